"""The English network as ONNX graphs, for onnxruntime: written by ``export_network``, run by ``OnnxNetwork``.

The folder holds ``values.onnx``, ``cached.onnx`` and ``cross.onnx``, the weights that they share in ``weights.bin``, and
``network.json``. Everything is float32; batch, length and the number of values may be of any size.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from moralguard.discriminator.encoder import EncoderConfig
from moralguard.discriminator.network import Network
from moralguard.errors import ModelError

FORMAT = 1
OPSET = 18
GRAPHS = ("values", "cached", "cross")

_WEIGHTS = "weights.bin"
_SETTINGS = "network.json"
_SMALLEST_SHARED = 1024  # bytes; what is smaller stays in its graph
_PAGE = 4096  # onnxruntime maps weights into memory only where they start at a page
_MISSING = 'ONNX networks need a package that isn\'t installed ({}); pip install "moralguard[onnx]"'

Arrays = TypeVar("Arrays", np.ndarray, Tensor)


class _Values(nn.Module):
    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """First states and sentence vectors [B, d] of values [B, T]."""
        encoded = self.network.encode(ids, mask, 0)
        assert encoded.states is not None
        return encoded.states[:, 0], encoded.sentence


class _Cached(nn.Module):
    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor, mask: Tensor, value_vectors: Tensor, value_sentences: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, N] of texts [B, T] against values [N, d]."""
        # expanded here: the network takes len() of a tensor to do it, which would fix the batch size in the graph
        vectors, sentences = (t[None].expand(ids.shape[0], -1, -1) for t in (value_vectors, value_sentences))
        return self.network.cached_logits(self.network.encode(ids, mask, 1), vectors, sentences)


class _Cross(nn.Module):
    def __init__(self, network: Network):
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor, mask: Tensor, value_ids: Tensor, value_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B] of pairs: text [B, T] with value [B, S]."""
        texts = self.network.encode(ids, mask, 1, alone=False)
        return self.network.cross_logits(texts, self.network.encode(value_ids, value_mask, 0, alone=False))


def _ids(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.ones(batch, length, dtype=torch.int64), torch.ones(batch, length, dtype=torch.bool)


def _move_weights(model: Any, weights: BinaryIO, places: dict[bytes, tuple[int, int]]) -> None:
    """Move a graph's large tensors to the end of ``weights``; what another graph already put there is only pointed at."""
    from onnx import TensorProto
    from onnx.external_data_helper import set_external_data

    for tensor in model.graph.initializer:
        if not tensor.HasField("raw_data") or len(tensor.raw_data) < _SMALLEST_SHARED:
            continue
        key = hashlib.sha256(tensor.raw_data).digest()
        if key not in places:
            weights.write(b"\0" * (-weights.tell() % _PAGE))
            places[key] = weights.tell(), len(tensor.raw_data)
            weights.write(tensor.raw_data)
        offset, length = places[key]
        set_external_data(tensor, _WEIGHTS, offset, length)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL


def export_network(network: Network, folder: Path, fingerprint: str = "") -> None:
    """Write ``network`` for ``OnnxNetwork``, in float32; the network itself is left as it is.

    Raises:
        ModelError: the packages of the ``onnx`` extra aren't installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ModelError(_MISSING.format(error)) from error

    network = copy.deepcopy(network).cpu().float().eval().requires_grad_(False)
    size = network.config.hidden_size
    batch, length, value_length, count = (torch.export.Dim(name) for name in ("batch", "length", "value_length", "count"))
    row, value_row, vector = {0: batch, 1: length}, {0: batch, 1: value_length}, {0: count}
    # the examples' sizes differ and none is 1, so that none is taken for a constant
    text = _ids(2, 7)
    vectors = torch.zeros(3, size), torch.zeros(3, size)
    logits = ["relevance", "broken"]
    plans: dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, Any], list[str]]] = {
        "values": (_Values(network), text, {"ids": row, "mask": row}, ["vectors", "sentences"]),
        "cached": (
            _Cached(network),
            (*text, *vectors),
            {"ids": row, "mask": row, "value_vectors": vector, "value_sentences": vector},
            logits,
        ),
        "cross": (
            _Cross(network),
            (*text, *_ids(2, 5)),
            {"ids": row, "mask": row, "value_ids": value_row, "value_mask": value_row},
            logits,
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[bytes, tuple[int, int]] = {}
    with (folder / _WEIGHTS).open("wb") as weights, torch.no_grad():
        for name in GRAPHS:
            module, examples, shapes, outputs = plans[name]
            program = torch.onnx.export(
                module.eval(),
                examples,
                input_names=list(shapes),
                output_names=outputs,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            model = program.model_proto
            for node in model.graph.node:  # stack traces, with paths of the machine that exported
                node.ClearField("metadata_props")
                node.ClearField("doc_string")
            _move_weights(model, weights, places)
            (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    settings = {"format": FORMAT, "opset": OPSET, "fingerprint": fingerprint, "config": network.config.model_dump()}
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _array(given: np.ndarray | Tensor, dtype: type[np.generic]) -> np.ndarray:
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.is_floating_point() else given).numpy()  # NumPy has no bfloat16
    return np.ascontiguousarray(given, dtype=dtype)


def _like(found: np.ndarray, example: Arrays) -> Arrays:
    """``found`` as a tensor on the example's device where that is a tensor."""
    if isinstance(example, Tensor):
        return torch.from_numpy(found).to(example.device)
    return found


