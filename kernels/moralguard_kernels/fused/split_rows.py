"""Third launch: flat rows, too many of whose tokens may be kept for one program; all programs work on one row's tiles.

A row goes through stages (see ``split_state``), each a sweep over its tiles; a search takes several. Programs take tickets of a row:
ticket t is tile t % tiles of phase t // tiles. A phase opens when the last tile of the one before has arrived, so a ticket waits only
for tickets given out earlier, whose holders run already: however few programs the machine runs at a time, one is never waited for
that has not begun. Sums are merged in the order of tiles, so that a row's result depends on nothing else.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .choose import candidate_tokens, end_row
from .noise import gumbel_of_tile
from .numerics import LN2, LOWEST_KEY, best_of, finite_or_zero, merged_mass, ordered_key, relative_mass, sanitized, tempered
from .rows import EMPTY, candidates_of, locate, noise_key, put_token, temperature_of, warp_of
from .split_state import DRAW, MASS_K, OVER, SEARCH_BASE, SEARCH_K, SEARCH_P, SUMS, begin_search, search_of, stage_after
from .terms import base_logits, raw_logits, rectified

# keys tried at once: each sweep leaves an eighth of the range
_PIVOTS = tl.constexpr(7)


@triton.jit
def _searching(stage):
    return (stage == SEARCH_BASE) | (stage == SEARCH_K) | (stage == SEARCH_P)


@triton.jit
def _step_of(low, high):
    return tl.maximum((high - low) // (_PIVOTS + 1), 1)


@triton.jit
def _sweep(terms, draw, split, virtual, rows, vocabulary, tiles, tile, stage, RANK: tl.constexpr, TILE: tl.constexpr):
    """One tile's part in a stage."""
    row, slot, plain = locate(terms, virtual, rows)
    temperature = temperature_of(draw, slot)
    ids = tile * TILE + tl.arange(0, TILE)
    mask = ids < vocabulary
    z = base_logits(terms, row, ids, mask)
    kept = (z > float("-inf")) & (ordered_key(z) >= tl.load(split.keys + virtual * 2, cache_modifier=".cg"))
    guarded = z
    if (not plain) & (stage != SEARCH_BASE):
        guarded = rectified(terms, z, row, slot, ids, mask, RANK)
    kept = kept & (guarded > float("-inf"))
    score = guarded
    if (temperature != 0.0) & (stage != SEARCH_BASE):
        score = tempered(guarded, temperature)
    keys = ordered_key(score)
    kept = kept & (keys >= tl.load(split.keys + virtual * 2 + 1, cache_modifier=".cg"))
    largest = tl.load(split.sums + virtual * 8, cache_modifier=".cg")
    partial = split.partials + (virtual.to(tl.int64) * tiles + tile) * 16
    if _searching(stage):
        mass = tl.where(kept, relative_mass(score, largest), 0.0)
        low = tl.load(split.search + virtual * 4, cache_modifier=".cg")
        high = tl.load(split.search + virtual * 4 + 1, cache_modifier=".cg")
        step = _step_of(low, high)
        for f in tl.static_range(_PIVOTS):
            above = kept & (keys > tl.minimum(low + (f + 1) * step, high).to(tl.int32))
            tl.store(partial + f, tl.sum(above.to(tl.int32)).to(tl.float32))
            tl.store(partial + 8 + f, tl.sum(tl.where(above, mass, 0.0)))
    if stage == MASS_K:
        tl.store(partial, tl.sum(tl.where(kept, relative_mass(score, largest), 0.0)))
    if stage == SUMS:
        score = tl.where(kept, score, float("-inf"))
        top = tl.max(score)
        tl.store(partial, top)
        tl.store(partial + 1, tl.sum(relative_mass(score, top)))
        guarded = tl.where(kept, guarded, float("-inf"))
        top = tl.max(guarded)
        mass = relative_mass(guarded, top)
        tl.store(partial + 2, top)
        tl.store(partial + 3, tl.sum(mass))
        tl.store(partial + 4, tl.sum(tl.where(mass > 0.0, mass * finite_or_zero(guarded - z), 0.0)))
    if stage == DRAW:
        top_k, top_p, min_p = warp_of(draw, slot)
        if min_p > 0.0:
            kept = kept & (score >= largest + tl.log(min_p))
        if draw.seed is not None:
            if temperature != 0.0:
                seed, position = noise_key(draw, row, slot)
                score = score + gumbel_of_tile(seed, position, tile * TILE, TILE)
        best, token = best_of(tl.where(kept, score, float("-inf")), ids)
        tl.store(partial, best)
        tl.store(partial + 1, token.to(tl.float32, bitcast=True))


