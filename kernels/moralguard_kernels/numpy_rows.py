"""What the operations are made of, in NumPy, for runtimes without torch: the counterpart of ``reference``, which is the specification.

Names, arguments, shapes and rules are those of ``reference``: R rows, V vocabulary entries, float32 whatever the input (float64 for
float64 logits), a base -inf vetoes, auxiliary terms never mask, boundary ties stay, and a row's result depends on that row alone.
Sums are in NumPy's order, so a probability may differ from torch's in its last bits; the noise is bit for bit the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import levels
from .gumbel import gumbel_argmax

Array = NDArray[Any]

# Infinities and NaN are values here, as in torch, and no cause for a warning.
quiet = np.errstate(all="ignore")


def _working(logits: Array) -> Array:
    return logits if logits.dtype == np.float64 else logits.astype(np.float32, copy=False)


def sanitize_logits(logits: Array) -> Array:
    """Base logits [R, V] with NaN -> -inf and +inf -> the largest finite value; float32 (or float64)."""
    z = _working(logits)
    return np.nan_to_num(z, nan=-np.inf, posinf=np.finfo(z.dtype).max, neginf=-np.inf)


def finite_or_zero(delta: Array) -> Array:
    """A delta with its non-finite entries set to 0: auxiliary terms never mask."""
    return np.nan_to_num(delta, nan=0.0, posinf=0.0, neginf=0.0)


@quiet
def softmax(logits: Array) -> Array:
    """softmax over the last axis; NaN in a row that is -inf throughout, as in torch."""
    z = _working(logits)
    law = np.exp(z - z.max(-1, keepdims=True))
    law /= law.sum(-1, keepdims=True)
    return law


@quiet
def log_softmax(logits: Array) -> Array:
    """Logarithm of the softmax over the last axis."""
    z = _working(logits)
    z = z - z.max(-1, keepdims=True)
    z -= np.log(np.exp(z).sum(-1, keepdims=True))
    return z


@quiet
def mix_delta(logits: Array, sources: Sequence[Array], weights: Sequence[Array], base_weight: Array | None) -> Array:
    """sum_i w_i z_i + w_0 z, 0 where not finite; sources f[R, V], weights f[R] each, base_weight f[R] or None for 0."""
    z = _working(logits)
    delta = np.zeros_like(z) if base_weight is None else z * base_weight.astype(z.dtype)[:, None]
    for source, weight in zip(sources, weights, strict=True):
        delta = delta + source.astype(z.dtype, copy=False) * weight.astype(z.dtype)[:, None]
    return finite_or_zero(delta)


@quiet
def row_products(matrix: Array, vectors: Array) -> Array:
    """matrix [n, m] times each row of vectors [R, m]: [R, n], with the same bits for a row alone and in any batch."""
    return np.stack([matrix @ vector.copy() for vector in vectors.astype(matrix.dtype, copy=False)])


@quiet
def row_sums(values: Array) -> Array:
    """Sum of each row of [R, n], with the same bits for a row alone and in any batch."""
    return np.stack([row.sum() for row in np.ascontiguousarray(values)])


def low_rank_delta(projection: Array, coefficients: Array) -> Array:
    """coefficients [R, r] times projection [V, r] transposed: [R, V]; the low-rank edit of a linear head."""
    return row_products(projection, coefficients)


@quiet
def attenuation_delta(logits: Array, biased: Sequence[Array], decay_constant: Array, epsilon: Array) -> Array:
    """Self-debiasing: max(log eps, decay * min(0, p - max_j q_j)) with p, q_j the softmax of the base and the biased logits."""
    z = _working(logits)
    p = softmax(z)
    q = softmax(biased[0].astype(z.dtype, copy=False))
    for other in biased[1:]:
        q = np.maximum(q, softmax(other.astype(z.dtype, copy=False)))
    delta = np.minimum(p - q, 0) * decay_constant.astype(z.dtype)[:, None]
    return finite_or_zero(np.maximum(delta, np.log(epsilon.astype(z.dtype))[:, None]))


def _column(values: Sequence[float], like: Array) -> Array:
    return np.array(values, dtype=like.dtype).reshape(-1, 1)


@quiet
def top_k_threshold(logits: Array, k: int) -> Array:
    """[R, 1]: the k-th largest logit of each row; v is kept iff z_v >= it (boundary ties stay). k >= V gives -inf."""
    if k >= logits.shape[-1]:
        return np.full_like(logits[:, :1], -np.inf)
    return _column([levels.kth_largest(row, k) for row in logits], logits)


@quiet
def top_p_threshold(logits: Array, p: float | Array) -> Array:
    """[R, 1]: the smallest logit inside the nucleus of mass p; v is kept iff z_v >= it. p >= 1 keeps everything."""
    z = _working(logits)
    own = np.broadcast_to(np.asarray(p, dtype=z.dtype).reshape(-1), len(z)).tolist()
    rows = zip(z, softmax(z), own, strict=True)
    return _column([-np.inf if mass >= 1 else levels.nucleus_threshold(row, law, mass) for row, law, mass in rows], z)


@quiet
def min_p_threshold(logits: Array, min_p: float | Array) -> Array:
    """[R, 1]: v is kept iff softmax(z)_v >= min_p * max softmax(z), that is z_v >= max z + log min_p."""
    z = _working(logits)
    return z.max(-1, keepdims=True) + np.log(np.asarray(min_p, dtype=z.dtype).reshape(-1, 1))


def _keep_from(values: Array, logits: Array, threshold: Array) -> Array:
    """The values [R, V] whose logit reaches the threshold [R, 1], -inf elsewhere."""
    return np.where(logits >= threshold, values, values.dtype.type(-np.inf))


@quiet
def rectify(
    logits: Array, deltas: Sequence[Array], thresholds: Sequence[Array] = (), candidates: Sequence[tuple[Array, Array, bool]] = ()
) -> Array:
    """z' = z + sum of deltas on the intersection of the keep-sets: the one equation of the guard; see ``reference.rectify``."""
    if not (deltas or thresholds or candidates):
        return logits
    rectified = logits
    for delta in deltas:
        rectified = rectified + delta
    for ids, bias, keep_rest in candidates:
        shifted = np.take_along_axis(rectified, ids, -1) + finite_or_zero(bias.astype(rectified.dtype))
        target = rectified.copy() if keep_rest else np.full_like(rectified, -np.inf)
        np.put_along_axis(target, ids, shifted, -1)
        rectified = target
    lowest = np.full_like(logits[:, :1], np.finfo(logits.dtype).min)
    for threshold in thresholds:
        lowest = np.maximum(lowest, threshold)
    # an overflowing sum stays the largest number, as +inf would make every softmax NaN
    rectified = np.minimum(rectified, np.finfo(rectified.dtype).max)
    return _keep_from(rectified, logits, lowest)


