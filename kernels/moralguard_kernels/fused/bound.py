"""First launch: read the logits once, bound the threshold of every row from below, draw where nothing is filtered.

A row is scored by its base logits where the base is filtered (the filter comes first, so that experts are read at survivors only),
else by its rectified logits over the temperature. Each group of tokens leaves its largest score and its mass; the program that
comes last to a row turns them into a bound: a token under it can't be kept.

    mass{y >= x} >= sum over groups with largest y_g >= x of max(exp(y_g), mass_g - (n - 1) exp(x))     n tokens a group

so once the right side reaches p times the total, or k groups have y_g >= x, everything under x is out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .noise import gumbel_of_tile
from .numerics import LN2, LOG2E, LOWEST_KEY, best_of, finite_or_zero, merged_mass, relative_mass, sanitized, tempered
from .rows import EMPTY, NAN_LOGITS, base_filter_of, candidates_of, filters, locate, noise_key, put_token, temperature_of, warp_of
from .terms import raw_logits, rectified

# halvings of the range in which the bound is looked for: a few thousandths of a nat
_STEPS = tl.constexpr(11)


@triton.jit
def _reaches(x, maxima, masses, largest, target, top_k, GROUP: tl.constexpr):
    """Whether no token under x can be kept."""
    at_least = maxima >= x
    peak = tl.where(maxima > float("-inf"), tl.exp2((maxima - largest) * LOG2E), 0.0)
    under = tl.exp2((x - largest) * LOG2E) * (GROUP - 1)
    sure = tl.sum(tl.where(at_least, tl.maximum(peak, masses * peak - under), 0.0))
    count = tl.sum(at_least.to(tl.int32))
    return (sure >= target) | ((top_k > 0) & (count >= top_k))


@triton.jit
def lower_bound(maxima, masses, largest, total, top_k, top_p, min_p, GROUP: tl.constexpr):
    """A score under which no token is kept; -inf where none is known."""
    # float32 sums of a few thousand terms: this much more than p of the mass is surely p of it
    target = tl.where(top_p < 1.0, top_p * total * 1.00002, float("inf"))
    low = tl.min(tl.where(maxima > float("-inf"), maxima, largest))
    low = tl.maximum(low, largest - 80.0)
    bound = float("-inf")
    if _reaches(low, maxima, masses, largest, target, top_k, GROUP):
        high = largest
        for _ in range(_STEPS):
            middle = low + (high - low) * 0.5
            if _reaches(middle, maxima, masses, largest, target, top_k, GROUP):
                low = middle
            else:
                high = middle
        bound = low
    if min_p > 0.0:
        bound = tl.maximum(bound, largest + tl.log(min_p) - 1e-3)
    return bound


@triton.jit
def _summary_of(partials, there):
    """(logsumexp of the base, of the rectified law, KL) from the tiles' sums."""
    maxima = tl.load(partials + 1, mask=there, other=float("-inf"), cache_modifier=".cg")
    top = tl.max(maxima)
    log_base = top + tl.log2(merged_mass(maxima, tl.load(partials + 2, mask=there, other=0.0, cache_modifier=".cg"), top)) * LN2
    maxima = tl.load(partials + 3, mask=there, other=float("-inf"), cache_modifier=".cg")
    top = tl.max(maxima)
    mass = merged_mass(maxima, tl.load(partials + 4, mask=there, other=0.0, cache_modifier=".cg"), top)
    moved = merged_mass(maxima, tl.load(partials + 5, mask=there, other=0.0, cache_modifier=".cg"), top)
    log_guarded = top + tl.log2(mass) * LN2
    return log_base, log_guarded, tl.maximum(moved / mass - log_guarded + log_base, 0.0)


@triton.jit
def _end_direct(terms, result, virtual, row, slot, plain, partials, there, log_guarded, kl, RANK: tl.constexpr, SUMMARY: tl.constexpr):
    """Results of a row in which nothing is filtered; whether it has no token left."""
    best, token = best_of(
        tl.load(partials + 6, mask=there, other=float("-inf"), cache_modifier=".cg"),
        tl.load(partials + 7, mask=there, other=0.0, cache_modifier=".cg").to(tl.int32, bitcast=True),
    )
    empty = best == float("-inf")
    token = tl.where(empty, 0, token)
    if result.threshold is not None:
        tl.store(result.threshold + virtual, LOWEST_KEY + 1)
    else:
        put_token(result, row, plain, token)
    if SUMMARY:
        one = token + tl.arange(0, 1)
        at = sanitized(raw_logits(terms.base, row, one, one >= 0))
        if not plain:
            at = rectified(terms, at, row, slot, one, one >= 0, RANK)
        tl.store(result.log_probability + virtual, tl.where(empty, float("-inf"), tl.max(at) - log_guarded))
        tl.store(result.kl + virtual, tl.where(empty, 0.0, kl))
    return empty


