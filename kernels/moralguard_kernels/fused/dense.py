"""Dense rectification in one launch, and the log-sums that an attenuation needs before it."""

from __future__ import annotations

import triton
import triton.language as tl

from .noise import gumbel_at
from .numerics import LARGEST, LN2, LOG2E, finite_or_zero, merged_mass, ordered_key, sanitized
from .terms import base_logits, raw_logits, rectified, slot_of


@triton.jit
def _sum_tile(matrix, row, ids, mask, partial, BASE: tl.constexpr):
    """Largest logit of a tile and sum of exp(logit - largest), which NaN or +inf in a biased source makes NaN."""
    z = raw_logits(matrix, row, ids, mask)
    if BASE:
        z = sanitized(z)
    top = tl.max(z)
    tl.store(partial, top)
    tl.store(partial + 1, tl.where(top == float("-inf"), 0.0, tl.sum(tl.exp2((z - top) * LOG2E))))


@triton.jit
def log_sums_kernel(terms, partials, log_sums, arrivals, vocabulary, tiles, TILE: tl.constexpr, TILES: tl.constexpr):
    """Grid (tiles, N): logsumexp of the base and of every biased source; NaN where a biased source holds NaN or +inf, or nothing."""
    tile, row = tl.program_id(0), tl.program_id(1)
    ids = tile * TILE + tl.arange(0, TILE)
    mask = ids < vocabulary
    width = len(terms.biased) + 1
    partial = partials + (row.to(tl.int64) * tiles + tile) * width * 2
    _sum_tile(terms.base, row, ids, mask, partial, True)
    for j in tl.static_range(len(terms.biased)):
        _sum_tile(terms.biased[j], row, ids, mask, partial + 2 * (j + 1), False)
    tl.debug_barrier()
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == tiles - 1:
        tl.debug_barrier()
        tl.store(arrivals + row, 0)
        each = tl.arange(0, TILES)
        there = each < tiles
        for j in tl.static_range(len(terms.biased) + 1):
            place = partials + ((row.to(tl.int64) * tiles + each) * width + j) * 2
            maxima = tl.load(place, mask=there, other=float("-inf"), cache_modifier=".cg")
            masses = tl.load(place + 1, mask=there, other=0.0, cache_modifier=".cg")
            top = tl.max(maxima)
            # a NaN among the masses stays; a source without any token is as broken
            total = tl.where(top == float("-inf"), float("nan"), top + tl.log2(merged_mass(maxima, masses, top)) * LN2)
            tl.store(log_sums + row.to(tl.int64) * width + j, total)


@triton.jit
def candidates_at(terms, ids_of, bias_of, row, slot, each, count, threshold, vocabulary, RANK: tl.constexpr):
    """(ids, which of them there are, base logits, rectified logits with their bias) of a row's candidates at these places.

    Ids outside the vocabulary aren't there; what the base's filters remove (keys under ``threshold``) is -inf.
    """
    there = each < count
    chosen = tl.load(ids_of[0] + row.to(tl.int64) * ids_of[1] + each, mask=there, other=0).to(tl.int32)
    there = there & (chosen >= 0) & (chosen < vocabulary)
    bias = finite_or_zero(tl.load(bias_of[0] + row.to(tl.int64) * bias_of[1] + each, mask=there, other=0.0).to(tl.float32))
    at = base_logits(terms, row, chosen, there)
    biased = rectified(terms, at, row, slot, chosen, there, RANK)
    biased = tl.where(at > float("-inf"), tl.minimum(biased + bias, LARGEST), float("-inf"))
    return chosen, there, at, tl.where(ordered_key(at) >= threshold, biased, float("-inf"))


@triton.jit
def rectify_kernel(
    terms,
    thresholds,
    ids_of,
    bias_of,
    counts,
    out,
    out_stride,
    arrivals,
    vocabulary,
    tiles,
    RANK: tl.constexpr,
    KEEP_REST: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (tiles, N). Candidates are written by the program that comes last to the row, over what the others wrote."""
    tile, row = tl.program_id(0), tl.program_id(1)
    slot = slot_of(terms, row)
    threshold = -2139095040
    if thresholds is not None:
        threshold = tl.load(thresholds + row)
    ids = tile * TILE + tl.arange(0, TILE)
    mask = ids < vocabulary
    z = base_logits(terms, row, ids, mask)
    guarded = rectified(terms, z, row, slot, ids, mask, RANK)
    if thresholds is not None:
        guarded = tl.where(ordered_key(z) >= threshold, guarded, float("-inf"))
    if ids_of is not None:
        count = tl.load(counts + row).to(tl.int32)
        if not KEEP_REST:
            guarded = tl.where(count >= 0, float("-inf"), guarded)
    place = out + row.to(tl.int64) * out_stride
    tl.store(place + ids, guarded.to(out.dtype.element_ty), mask=mask)
    if ids_of is not None:
        tl.debug_barrier()
        if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == tiles - 1:
            tl.debug_barrier()
            tl.store(arrivals + row, 0)
            each = tl.arange(0, CANDIDATES)
            chosen, there, _, biased = candidates_at(terms, ids_of, bias_of, row, slot, each, count, threshold, vocabulary, RANK)
            tl.store(place + chosen, biased.to(out.dtype.element_ty), mask=there)


@triton.jit
def gumbel_kernel(seed, position, ids_of, out, columns, BLOCK: tl.constexpr):
    """Grid (blocks of columns, rows): the noise of given tokens, for those who draw by themselves."""
    from_column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1)
    mask = from_column < columns
    place = row.to(tl.int64) * columns + from_column
    ids = tl.load(ids_of + place, mask=mask, other=0).to(tl.int32)
    tl.store(out + place, gumbel_at(tl.load(seed + row).to(tl.int64), tl.load(position + row), ids), mask=mask)
