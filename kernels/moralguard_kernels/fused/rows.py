"""What a kernel knows of a row: its parameters, and how its token will be found."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .terms import slot_of

# Flags of a drawn token, also public as ``moralguard_kernels.EMPTY`` and so on.
EMPTY = tl.constexpr(1)
NAN_LOGITS = tl.constexpr(2)
SPLIT = tl.constexpr(4)


class Draw(NamedTuple):
    """Arguments of a draw as kernels take them; absent tensors are None. S slots, N rows.

    Attributes:
        seed: i64[S]; position: i64[N].
        temperature, top_p, min_p: f32[S]; top_k: i32[S].
        base_top_p, base_min_p: f32[S]; base_top_k: i32[S], filters of the base.
        candidate_ids: (pointer to i32[N, C], row stride); candidate_bias f32[N, C] likewise; candidate_count i32[N], below 0 where
            the row has no candidates.
        vocabulary: number of tokens; a top-k of as many filters nothing.
    """

    seed: Any
    position: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    base_top_k: Any
    base_top_p: Any
    base_min_p: Any
    candidate_ids: Any
    candidate_bias: Any
    candidate_count: Any
    vocabulary: Any


class Work(NamedTuple):
    """Scratch memory; R = N rows, or 2 N where the unguarded token is drawn too (rows N.. are the base alone).

    Attributes:
        group_max, group_mass: f32[R, G], of every group of tokens: largest score, sum of exp(score - largest).
        tiles: f32[R, tiles, 8], partial sums of the tiles (see ``bound``).
        row: f32[R, 8]: lower bound of the threshold, largest score, mass relative to it, logsumexp of the base, logsumexp of the
            rectified law, KL; the last two only where the base isn't filtered.
        state: i32[R, 4]: done, survivors, tiles that have arrived at the second launch, free.
        survivors: i32[R, capacity].
        arrivals: i32[R], 0 between calls: tiles that have arrived at the first launch.
        overflow: i32[1 + R]: number of rows for the third launch, then their list.
    """

    group_max: Any
    group_mass: Any
    tiles: Any
    row: Any
    state: Any
    survivors: Any
    arrivals: Any
    overflow: Any


class Result(NamedTuple):
    """Outputs: token i64[N] and counterfactual i64[N] (or None), log_probability f32, kl f32, flags i32, one a row of ``Work``.

    With ``threshold`` i32 (key of the smallest base logit that the base's filters keep) nothing is drawn: it is the only output
    beside the flags.
    """

    threshold: Any
    token: Any
    counterfactual: Any
    log_probability: Any
    kl: Any
    flags: Any


@triton.jit
def temperature_of(draw, slot):
    value = 1.0
    if draw.temperature is not None:
        value = tl.load(draw.temperature + slot)
    return value


@triton.jit
def warp_of(draw, slot):
    """(top_k i32, top_p f32, min_p f32); 0, 1 and 0 where absent. At temperature 0 nothing is filtered."""
    top_k, top_p, min_p = 0, 1.0, 0.0
    if draw.top_k is not None:
        top_k = tl.load(draw.top_k + slot).to(tl.int32)
        top_k = tl.where(top_k < draw.vocabulary, top_k, 0)
    if draw.top_p is not None:
        top_p = tl.load(draw.top_p + slot)
    if draw.min_p is not None:
        min_p = tl.load(draw.min_p + slot)
    if temperature_of(draw, slot) == 0.0:
        top_k, top_p, min_p = 0, 1.0, 0.0
    return top_k, top_p, min_p


@triton.jit
def base_filter_of(draw, slot, plain):
    """(top_k, top_p, min_p) of the base's own plausibility; 0, 1 and 0 for the row of the base alone."""
    top_k, top_p, min_p = 0, 1.0, 0.0
    if draw.base_top_k is not None:
        top_k = tl.load(draw.base_top_k + slot).to(tl.int32)
        top_k = tl.where(top_k < draw.vocabulary, top_k, 0)
    if draw.base_top_p is not None:
        top_p = tl.load(draw.base_top_p + slot)
    if draw.base_min_p is not None:
        min_p = tl.load(draw.base_min_p + slot)
    if plain:
        top_k, top_p, min_p = 0, 1.0, 0.0
    return top_k, top_p, min_p


@triton.jit
def filters(top_k, top_p, min_p):
    """Whether any of them removes tokens."""
    return (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)


@triton.jit
def candidates_of(draw, row, plain):
    """Number of candidates that the row's token must be one of; -1 where any token may be drawn."""
    count = -1
    if draw.candidate_ids is not None:
        count = tl.load(draw.candidate_count + row).to(tl.int32)
        if plain:
            count = -1
    return count


@triton.jit
def locate(terms, virtual, rows):
    """(row, slot, plain) of a row of ``Work``."""
    plain = virtual >= rows
    row = tl.where(plain, virtual - rows, virtual)
    return row, slot_of(terms, row), plain


@triton.jit
def noise_key(draw, row, slot):
    return tl.load(draw.seed + slot).to(tl.int64), tl.load(draw.position + row)


@triton.jit
def put_token(result, row, plain, token):
    if plain:
        if result.counterfactual is not None:
            tl.store(result.counterfactual + row, token.to(tl.int64))
    else:
        tl.store(result.token + row, token.to(tl.int64))
