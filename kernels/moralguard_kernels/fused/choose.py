"""Device code that ends a row exactly, with every token that may be kept in registers: filters, draw, log-probability, KL."""

from __future__ import annotations

import triton
import triton.language as tl

from .noise import gumbel_at
from .numerics import (
    LARGEST,
    LN2,
    LOWEST_KEY,
    MASS_SCALE,
    NO_LIMIT,
    NO_TARGET,
    best_of,
    finite_or_zero,
    mass_target,
    ordered_key,
    relative_mass,
    tempered,
    threshold_key,
)
from .rows import EMPTY, base_filter_of, candidates_of, filters, noise_key, put_token, temperature_of, warp_of
from .terms import base_logits, rectified


@triton.jit
def fixed_mass(score, valid, largest):
    """exp(score - largest) of valid tokens, i64 in units of 1 / MASS_SCALE."""
    return tl.where(valid, relative_mass(score, largest) * MASS_SCALE, 0.0).to(tl.int64)


@triton.jit
def base_threshold(draw, z, valid, slot, bound, largest, total):
    """Key of the smallest base logit that the base's own filters keep; all of them judge the whole base."""
    top_k, top_p, min_p = base_filter_of(draw, slot, False)
    keys = ordered_key(z)
    threshold = ordered_key(bound)
    if (top_k > 0) | (top_p < 1.0):
        limit = tl.where(top_k > 0, top_k, NO_LIMIT)
        target = mass_target(top_p, total * MASS_SCALE)
        lowest = tl.maximum(threshold, LOWEST_KEY + 1) - 1
        threshold = threshold_key(keys, fixed_mass(z, valid, largest), valid, limit, target, lowest, ordered_key(largest))
    if min_p > 0.0:
        threshold = tl.maximum(threshold, ordered_key(largest + tl.log(min_p)))
    return threshold


@triton.jit
def candidate_tokens(draw, row, count, vocabulary, CAPACITY: tl.constexpr):
    """(ids, which of them there are, their bias) of a row that draws among candidates; ids outside the vocabulary don't count."""
    each = tl.arange(0, CAPACITY)
    there = each < count
    ids = tl.load(draw.candidate_ids[0] + row.to(tl.int64) * draw.candidate_ids[1] + each, mask=there, other=0).to(tl.int32)
    there = there & (ids >= 0) & (ids < vocabulary)
    bias = tl.load(draw.candidate_bias[0] + row.to(tl.int64) * draw.candidate_bias[1] + each, mask=there, other=0.0)
    return ids, there, finite_or_zero(bias.to(tl.float32))


@triton.jit
def _summary_of(guarded, z, log_base):
    """(logsumexp, KL to the base), in fixed point so that no order of the tokens can change them."""
    top = tl.max(guarded)
    mass = relative_mass(guarded, top)
    total = tl.sum((mass * MASS_SCALE).to(tl.int64)).to(tl.float32)
    moved = tl.minimum(tl.maximum(finite_or_zero(guarded - z), -16384.0), 16384.0)
    gain = tl.sum((mass * moved * 1048576.0).to(tl.int64)).to(tl.float32) * 65536.0
    log_sum = top + (tl.log2(total) - 36.0) * LN2
    return log_sum, tl.maximum(gain / total - log_sum + log_base, 0.0)