class OnnxNetwork:
    """A folder of ``export_network``, loaded; safe to share between threads.

    Methods take NumPy arrays or tensors and return float32 of the same kind. Ids are int64 and masks bool, both [B, T], each row
    with at least one token.

    Attributes:
        config: sizes of the network that was exported. fingerprint: of its weights, "" where none was given.
    """

    def __init__(self, folder: Path, providers: Sequence[str] = ("CPUExecutionProvider",), threads: int | None = None):
        """Load ``folder``; ``providers`` are onnxruntime's, best first, ``threads`` the threads of one call (default: all cores).

        Raises:
            ModelError: onnxruntime isn't installed or lacks a provider, or a file is missing or broken.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise ModelError(_MISSING.format(error)) from error

        self.config, self.fingerprint = self._settings(folder)
        offered = onnxruntime.get_available_providers()
        for provider in providers:
            if provider not in offered:
                raise ModelError(f"this onnxruntime has no {provider}, only {', '.join(offered)}")
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        self._sessions = {}
        for name in GRAPHS:
            path = folder / f"{name}.onnx"
            try:
                session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
            except Exception as error:  # onnxruntime's errors have no base class of their own
                raise ModelError(f"onnxruntime can't load {path} with its {_WEIGHTS} ({str(error)[:300]}); export it again") from error
            if providers[0] not in session.get_providers():  # onnxruntime only logs it where a provider's libraries don't load
                raise ModelError(f"onnxruntime couldn't start {providers[0]} for {path}; are the libraries that it needs installed?")
            self._sessions[name] = session

    @staticmethod
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

    def _run(self, graph: str, ids: Arrays, inputs: dict[str, np.ndarray]) -> tuple[Arrays, Arrays]:
        first, second = self._sessions[graph].run(None, inputs)
        return _like(first, ids), _like(second, ids)

    def value_vectors(self, ids: Arrays, mask: Arrays) -> tuple[Arrays, Arrays]:
        """First states and sentence vectors, [N, d], of values [N, T]."""
        return self._run("values", ids, {"ids": _array(ids, np.int64), "mask": _array(mask, np.bool_)})

    def cached_logits(self, ids: Arrays, mask: Arrays, value_vectors: Arrays, value_sentences: Arrays) -> tuple[Arrays, Arrays]:
        """Relevance and broken logits [B, N] of texts [B, T] against values, given as ``value_vectors`` returned them."""
        inputs = {
            "ids": _array(ids, np.int64),
            "mask": _array(mask, np.bool_),
            "value_vectors": _array(value_vectors, np.float32),
            "value_sentences": _array(value_sentences, np.float32),
        }
        return self._run("cached", ids, inputs)

    def cross_logits(self, ids: Arrays, mask: Arrays, value_ids: Arrays, value_mask: Arrays) -> tuple[Arrays, Arrays]:
        """Relevance and broken logits [B] of pairs: text [B, T] with value [B, S]."""
        inputs = {
            "ids": _array(ids, np.int64),
            "mask": _array(mask, np.bool_),
            "value_ids": _array(value_ids, np.int64),
            "value_mask": _array(value_mask, np.bool_),
        }
        return self._run("cross", ids, inputs)
