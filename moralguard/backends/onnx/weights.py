"""Reading an ONNX file without its weights, and its weights without copying them.

A graph may hold its weights inside (protobuf) or beside it (external data). ``read_graph`` gives both in one form: large tensors
that lie inside the file become references to their place in it, so that a graph of any size is read, edited and hashed in a moment
and no weight is copied to disk. Format: onnx.proto of ONNX 1.20 (ModelProto.graph = 7, GraphProto.initializer = 5,
TensorProto.raw_data = 9).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moralguard.errors import ModelError

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_LARGE = 4096  # bytes of a tensor that is referred to rather than read
_BYTES = 2  # protobuf's wire type of length-delimited fields

INSTALL = 'ONNX models need a package that isn\'t installed ({}); pip install "moralguard[onnx]" (or "moralguard[onnx-gpu]")'


class _TruncatedError(Exception):
    """A field ends behind the end of the file."""


def _varint(data: Any, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _TruncatedError


def _fields(data: Any, at: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Fields of a protobuf message: (number, wire type, where the field starts, where its value starts, where it ends)."""
    while at < end:
        start = at
        key, at = _varint(data, at, end)
        number, wire = key >> 3, key & 7
        value = at
        if wire == 0:
            _, at = _varint(data, at, end)
        elif wire == _BYTES:
            length, value = _varint(data, at, end)
            at = value + length
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise _TruncatedError
        if at > end:
            raise _TruncatedError
        yield number, wire, start, value, at


def _key(number: int, length: int) -> bytes:
    out = bytearray()
    for value in (number << 3 | _BYTES, length):
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
    return bytes(out)


def _referred(data: Any, start: int, end: int, name: str) -> bytes | None:
    """A tensor's message with its raw data replaced by a reference to the file ``name``; None where it holds none that is large."""
    from onnx import TensorProto
    from onnx.external_data_helper import set_external_data

    kept, place = bytearray(), None
    for number, _, field_start, value, field_end in _fields(data, start, end):
        if number == _RAW_DATA and field_end - value >= _LARGE:
            place = (value, field_end - value)
        else:
            kept += data[field_start:field_end]
    if place is None:
        return None
    tensor = TensorProto()
    tensor.ParseFromString(bytes(kept))
    tensor.raw_data = b""  # the helper wants the field, and the reference takes its place
    set_external_data(tensor, name, *place)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    return tensor.SerializeToString()


def _without_weights(data: Any, name: str) -> bytes:
    model = bytearray()
    for number, wire, start, value, end in _fields(data, 0, len(data)):
        if number != _GRAPH or wire != _BYTES:
            model += data[start:end]
            continue
        graph = bytearray()
        for inner, inner_wire, inner_start, inner_value, inner_end in _fields(data, value, end):
            tensor = _referred(data, inner_value, inner_end, name) if inner == _INITIALIZER and inner_wire == _BYTES else None
            graph += data[inner_start:inner_end] if tensor is None else _key(_INITIALIZER, len(tensor)) + tensor
        model += _key(_GRAPH, len(graph)) + graph
    return bytes(model)


def read_graph(path: Path) -> Any:
    """The ``onnx.ModelProto`` of a file; every large initialiser is a reference (external data), relative to the file's folder.

    Raises:
        ModelError: onnx isn't installed, the file is cut short or isn't ONNX, or a file of weights is missing or cut short.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise ModelError(INSTALL.format(error)) from error
    broken = f"{path} can't be read as an ONNX model: it is cut short or damaged ({{}}). Copy or export it again"
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise ModelError(broken.format("it is empty"))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                model = onnx.ModelProto()
                model.ParseFromString(_without_weights(data, path.name))
    except (_TruncatedError, DecodeError) as error:
        raise ModelError(broken.format(str(error) or "a field ends behind the end of the file")) from error
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error}") from error
    if not model.graph.node or not model.opset_import:
        raise ModelError(broken.format("it holds no graph"))
    _check_external(model, path)
    return model


def _check_external(model: Any, path: Path) -> None:
    for tensor in initializers(model.graph):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        location, offset, length = _place(tensor)
        weights = path.parent / location
        if not weights.is_file():
            raise ModelError(f"{path} keeps its weights in {location!r}, which isn't in its folder; copy that file beside the graph")
        if offset + length > weights.stat().st_size:
            raise ModelError(
                f"{weights} is cut short: {tensor.name!r} of {path.name} ends at byte {offset + length}, but the file has "
                f"{weights.stat().st_size}. Copy or export both again"
            )


def initializers(graph: Any) -> Iterator[Any]:
    """All initialisers of a graph and of the graphs in its nodes' branches."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from initializers(attribute.g)


def _place(tensor: Any) -> tuple[str, int, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return entries.get("location", ""), int(entries.get("offset", 0)), int(entries.get("length", 0))


def read_tensor(tensor: Any, folder: Path) -> np.ndarray:
    """An initialiser as an array; a read-only view of the file where it lies in one. Packed 4-bit types aren't read."""
    from onnx import helper, numpy_helper

    if tensor.data_location != tensor.EXTERNAL:
        return numpy_helper.to_array(tensor)
    location, offset, _ = _place(tensor)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if 0 in tensor.dims:
        return np.zeros(tuple(tensor.dims), dtype)
    return np.memmap(folder / location, dtype, "r", offset, tuple(tensor.dims))
