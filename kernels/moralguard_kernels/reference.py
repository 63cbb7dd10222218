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

import torch

from .philox import gumbel_noise, vocabulary_noise

# A nucleus is looked for among so many largest logits, then among more; what is left is sorted in full (the result is the same).
_NUCLEUS_LOOKS = (512, 4096)


def _working(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.to(torch.float32)


def sanitize_logits(logits: torch.Tensor) -> torch.Tensor:
    """Base logits [R, V] with NaN -> -inf and +inf -> the largest finite value; float32 (or float64)."""
    z = _working(logits)
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
    return torch.topk(logits, k, dim=-1).values[:, -1:]


def top_p_threshold(logits: torch.Tensor, p: float | torch.Tensor) -> torch.Tensor:
    """[R, 1]: the smallest logit inside the nucleus of mass p; v is kept iff z_v >= it.

    The nucleus holds v iff the mass of strictly larger logits is < p, so the first token over the threshold stays. p >= 1 keeps
    everything that isn't -inf (float32 mass of the top token can round to the total, so this is decided before any sum).
    """
    z = _working(logits)
    rows, vocabulary = z.shape
    p_row = torch.as_tensor(p, dtype=z.dtype, device=z.device).reshape(-1, 1).expand(rows, 1)
    # softmax reduces each row in one order whatever the batch, which logsumexp doesn't
    probabilities = torch.softmax(z, -1)
    threshold = torch.empty_like(z[:, :1])
    pending = torch.arange(rows, device=z.device)
    for look in (*(n for n in _NUCLEUS_LOOKS if n < vocabulary), vocabulary):
        largest = torch.topk(z[pending], look, dim=-1)
        found, complete = _nucleus_threshold(largest.values, probabilities[pending].gather(-1, largest.indices), p_row[pending])
        threshold[pending] = found
        pending = pending[~complete.squeeze(-1)]
        if not len(pending):
            break
    return torch.where(p_row >= 1, torch.full_like(threshold, float("-inf")), threshold)


def _nucleus_threshold(largest: torch.Tensor, mass: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nucleus boundary among the sorted largest logits [R, n] of these masses; complete says that it lies inside them."""
    before = mass.cumsum(-1) - mass
    # The mass strictly above a group of ties is the mass before its first member.
    first_of_ties = torch.ones_like(largest, dtype=torch.bool)
    first_of_ties[:, 1:] = largest[:, 1:] < largest[:, :-1]
    inside = (before < p) & first_of_ties
    inside[:, 0] = True
    index = torch.arange(largest.shape[-1], device=largest.device)
    last = torch.where(inside, index, -1).amax(-1, keepdim=True)
    covered = before[:, -1:] + mass[:, -1:]
    return largest.gather(-1, last), (covered >= p) | (p >= 1)


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
    return torch.where(logits >= lowest, rectified, float("-inf"))


def warp(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    """Temperature, then top-k, then top-p on the mass that top-k left, then min-p; [R, V] with -inf where removed.

    0 (top_k, min_p) and 1 (temperature, top_p) leave the logits as they are. The order is transformers' own.
    """
    z = _working(logits)
    if temperature != 1.0:
        z = (z / temperature).clamp(max=torch.finfo(z.dtype).max)
    if top_k:
        z = z.masked_fill(z < top_k_threshold(z, top_k), float("-inf"))
    if top_p < 1.0:
        z = z.masked_fill(z < top_p_threshold(z, top_p), float("-inf"))
    if min_p > 0.0:
        z = z.masked_fill(z < min_p_threshold(z, min_p), float("-inf"))
    return z


def gumbel_argmax(logits: torch.Tensor, seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Exact draw from softmax(logits) by the Gumbel-max trick: i64[R]. Noise is made for surviving tokens only.

    Two calls with the same (seed, position) and other logits share their noise: that is what makes the unguarded
    counterfactual token comparable with the drawn one (arXiv 2411.07180).

    Args:
        logits: f[R, V]; -inf where removed. An all -inf row gives token 0; ``torch.isneginf(logits).all(-1)`` tells.
        seed, position: i64[R].
    """
    survivors = int((~torch.isneginf(logits)).sum(-1).max())
    if survivors == 0:
        return torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    if survivors > logits.shape[-1] // 2:
        drawn = (logits + vocabulary_noise(seed, position, logits.shape[-1]).to(logits)).argmax(-1)
    else:
        scores, ids = torch.topk(logits, survivors, dim=-1)
        # ascending ids, so that the lowest id wins a tie
        ids, order = ids.sort(-1)
        noisy = scores.gather(-1, order) + gumbel_noise(seed, position, ids).to(scores)
        drawn = ids.gather(-1, noisy.argmax(-1, keepdim=True)).squeeze(-1)
    return drawn.masked_fill(torch.isneginf(logits).all(-1), 0)


def kl_divergence(guarded: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """KL(guarded || base) in nats, [R], of softmax(guarded) against softmax(base); 0 * log 0 = 0."""
    log_guarded, log_base = torch.log_softmax(guarded, -1), torch.log_softmax(base, -1)
    gap = torch.where(torch.isneginf(log_guarded), torch.zeros_like(log_guarded), log_guarded - log_base)
    return row_sums(log_guarded.exp() * gap).clamp(min=0)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of softmax(logits) in nats, [R]."""
    return row_sums(torch.special.entr(torch.softmax(_working(logits), -1)))
