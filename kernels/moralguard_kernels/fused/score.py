"""What the rectified law says of given tokens, in one launch over the logits: no rectified row is ever stored.

Each program sums a tile, for the base and for the rectified law without the row's token; the program that comes last to a row merges
the tiles in their order and adds the token. The law's other tokens are summed without it, never by subtracting it: that is what keeps
the log-odds of a token with nearly all the mass exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dense import candidates_at
from .numerics import LN2, LOG2E, LOWEST_KEY, finite_or_zero, merged_mass, ordered_key, relative_mass
from .terms import base_logits, rectified, slot_of


@triton.jit
def _log1p(u):
    """log(1 + u) for 0 <= u <= 1; what 1 + u rounds away is put back, so that a small u is its own logarithm."""
    rounded = 1.0 + u
    return tl.where(rounded == 1.0, u, tl.log(rounded) * (u / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))


@triton.jit
def _members(ids_of, row, count, first, CANDIDATES: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """bool[TILE]: which of the tile's tokens are among the row's candidates."""
    found = tl.zeros([TILE], tl.int32)
    for start in tl.range(0, CANDIDATES, CHUNK):
        each = start + tl.arange(0, CHUNK)
        there = each < count
        chosen = tl.load(ids_of[0] + row.to(tl.int64) * ids_of[1] + each, mask=there, other=-1).to(tl.int32)
        there = there & (chosen >= first) & (chosen < first + TILE)
        found += tl.histogram(tl.where(there, chosen - first, 0), TILE, mask=there)
    return found > 0


@triton.jit
def _with_candidates(
    terms,
    ids_of,
    bias_of,
    row,
    slot,
    token,
    count,
    threshold,
    vocabulary,
    own,
    top,
    mass,
    moved,
    RANK: tl.constexpr,
    CANDIDATES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The token's logit and the sums over the other tokens, with the row's candidates added to them."""
    for start in tl.range(0, CANDIDATES, CHUNK):
        each = start + tl.arange(0, CHUNK)
        chosen, there, at, biased = candidates_at(terms, ids_of, bias_of, row, slot, each, count, threshold, vocabulary, RANK)
        is_token = there & (chosen == token)
        if tl.max(is_token.to(tl.int32)) > 0:
            own = tl.max(tl.where(is_token, biased, float("-inf")))
        others = tl.where(there & (chosen != token), biased, float("-inf"))
        largest = tl.maximum(top, tl.max(others))
        before = tl.where(top > float("-inf"), tl.exp2((top - largest) * LOG2E), 0.0)
        part = relative_mass(others, largest)
        mass = mass * before + tl.sum(part)
        moved = moved * before + tl.sum(tl.where(part > 0.0, part * finite_or_zero(others - at), 0.0))
        top = largest
    return own, top, mass, moved


