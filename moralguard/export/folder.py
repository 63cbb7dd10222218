"""Export a model into a folder that onnxruntime, moralguard and a tokenizer can be loaded from."""

from __future__ import annotations

import copy
import importlib.util
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moralguard import __version__
from moralguard.backends.hf import LanguageModel
from moralguard.errors import ModelError
from moralguard.export.comparison import Difference, check, compare
from moralguard.export.decoder import FlatDecoder, GraphNames, LogitsKept, check_exportable, quiet, reason, trace
from moralguard.export.merged import find_adapter, merge_adapter

GRAPH = "model.onnx"
CARD = "moralguard.json"
FORMAT = 1
OPSETS = range(18, 24)
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Export:
    """An exported model.

    Attributes:
        folder: where it lies.
        difference: how far it is from PyTorch.
        tokenizer: whether tokenizer.json, which is read without transformers, lies there.
    """

    folder: Path
    difference: Difference
    tokenizer: bool


def export_model(
    lm: LanguageModel,
    out: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str = "float32",
    opset: int = 20,
    logits: LogitsKept = "last",
    report: Callable[[str], None] = lambda _step: None,
) -> Export:
    """Write ``lm`` as an ONNX decoder with cache and last hidden state, checked against PyTorch; ``lm`` stays as it is.

    Args:
        lm: a causal LM on the CPU.
        out: a folder that doesn't exist yet, or is empty. It appears whole or not at all.
        adapter: a LoRA to merge: ``pack:NAME``, a pack's or a PEFT folder.
        dtype: of weights, cache and logits: "float32" or "float16".
        opset: of the ai.onnx operators.
        logits: "last" position, or "all" as transformers' assisted generation and scoring read them.
        report: called with what is being done.

    Raises:
        ModelError: the model can't be exported, or the graph's logits aren't the model's; nothing is written.
    """
    place = Path(out)
    _check_arguments(lm, place, dtype, opset, logits)
    check_exportable(lm.model, lm.name)
    fingerprint = lm.fingerprint
    model, merged = lm.model, None
    if adapter is not None:
        report("merging the adapter")
        model = merge_adapter(lm, find_adapter(adapter, lm))
        merged = {"name": _plain_name(str(adapter)), "base_fingerprint": fingerprint}
        fingerprint = LanguageModel(model, lm.tokenizer, lm.name).fingerprint
    kind = DTYPES[dtype]
    if model.dtype != kind:
        model = (copy.deepcopy(model) if model is lm.model else model).to(kind)
    decoder = FlatDecoder(model, logits).eval()
    report("tracing")
    program, layers = trace(decoder, lm.name)
    names = decoder.names(layers)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".export-") as work:
        folder = Path(work) / "model"
        folder.mkdir()
        report("writing the graph")
        _write_graph(program, names, folder / GRAPH, opset, lm.name)
        report("comparing it with PyTorch")
        difference = compare(folder / GRAPH, decoder, names)
        check(difference, kind, lm.name)
        _write_texts(folder, model, lm, kind)
        card = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "tokenizer_hash": lm.tokenizer_hash,
            "source": _plain_name(lm.name),
            "adapter": merged,
            "dtype": dtype,
            "opset": opset,
            "logits": "last" if decoder.keeps_last else "all",
            "difference": asdict(difference),
            "program": {"moralguard": __version__, **{package: version(package) for package in ("torch", "transformers", "onnxscript")}},
        }
        (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        if place.exists():
            place.rmdir()  # empty, or it would have been refused
        folder.rename(place)
    return Export(place, difference, (place / "tokenizer.json").is_file())


def _check_arguments(lm: LanguageModel, place: Path, dtype: str, opset: int, logits: str) -> None:
    missing = [package for package in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(package) is None]
    if missing:
        raise ModelError(f'exporting needs {", ".join(missing)}: pip install "moralguard[onnx]"')
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} can't be exported; expected one of {', '.join(DTYPES)}")
    if opset not in OPSETS:
        raise ModelError(f"opset {opset} can't be exported; expected one from {OPSETS[0]} to {OPSETS[-1]}")
    if logits not in ("last", "all"):
        raise ModelError(f"logits {logits!r} isn't a choice; expected last or all")
    if lm.device.type != "cpu":
        raise ModelError(f"{lm.name} is on {lm.device}; load it with device='cpu' to export it")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ModelError(f"{place} is there already; name a folder that doesn't exist yet, or remove it")


def _write_graph(program: Any, names: GraphNames, path: Path, opset: int, name: str) -> None:
    """The program in ONNX's operators; weights beside it, in one file."""
    try:
        with quiet():
            graph = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                optimize=True,
                verbose=False,
                input_names=list(names.inputs),
                output_names=list(names.outputs),
            )
            assert graph is not None
            graph.save(str(path), external_data=True)
    except Exception as error:  # the exporter and onnxscript raise many types of their own
        raise ModelError(f"{name} can't be exported: PyTorch's ONNX exporter failed on its graph: {reason(error)}") from error


def _write_texts(folder: Path, model: Any, lm: LanguageModel, dtype: torch.dtype) -> None:
    config = copy.deepcopy(model.config)
    config.dtype, config._name_or_path = dtype, _plain_name(lm.name)
    config.save_pretrained(folder)
    # as it is: save_pretrained refuses settings that transformers itself generates with
    (folder / "generation_config.json").write_text(model.generation_config.to_json_string(), encoding="utf-8")
    if lm.tokenizer is not None:
        lm.tokenizer.save_pretrained(folder)


def _plain_name(name: str) -> str:
    """A local path says where something was fitted or kept, which is nobody's business."""
    return Path(name).name if Path(name).is_absolute() else name
