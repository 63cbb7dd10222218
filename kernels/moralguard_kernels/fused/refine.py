"""Second launch: gather the tokens over the bound, and let the program that comes last to a row end it exactly."""

from __future__ import annotations

import triton
import triton.language as tl

from .choose import choose
from .numerics import tempered
from .rows import base_filter_of, candidates_of, filters, locate, temperature_of
from .split_state import hand_over
from .terms import base_logits, rectified


@triton.jit
def _gather(
    terms,
    draw,
    work,
    virtual,
    row,
    slot,
    plain,
    base_filtered,
    bound,
    block,
    vocabulary,
    groups,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Append a block's tokens over the bound to the row's survivors, in any order; how many there were before."""
    group = block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    maxima = tl.load(work.group_max + virtual.to(tl.int64) * groups + group, mask=group < groups, other=float("-inf"))
    ids = block * BLOCK + tl.arange(0, BLOCK)
    # only groups with a token over the bound are read again
    touched = tl.reshape(tl.broadcast_to(tl.expand_dims(maxima >= bound, 1), [BLOCK // GROUP, GROUP]), [BLOCK])
    mask = (ids < vocabulary) & touched
    score = base_logits(terms, row, ids, mask)
    if not base_filtered:
        if not plain:
            score = rectified(terms, score, row, slot, ids, mask, RANK)
        temperature = temperature_of(draw, slot)
        score = tempered(score, tl.where(temperature == 0.0, 1.0, temperature))
    keep = mask & (score >= bound) & (score > float("-inf"))
    number = keep.to(tl.int32)
    first = tl.atomic_add(work.state + virtual * 4 + 1, tl.sum(number), sem="relaxed")
    place = first + tl.cumsum(number, axis=0) - number
    tl.store(work.survivors + virtual.to(tl.int64) * CAPACITY + place, ids, mask=keep & (place < CAPACITY))
    return first


@triton.jit(do_not_specialize=["rows", "width", "strips"])  # else a batch of one, and one of 16, would be compiled anew
def refine_kernel(
    terms,
    draw,
    work,
    split,
    result,
    rows,
    vocabulary,
    groups,
    width,
    strips,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    STRIP: tl.constexpr,
    FEW: tl.constexpr,
    CAPACITY: tl.constexpr,
    SUMMARY: tl.constexpr,
):
    """Grid (strips, R), a strip being ``width`` groups, at most STRIP, in whole blocks of BLOCK tokens.

    A row's result doesn't depend on the width: its survivors may come in any order. A row with up to FEW possible tokens is ended by a
    small copy of the code; one with more than CAPACITY is left to the third launch.
    """
    strip, virtual = tl.program_id(0), tl.program_id(1)
    state = work.state + virtual * 4
    if tl.load(state) == 0:
        row, slot, plain = locate(terms, virtual, rows)
        base_k, base_p, base_min = base_filter_of(draw, slot, plain)
        base_filtered = filters(base_k, base_p, base_min)
        candidates = candidates_of(draw, row, plain)
        if base_filtered | (candidates < 0):
            bound = tl.load(work.row + virtual * 8)
            each = tl.arange(0, STRIP)
            group = strip * width + each
            mine = (each < width) & (group < groups)
            maxima = tl.load(work.group_max + virtual.to(tl.int64) * groups + group, mask=mine, other=float("-inf"))
            touched = tl.where((maxima >= bound) & mine, group // (BLOCK // GROUP), 0x7FFFFFFF)
            block = tl.min(touched)
            while block < 0x7FFFFFFF:
                before = _gather(
                    terms,
                    draw,
                    work,
                    virtual,
                    row,
                    slot,
                    plain,
                    base_filtered,
                    bound,
                    block,
                    vocabulary,
                    groups,
                    RANK,
                    BLOCK,
                    GROUP,
                    CAPACITY,
                )
                # a row that overflows already needs no more of them counted
                block = tl.where(before > CAPACITY, 0x7FFFFFFF, tl.min(tl.where(touched > block, touched, 0x7FFFFFFF)))
        tl.debug_barrier()
        if tl.atomic_add(state + 2, 1, sem="acq_rel") == strips - 1:
            tl.debug_barrier()
            survivors = tl.atomic_add(state + 1, 0, sem="relaxed")
            most = tl.maximum(survivors, candidates)
            if most <= FEW:
                choose(terms, draw, work, result, virtual, row, slot, plain, survivors, vocabulary, FEW, CAPACITY, RANK, SUMMARY)
            else:
                if survivors <= CAPACITY:
                    choose(terms, draw, work, result, virtual, row, slot, plain, survivors, vocabulary, CAPACITY, CAPACITY, RANK, SUMMARY)
                else:
                    hand_over(draw, work, split, result, virtual, row, slot, plain)
