"""KV caches of ONNX decoders: grown by each pass, or written in place in a buffer that past and present share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from moralguard.backends.onnx.graph import CacheSlot

KeyValue = tuple[np.ndarray, np.ndarray]
"""Keys and values of one layer, each f[R, heads, W, head_dim]."""

_BLOCK = 128  # columns by which a shared buffer grows


class Device:
    """Where onnxruntime keeps tensors: arrays in, arrays out."""

    def __init__(self, kind: str = "cpu", index: int = 0):
        self.kind, self.index = kind, index

    def put(self, array: np.ndarray) -> Any:
        """The array as an ``OrtValue``; on the CPU both share their memory."""
        from onnxruntime import OrtValue

        return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.kind, self.index)

    def get(self, value: Any) -> np.ndarray:
        """An ``OrtValue`` as an array, not to be written to; without a copy on the CPU where this onnxruntime lets it be had."""
        lent = getattr(value, "_numpy_obj", None)  # what ``put`` shared: its memory lives as long as this array, not as the value
        if lent is not None:
            return np.asarray(lent)
        inner = getattr(value, "_ortvalue", None)
        if self.kind == "cpu" and inner is not None and hasattr(inner, "__dlpack__"):
            return np.from_dlpack(inner)
        return np.asarray(value.numpy())


class OnnxCache(ABC):
    """Keys and values of the tokens read so far, for one batch of rows.

    Attributes:
        length: W, columns read so far, padding on the left included.
        rows: R, 0 before the first pass.
    """

    def __init__(self, slots: Sequence[CacheSlot], device: Device):
        self.slots, self.device = tuple(slots), device
        self.length = self.rows = 0

    @abstractmethod
    def select_rows(self, rows: np.ndarray) -> None:
        """Keep and reorder rows i64[n] in place; an index may repeat (a fork)."""

    @abstractmethod
    def twin(self) -> Any:
        """The same rows again; what changes in one of the two doesn't change in the other."""

    @abstractmethod
    def join(self, other: Any) -> None:
        """Rows of another cache of the same graph behind one's own; the narrower of the two gets padding in front."""

    @abstractmethod
    def drop_newest(self, tokens: int) -> None:
        """Forget the newest tokens of every row."""

    @abstractmethod
    def drop_oldest(self, columns: int) -> None:
        """Forget the oldest columns, which must be padding in every row."""

    @abstractmethod
    def key_values(self) -> list[KeyValue]:
        """Keys and values of every layer, f[R, heads, W, head_dim] each; not to be written to."""


class GrowingCache(OnnxCache):
    """The graph returns past and new columns together, in tensors of its own."""

    def __init__(self, slots: Sequence[CacheSlot], device: Device):
        super().__init__(slots, device)
        self._values: list[Any] = []

    def bind(self, rows: int) -> list[Any]:
        """``OrtValue`` of each slot, to be fed as past."""
        if not self._values:
            return [self.device.put(np.zeros((rows, slot.heads, 0, slot.size), slot.dtype)) for slot in self.slots]
        return self._values

    def update(self, presents: list[Any], rows: int, tokens: int) -> None:
        self._values, self.rows, self.length = presents, rows, self.length + tokens

    def _map(self, change: Any) -> None:
        # one at a time, so that no more than one tensor is there twice
        for index, value in enumerate(self._values):
            self._values[index] = self.device.put(np.array(change(self.device.get(value)), order="C"))

    def select_rows(self, rows: np.ndarray) -> None:
        index = np.asarray(rows, np.int64)
        self._map(lambda array: array[index])
        self.rows = len(index)

    def twin(self) -> GrowingCache:
        twin = copy.copy(self)
        twin._values = list(self._values)
        return twin

    def join(self, other: GrowingCache) -> None:
        width = max(self.length, other.length)
        for index, (mine, theirs) in enumerate(zip(self._values, other._values, strict=True)):
            parts = [_padded(self.device.get(value), width) for value in (mine, theirs)]
            self._values[index] = self.device.put(np.concatenate(parts))
        self.rows, self.length = self.rows + other.rows, width

    def drop_newest(self, tokens: int) -> None:
        if not tokens:
            return
        kept = max(0, self.length - tokens)
        self._map(lambda array: array[:, :, :kept])
        self.length = kept

    def drop_oldest(self, columns: int) -> None:
        if not columns:
            return
        self._map(lambda array: array[:, :, columns:])
        self.length -= columns

    def key_values(self) -> list[KeyValue]:
        arrays = [self.device.get(value) for value in self._values]
        return list(zip(arrays[0::2], arrays[1::2], strict=True))