@quiet
def warp(logits: Array, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Array:
    """Temperature, then top-k, then top-p on the mass that top-k left, then min-p; [R, V] with -inf where removed."""
    z = _tempered(logits, temperature)
    if not (top_k or top_p < 1.0 or min_p > 0.0):
        return z
    return _keep_from(z, z, _warp_threshold(z, top_k, top_p, min_p))


def _tempered(logits: Array, temperature: float) -> Array:
    z = _working(logits)
    return z if temperature == 1.0 else np.minimum(z / z.dtype.type(temperature), np.finfo(z.dtype).max)


def _warp_threshold(z: Array, top_k: int, top_p: float, min_p: float) -> Array:
    """[R, 1]: v passes the three filters iff z_v >= it."""
    lowest = np.full_like(z[:, :1], -np.inf)
    if top_k:
        lowest = top_k_threshold(z, top_k)
    if top_p < 1.0:
        lowest = np.maximum(lowest, top_p_threshold(_keep_from(z, z, lowest) if top_k else z, top_p))
    if min_p > 0.0:
        lowest = np.maximum(lowest, min_p_threshold(z, min_p))
    return lowest


@quiet
def warped_draw(
    logits: Array,
    seed: Array,
    position: Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Array:
    """``gumbel_argmax`` of ``warp``: i64[R], without storing the warped logits."""
    z = _tempered(logits, temperature)
    if not (top_k or top_p < 1.0 or min_p > 0.0):
        return gumbel_argmax(z, seed, position)
    return gumbel_argmax(z, seed, position, _warp_threshold(z, top_k, top_p, min_p))


@quiet
def kl_divergence(guarded: Array, base: Array) -> Array:
    """KL(guarded || base) in nats, [R], of softmax(guarded) against softmax(base); 0 * log 0 = 0."""
    log_guarded, log_base = log_softmax(guarded), log_softmax(base)
    gap = np.where(np.isneginf(log_guarded), log_guarded.dtype.type(0), log_guarded - log_base)
    return np.maximum(row_sums(np.exp(log_guarded) * gap), 0)


@quiet
def entropy(logits: Array) -> Array:
    """Entropy of softmax(logits) in nats, [R]."""
    law = softmax(logits)
    return row_sums(np.where(law == 0, law.dtype.type(0), -law * np.log(law)))