@triton.jit
def end_row(
    terms,
    draw,
    result,
    virtual,
    row,
    slot,
    plain,
    ids,
    valid,
    z,
    bias,
    whole,
    row_mass,
    log_base,
    log_guarded,
    kl,
    flags,
    RANK: tl.constexpr,
    SUMMARY: tl.constexpr,
):
    """Rectify, warp and draw among these tokens, and write the row's results.

    Args:
        ids, valid, z, bias: the tokens, which of them are there, base logits, bias.
        whole: the tokens are the row's whole support, so that mass and KL are theirs; else they are its upper part.
        row_mass: mass of the whole row relative to its largest score.
        log_base, log_guarded, kl: the row's, as far as known.
    """
    temperature = temperature_of(draw, slot)
    top_k, top_p, min_p = warp_of(draw, slot)
    guarded = z
    if not plain:
        guarded = rectified(terms, z, row, slot, ids, valid, RANK)
    guarded = tl.where(z > float("-inf"), tl.minimum(guarded + bias, LARGEST), float("-inf"))
    guarded = tl.where(valid, guarded, float("-inf"))
    if SUMMARY:
        if whole:
            log_guarded, kl = _summary_of(guarded, z, log_base)
    score = guarded
    if temperature != 0.0:
        score = tempered(guarded, temperature)
    kept = guarded > float("-inf")
    if filters(top_k, top_p, min_p):
        largest = tl.max(score)
        keys = ordered_key(score)
        mass = fixed_mass(score, kept, largest)
        lowest = tl.min(tl.where(kept, keys, 0x7FFFFFFF)) - 1
        highest = ordered_key(largest)
        if top_k > 0:
            kept = kept & (keys >= threshold_key(keys, mass, kept, top_k, NO_TARGET, lowest, highest))
        if top_p < 1.0:
            total = tl.sum(tl.where(kept, mass, 0)).to(tl.float32)
            if (not whole) & (top_k <= 0):
                total = row_mass * MASS_SCALE
            kept = kept & (keys >= threshold_key(keys, mass, kept, NO_LIMIT, mass_target(top_p, total), lowest, highest))
        if min_p > 0.0:
            kept = kept & (score >= largest + tl.log(min_p))
    if temperature != 0.0:
        seed, position = noise_key(draw, row, slot)
        score = score + gumbel_at(seed, position, ids)
    best, token = best_of(tl.where(kept, score, float("-inf")), ids)
    empty = best == float("-inf")
    put_token(result, row, plain, tl.where(empty, 0, token))
    tl.store(result.flags + virtual, tl.where(empty, flags | EMPTY, flags))
    if SUMMARY:
        drawn = tl.max(tl.where(ids == token, guarded, float("-inf")))
        tl.store(result.log_probability + virtual, tl.where(empty, float("-inf"), drawn - log_guarded))
        tl.store(result.kl + virtual, tl.where(empty, 0.0, kl))


@triton.jit
def choose(
    terms,
    draw,
    work,
    result,
    virtual,
    row,
    slot,
    plain,
    survivors,
    vocabulary,
    CAPACITY: tl.constexpr,
    STRIDE: tl.constexpr,
    RANK: tl.constexpr,
    SUMMARY: tl.constexpr,
):
    """End a row whose possible tokens all fit CAPACITY: exact filters of the base, then of the rectified law, then the draw."""
    values = work.row + virtual * 8
    bound = tl.load(values, cache_modifier=".cg")
    largest = tl.load(values + 1, cache_modifier=".cg")
    total = tl.load(values + 2, cache_modifier=".cg")
    log_base = tl.load(values + 3, cache_modifier=".cg")
    log_guarded = tl.load(values + 4, cache_modifier=".cg")
    kl = tl.load(values + 5, cache_modifier=".cg")
    flags = tl.load(result.flags + virtual, cache_modifier=".cg")
    base_k, base_p, base_min = base_filter_of(draw, slot, plain)
    base_filtered = filters(base_k, base_p, base_min)
    candidates = candidates_of(draw, row, plain)

    each = tl.arange(0, CAPACITY)
    valid = each < survivors
    ids = tl.load(work.survivors + virtual.to(tl.int64) * STRIDE + each, mask=valid, other=0, cache_modifier=".cg")
    bias = tl.zeros([CAPACITY], tl.float32)
    z = base_logits(terms, row, ids, valid)
    threshold = LOWEST_KEY + 1
    if base_filtered:
        threshold = base_threshold(draw, z, valid, slot, bound, largest, total)
    if result.threshold is not None:
        tl.store(result.threshold + virtual, threshold)
    else:
        if draw.candidate_ids is not None:
            if candidates >= 0:
                ids, valid, bias = candidate_tokens(draw, row, candidates, vocabulary, CAPACITY)
                z = base_logits(terms, row, ids, valid)
        valid = valid & (ordered_key(z) >= threshold)
        whole = base_filtered | (candidates >= 0)
        end_row(
            terms,
            draw,
            result,
            virtual,
            row,
            slot,
            plain,
            ids,
            valid,
            z,
            bias,
            whole,
            total,
            log_base,
            log_guarded,
            kl,
            flags,
            RANK,
            SUMMARY,
        )
