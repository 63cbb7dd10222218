"""Draws by the Gumbel-max trick, in NumPy: exact, with noise made only for the tokens that can win.

What a decode step pays on the CPU. Two draws with the same (seed, position) and other logits share their noise: that is what makes
the unguarded counterfactual token comparable with the drawn one (arXiv 2411.07180).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .noise import gumbel_of_words, token_words, uniform_of_words, vocabulary_words

Array = NDArray[Any]
Ids = NDArray[np.int64]

# More than the error of a float32 logarithm whose result lies within 23 of 0, and than the rounding of sums under _LARGEST_LOGIT.
_MARGIN = 1e-3
_LARGEST_LOGIT = 1e3
_LONG_ROW = 1024
"""Tokens from which on it pays to leave noise out."""
_NEAR = 8.0
"""Nats under the largest logit: tokens further down can win by rare noise only, which its words tell without a logarithm."""


def gumbel_argmax(z: Array, seed: Ids, position: Ids, threshold: Array | None = None) -> Ids:
    """Exact draw from the softmax of every row of z f[R, V], i64[R]; the lowest id among equals, 0 in a row of -inf.

    Args:
        z: -inf where removed, no NaN and no +inf.
        seed, position: i64[R].
        threshold: f[R, 1], logits under it are removed, too; None for none.
    """
    lowest = np.full((len(z), 1), np.finfo(z.dtype).min, dtype=z.dtype)
    if threshold is not None:
        lowest = np.maximum(lowest, threshold)
    possible = z >= lowest
    drawn = np.zeros(len(z), dtype=np.int64)
    if z.shape[-1] >= _LONG_ROW:
        for i, row in enumerate(possible):
            if 2 * np.count_nonzero(row) > row.size:
                drawn[i] = _largest_of_many(z[i], lowest[i, 0], seed[i], position[i])
                row[:] = False
    rows, ids = _places(possible)
    if len(rows) < 2 or bool((np.diff(rows) > 0).all()):  # one token a row at most: no noise changes that
        drawn[rows] = ids
        return drawn
    noisy = z[rows, ids] + gumbel_of_words(token_words(seed[rows], position[rows], ids)).astype(z.dtype)
    if len(z) == 1:
        drawn[0] = ids[noisy.argmax()]
        return drawn
    order = np.lexsort((-noisy, rows))  # stable: the lowest id comes first of equals
    best = order[np.diff(rows[order], prepend=-1) > 0]
    drawn[rows[best]] = ids[best]
    return drawn


def _places(members: NDArray[np.bool_]) -> tuple[Ids, Ids]:
    """Row and column of every member of bool[R, V], by row, then by column."""
    if len(members) > 1:
        rows, ids = np.nonzero(members)
        return rows, ids
    ids = np.flatnonzero(members)  # several times faster than nonzero
    return np.zeros_like(ids), ids


def _largest(row: Array, ids: Ids, words: NDArray[np.uint32]) -> int:
    """Of these ids, in rising order, the one whose noisy logit is largest."""
    return int(ids[(row[ids] + gumbel_of_words(words).astype(row.dtype)).argmax()])


def _largest_of_many(row: Array, lowest: float, seed: np.int64, position: np.int64) -> int:
    """The draw from a row most of whose tokens reach ``lowest``: -log u bounds the noise from above."""
    words = vocabulary_words(np.asarray([seed]), np.asarray([position]), row.size)[0]
    top = float(row.max())
    if abs(top) > _LARGEST_LOGIT:
        ids = np.flatnonzero(row >= lowest)
        ids = ids[_can_win(row[ids], words[ids])]
        return _largest(row, ids, words[ids])
    level = row.dtype.type(max(top - _NEAR, lowest))
    near = np.flatnonzero(row >= level)
    kept = _can_win(row[near], words[near])
    near = near[kept]
    least = float((row[near] + gumbel_of_words(words[near]).astype(row.dtype)).max())
    # a token under the level wins only with -log u >= least - level
    likeliest = min(2.0**32 - 1, 2.0**32 * np.exp(float(level) - least + _MARGIN) + 1)
    rare = np.flatnonzero(words <= np.uint32(likeliest))
    ids = np.concatenate([near, rare[(row[rare] < level) & (row[rare] >= lowest)]])
    ids.sort()
    return _largest(row, ids, words[ids])


def _can_win(z: Array, words: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """bool[n]: tokens whose noisy logit can be the largest of these."""
    # the rounding of a sum is monotone, so a bound on the noise bounds the noisy logit
    bound = z + (np.float32(_MARGIN) - np.log(uniform_of_words(words))).astype(z.dtype)
    first = bound.argmax(keepdims=True)
    least = (z[first] + gumbel_of_words(words[first]).astype(z.dtype))[0]
    found: NDArray[np.bool_] = bound >= least
    return found