@triton.jit
def score_kernel(
    terms,
    thresholds,
    ids_of,
    bias_of,
    counts,
    tokens,
    log_probability,
    log_odds,
    kl,
    partials,
    arrivals,
    vocabulary,
    tiles,
    RANK: tl.constexpr,
    KEEP_REST: tl.constexpr,
    CANDIDATES: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Grid (tiles, N); partials f32[N, tiles, 5]. CHUNK divides CANDIDATES; TILES is a power of two, at least tiles."""
    tile, row = tl.program_id(0), tl.program_id(1)
    slot = slot_of(terms, row)
    token = tl.load(tokens + row).to(tl.int32)
    threshold = LOWEST_KEY + 1
    if thresholds is not None:
        threshold = tl.load(thresholds + row)
    count = -1
    if ids_of is not None:
        count = tl.load(counts + row).to(tl.int32)
    ids = tile * TILE + tl.arange(0, TILE)
    mask = ids < vocabulary
    z = base_logits(terms, row, ids, mask)
    others = tl.where(ids == token, float("-inf"), rectified(terms, z, row, slot, ids, mask, RANK))
    if thresholds is not None:
        others = tl.where(ordered_key(z) >= threshold, others, float("-inf"))
    if ids_of is not None:
        # the last program adds a row's candidates, so here they are no part of it
        if KEEP_REST:
            if count > 0:
                inside = _members(ids_of, row, count, tile * TILE, CANDIDATES, CHUNK, TILE)
                others = tl.where(inside, float("-inf"), others)
        else:
            others = tl.where(count >= 0, float("-inf"), others)
    partial = partials + (row.to(tl.int64) * tiles + tile) * 5
    top = tl.max(z)
    tl.store(partial, top)
    tl.store(partial + 1, tl.sum(relative_mass(z, top)))
    top = tl.max(others)
    mass = relative_mass(others, top)
    tl.store(partial + 2, top)
    tl.store(partial + 3, tl.sum(mass))
    tl.store(partial + 4, tl.sum(tl.where(mass > 0.0, mass * finite_or_zero(others - z), 0.0)))
    tl.debug_barrier()
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == tiles - 1:
        tl.debug_barrier()
        tl.store(arrivals + row, 0)
        _end_row(
            terms,
            ids_of,
            bias_of,
            row,
            slot,
            token,
            count,
            threshold,
            log_probability,
            log_odds,
            kl,
            partials,
            vocabulary,
            tiles,
            RANK,
            KEEP_REST,
            CANDIDATES,
            CHUNK,
            TILES,
        )


@triton.jit
def _end_row(
    terms,
    ids_of,
    bias_of,
    row,
    slot,
    token,
    count,
    threshold,
    log_probability,
    log_odds,
    kl,
    partials,
    vocabulary,
    tiles,
    RANK: tl.constexpr,
    KEEP_REST: tl.constexpr,
    CANDIDATES: tl.constexpr,
    CHUNK: tl.constexpr,
    TILES: tl.constexpr,
):
    """Merge a row's tiles, add its candidates and its token, write its results."""
    each = tl.arange(0, TILES)
    there = each < tiles
    partial = partials + (row.to(tl.int64) * tiles + each) * 5
    maxima = tl.load(partial, mask=there, other=float("-inf"), cache_modifier=".cg")
    base_top = tl.max(maxima)
    base_mass = merged_mass(maxima, tl.load(partial + 1, mask=there, other=0.0, cache_modifier=".cg"), base_top)
    maxima = tl.load(partial + 2, mask=there, other=float("-inf"), cache_modifier=".cg")
    top = tl.max(maxima)
    mass = merged_mass(maxima, tl.load(partial + 3, mask=there, other=0.0, cache_modifier=".cg"), top)
    moved = merged_mass(maxima, tl.load(partial + 4, mask=there, other=0.0, cache_modifier=".cg"), top)

    one = token + tl.arange(0, 1)
    inside = (one >= 0) & (one < vocabulary)
    z = base_logits(terms, row, one, inside)
    guarded = rectified(terms, z, row, slot, one, inside, RANK)
    own = tl.max(tl.where(ordered_key(z) >= threshold, guarded, float("-inf")))
    if ids_of is not None:
        if not KEEP_REST:
            own = tl.where(count >= 0, float("-inf"), own)
        if count > 0:
            own, top, mass, moved = _with_candidates(
                terms, ids_of, bias_of, row, slot, token, count, threshold, vocabulary, own, top, mass, moved, RANK, CANDIDATES, CHUNK
            )
    removed = own == float("-inf")
    alone = top == float("-inf")
    odds = tl.where(alone, float("inf"), (own - tl.where(alone, 0.0, top)) - tl.log2(tl.where(alone, 1.0, mass)) * LN2)
    odds = tl.where(removed, float("-inf"), odds)
    tl.store(log_odds + row, odds)
    # log p = -log(1 + exp(-odds)), which loses nothing where p is close to 1
    tl.store(log_probability + row, tl.minimum(odds, 0.0) - _log1p(tl.exp2(-tl.abs(odds) * LOG2E)))

    largest = tl.maximum(top, own)
    before = tl.where(alone, 0.0, tl.exp2((top - largest) * LOG2E))
    weight = tl.where(removed, 0.0, tl.exp2((own - largest) * LOG2E))
    total = mass * before + weight
    gain = moved * before + weight * finite_or_zero(own - tl.max(z))
    distance = gain / total - (largest - base_top) - (tl.log2(total) - tl.log2(base_mass)) * LN2
    tl.store(kl + row, tl.where(largest == float("-inf"), 0.0, tl.maximum(distance, 0.0)))