@triton.jit
def _narrow(draw, split, virtual, slot, tiles, stage, TILES: tl.constexpr):
    """New ends of the search after a sweep; whether it is over."""
    each = tl.arange(0, TILES)
    partials = split.partials + (virtual.to(tl.int64) * tiles + each) * 16
    search = split.search + virtual * 4
    low = tl.load(search, cache_modifier=".cg")
    high = tl.load(search + 1, cache_modifier=".cg")
    above_low = tl.load(search + 2, cache_modifier=".cg")
    above_high = tl.load(search + 3, cache_modifier=".cg")
    step = _step_of(low, high)
    limit, target = search_of(draw, split, virtual, slot, stage)
    start, end = low, high
    for f in tl.static_range(_PIVOTS):
        pivot = start + (f + 1) * step
        count = tl.sum(tl.load(partials + f, mask=each < tiles, other=0.0, cache_modifier=".cg").to(tl.int32))
        mass = tl.sum(tl.load(partials + 8 + f, mask=each < tiles, other=0.0, cache_modifier=".cg"))
        inside = (count < limit) & (mass < target)
        # pivots rise: the last one outside is the new low end, the first one inside the new high end
        outside_here = (pivot < end) & (not inside)
        inside_here = (pivot < high) & inside
        low = tl.where(outside_here, pivot, low)
        above_low = tl.where(outside_here, count.to(tl.int64), above_low)
        high = tl.where(inside_here, pivot, high)
        above_high = tl.where(inside_here, count.to(tl.int64), above_high)
    tl.store(search, low)
    tl.store(search + 1, high)
    tl.store(search + 2, above_low)
    tl.store(search + 3, above_high)
    return high, (high - low <= 1) | (above_low == above_high)


@triton.jit
def _finish(terms, draw, split, result, virtual, row, slot, plain, tiles, TILES: tl.constexpr, RANK: tl.constexpr, SUMMARY: tl.constexpr):
    """Write the token that won over all tiles."""
    each = tl.arange(0, TILES)
    there = each < tiles
    partials = split.partials + (virtual.to(tl.int64) * tiles + each) * 16
    best, token = best_of(
        tl.load(partials, mask=there, other=float("-inf"), cache_modifier=".cg"),
        tl.load(partials + 1, mask=there, other=0.0, cache_modifier=".cg").to(tl.int32, bitcast=True),
    )
    empty = best == float("-inf")
    token = tl.where(empty, 0, token)
    put_token(result, row, plain, token)
    if empty:
        tl.store(result.flags + virtual, tl.load(result.flags + virtual, cache_modifier=".cg") | EMPTY)
    if SUMMARY:
        one = token + tl.arange(0, 1)
        at = sanitized(raw_logits(terms.base, row, one, one >= 0))
        if not plain:
            at = rectified(terms, at, row, slot, one, one >= 0, RANK)
        log_guarded = tl.load(split.sums + virtual * 8 + 2, cache_modifier=".cg")
        kl = tl.load(split.sums + virtual * 8 + 3, cache_modifier=".cg")
        tl.store(result.log_probability + virtual, tl.where(empty, float("-inf"), tl.max(at) - log_guarded))
        tl.store(result.kl + virtual, tl.where(empty, 0.0, kl))


@triton.jit
def _add_up(work, split, virtual, tiles, TILES: tl.constexpr):
    """Masses of the rectified law on what the base's filters left."""
    each = tl.arange(0, TILES)
    there = each < tiles
    partials = split.partials + (virtual.to(tl.int64) * tiles + each) * 16
    values = split.sums + virtual * 8
    maxima = tl.load(partials, mask=there, other=float("-inf"), cache_modifier=".cg")
    largest = tl.max(maxima)
    total = merged_mass(maxima, tl.load(partials + 1, mask=there, other=0.0, cache_modifier=".cg"), largest)
    tl.store(values, largest)
    tl.store(values + 1, total)
    tl.store(values + 4, total)
    maxima = tl.load(partials + 2, mask=there, other=float("-inf"), cache_modifier=".cg")
    top = tl.max(maxima)
    mass = merged_mass(maxima, tl.load(partials + 3, mask=there, other=0.0, cache_modifier=".cg"), top)
    moved = merged_mass(maxima, tl.load(partials + 4, mask=there, other=0.0, cache_modifier=".cg"), top)
    log_guarded = top + tl.log2(mass) * LN2
    log_base = tl.load(work.row + virtual * 8 + 3, cache_modifier=".cg")
    tl.store(values + 2, log_guarded)
    tl.store(values + 3, tl.maximum(moved / mass - log_guarded + log_base, 0.0))
    return largest


