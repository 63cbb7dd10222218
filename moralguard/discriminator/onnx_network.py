"""The English network on onnxruntime: from stored weights in memory, or from a folder that ``export_network`` wrote.

The folder holds ``lower.onnx``, ``values.onnx``, ``cached.onnx`` and ``cross.onnx`` (``onnx_graph.build_graphs``), the weights that
they share in ``weights.bin``, and ``network.json``. Everything is float32; batch, length and the number of values may be of any
size. Nothing here needs torch.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from moralguard.discriminator.encoder_config import EncoderConfig
from moralguard.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from moralguard.discriminator.network import Network

FORMAT = 2
GRAPHS = ("lower", "values", "cached", "cross")

_WEIGHTS = "weights.bin"
_SETTINGS = "network.json"
_MISSING = 'the discriminator on onnxruntime needs a package that isn\'t installed ({}); pip install "moralguard[onnx]"'

Arrays = TypeVar("Arrays", np.ndarray, "Tensor")


def export_network(network: Network, folder: Path, fingerprint: str = "") -> None:
    """Write ``network`` for ``OnnxNetwork``, in float32; the network itself is left as it is.

    Raises:
        ModelError: the packages of the ``onnx`` extra aren't installed.
    """
    write_network(network.config, {name: _numpy(tensor) for name, tensor in network.state_dict().items()}, folder, fingerprint)


def write_network(config: EncoderConfig, arrays: Mapping[str, np.ndarray], folder: Path, fingerprint: str = "") -> None:
    """``export_network`` of weights float32, by the names of ``Network``.

    Raises:
        ModelError: the packages of the ``onnx`` extra aren't installed.
    """
    onnx_graph = _onnx_graph()
    weights = onnx_graph.graph_weights(arrays)
    places = onnx_graph.lay_out(weights)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _WEIGHTS).open("wb") as file:
        for name, place in places.items():
            file.write(b"\0" * (place.offset - file.tell()))
            file.write(weights[name].data)
    for name, model in onnx_graph.build_graphs(config, places, _WEIGHTS).items():
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    settings = {"format": FORMAT, "opset": onnx_graph.OPSET, "fingerprint": fingerprint, "config": config.model_dump()}
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class OnnxEncoded:
    """Texts or values behind the encoder, in NumPy; ``network.Encoded`` in torch.

    Attributes:
        mask: bool [B, T], True at tokens.
        lower: states behind the shared layers, float32 [B, T, d].
        sentences: frozen sentence vectors, float32 [B, d], length 1.
    """

    mask: np.ndarray
    lower: np.ndarray
    sentences: np.ndarray


class OnnxNetwork:
    """The network's graphs, loaded; safe to share between threads.

    Ids are int64 and masks bool, both [B, T], each row with at least one token; what comes back is float32. ``value_vectors``,
    ``cached_logits`` and ``cross_logits`` take NumPy arrays or tensors and return the same kind.

    Attributes:
        config: sizes of the network. fingerprint: of its weights, "" where none was given.
    """

    def __init__(self, folder: Path, providers: Sequence[str] = ("CPUExecutionProvider",), threads: int | None = None):
        """Load ``folder``; ``providers`` are onnxruntime's, best first, ``threads`` the threads of one call (default: all cores).

        Raises:
            ModelError: onnxruntime isn't installed or lacks a provider, or a file is missing or broken.
        """
        runtime = _runtime(providers)
        config, fingerprint = _settings(folder)

        def session(name: str) -> Any:
            path = folder / f"{name}.onnx"
            try:
                return runtime.InferenceSession(str(path), _options(runtime, threads), providers=list(providers))
            except Exception as error:  # onnxruntime's errors have no base class of their own
                raise ModelError(f"onnxruntime can't load {path} with its {_WEIGHTS} ({str(error)[:300]}); export it again") from error

        self._set(config, fingerprint, providers, session, str(folder))
        for name in GRAPHS:  # a broken file shows now, not at the first text
            self._session(name)

    @classmethod
    def from_arrays(
        cls,
        config: EncoderConfig,
        arrays: Mapping[str, np.ndarray],
        fingerprint: str = "",
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int | None = None,
    ) -> OnnxNetwork:
        """The network of weights float32, by the names of ``Network``; graphs are built here, and loaded when they are first used.

        Raises:
            ModelError: onnxruntime or onnx isn't installed, onnxruntime lacks a provider, or an array is missing.
        """
        runtime, onnx_graph = _runtime(providers), _onnx_graph()
        weights = onnx_graph.graph_weights(arrays)
        try:
            graphs = onnx_graph.build_graphs(config, onnx_graph.lay_out(weights), _WEIGHTS)
        except KeyError as error:
            raise ModelError(f"the discriminator's network has no array {error}; fit it again or reinstall moralguard") from error
        values = {name: runtime.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()}

        def session(name: str) -> Any:
            # the weights are handed over in memory; they must outlive the session, so ``values`` stays in this closure
            used = [tensor.name for tensor in graphs[name].graph.initializer if tensor.external_data]
            options = _options(runtime, threads)
            options.add_external_initializers(used, [values[key] for key in used])
            try:
                return runtime.InferenceSession(graphs[name].SerializeToString(), options, providers=list(providers))
            except Exception as error:  # onnxruntime's errors have no base class of their own
                raise ModelError(f"onnxruntime can't run the discriminator's graph {name!r} ({str(error)[:300]})") from error

        network = cls.__new__(cls)
        network._set(config, fingerprint, providers, session, "the discriminator")
        return network

    def _set(self, config: EncoderConfig, fingerprint: str, providers: Sequence[str], load: Callable[[str], Any], source: str) -> None:
        self.config, self.fingerprint = config, fingerprint
        self._first_provider, self._load, self._source = providers[0], load, source
        self._sessions: dict[str, Any] = {}
        self._lock = threading.Lock()

    def _session(self, name: str) -> Any:
        with self._lock:
            if name not in self._sessions:
                session = self._load(name)
                if self._first_provider not in session.get_providers():  # onnxruntime only logs it where a provider's libraries don't load
                    raise ModelError(
                        f"onnxruntime couldn't start {self._first_provider} for {self._source}; are the libraries that it needs installed?"
                    )
                self._sessions[name] = session
            return self._sessions[name]

    def _run(self, graph: str, **inputs: np.ndarray) -> list[np.ndarray]:
        return self._session(graph).run(None, inputs)

    def encode(self, ids: np.ndarray, mask: np.ndarray) -> OnnxEncoded:
        """Texts or values behind the layers that don't tell them apart, of NumPy arrays [B, T]."""
        lower, sentences = self._run("lower", ids=ids, mask=mask)
        return OnnxEncoded(mask, lower, sentences)

    def first_states(self, values: OnnxEncoded) -> np.ndarray:
        """First states [N, d] of values, read alone."""
        return self._run("values", lower=values.lower, mask=values.mask)[0]

    def cached(self, texts: OnnxEncoded, vectors: np.ndarray, sentences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Relevance and broken logits [B, N] of texts against values' first states and sentence vectors [N, d]."""
        values = {"value_vectors": vectors, "value_sentences": sentences}
        relevance, broken = self._run("cached", lower=texts.lower, mask=texts.mask, sentences=texts.sentences, **values)
        return relevance, broken

    def cross(self, texts: OnnxEncoded, values: OnnxEncoded) -> tuple[np.ndarray, np.ndarray]:
        """Relevance and broken logits [B] of pairs: text b with value b."""
        pair = {"value_lower": values.lower, "value_mask": values.mask, "value_sentences": values.sentences}
        relevance, broken = self._run("cross", lower=texts.lower, mask=texts.mask, sentences=texts.sentences, **pair)
        return relevance, broken

    def value_vectors(self, ids: Arrays, mask: Arrays) -> tuple[Arrays, Arrays]:
        """First states and sentence vectors, [N, d], of values [N, T]."""
        values = self._encode(ids, mask)
        return _like(self.first_states(values), ids), _like(values.sentences, ids)

    def cached_logits(self, ids: Arrays, mask: Arrays, value_vectors: Arrays, value_sentences: Arrays) -> tuple[Arrays, Arrays]:
        """Relevance and broken logits [B, N] of texts [B, T] against values, given as ``value_vectors`` returned them."""
        values = _array(value_vectors, np.float32), _array(value_sentences, np.float32)
        relevance, broken = self.cached(self._encode(ids, mask), *values)
        return _like(relevance, ids), _like(broken, ids)

    def cross_logits(self, ids: Arrays, mask: Arrays, value_ids: Arrays, value_mask: Arrays) -> tuple[Arrays, Arrays]:
        """Relevance and broken logits [B] of pairs: text [B, T] with value [B, S]."""
        relevance, broken = self.cross(self._encode(ids, mask), self._encode(value_ids, value_mask))
        return _like(relevance, ids), _like(broken, ids)

    def _encode(self, ids: Arrays, mask: Arrays) -> OnnxEncoded:
        return self.encode(_array(ids, np.int64), _array(mask, np.bool_))


def _runtime(providers: Sequence[str]) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError(_MISSING.format(error)) from error
    offered = onnxruntime.get_available_providers()
    for provider in providers:
        if provider not in offered:
            raise ModelError(f"this onnxruntime has no {provider}, only {', '.join(offered)}")
    return onnxruntime


def _onnx_graph() -> Any:
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ModelError(_MISSING.format(error)) from error
    from moralguard.discriminator import onnx_graph

    return onnx_graph


def _options(runtime: Any, threads: int | None) -> Any:
    options = runtime.SessionOptions()
    # threads that wait by spinning take the cores from the model that is being guarded: on two busy cores a text took 15 times as long
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _settings(folder: Path) -> tuple[EncoderConfig, str]:
    for name in (_SETTINGS, _WEIGHTS, *(f"{graph}.onnx" for graph in GRAPHS)):
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name} is missing; export the network again")
    path = folder / _SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        found = settings["format"]
        config = EncoderConfig.model_validate(settings["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} doesn't describe an exported network ({str(error)[:300]}); export it again") from error
    if found != FORMAT:
        raise ModelError(f"{path} has format {found!r}, and this moralguard reads format {FORMAT}; export it again")
    return config, str(settings.get("fingerprint", ""))


def _numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # NumPy has no bfloat16


def _array(given: np.ndarray | Tensor, dtype: type[np.generic]) -> np.ndarray:
    return np.ascontiguousarray(given if isinstance(given, np.ndarray) else _numpy(given), dtype=dtype)


def _like(found: np.ndarray, example: Arrays) -> Arrays:
    """``found`` as a tensor on the example's device where that is a tensor."""
    if isinstance(example, np.ndarray):
        return found
    import torch

    return torch.from_numpy(found).to(example.device)
