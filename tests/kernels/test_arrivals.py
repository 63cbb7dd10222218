"""Counters for captured calls: each its own, until none are left."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton", reason="no Triton on this platform")

from moralguard_kernels.fused.arrivals import CapturedCounters, arrival_counters


def test_captured_calls_never_share_counters() -> None:
    memory = torch.zeros(100_000, dtype=torch.int32)
    counters = CapturedCounters(memory)
    taken: list[tuple[int, int]] = []

    def capture() -> None:
        for rows in (1, 31, 32, 33, 500, 1):
            own = counters.take(rows)
            assert own is not None
            assert len(own) == rows
            taken.append((own.storage_offset(), own.storage_offset() + rows))

    threads = [threading.Thread(target=capture) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 48
    places = sorted(taken)
    assert all(first[1] <= second[0] for first, second in pairwise(places))
    assert all(start % 32 == 0 for start, _ in places), "two graphs would write to one line of the cache"


def test_what_is_used_up_is_told_and_nothing_is_given_twice() -> None:
    counters = CapturedCounters(torch.zeros(96, dtype=torch.int32))
    assert counters.take(97) is None
    first = counters.take(64)
    assert first is not None
    assert counters.take(33) is None
    last = counters.take(32)
    assert last is not None
    assert last.storage_offset() == 64
    assert counters.take(1) is None


def test_elsewhere_they_are_fresh_zeros() -> None:
    one, other = arrival_counters(torch.device("cpu"), 7), arrival_counters(torch.device("cpu"), 7)
    assert one.tolist() == [0] * 7
    assert one.data_ptr() != other.data_ptr()
