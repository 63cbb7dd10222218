"""Draws and log-probabilities for rows of different requests, each with decoding settings of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moralguard.backends.arrays import Array, namespace_for
from moralguard.decoding.rectification import Drawn, Rectified
from moralguard.decoding.settings import DecodingSettings
from moralguard.decoding.warp import given_arguments, warp_values
from moralguard.serving.generation import TokenLogprob


def draw(law: Rectified, settings: Sequence[DecodingSettings], keys: Array, positions: Array, counterfactual: bool = False) -> Drawn:
    """One token a row, each under its own settings: the token that ``law.draw`` gives for that row alone.

    Args:
        settings: one a row.
        keys, positions: i64[R], of the noise.
        counterfactual: tell what the base alone would have drawn, too.
    """
    arrays = namespace_for(law.base)
    ops, warp = arrays.ops, _warp(settings, law.base)
    fused = arrays.on_gpu(law.base) and law.computed is None
    logits, terms = (law.base, law.arguments) if fused else (law.logits, {})
    tokens, _, _, flags, other = ops.sample_logits(
        logits, keys, positions, **warp, **terms, counterfactual=fused and counterfactual, summary=False
    )
    if counterfactual and not fused:
        other = ops.sample_logits(law.base, keys, positions, **warp, summary=False)[0]
    return Drawn(tokens, (flags & ops.EMPTY) != 0, other)


def _warp(settings: Sequence[DecodingSettings], base: Array) -> dict[str, Any]:
    """One value a row, as the op takes them."""
    arrays, rows = namespace_for(base), [warp_values(each) for each in settings]
    warp: dict[str, Any] = {}
    for name in given_arguments(rows, arrays.on_gpu(base)):
        dtype = arrays.int32 if name == "top_k" else arrays.float32
        warp[name] = arrays.beside(arrays.cast(arrays.float_array([row[name] for row in rows]), dtype), base)
    return warp


def log_probabilities(logits: Array) -> np.ndarray:
    """float64[V], the log of the law of one row of guarded logits f[V]; -inf where it holds nothing."""
    arrays = namespace_for(logits)
    row = np.asarray(arrays.on_host(arrays.as_float(logits)), dtype=np.float64)
    row = np.where(np.isnan(row), -np.inf, row)
    largest = row.max()
    if not np.isfinite(largest):
        return np.full(row.shape, -np.inf)
    shifted: np.ndarray = row - largest
    return shifted - np.log(np.exp(shifted).sum())


def token_logprob(log_law: np.ndarray, token: int, most: int) -> TokenLogprob:
    """What a law float64[V] says of a token, and its ``most`` most probable tokens.

    All numbers come from the one array, so that a token is greedy exactly where its number equals the largest one.
    """
    most = min(most, len(log_law))
    top: tuple[tuple[int, float], ...] = ()
    if most:
        least = np.partition(log_law, -most)[-most]
        ids = np.flatnonzero((log_law >= least) & np.isfinite(log_law))
        ids = ids[np.argsort(-log_law[ids], kind="stable")][:most]
        top = tuple((int(i), float(log_law[i])) for i in ids)
    return TokenLogprob(int(token), float(log_law[token]), top)
