"""One pass of rows through a graph and its cache: what is fed, and which positions of what comes out are each row's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moralguard.backends.onnx.cache import GrowingCache, SharedCache
from moralguard.backends.onnx.runner import Runner
from moralguard.backends.onnx.surgery import STRENGTH
from moralguard.errors import ModelError


@dataclass(frozen=True)
class Request:
    """What ``forward`` was asked: ids i64[R, T], mask i64[R, W + T], positions i64[R, T] or None, strength f32[R, 1, 1] or None."""

    ids: np.ndarray
    mask: np.ndarray
    positions: np.ndarray | None
    strength: np.ndarray | None
    states: bool


@dataclass(frozen=True)
class Found:
    """logits f32[R, V]; hidden f32[R, d], before f32[R, V] and states f32[R, T, d] where asked for and given.

    ``short``: the graph gave logits of the last column only.
    """

    logits: np.ndarray
    hidden: np.ndarray | None
    before: np.ndarray | None
    states: np.ndarray | None
    short: bool = False


def _count(mask: np.ndarray, tokens: int) -> np.ndarray:
    """Positions i64[R, T] of the newest columns, counted without padding."""
    return np.maximum(mask.cumsum(-1) - 1, 0)[:, -tokens:]


def _feeds(runner: Runner, request: Request, length: int, mask: np.ndarray, positions: np.ndarray) -> dict[str, Any]:
    ports = runner.ports
    given = {ports.ids: request.ids, ports.mask: mask, ports.positions: positions}
    given[ports.column] = np.arange(length, length + request.ids.shape[1])
    feeds = {name: np.ascontiguousarray(array, ports.kinds[name]) for name, array in given.items() if name is not None}
    if ports.switch is not None:
        feeds[ports.switch] = np.asarray([length > 0])
    if request.strength is not None:
        feeds[STRENGTH] = request.strength
    return feeds


def _wanted(runner: Runner, states: bool) -> list[str]:
    return [runner.ports.logits, *(n for n in (runner.hidden, runner.before) if n is not None)] if states else [runner.ports.logits]


def _float(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32)


def _rows(array: np.ndarray, rows: int) -> np.ndarray:
    """[R, positions, width] of an output that may be flat."""
    return array.reshape(rows, -1, array.shape[-1])


def run_growing(runner: Runner, cache: GrowingCache, request: Request) -> Found:
    """A pass through a graph that returns the cache in tensors of its own."""
    rows, tokens = request.ids.shape
    if runner.ports.switch is not None and cache.length and tokens > 1:
        # a merged decoder's branch with a cache was traced with one token: it isn't sure to take more
        return _one_by_one(lambda part: run_growing(runner, cache, part), request, cache.length)
    positions = _count(request.mask, tokens) if request.positions is None else request.positions
    feeds = _feeds(runner, request, cache.length, request.mask, positions)
    if runner.ports.slots[0].past is not None:
        feeds.update({str(slot.past): value for slot, value in zip(runner.ports.slots, cache.bind(rows), strict=True)})
    wanted = _wanted(runner, request.states)
    arrays, presents = runner.run(feeds, {}, wanted, [slot.present for slot in runner.ports.slots])
    cache.update(presents, rows, tokens)
    by_name = dict(zip(wanted, arrays, strict=True))

    def last(name: str) -> np.ndarray:
        return _float(_rows(by_name[name], rows)[:, -1])

    hidden, before = (last(name) if name is not None and name in by_name else None for name in (runner.hidden, runner.before))
    states = _float(_rows(by_name[runner.hidden], rows)) if runner.hidden in by_name and runner.hidden is not None else None
    seen = request.mask[:, -tokens:]
    if states is not None and not seen.all() and states.shape[1] == tokens:
        states = np.where(seen[..., None] != 0, states, np.float32(0))  # padding may hold anything, NaN too
    return Found(last(runner.ports.logits), hidden, before, states)


def _one_by_one(step: Any, request: Request, length: int) -> Found:
    """A pass of several tokens as passes of one."""
    found: list[Found] = []
    for at in range(request.ids.shape[1]):
        positions = None if request.positions is None else request.positions[:, at : at + 1]
        part = replace(request, ids=request.ids[:, at : at + 1], mask=request.mask[:, : length + at + 1], positions=positions)
        found.append(step(part))
    states = np.concatenate([f.states for f in found], 1) if found[0].states is not None else None
    return replace(found[-1], states=states)


def run_shared(runner: Runner, cache: SharedCache, request: Request) -> Found:
    """A pass through GroupQueryAttention: rows begin at column 0 of a buffer and each has a length of its own.

    Left padding is taken away before and put back afterwards; positions follow from the lengths (com.microsoft, opset 1).
    """
    rows, tokens = request.ids.shape
    if cache.length == 0:
        lengths = request.mask.sum(-1)
        if not (np.diff(request.mask, axis=1) >= 0).all() or not lengths.all():
            raise ModelError(f"{runner.path} needs padding on the left, with a token in every row; a mask has zeros behind a one")
        return _prefill(runner, cache, request, lengths.astype(np.int64))
    if tokens > 1 and rows > 1:  # the kernel takes several new tokens on a cache for one row only
        return _one_by_one(lambda part: run_shared(runner, cache, part), request, cache.length)
    found = _grouped(runner, cache, request, cache.lengths, cache.lengths + tokens)
    cache.update(cache.lengths + tokens, tokens)
    return found


def _prefill(runner: Runner, cache: SharedCache, request: Request, lengths: np.ndarray) -> Found:
    rows, tokens = request.ids.shape
    width = int(lengths.max())
    left = np.zeros((rows, width), np.int64)
    for row, length in enumerate(lengths):
        left[row, :length] = request.ids[row, tokens - length :]
    found = _grouped(runner, cache, replace(request, ids=left), np.zeros(rows, np.int64), lengths)
    if found.short and (lengths < width).any():
        # logits of the last column only, which is padding in the shorter rows: each row's last token is read once more, in its place
        ends = replace(request, ids=np.take_along_axis(left, lengths[:, None] - 1, 1))
        again = _grouped(runner, cache, ends, lengths - 1, lengths)
        found = replace(again, states=found.states)
    cache.update(lengths, tokens)
    if found.states is None:
        return found
    states = np.zeros((rows, tokens, found.states.shape[-1]), np.float32)
    for row, length in enumerate(lengths):
        states[row, tokens - length :] = found.states[row, :length]
    return replace(found, states=states)


def _grouped(runner: Runner, cache: SharedCache, request: Request, before: np.ndarray, lengths: np.ndarray) -> Found:
    """A pass of rows that had ``before`` i64[R] tokens and have ``lengths`` i64[R] after it; the cache's lengths stay as they are."""
    rows, tokens = request.ids.shape
    width = int(lengths.max())
    mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
    buffers = cache.bind(rows, width)
    ports = runner.ports
    feeds = _feeds(runner, request, int(before.max()), mask, before[:, None] + np.arange(tokens))
    feeds.update({str(slot.past): value for slot, value in zip(ports.slots, buffers, strict=True)})
    wanted = _wanted(runner, request.states)
    arrays, _ = runner.run(feeds, {slot.present: value for slot, value in zip(ports.slots, buffers, strict=True)}, wanted, ())
    by_name = {name: _rows(array, rows) for name, array in zip(wanted, arrays, strict=True)}
    ends = lengths - before - 1

    def last(name: str) -> np.ndarray:
        array = by_name[name]
        return _float(array[:, -1] if array.shape[1] != tokens else array[np.arange(rows), ends])

    hidden, before_cap = (last(name) if name is not None and name in by_name else None for name in (runner.hidden, runner.before))
    states = _float(by_name[runner.hidden]) if runner.hidden is not None and runner.hidden in by_name else None
    short = by_name[ports.logits].shape[1] != tokens
    return Found(last(ports.logits), hidden, before_cap, states, short)
