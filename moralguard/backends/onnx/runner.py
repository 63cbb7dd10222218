"""One graph on onnxruntime: loaded (edited first where the head's input isn't an output), run by io-binding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moralguard.backends.onnx import surgery
from moralguard.backends.onnx.cache import Device
from moralguard.backends.onnx.graph import Ports
from moralguard.backends.onnx.head_place import HeadPlace, find_heads
from moralguard.backends.onnx.weights import INSTALL
from moralguard.errors import ModelError

_FOLDER = "session.model_external_initializers_file_folder_path"  # where a graph given as bytes has its weights


@dataclass(frozen=True)
class Settings:
    """How onnxruntime runs a graph: providers, best first, and threads of one call (None: all cores)."""

    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    threads: int | None = None

    @property
    def device(self) -> Device:
        on_gpu = self.providers[0] in ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
        return Device("cuda") if on_gpu else Device()


class Runner:
    """A decoder's graph, ready to run; safe to share between threads.

    Attributes:
        path: the user's file. ports: its inputs and outputs. places: its heads (empty where none was found).
        hidden, before: outputs with the states and with the head's raw output; None where the graph gives none.
    """

    def __init__(self, path: Path, model: Any, ports: Ports, settings: Settings, basis: np.ndarray | None = None):
        """Load the graph.

        Args:
            model: what ``read_graph`` gave for ``path``; edited in place.
            basis: U f32[d, r] of a projection to insert, or None.

        Raises:
            ModelError: onnxruntime isn't installed, lacks a provider or can't load the graph; the head isn't found where a projection
                needs it.
        """
        self.path, self.ports, self.settings, self.device = path, ports, settings, settings.device
        self.places = find_heads(model, ports.logits, path.parent)
        self.hidden = surgery.find_output(model, self.places[0]) if self.places else None
        self.before: str | None = None
        edited = self._edit(model, basis)
        self.session = _load(path, edited, settings)

    def _edit(self, model: Any, basis: np.ndarray | None) -> bytes | None:
        if basis is not None and not self.places:
            raise ModelError(f"the head of {self.path} can't be found, so a projection can't be put in front of it. {HEAD_HINT}")
        if not self.places:
            return None
        hidden, before = self.hidden is None, self.places[0].softcap is not None
        if not (hidden or before or basis is not None):
            return None
        key = surgery.graph_key(self.path, repr((hidden, before)).encode(), b"" if basis is None else basis.tobytes())
        kept = surgery.cache_folder() / f"{key}.onnx"
        if hidden:
            self.hidden = surgery.HIDDEN
        if before:
            self.before = surgery.BEFORE
        if kept.is_file():
            return kept.read_bytes()
        surgery.expose(model, self.places, hidden=hidden, before=before)
        if basis is not None:
            surgery.insert_projection(model, self.places, basis, element_kind(self.places[0]))
        content: bytes = model.SerializeToString()
        surgery.keep(key, content)
        return content

    def run(
        self, feeds: dict[str, Any], bound: dict[str, Any], wanted: Sequence[str], kept: Sequence[str]
    ) -> tuple[list[np.ndarray], list[Any]]:
        """One pass.

        Args:
            feeds: inputs by name, arrays or ``OrtValue``s.
            bound: outputs by name that are written in place, ``OrtValue``s.
            wanted: outputs to return as arrays.
            kept: outputs to return as ``OrtValue``s on the device.

        Raises:
            ModelError: onnxruntime fails in it.
        """
        binding = self.session.io_binding()
        # bound values must outlive the run, whether or not this onnxruntime holds on to them
        values = {name: self.device.put(value) if isinstance(value, np.ndarray) else value for name, value in feeds.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in bound.items():
            binding.bind_ortvalue_output(name, value)
        for name in wanted:
            binding.bind_output(name, "cpu")
        for name in kept:
            binding.bind_output(name, self.device.kind, self.device.index)
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's errors have no base class of their own
            raise ModelError(f"onnxruntime fails in {self.path}: {str(error).strip()[:400]}") from error
        outputs = binding.get_outputs()[len(bound) :]
        host = Device()
        return [host.get(value) for value in outputs[: len(wanted)]], list(outputs[len(wanted) :])


HEAD_HINT = (
    "Expected logits = MatMul, Gemm or MatMulNBits of the last hidden state with a constant weight, then at most a bias, a scale and a "
    "soft cap; export the model again with `moralguard export MODEL OUT`"
)


def _load(path: Path, edited: bytes | None, settings: Settings) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError(INSTALL.format(error)) from error
    offered = onnxruntime.get_available_providers()
    for provider in settings.providers:
        if provider not in offered:
            raise ModelError(f"this onnxruntime has no {provider}, only {', '.join(offered)}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Threads that spin after a run take the cores from what runs next: NumPy, and the sessions of other passes. Three models in turns
    # took 2.2 times as long with it, and one alone no less.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    if edited is not None:
        options.add_session_config_entry(_FOLDER, str(path.parent.resolve()))
    try:
        session = onnxruntime.InferenceSession(edited or str(path), options, providers=list(settings.providers))
    except Exception as error:  # onnxruntime's errors have no base class of their own
        raise ModelError(_explain(path, str(error))) from error
    if settings.providers[0] not in session.get_providers():  # onnxruntime only logs it where a provider's libraries don't load
        raise ModelError(f"onnxruntime couldn't start {settings.providers[0]} for {path}; are the libraries that it needs installed?")
    return session


def _explain(path: Path, error: str) -> str:
    import onnxruntime

    told = error.strip().splitlines()[0][:300] if error.strip() else "no message"
    if "opset" in error.lower() or "ir version" in error.lower():
        return (
            f"{path} is in a version of ONNX that onnxruntime {onnxruntime.__version__} doesn't run ({told}); export it with another one, "
            "for example `moralguard export MODEL OUT --opset 20`, or update onnxruntime"
        )
    return f"onnxruntime {onnxruntime.__version__} can't load {path}: {told}"


def element_kind(place: HeadPlace) -> int:
    """ONNX element type of the head's input: that of its weight, or of its scales where it is packed."""
    tensor = place.scope.weight(place.node.input[2 if place.node.op_type == "MatMulNBits" else 1])
    return int(tensor.data_type) if tensor is not None and tensor.data_type in (1, 10) else 1
