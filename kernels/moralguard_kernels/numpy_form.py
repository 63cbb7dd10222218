"""The operations in NumPy, for runtimes without torch: the same names, arguments and rules as in ``reference_ops`` and ``reference``.

``reference_ops`` says what the arguments are. Same noise, same order of the terms, float32: the same token for the same seed, but for
laws in which two candidates lie within rounding. Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import numpy_rows as rows
from .gumbel import gumbel_argmax
from .noise import gumbel_of_words, token_words
from .numpy_rows import (
    attenuation_delta,
    entropy,
    finite_or_zero,
    kl_divergence,
    log_softmax,
    low_rank_delta,
    min_p_threshold,
    mix_delta,
    rectify,
    row_products,
    row_sums,
    sanitize_logits,
    softmax,
    top_k_threshold,
    top_p_threshold,
    warp,
    warped_draw,
)

__all__ = [
    "EMPTY",
    "NAN_LOGITS",
    "attenuation_delta",
    "draw",
    "entropy",
    "finite_or_zero",
    "gumbel_argmax",
    "gumbel_noise",
    "kl_divergence",
    "log_softmax",
    "low_rank_delta",
    "min_p_threshold",
    "mix_delta",
    "rectify",
    "rectify_logits",
    "row_products",
    "row_sums",
    "sample_logits",
    "sanitize_logits",
    "score_tokens",
    "softmax",
    "top_k_threshold",
    "top_p_threshold",
    "warp",
    "warped_draw",
]

Array = NDArray[Any]

EMPTY, NAN_LOGITS = 1, 2
"""Flags of a drawn token, as in ``reference_ops``."""


def gumbel_noise(seed: Array, position: Array, token_ids: Array) -> Array:
    """Standard Gumbel noise f32[R, C] for (seed i64[R], position i64[R], token i64[R, C])."""
    return gumbel_of_words(token_words(seed[:, None], position[:, None], token_ids))


def _of_row(parameter: Array | None, slots: Array | None) -> Array | None:
    return parameter if parameter is None or slots is None else parameter[slots]


def _mixes(z: Array, sources: Sequence[Array], groups: Sequence[int], weights: Array | None) -> list[Array]:
    if not groups:
        return []
    if weights is None or sum(groups) != len(sources) or weights.shape[1] != len(sources) + len(groups):
        shape = None if weights is None else tuple(weights.shape)
        raise ValueError(
            f"weights of shape {shape} for {len(sources)} sources in groups {list(groups)}; expected [slots, sources + groups], the "
            "groups summing to the number of sources"
        )
    deltas, source, column = [], 0, 0
    for size in groups:
        own = [weights[:, column + 1 + i] for i in range(size)]
        deltas.append(mix_delta(z, sources[source : source + size], own, weights[:, column]))
        source, column = source + size, column + 1 + size
    return deltas


def _base_thresholds(z: Array, top_k: Array | None, top_p: Array | None, min_p: Array | None) -> list[Array]:
    """Thresholds [N, 1] on the base's logits; -inf in rows whose value is neutral."""
    found = []
    if top_k is not None:
        threshold = np.full_like(z[:, :1], -np.inf)
        for k in np.unique(top_k).tolist():
            if k > 0:
                threshold[top_k == k] = top_k_threshold(z[top_k == k], k)
        found.append(threshold)
    if top_p is not None and bool((top_p < 1).any()):
        found.append(top_p_threshold(z, top_p))
    if min_p is not None and bool((min_p > 0).any()):
        found.append(np.where(min_p[:, None] <= 0, z.dtype.type(-np.inf), min_p_threshold(z, min_p)))
    return found


def rectify_logits(
    logits: Array,
    slots: Array | None = None,
    sources: Sequence[Array] | None = None,
    groups: Sequence[int] | None = None,
    weights: Array | None = None,
    projection: Array | None = None,
    coefficients: Array | None = None,
    biased: Sequence[Array] | None = None,
    decay_constant: Array | None = None,
    epsilon: Array | None = None,
    candidate_ids: Array | None = None,
    candidate_bias: Array | None = None,
    candidate_count: Array | None = None,
    keep_rest: bool = True,
    base_top_k: Array | None = None,
    base_top_p: Array | None = None,
    base_min_p: Array | None = None,
) -> Array:
    """z' = z + the terms, on the tokens that the filters keep: f32[N, V] (f64 for f64 logits), -inf where vetoed or removed."""
    z = sanitize_logits(logits)
    deltas = _mixes(z, sources or (), groups or (), _of_row(weights, slots))
    if projection is not None and coefficients is not None:
        deltas.append(finite_or_zero(low_rank_delta(projection, coefficients)))
    if biased and decay_constant is not None and epsilon is not None:
        constants = (decay_constant if slots is None else decay_constant[slots], epsilon if slots is None else epsilon[slots])
        deltas.append(attenuation_delta(z, biased, *constants))
    thresholds = _base_thresholds(z, _of_row(base_top_k, slots), _of_row(base_top_p, slots), _of_row(base_min_p, slots))
    if candidate_ids is None or candidate_bias is None:
        return rectify(z, deltas, thresholds)
    if candidate_count is None:
        return rectify(z, deltas, thresholds, [(candidate_ids.astype(np.int64, copy=False), candidate_bias, keep_rest)])
    added, removed = _counted_candidates(z, candidate_ids, candidate_bias, candidate_count)
    guarded = rectify(z, [*deltas, added], thresholds)
    return guarded if keep_rest else np.where(removed, guarded.dtype.type(-np.inf), guarded)