class SharedCache(OnnxCache):
    """One buffer a slot, which the graph reads as past and writes as present; rows begin at column 0 whatever their length.

    Attributes:
        lengths: i64[R], tokens read so far by each row.
    """

    def __init__(self, slots: Sequence[CacheSlot], device: Device):
        super().__init__(slots, device)
        self.lengths = np.zeros(0, np.int64)
        self._capacity = 0
        self._arrays: list[np.ndarray] = []  # the same memory as the values on the CPU
        self._values: list[Any] = []

    def bind(self, rows: int, needed: int) -> list[Any]:
        """``OrtValue`` of each slot with room for ``needed`` columns, to be bound as past and as present."""
        if not self._values or needed > self._capacity:
            capacity = -(-needed // _BLOCK) * _BLOCK
            shapes = [(rows, slot.heads, capacity, slot.size) for slot in self.slots]
            self._replace([np.zeros(shape, slot.dtype) for shape, slot in zip(shapes, self.slots, strict=True)], copy_from=self._read())
            self._capacity = capacity
        return self._values

    def update(self, lengths: np.ndarray, tokens: int) -> None:
        self.lengths, self.rows, self.length = lengths, len(lengths), self.length + tokens

    def _read(self) -> list[np.ndarray]:
        return self._arrays if self.device.kind == "cpu" else [self.device.get(value) for value in self._values]

    def _replace(self, arrays: list[np.ndarray], copy_from: list[np.ndarray] | None = None) -> None:
        for fresh, old in zip(arrays, copy_from or [], strict=False):
            fresh[:, :, : old.shape[2]] = old
        self._arrays = arrays if self.device.kind == "cpu" else []
        self._values = [self.device.put(array) for array in arrays]

    def select_rows(self, rows: np.ndarray) -> None:
        index = np.asarray(rows, np.int64)
        self._replace([array[index] for array in self._read()])
        self.lengths, self.rows = self.lengths[index], len(index)

    def twin(self) -> SharedCache:
        twin = copy.copy(self)
        twin._replace([array.copy() for array in self._read()])  # the graph writes to these
        return twin

    def join(self, other: SharedCache) -> None:
        capacity = max(self._capacity, other._capacity)
        joined = []
        for mine, theirs in zip(self._read(), other._read(), strict=True):
            array = np.zeros((len(mine) + len(theirs), mine.shape[1], capacity, mine.shape[3]), mine.dtype)
            array[: len(mine), :, : mine.shape[2]], array[len(mine) :, :, : theirs.shape[2]] = mine, theirs
            joined.append(array)
        self._replace(joined)
        self._capacity, self.length = capacity, max(self.length, other.length)
        self.lengths = np.concatenate([self.lengths, other.lengths])
        self.rows = len(self.lengths)

    def drop_newest(self, tokens: int) -> None:
        # what lies behind a row's length is never read, and written over by the next pass
        self.lengths = np.maximum(self.lengths - tokens, 0)
        self.length = max(0, self.length - tokens)

    def drop_oldest(self, columns: int) -> None:
        self.length -= columns

    def key_values(self) -> list[KeyValue]:
        arrays = []
        for array in self._read():
            padded = np.zeros((self.rows, array.shape[1], self.length, array.shape[3]), array.dtype)
            for row, length in enumerate(self.lengths):
                padded[row, :, self.length - length :] = array[row, :, :length]
            arrays.append(padded)
        return list(zip(arrays[0::2], arrays[1::2], strict=True))


def _padded(array: np.ndarray, width: int) -> np.ndarray:
    """[R, heads, width, head_dim] with zeros in front."""
    return np.pad(array, ((0, 0), (0, 0), (width - array.shape[2], 0), (0, 0)))