@triton.jit
def _set_bound(
    draw, work, result, virtual, row, slot, plain, candidates, groups, GROUP: tl.constexpr, GROUPS: tl.constexpr, SUMMARY: tl.constexpr
):
    """Store what the second launch needs; whether the row has no token at all."""
    each = tl.arange(0, GROUPS)
    place = virtual.to(tl.int64) * groups + each
    maxima = tl.load(work.group_max + place, mask=each < groups, other=float("-inf"), cache_modifier=".cg")
    masses = tl.load(work.group_mass + place, mask=each < groups, other=0.0, cache_modifier=".cg")
    largest = tl.max(maxima)
    total = merged_mass(maxima, masses, largest)
    base_k, base_p, base_min = base_filter_of(draw, slot, plain)
    top_k, top_p, min_p = warp_of(draw, slot)
    if filters(base_k, base_p, base_min):
        top_k, top_p, min_p = base_k, base_p, base_min
    else:
        if candidates >= 0:
            top_k, top_p, min_p = 0, 1.0, 0.0
        if (top_k > 0) & (top_p < 1.0):
            # top-p counts against the mass that top-k left, so all of what top-k leaves has to be gathered
            top_p, min_p = 1.0, 0.0
    bound = lower_bound(maxima, masses, largest, total, top_k, top_p, min_p, GROUP)
    values = work.row + virtual * 8
    tl.store(values, bound)
    tl.store(values + 1, largest)
    tl.store(values + 2, total)
    empty = largest == float("-inf")
    if empty:
        if result.threshold is not None:
            tl.store(result.threshold + virtual, LOWEST_KEY + 1)
        else:
            put_token(result, row, plain, tl.zeros_like(row))
        if SUMMARY:
            tl.store(result.log_probability + virtual, float("-inf"))
            tl.store(result.kl + virtual, 0.0)
    return empty


@triton.jit(do_not_specialize=["rows"])  # else a batch of one, and one of 16, would be compiled anew
def bound_kernel(
    terms,
    draw,
    work,
    result,
    rows,
    vocabulary,
    groups,
    tiles,
    RANK: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    SUMMARY: tl.constexpr,
):
    """Grid (tiles, R). TILE is a multiple of GROUP; GROUPS and TILES are powers of two, at least groups and tiles."""
    tile, virtual = tl.program_id(0), tl.program_id(1)
    row, slot, plain = locate(terms, virtual, rows)
    base_k, base_p, base_min = base_filter_of(draw, slot, plain)
    base_filtered = filters(base_k, base_p, base_min)
    candidates = candidates_of(draw, row, plain)
    temperature = temperature_of(draw, slot)
    top_k, top_p, min_p = warp_of(draw, slot)
    direct = (not base_filtered) & (candidates < 0) & (not filters(top_k, top_p, min_p))

    ids = tile * TILE + tl.arange(0, TILE)
    mask = ids < vocabulary
    raw = raw_logits(terms.base, row, ids, mask)
    z = sanitized(raw)
    guarded = z
    if (not plain) & (not base_filtered) & (candidates < 0):
        guarded = rectified(terms, z, row, slot, ids, mask, RANK)
    score = guarded
    if (not base_filtered) & (temperature != 0.0):
        score = tempered(guarded, temperature)

    partial = work.tiles + (virtual.to(tl.int64) * tiles + tile) * 8
    tl.store(partial, tl.max((raw != raw).to(tl.int32)).to(tl.float32))
    if SUMMARY:
        base_max, guarded_max = tl.max(z), tl.max(guarded)
        tl.store(partial + 1, base_max)
        tl.store(partial + 2, tl.sum(relative_mass(z, base_max)))
        mass = relative_mass(guarded, guarded_max)
        tl.store(partial + 3, guarded_max)
        tl.store(partial + 4, tl.sum(mass))
        tl.store(partial + 5, tl.sum(tl.where(mass > 0.0, mass * finite_or_zero(guarded - z), 0.0)))
    if direct:
        noisy = score
        if result.threshold is None:
            if temperature != 0.0:
                seed, position = noise_key(draw, row, slot)
                noisy = score + gumbel_of_tile(seed, position, tile * TILE, TILE)
        best, token = best_of(noisy, ids)
        tl.store(partial + 6, best)
        tl.store(partial + 7, token.to(tl.float32, bitcast=True))
    else:
        grouped = tl.reshape(score, [TILE // GROUP, GROUP])
        largest = tl.max(grouped, axis=1)
        group = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
        place = virtual.to(tl.int64) * groups + group
        tl.store(work.group_max + place, largest, mask=group < groups)
        safe = tl.where(largest > float("-inf"), largest, 0.0)
        spread = tl.exp2((grouped - tl.expand_dims(safe, 1)) * LOG2E)
        tl.store(work.group_mass + place, tl.sum(spread, axis=1), mask=group < groups)

    # What this program wrote must be seen by whichever comes last: all its threads first, then one release.
    tl.debug_barrier()
    if tl.atomic_add(work.arrivals + virtual, 1, sem="acq_rel") == tiles - 1:
        tl.debug_barrier()
        tl.store(work.arrivals + virtual, 0)
        if virtual == 0:
            tl.store(work.overflow, 0)
        each = tl.arange(0, TILES)
        partials = work.tiles + (virtual.to(tl.int64) * tiles + each) * 8
        there = each < tiles
        flags = tl.where(tl.max(tl.load(partials, mask=there, other=0.0, cache_modifier=".cg")) > 0.0, NAN_LOGITS, 0)
        log_base, log_guarded, kl = 0.0, 0.0, 0.0
        if SUMMARY:
            log_base, log_guarded, kl = _summary_of(partials, there)
        values, state = work.row + virtual * 8, work.state + virtual * 4
        tl.store(values + 3, log_base)
        tl.store(values + 4, log_guarded)
        tl.store(values + 5, kl)
        if direct:
            empty = _end_direct(terms, result, virtual, row, slot, plain, partials, there, log_guarded, kl, RANK, SUMMARY)
        else:
            empty = _set_bound(draw, work, result, virtual, row, slot, plain, candidates, groups, GROUP, GROUPS, SUMMARY)
        tl.store(result.flags + virtual, tl.where(empty, flags | EMPTY, flags))
        tl.store(state, (direct | empty).to(tl.int32))
        tl.store(state + 1, 0)
        tl.store(state + 2, 0)