def _counted_candidates(z: Array, ids: Array, bias: Array, count: Array) -> tuple[Array, Array]:
    """Candidates of rows that have different numbers of them, in dense form: (bias f[N, V], bool[N, V] where there is no candidate)."""
    row, place = np.nonzero(np.arange(ids.shape[1]) < count[:, None])
    added, members = np.zeros_like(z), np.zeros(z.shape, dtype=bool)
    added[row, ids[row, place]] = finite_or_zero(bias.astype(z.dtype))[row, place]
    members[row, ids[row, place]] = True
    return added, ~members & (count >= 0)[:, None]


def sample_logits(
    logits: Array,
    seed: Array,
    position: Array,
    slots: Array | None = None,
    temperature: Array | None = None,
    top_k: Array | None = None,
    top_p: Array | None = None,
    min_p: Array | None = None,
    *,
    counterfactual: bool = False,
    summary: bool = True,
    **terms: Any,
) -> tuple[Array, Array, Array, Array, Array]:
    """Rectify, warp and draw one token a row; the terms are ``rectify_logits``' keywords.

    Returns:
        (token i64[N], log_probability f32[N], kl f32[N], flags i32[N], counterfactual i64[N]), as ``reference_ops.sample_logits``.
    """
    guarded = rectify_logits(logits, slots, **terms)
    warped = tuple(_of_row(parameter, slots) for parameter in (temperature, top_k, top_p, min_p))
    seeds = seed if slots is None else seed[slots]
    token = draw(guarded, seeds, position, *warped)
    other = draw(sanitize_logits(logits), seeds, position, *warped) if counterfactual else np.empty(0, dtype=np.int64)
    emptied = np.isneginf(guarded.max(-1))
    flags = emptied.astype(np.int32) * EMPTY + np.isnan(logits.max(-1)).astype(np.int32) * NAN_LOGITS
    log_probability = kl = np.empty(0, dtype=np.float32)
    if summary:
        own = np.take_along_axis(log_softmax(guarded), token[:, None], -1)[:, 0]
        log_probability = np.where(emptied, -np.inf, own).astype(np.float32)
        kl = np.where(emptied, 0.0, kl_divergence(guarded, sanitize_logits(logits))).astype(np.float32)
    return token, log_probability, kl, flags, other


@rows.quiet
def score_tokens(logits: Array, tokens: Array, slots: Array | None = None, **terms: Any) -> tuple[Array, Array, Array]:
    """What the rectified law says of one given token a row: (log_probability, log_odds, kl), as ``reference_ops.score_tokens``."""
    base = sanitize_logits(logits)
    guarded = rectify_logits(logits, slots, **terms)
    emptied = np.isneginf(guarded.max(-1))
    odds = _log_odds(guarded.astype(np.float64), tokens)
    log_probability = np.minimum(odds, 0) - np.log1p(np.exp(-np.abs(odds)))
    kl = np.where(emptied, 0.0, kl_divergence(guarded.astype(np.float64), base.astype(np.float64)))
    return log_probability.astype(base.dtype), odds.astype(base.dtype), kl.astype(base.dtype)


def _log_odds(z: Array, tokens: Array) -> Array:
    """log p / (1 - p) of one token a row, f64[N], from f64[N, V]; the other tokens are summed without it, never by a difference."""
    own = np.take_along_axis(z, tokens[:, None], -1)[:, 0]
    others = z.copy()
    np.put_along_axis(others, tokens[:, None], -np.inf, -1)
    top = others.max(-1)
    odds = own - top + log_softmax(others).max(-1)
    odds[np.isneginf(top)] = np.inf
    odds[np.isneginf(own)] = -np.inf
    return odds


def draw(
    logits: Array,
    seed: Array,
    position: Array,
    temperature: Array | None = None,
    top_k: Array | None = None,
    top_p: Array | None = None,
    min_p: Array | None = None,
) -> Array:
    """Tokens i64[N] from sanitised logits f[N, V] under a warp of one value a row; rows with equal settings are drawn together."""
    neutral = ((temperature, 1.0), (top_k, 0), (top_p, 1.0), (min_p, 0.0))
    columns = [[value] * len(logits) if parameter is None else parameter.tolist() for parameter, value in neutral]
    settings = list(zip(*columns, strict=True))
    token = np.zeros(len(logits), dtype=np.int64)
    for distinct in dict.fromkeys(settings):
        chosen = [i for i, own in enumerate(settings) if own == distinct]
        if distinct[0] == 0:
            token[chosen] = logits[chosen].argmax(-1)
        else:
            token[chosen] = warped_draw(logits[chosen], seed[chosen], position[chosen], *distinct)
    return token