@triton.jit
def _end_phase(
    terms,
    draw,
    work,
    split,
    result,
    virtual,
    rows,
    vocabulary,
    tiles,
    stage,
    phase,
    RANK: tl.constexpr,
    TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    SUMMARY: tl.constexpr,
):
    """What the program that came last to a phase does: decide, and open the next phase or close the row."""
    row, slot, plain = locate(terms, virtual, rows)
    following = stage
    closed = stage == DRAW
    if _searching(stage):
        threshold, over = _narrow(draw, split, virtual, slot, tiles, stage, TILES)
        if over:
            following = stage_after(draw, slot, stage)
            place = split.keys + virtual * 2
            if stage != SEARCH_BASE:
                place += 1
            key = tl.maximum(threshold.to(tl.int32), tl.load(place, cache_modifier=".cg"))
            tl.store(place, key)
            candidates = candidates_of(draw, row, plain)
            if result.threshold is not None:
                tl.store(result.threshold + virtual, key)
                closed = True
            if CANDIDATES > 0:
                if (stage == SEARCH_BASE) & (candidates >= 0):
                    ids, valid, bias = candidate_tokens(draw, row, candidates, vocabulary, CANDIDATES)
                    z = base_logits(terms, row, ids, valid)
                    valid = valid & (ordered_key(z) >= key)
                    flags = tl.load(result.flags + virtual, cache_modifier=".cg")
                    log_base = tl.load(work.row + virtual * 8 + 3, cache_modifier=".cg")
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
                        True,
                        0.0,
                        log_base,
                        0.0,
                        0.0,
                        flags,
                        RANK,
                        SUMMARY,
                    )
                    closed = True
    else:
        if stage == SUMS:
            largest = _add_up(work, split, virtual, tiles, TILES)
            following = stage_after(draw, slot, stage)
            begin_search(split, virtual, tl.zeros_like(phase) + LOWEST_KEY, largest)
        if stage == MASS_K:
            each = tl.arange(0, TILES)
            partials = split.partials + (virtual.to(tl.int64) * tiles + each) * 16
            tl.store(split.sums + virtual * 8 + 4, tl.sum(tl.load(partials, mask=each < tiles, other=0.0, cache_modifier=".cg")))
            following = stage_after(draw, slot, stage)
            lowest = tl.load(split.keys + virtual * 2 + 1, cache_modifier=".cg") - 1
            begin_search(split, virtual, lowest, tl.load(split.sums + virtual * 8, cache_modifier=".cg"))
        if result.threshold is None:
            if stage == DRAW:
                _finish(terms, draw, split, result, virtual, row, slot, plain, tiles, TILES, RANK, SUMMARY)
    counters = split.counters + virtual * 4
    tl.store(counters + 2, 0)
    tl.store(counters + 3, following)
    tl.debug_barrier()
    tl.atomic_xchg(counters + 1, tl.where(closed, OVER, phase + 1), sem="release")


@triton.jit(do_not_specialize=["rows"])  # else a batch of one, and one of 16, would be compiled anew
def split_rows_kernel(
    terms,
    draw,
    work,
    split,
    result,
    rows,
    vocabulary,
    tiles,
    RANK: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    SUMMARY: tl.constexpr,
):
    """Grid of any size; ends at once where no row overflowed."""
    number = tl.load(work.overflow)
    turn = 0
    while turn < number:
        # every program works on a row until it is closed, then on the next one; it begins where few others do
        virtual = tl.load(work.overflow + 1 + (tl.program_id(0) + turn) % number)
        counters = split.counters + virtual * 4
        ticket = tl.atomic_add(counters, 1, sem="relaxed")
        phase, tile = ticket // tiles, ticket % tiles
        opened = tl.atomic_add(counters + 1, 0, sem="acquire")
        while opened < phase:
            opened = tl.atomic_add(counters + 1, 0, sem="acquire")
        tl.debug_barrier()
        if opened >= OVER:
            turn += 1
        else:
            stage = tl.load(counters + 3, cache_modifier=".cg")
            _sweep(terms, draw, split, virtual, rows, vocabulary, tiles, tile, stage, RANK, TILE)
            tl.debug_barrier()
            if tl.atomic_add(counters + 2, 1, sem="acq_rel") == tiles - 1:
                tl.debug_barrier()
                _end_phase(
                    terms, draw, work, split, result, virtual, rows, vocabulary, tiles, stage, phase, RANK, TILES, CANDIDATES, SUMMARY
                )
