"""Thresholds of one row of logits, in NumPy, without a sort of the vocabulary.

The tokens that a filter can keep lie above some level, so they are looked for a few nats under the largest logit, then further down,
at last everywhere. The result is the same at every level that holds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LEVELS = (8.0, 16.0)
"""Nats under the largest logit."""


def _down_from_the_top(z: NDArray[Any]) -> Iterator[NDArray[np.int64]]:
    """Ids of all tokens above a level, for one level after the other; the last are all ids."""
    top = float(z.max())
    for level in _LEVELS:
        yield np.flatnonzero(z >= top - level)
    yield np.arange(len(z))


def kth_largest(z: NDArray[Any], k: int) -> float:
    """The k-th largest of sanitised logits f[V], 1 <= k <= V."""
    for ids in _down_from_the_top(z):
        if len(ids) >= k:
            return float(np.partition(z[ids], -k)[-k])
        # behind a filter there may be fewer than k tokens left; a partition of nothing but -inf takes a hundred times as long
        if np.count_nonzero(z > -np.inf) < k <= len(z):
            return float("-inf")
    raise ValueError(f"k is {k}, of {len(z)} logits; expected 1 to {len(z)}")


def nucleus_threshold(z: NDArray[Any], probabilities: NDArray[Any], p: float) -> float:
    """The smallest logit inside the nucleus of mass p: v belongs to it iff the mass of strictly larger logits is < p.

    Args:
        z: f[V], sanitised logits; probabilities: f[V], their softmax.
        p: in (0, 1), or less, which leaves the largest logit.
    """
    threshold = float("-inf")
    for ids in _down_from_the_top(z):
        # each sorted by itself, several times faster than by an order of both: the softmax rises with the logit
        largest, mass = np.sort(z[ids])[::-1], np.sort(probabilities[ids])[::-1].astype(np.float64)
        through = mass.cumsum()
        # The mass strictly above a group of ties is the mass before its first member.
        inside = through - mass < p
        inside[1:] &= largest[1:] < largest[:-1]
        inside[0] = True
        threshold = float(largest[np.flatnonzero(inside)[-1]])
        if through[-1] >= p:
            break
    return threshold
