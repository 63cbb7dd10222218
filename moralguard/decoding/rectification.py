"""Assembles the controls' terms into the one rectification of a step and runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import moralguard_kernels as ops
from moralguard.decoding.terms import Attenuation, Dense, Keep, LowRank, Mix, Sparse, Terms


@dataclass(frozen=True)
class Rectified:
    """The guarded logits of a step.

    Attributes:
        logits: f32[R, V]; rows that no control touched are the base's own, bit for bit.
        touched: bool[R].
    """

    logits: torch.Tensor
    touched: torch.Tensor


def rectify(base: torch.Tensor, terms: Sequence[Terms]) -> Rectified:
    """z' = z + sum of deltas on the intersection of the keep-sets, f32[R, V].

    A control that acts on some rows only contributes nothing, and removes nothing, on the others.
    """
    touched = torch.zeros(base.shape[0], dtype=torch.bool, device=base.device)
    deltas: list[torch.Tensor] = []
    thresholds: list[torch.Tensor] = []
    candidates: list[tuple[torch.Tensor, torch.Tensor, bool]] = []
    z = ops.sanitize_logits(base)
    for item in terms:
        if not item.terms or (item.rows is not None and not bool(item.rows.any())):
            continue
        everywhere = item.rows is None or bool(item.rows.all())
        outside = None if everywhere or item.rows is None else ~item.rows[:, None]
        touched |= True if item.rows is None else item.rows
        for term in item.terms:
            if isinstance(term, Keep):
                found = _thresholds(z, term)
                thresholds += found if outside is None else [t.masked_fill(outside, float("-inf")) for t in found]
            elif isinstance(term, Sparse) and outside is None:
                candidates.append((term.ids, term.bias, term.keep_rest))
            else:
                parts = _sparse_as_deltas(z, term) if isinstance(term, Sparse) else [_delta(z, term)]
                deltas += parts if outside is None else [part.masked_fill(outside, 0.0) for part in parts]
    if not bool(touched.any()):
        return Rectified(base, touched)
    logits = ops.rectify(z, deltas, thresholds, candidates)
    if not bool(touched.all()):
        logits = torch.where(touched[:, None], logits, base)
    return Rectified(logits, touched)


def _delta(z: torch.Tensor, term: Mix | LowRank | Attenuation | Dense) -> torch.Tensor:
    if isinstance(term, Mix):
        return ops.mix_delta(z, term.sources, term.weights, term.base_weight)
    if isinstance(term, LowRank):
        return ops.finite_or_zero(ops.low_rank_delta(term.projection, term.coefficients))
    if isinstance(term, Attenuation):
        return ops.attenuation_delta(z, term.sources, term.decay_constant, term.epsilon)
    return ops.finite_or_zero(term.delta.to(z))


def _thresholds(z: torch.Tensor, keep: Keep) -> list[torch.Tensor]:
    found = []
    if keep.top_k is not None:
        found.append(ops.top_k_threshold(z, keep.top_k))
    if keep.top_p is not None and keep.top_p < 1:
        found.append(ops.top_p_threshold(z, keep.top_p))
    if keep.min_p is not None and keep.min_p > 0:
        found.append(ops.min_p_threshold(z, keep.min_p))
    return found


def _sparse_as_deltas(z: torch.Tensor, term: Sparse) -> list[torch.Tensor]:
    """Dense form of a sparse term, for batches in which only some rows take part: the bias, and 0 / -inf for the rest."""
    bias = torch.zeros_like(z).scatter(-1, term.ids, ops.finite_or_zero(term.bias.to(z)))
    if term.keep_rest:
        return [bias]
    return [bias, torch.full_like(z, float("-inf")).scatter(-1, term.ids, 0.0)]
