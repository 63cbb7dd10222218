"""The specification: every operation between a model's logits and the drawn token, in plain PyTorch.

Shapes: R rows (one row of logits each), V vocabulary entries, C candidates. Arithmetic is float32 whatever the input; pass
float64 logits to get float64 arithmetic. Rules that every implementation must keep:

* a base -inf always vetoes: nothing can bring that token back; a base NaN counts as -inf, +inf as the largest float;
* auxiliary terms re-weigh, they never mask or resurrect: a non-finite delta contributes 0;
* ``top_k``, ``top_p`` and ``min_p`` keep boundary ties: v stays iff count{u: z_u > z_v} < k and mass{u: z_u > z_v} < p;
* a row's result depends on that row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import gumbel, levels


def _working(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.to(torch.float32)


def sanitize_logits(logits: torch.Tensor) -> torch.Tensor:
    """Base logits [R, V] with NaN -> -inf and +inf -> the largest finite value; float32 (or float64); themselves where nothing changes."""
    z = _working(logits)
    # NaN wins in amax, and one look costs a third of the copy; on a GPU the answer would have to be waited for
    if not z.is_cuda and z.numel() and bool(z.amax() < float("inf")):
        return z
    return torch.nan_to_num(z, nan=float("-inf"), posinf=torch.finfo(z.dtype).max, neginf=float("-inf"))


def mix_delta(
    logits: torch.Tensor, sources: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], base_weight: torch.Tensor | None
) -> torch.Tensor:
    """sum_i w_i z_i + w_0 z, 0 where not finite.

    DExperts is (z+, z-) with weights (alpha, -alpha); PPLM's geometric mean is one source with weight gm and w_0 = T(1 - gm) - 1.

    Args:
        logits: f[R, V], the base.
        sources: each f[R, V].
        weights: one f[R] a source.
        base_weight: f[R], or None for 0.
    """
    z = _working(logits)
    delta = torch.zeros_like(z) if base_weight is None else z * base_weight.to(z)[:, None]
    for source, weight in zip(sources, weights, strict=True):
        # two roundings, as the kernels do: a fused multiply-add would differ in the last bit from machine to machine
        delta = delta + source.to(z) * weight.to(z)[:, None]
    return finite_or_zero(delta)


def row_products(matrix: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """matrix [n, m] times each row of vectors [R, m]: [R, n], with the same bits for a row alone and in any batch.

    A product of matrices picks its kernel, and so its rounding, by the batch; a product with one vector (in memory of its own, as
    alignment matters too) doesn't.
    """
    return torch.stack([matrix @ vector.clone() for vector in vectors.to(matrix.dtype)])


def row_sums(values: torch.Tensor) -> torch.Tensor:
    """Sum of each row of [R, n], with the same bits for a row alone and in any batch: threads share a long row only when it is
    summed alone."""
    return torch.stack([row.sum() for row in values])


def low_rank_delta(projection: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """coefficients [R, r] times projection [V, r] transposed: [R, V]; the low-rank edit of a linear head."""
    return row_products(projection, coefficients)


def attenuation_delta(
    logits: torch.Tensor, biased: Sequence[torch.Tensor], decay_constant: torch.Tensor, epsilon: torch.Tensor
) -> torch.Tensor:
    """Self-debiasing: max(log eps, decay * min(0, p - max_j q_j)) with p, q_j the softmax of the base and the biased logits.

    Schick et al. 2021 (arXiv 2103.00453), section 3.2: p' is proportional to p * max(exp(-decay * max(q - p, 0)), eps).

    Args:
        logits: f[R, V], the base.
        biased: each f[R, V], one a prefix.
        decay_constant, epsilon: f[R].
    """
    z = _working(logits)
    p = torch.softmax(z, -1)
    q = torch.softmax(biased[0].to(z), -1)
    for other in biased[1:]:
        q = torch.maximum(q, torch.softmax(other.to(z), -1))
    delta = (p - q).clamp_(max=0).mul_(decay_constant.to(z)[:, None])
    return finite_or_zero(torch.maximum(delta, epsilon.to(z).log()[:, None]))


def finite_or_zero(delta: torch.Tensor) -> torch.Tensor:
    """A delta with its non-finite entries set to 0: auxiliary terms never mask."""
    return torch.nan_to_num(delta, nan=0.0, posinf=0.0, neginf=0.0)


def top_k_threshold(logits: torch.Tensor, k: int) -> torch.Tensor:
    """[R, 1]: the k-th largest logit of each row; v is kept iff z_v >= it (boundary ties stay). k >= V gives -inf."""
    if k >= logits.shape[-1]:
        return torch.full_like(logits[:, :1], float("-inf"))
    return _of_rows([levels.kth_largest(row, k) for row in _host(logits)], logits)


def top_p_threshold(logits: torch.Tensor, p: float | torch.Tensor) -> torch.Tensor:
    """[R, 1]: the smallest logit inside the nucleus of mass p; v is kept iff z_v >= it.

    The nucleus holds v iff the mass of strictly larger logits is < p, so the first token over the threshold stays. p >= 1 keeps
    everything that isn't -inf (float32 mass of the top token can round to the total, so this is decided before any sum).
    """
    z = _working(logits)
    p_row = torch.as_tensor(p, dtype=z.dtype, device=z.device).reshape(-1).expand(len(z)).tolist()
    # softmax reduces each row in one order whatever the batch, which logsumexp doesn't
    rows = zip(_host(z), _host(torch.softmax(z, -1)), p_row, strict=True)
    return _of_rows([float("-inf") if own >= 1 else levels.nucleus_threshold(row, law, own) for row, law, own in rows], z)


def _host(tensor: torch.Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array


def _of_rows(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _keep_from(values: torch.Tensor, logits: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """The values [R, V] whose logit reaches the threshold [R, 1], -inf elsewhere. NumPy compares several times faster than torch."""
    if values.is_cuda:
        return torch.where(logits >= threshold, values, float("-inf"))
    kept = np.where(_host(logits) >= _host(threshold), _host(values), _host(values).dtype.type(-np.inf))
    return torch.from_numpy(kept)


def min_p_threshold(logits: torch.Tensor, min_p: float | torch.Tensor) -> torch.Tensor:
    """[R, 1]: v is kept iff softmax(z)_v >= min_p * max softmax(z), that is z_v >= max z + log min_p."""
    z = _working(logits)
    ratio = torch.as_tensor(min_p, dtype=z.dtype, device=z.device).reshape(-1, 1)
    return z.amax(-1, keepdim=True) + ratio.log()


def rectify(
    logits: torch.Tensor,
    deltas: Sequence[torch.Tensor],
    thresholds: Sequence[torch.Tensor] = (),
    candidates: Sequence[tuple[torch.Tensor, torch.Tensor, bool]] = (),
) -> torch.Tensor:
    """z' = z + sum of deltas on the intersection of the keep-sets: the one equation of the guard.

    Args:
        logits: f[R, V], the base, already sanitised.
        deltas: each f[R, V], finite.
        thresholds: each f[R, 1] on the **base** logits: v stays iff z_v >= threshold (base plausibility).
        candidates: (ids i64[R, C], bias f[R, C], keep_rest): bias added at ids; unless keep_rest, other tokens are removed. Ids of
            one row are distinct.

    Returns:
        f[R, V]; -inf where vetoed or removed.
    """
    if not (deltas or thresholds or candidates):
        return logits
    rectified = logits
    for delta in deltas:
        rectified = rectified + delta
    for ids, bias, keep_rest in candidates:
        shifted = rectified.gather(-1, ids) + finite_or_zero(bias.to(rectified))
        target = rectified.clone() if keep_rest else torch.full_like(rectified, float("-inf"))
        rectified = target.scatter(-1, ids, shifted)
    # the largest threshold says it for all, and -inf stays under any finite one
    lowest = torch.full_like(logits[:, :1], torch.finfo(logits.dtype).min)
    for threshold in thresholds:
        lowest = torch.maximum(lowest, threshold)
    # an overflowing sum stays the largest number, as +inf would make every softmax NaN
    rectified = rectified.clamp(max=torch.finfo(rectified.dtype).max)
    return _keep_from(rectified, logits, lowest)


def warp(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    """Temperature, then top-k, then top-p on the mass that top-k left, then min-p; [R, V] with -inf where removed.

    0 (top_k, min_p) and 1 (temperature, top_p) leave the logits as they are. The order is transformers' own.
    """
    z = _tempered(logits, temperature)
    if not (top_k or top_p < 1.0 or min_p > 0.0):
        return z
    return _keep_from(z, z, _warp_threshold(z, top_k, top_p, min_p))


def _tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    z = _working(logits)
    if temperature == 1.0:
        return z
    z = z / temperature
    return z if temperature > 1 else z.clamp_(max=torch.finfo(z.dtype).max)


def _warp_threshold(z: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """[R, 1]: v passes the three filters iff z_v >= it."""
    lowest = torch.full_like(z[:, :1], float("-inf"))
    if top_k:
        lowest = top_k_threshold(z, top_k)
    if top_p < 1.0:
        lowest = torch.maximum(lowest, top_p_threshold(_keep_from(z, z, lowest) if top_k else z, top_p))
    if min_p > 0.0:
        lowest = torch.maximum(lowest, min_p_threshold(z, min_p))
    return lowest


def gumbel_argmax(logits: torch.Tensor, seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Exact draw from softmax(logits) by the Gumbel-max trick: i64[R]; see ``gumbel``.

    Args:
        logits: f[R, V]; -inf where removed. An all -inf row gives token 0; ``torch.isneginf(logits).all(-1)`` tells.
        seed, position: i64[R].
    """
    return torch.as_tensor(gumbel.gumbel_argmax(_host(logits), _host(seed), _host(position)), device=logits.device)


def warped_draw(
    logits: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> torch.Tensor:
    """``gumbel_argmax`` of ``warp``: i64[R], without storing the warped logits."""
    z = _tempered(logits, temperature)
    if not (top_k or top_p < 1.0 or min_p > 0.0):
        return gumbel_argmax(z, seed, position)
    threshold = _host(_warp_threshold(z, top_k, top_p, min_p))
    return torch.as_tensor(gumbel.gumbel_argmax(_host(z), _host(seed), _host(position), threshold), device=logits.device)


def kl_divergence(guarded: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """KL(guarded || base) in nats, [R], of softmax(guarded) against softmax(base); 0 * log 0 = 0."""
    log_guarded, log_base = torch.log_softmax(guarded, -1), torch.log_softmax(base, -1)
    gap = torch.where(torch.isneginf(log_guarded), torch.zeros_like(log_guarded), log_guarded - log_base)
    return row_sums(log_guarded.exp() * gap).clamp(min=0)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of softmax(logits) in nats, [R]."""
    return row_sums(torch.special.entr(torch.softmax(_working(logits), -1)))
