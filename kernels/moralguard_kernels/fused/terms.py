"""Device code of the rectification: base logits and the sum of a row's terms, at any token ids."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .numerics import LARGEST, finite_or_zero, sanitized


class Terms(NamedTuple):
    """Arguments of the rectification as a kernel takes them. Matrices are (pointer, row stride); absent ones None.

    Attributes:
        base: f[N, V].
        slots: i32[N], the row of every per-slot parameter; None where slot = row.
        groups: the mixes, each a tuple of sources f[N, V].
        weights: f32[S, n], for each group its base weight, then one a source.
        projection: (pointer, stride of tokens, stride of ranks) of f32[V, r].
        coefficients: f32[N, r].
        biased: sources f[N, V] of the attenuation.
        log_sums: f32[N, 1 + len(biased)], logsumexp of the base and of each biased source.
        decay_constant, epsilon: f32[S].
        given: f32[N, V], the rectified logits where they were computed before; the other terms don't count then.
    """

    base: Any
    slots: Any
    groups: Any
    weights: Any
    projection: Any
    coefficients: Any
    biased: Any
    log_sums: Any
    decay_constant: Any
    epsilon: Any
    given: Any = None


@triton.jit
def slot_of(terms, row):
    slot = row
    if terms.slots is not None:
        slot = tl.load(terms.slots + row).to(tl.int32)
    return slot


@triton.jit
def raw_logits(matrix, row, ids, mask):
    """f32 logits of a row at these ids; -inf where masked out."""
    return tl.load(matrix[0] + row.to(tl.int64) * matrix[1] + ids, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def base_logits(terms, row, ids, mask):
    return sanitized(raw_logits(terms.base, row, ids, mask))


@triton.jit
def rectified(terms, z, row, slot, ids, mask, RANK: tl.constexpr):
    """z plus the row's mixes, low-rank term and attenuation at these ids; -inf where z is."""
    total = z
    if terms.given is not None:
        total = tl.load(terms.given[0] + row.to(tl.int64) * terms.given[1] + ids, mask=mask, other=float("-inf"))
    if terms.groups is not None:
        weight = terms.weights[0] + slot.to(tl.int64) * terms.weights[1]
        for g in tl.static_range(len(terms.groups)):
            delta = z * tl.load(weight)
            weight += 1
            for i in tl.static_range(len(terms.groups[g])):
                source = tl.load(terms.groups[g][i][0] + row.to(tl.int64) * terms.groups[g][i][1] + ids, mask=mask, other=0.0)
                delta = delta + source.to(tl.float32) * tl.load(weight)
                weight += 1
            total = total + finite_or_zero(delta)
    if terms.projection is not None:
        delta = tl.zeros_like(z)
        # not unrolled in full: sixteen columns in flight would not fit the registers
        for j in tl.range(0, RANK, loop_unroll_factor=4):
            column = tl.load(terms.projection[0] + ids.to(tl.int64) * terms.projection[1] + j * terms.projection[2], mask=mask, other=0.0)
            delta += column * tl.load(terms.coefficients[0] + row.to(tl.int64) * terms.coefficients[1] + j)
        total = total + finite_or_zero(delta)
    if terms.biased is not None:
        log_sum = terms.log_sums + row.to(tl.int64) * (len(terms.biased) + 1)
        largest = tl.zeros_like(z)
        broken = z != z
        for j in tl.static_range(len(terms.biased)):
            q = tl.exp(raw_logits(terms.biased[j], row, ids, mask) - tl.load(log_sum + 1 + j))
            broken = broken | (q != q)
            largest = tl.maximum(largest, q)
        excess = tl.exp(z - tl.load(log_sum)) - largest
        delta = tl.minimum(excess, 0.0) * tl.load(terms.decay_constant + slot)
        delta = tl.maximum(delta, tl.log(tl.load(terms.epsilon + slot)))
        total = total + finite_or_zero(tl.where(broken, 0.0, delta))
    return tl.where(z > float("-inf"), tl.minimum(total, LARGEST), float("-inf"))
