"""Loading an ONNX causal LM from a folder or a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moralguard.backends.onnx.description import describe, read_json
from moralguard.backends.onnx.graph import EXPORT_HINT, inspect
from moralguard.backends.onnx.model import OnnxLanguageModel
from moralguard.backends.onnx.runner import Runner, Settings
from moralguard.backends.onnx.tokenizer import load_tokenizer
from moralguard.backends.onnx.weights import read_graph
from moralguard.errors import ModelError

_PREFERRED = ("decoder_model_merged.onnx", "model.onnx")
_TORCH = ("*.safetensors", "pytorch_model*.bin", "*.gguf")


def is_onnx_source(source: Any) -> bool:
    """Whether this names an ONNX model: a .onnx file, or a folder with one and no weights of another kind."""
    if not isinstance(source, (str, Path)):
        return False
    path = Path(source)
    if path.suffix.lower() == ".onnx":
        return True
    return path.is_dir() and bool(_graphs(path)) and not any(any(path.glob(pattern)) for pattern in _TORCH)


def load_onnx(
    source: str | Path, *, providers: Sequence[str] | None = None, threads: int | None = None, tokenizer: Any = None
) -> OnnxLanguageModel:
    """A causal LM on onnxruntime, ready to be guarded.

    Args:
        source: a .onnx file, or a folder: as ``moralguard export``, optimum, ``transformers.exporters`` or onnxruntime-genai's builder
            writes it.
        providers: onnxruntime's, best first; by default CUDA where this onnxruntime has it, else the CPU.
        threads: of one call; all cores by default.
        tokenizer: instead of the tokenizer.json beside the graph.

    Raises:
        ModelError: onnxruntime isn't installed; there is no graph; it is damaged, an encoder, has no cache, lacks its external data, or is
            of an opset that this onnxruntime doesn't run.
    """
    path = Path(source)
    if not path.exists():
        raise ModelError(f"{str(source)!r} isn't there; expected a .onnx file or a folder with one")
    settings = Settings(_providers(providers), threads)
    graphs = [path] if path.is_file() else _candidates(path)
    return _assemble(graphs, str(source), settings, tokenizer, None)


def _providers(given: Sequence[str] | None) -> tuple[str, ...]:
    if given:
        return tuple(given)
    try:
        import onnxruntime
    except ImportError:  # said in full where the graph is loaded
        return ("CPUExecutionProvider",)
    both = ("CUDAExecutionProvider", "CPUExecutionProvider")
    return both if both[0] in onnxruntime.get_available_providers() else both[1:]


def _graphs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.onnx")) or sorted((folder / "onnx").glob("*.onnx"))


def _candidates(folder: Path) -> list[Path]:
    """The graphs of a folder that make up the model: one, or one that starts a text and one that goes on."""
    found = _graphs(folder)
    if not found:
        raise ModelError(f"{folder} holds no .onnx file; expected an exported causal LM. {EXPORT_HINT}")
    named = read_json(found[0], "genai_config.json").get("model", {}).get("decoder", {}).get("filename")
    for name in (named, *_PREFERRED):
        chosen = [path for path in found if path.name == name]
        if chosen:
            return chosen
    return found


def _assemble(graphs: Sequence[Path], name: str, settings: Settings, tokenizer: Any, basis: np.ndarray | None) -> OnnxLanguageModel:
    description = describe(graphs[0], name)
    models = {path: read_graph(path) for path in graphs}
    ports = {path: inspect(model, str(path), description.heads, description.size) for path, model in models.items()}
    onward = [path for path in graphs if ports[path].slots[0].past is not None]
    starts = [path for path in graphs if path not in onward]
    if len(onward) != 1 or len(starts) > 1:
        listed = ", ".join(path.name for path in graphs)
        told = "none that reads" if not onward else "more than one that read"
        raise ModelError(
            f"{name} holds {listed}: {told} past keys and values. Expected one graph with a KV cache as input (and at most one without, "
            f"for the prompt); name the file, or {EXPORT_HINT}"
        )
    if starts and ports[starts[0]].grouped != ports[onward[0]].grouped:
        raise ModelError(
            f"{starts[0].name} and {onward[0].name} keep their caches in different forms (GroupQueryAttention in one of them only); export "
            "both without fusions (transformers.exporters: OnnxConfig without ort_fusions)"
        )
    first = Runner(starts[0], models[starts[0]], ports[starts[0]], settings, basis) if starts else None
    runner = Runner(onward[0], models[onward[0]], ports[onward[0]], settings, basis)
    if tokenizer is None:
        tokenizer = load_tokenizer(onward[0])

    def project(columns: np.ndarray) -> OnnxLanguageModel:
        return _assemble(graphs, name, settings, tokenizer, columns)

    lm = OnnxLanguageModel(runner, description, tokenizer, first=first, project=project, projected=basis is not None)
    _try(lm)
    return lm


def _try(lm: OnnxLanguageModel) -> None:
    """Run a few tokens, so that a graph that doesn't run as it was read is told of now.

    Raises:
        ModelError: onnxruntime fails, the outputs have other shapes than a decoder's, or padding changes a row's logits.
    """
    cache, tokens = lm.new_cache(), np.arange(3)[None] % lm.vocab_size
    for length in (1, 2):
        logits = lm.forward(cache=cache, input_ids=tokens[:, length - 1 : length]).logits
        columns = cache.key_values()[0][0].shape[2]
        if logits.shape != (1, lm.vocab_size) or columns != length:
            raise ModelError(
                f"{lm.path} gave logits {list(logits.shape)} and keys of {columns} positions after {length} tokens; expected "
                f"[1, {lm.vocab_size}] and {length}. {EXPORT_HINT}"
            )
    if lm.takes_padding:
        padded, mask = np.stack([tokens[0], [*tokens[0, 2:], *tokens[0, :2]]]), np.asarray([[1, 1, 1], [0, 1, 1]])
        again = lm.forward(cache=lm.new_cache(), input_ids=padded, attention_mask=mask).logits[1]
        # far apart where padding is read; dynamic quantisation alone may move logits by some percent
        if not np.abs(again - logits[0]).max() <= 0.1 * (1 + np.abs(logits).max()):
            change = np.abs(again - logits[0]).max()
            raise ModelError(
                f"{lm.path} doesn't leave out padding: a row's logits change by {change:.3g} with a padding token in front of it, so "
                f"rows of different lengths can't share a pass. {EXPORT_HINT}"
            )
