"""Counters of arrived programs, i32 zeros whenever no kernel runs: each kernel leaves its own as it found them.

Two calls that may run at once must not share any. Calls of one stream run one after the other, so a stream has one set. A captured
call may be replayed on any stream, and for as long as its graph lives: it gets counters that nobody else is ever given.
"""

from __future__ import annotations

import threading

import torch

MOST_ROWS = 65_535  # what CUDA allows in the grid's second dimension
_CAPTURED = 2**20  # counters that a device sets aside for captured calls, 4 MiB
_LINE = 32  # counters in 128 bytes, so that graphs don't share a line of the cache


class CapturedCounters:
    """What captured calls take their counters from, each its own; safe to share between threads."""

    def __init__(self, counters: torch.Tensor):
        """i32 zeros, which are given out piece by piece."""
        self._counters, self._given = counters, 0
        self._lock = threading.Lock()

    def take(self, rows: int) -> torch.Tensor | None:
        """i32[rows] that no other call has or gets; None where too few are left."""
        with self._lock:
            first = self._given
            if first + rows > len(self._counters):
                return None
            self._given += -(-rows // _LINE) * _LINE
        return self._counters[first : first + rows]


_of_streams: dict[tuple[torch.device, int], torch.Tensor] = {}
_of_graphs: dict[torch.device, CapturedCounters] = {}


def arrival_counters(device: torch.device, rows: int) -> torch.Tensor:
    """i32 zeros, at least ``rows`` of them, for one call on the current stream.

    A graph that is captured before the device has ever run a kernel, or after a million counters were given out, fills zeros of its own
    at each replay.
    """
    if device.type != "cuda":
        return torch.zeros(rows, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        spare = _of_graphs.get(device)
        own = None if spare is None else spare.take(rows)
        return torch.zeros(rows, dtype=torch.int32, device=device) if own is None else own
    stream = torch.cuda.current_stream(device)
    if device not in _of_graphs:
        _of_graphs[device] = CapturedCounters(torch.zeros(_CAPTURED, dtype=torch.int32, device=device))
        stream.synchronize()  # once a process: a graph may be replayed on another stream
    key = (device, stream.cuda_stream)
    if key not in _of_streams:
        _of_streams[key] = torch.zeros(MOST_ROWS, dtype=torch.int32, device=device)
    return _of_streams[key]
