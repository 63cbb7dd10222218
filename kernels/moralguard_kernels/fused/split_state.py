"""State of a row whose possible tokens overflow the second launch: which stage it is at, and between which keys it searches."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .numerics import LOWEST_KEY, NO_LIMIT, ordered_key
from .rows import SPLIT, base_filter_of, candidates_of, filters, warp_of

SEARCH_BASE = tl.constexpr(0)  # threshold of the base's own filters
SUMS = tl.constexpr(1)  # masses of the rectified law on what the base's filters left
SEARCH_K = tl.constexpr(2)  # threshold of top-k
MASS_K = tl.constexpr(3)  # mass that top-k left
SEARCH_P = tl.constexpr(4)  # threshold of top-p
DRAW = tl.constexpr(5)
OVER = tl.constexpr(1 << 30)


class Split(NamedTuple):
    """Scratch memory of the third launch, R rows.

    Attributes:
        counters: i32[R, 4]: tickets given out, open phase, tiles that have arrived, stage.
        keys: i32[R, 2]: smallest kept key of the base logits, of the scores.
        search: i64[R, 4]: low and high end of the search, tokens over each.
        sums: f32[R, 8]: largest score, mass relative to it, logsumexp of the rectified law, KL, mass that top-p counts against.
        partials: f32[R, tiles, 16].
    """

    counters: Any
    keys: Any
    search: Any
    sums: Any
    partials: Any


@triton.jit
def begin_search(split, virtual, lowest, largest):
    """Search among (lowest, key of the largest score]."""
    search = split.search + virtual * 4
    tl.store(search, lowest.to(tl.int64))
    tl.store(search + 1, ordered_key(largest).to(tl.int64))
    tl.store(search + 2, -1)
    tl.store(search + 3, 0)


@triton.jit
def search_of(draw, split, virtual, slot, stage):
    """(limit, target): the search keeps keys with fewer than limit tokens and less than target mass over them."""
    limit, target = NO_LIMIT + 0, float("inf")
    top_k, top_p, min_p = warp_of(draw, slot)
    if stage == SEARCH_BASE:
        top_k, top_p, min_p = base_filter_of(draw, slot, False)
    if (top_k > 0) & (stage != SEARCH_P):
        limit = top_k
    if (top_p < 1.0) & (stage != SEARCH_K):
        target = tl.maximum(top_p * tl.load(split.sums + virtual * 8 + 4, cache_modifier=".cg"), 1e-30)
    return limit, target


@triton.jit
def stage_after(draw, slot, stage):
    """The next stage; SUMS as ``stage`` also stands for a row whose sums the first launch has taken."""
    top_k, top_p, min_p = warp_of(draw, slot)
    following = DRAW + 0
    if stage == SEARCH_BASE:
        following = SUMS + 0
    if stage == SUMS:
        if top_k > 0:
            following = SEARCH_K + 0
        else:
            if top_p < 1.0:
                following = SEARCH_P + 0
    if (stage == SEARCH_K) & (top_p < 1.0):
        following = MASS_K + 0
    if stage == MASS_K:
        following = SEARCH_P + 0
    return following


@triton.jit
def hand_over(draw, work, split, result, virtual, row, slot, plain):
    """Put a row on the third launch's list; run by the program that came last to the row."""
    values = work.row + virtual * 8
    bound = tl.load(values, cache_modifier=".cg")
    largest = tl.load(values + 1, cache_modifier=".cg")
    total = tl.load(values + 2, cache_modifier=".cg")
    base_k, base_p, base_min = base_filter_of(draw, slot, plain)
    lowest = tl.maximum(ordered_key(bound), LOWEST_KEY + 1) - 1
    base_key, stage = LOWEST_KEY + 1, SUMS + 0
    if filters(base_k, base_p, base_min):
        if base_min > 0.0:
            base_key = ordered_key(largest + tl.log(base_min))
        # candidates are drawn from once the base's threshold is known, so these rows take that stage even without a search
        if (base_k > 0) | (base_p < 1.0) | (candidates_of(draw, row, plain) >= 0) | (result.threshold is not None):
            stage = SEARCH_BASE + 0
    else:
        stage = stage_after(draw, slot, SUMS)
    begin_search(split, virtual, lowest, largest)
    tl.store(split.keys + virtual * 2, base_key)
    tl.store(split.keys + virtual * 2 + 1, LOWEST_KEY + 1)
    tl.store(split.sums + virtual * 8, largest)
    tl.store(split.sums + virtual * 8 + 1, total)
    tl.store(split.sums + virtual * 8 + 2, tl.load(values + 4, cache_modifier=".cg"))
    tl.store(split.sums + virtual * 8 + 3, tl.load(values + 5, cache_modifier=".cg"))
    tl.store(split.sums + virtual * 8 + 4, total)
    counters = split.counters + virtual * 4
    tl.store(counters, 0)
    tl.store(counters + 1, 0)
    tl.store(counters + 2, 0)
    tl.store(counters + 3, stage)
    tl.store(result.flags + virtual, tl.load(result.flags + virtual, cache_modifier=".cg") | SPLIT)
    tl.store(work.overflow + 1 + tl.atomic_add(work.overflow, 1, sem="relaxed"), virtual)
