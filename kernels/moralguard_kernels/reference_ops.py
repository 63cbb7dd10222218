"""The fused operations in plain PyTorch: the specification of the kernels, and what runs where there is no GPU.

Every function has a kernel of the same name and arguments in ``fused.launch``. Shapes: N rows of logits, V vocabulary entries, S
slots, C candidates, r rank, J biased sources. Parameters of shape [S] are looked up through ``slots`` i32[N] (slot = row where it is
None); whatever is absent (None) doesn't act, and neither does a neutral value in a row. Arithmetic is float32, float64 for float64
logits (on the CPU only). The rules of ``reference`` hold: a base -inf vetoes, auxiliary terms never mask, boundary ties stay, and a
row's result depends on that row alone.

Terms of the rectification, added in this order:
    sources, groups, weights: mixes. ``groups`` says how many of the sources (f[N, V] each, in a row) belong to each mix; row s of
        weights f32[S, n] holds, mix by mix, the weight of the base, then one a source. A mix's sum counts 0 where it isn't finite.
    projection f32[V, r], coefficients f32[N, r]: the low-rank term.
    biased (J of f[N, V]), decay_constant, epsilon f32[S]: self-debiasing's attenuation.
    candidate_ids i64[N, C] (distinct in a row), candidate_bias f32[N, C], candidate_count i32[N]: a bias on tokens; unless
        ``keep_rest`` the others are removed. The first ``candidate_count`` entries of a row count; below 0 the row has no candidates
        and nothing is removed.
    base_top_k i32[S], base_top_p, base_min_p f32[S]: the base's own plausibility, each judged on the whole base.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import reference as rows
from .arguments import check_arguments

EMPTY, NAN_LOGITS, SPLIT = 1, 2, 4
"""Flags of a drawn token: the row had no token left (token 0, log-probability -inf); its base held NaN; its possible tokens were too
many for the second launch (kernels only)."""


def _of_row(parameter: torch.Tensor | None, slots: torch.Tensor | None) -> torch.Tensor | None:
    return parameter if parameter is None or slots is None else parameter[slots.long()]


def _mixes(z: torch.Tensor, sources: Sequence[torch.Tensor], groups: Sequence[int], weights: torch.Tensor | None) -> list[torch.Tensor]:
    if weights is None:
        return []
    deltas, source, column = [], 0, 0
    for size in groups:
        deltas.append(
            rows.mix_delta(
                z,
                sources[source : source + size],
                [weights[:, column + 1 + i] for i in range(size)],
                weights[:, column],
            )
        )
        source, column = source + size, column + 1 + size
    return deltas


def _base_thresholds(
    z: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None, min_p: torch.Tensor | None
) -> list[torch.Tensor]:
    """Thresholds [N, 1] on the base's logits; -inf in rows whose value is neutral."""
    found = []
    if top_k is not None:
        found.append(_top_k(z, top_k))
    if top_p is not None and bool((top_p < 1).any()):
        found.append(rows.top_p_threshold(z, top_p))
    if min_p is not None and bool((min_p > 0).any()):
        found.append(rows.min_p_threshold(z, min_p).masked_fill(min_p[:, None] <= 0, float("-inf")))
    return found


def _top_k(z: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Threshold [N, 1] of each row's own k; -inf where k is 0."""
    threshold = torch.full_like(z[:, :1], float("-inf"))
    for k in top_k.unique().tolist():
        if k > 0:
            chosen = top_k == k
            threshold[chosen] = rows.top_k_threshold(z[chosen], k)
    return threshold


def rectify_logits(
    logits: torch.Tensor,
    slots: torch.Tensor | None = None,
    sources: Sequence[torch.Tensor] | None = None,
    groups: Sequence[int] | None = None,
    weights: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    coefficients: torch.Tensor | None = None,
    biased: Sequence[torch.Tensor] | None = None,
    decay_constant: torch.Tensor | None = None,
    epsilon: torch.Tensor | None = None,
    candidate_ids: torch.Tensor | None = None,
    candidate_bias: torch.Tensor | None = None,
    candidate_count: torch.Tensor | None = None,
    keep_rest: bool = True,
    base_top_k: torch.Tensor | None = None,
    base_top_p: torch.Tensor | None = None,
    base_min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """z' = z + the terms, on the tokens that the filters keep; the one equation of the guard. See the module for the arguments.

    Returns:
        f32[N, V] (f64 for f64 logits): -inf where vetoed or removed.

    Raises:
        ValueError: a tensor's shape or device doesn't fit the logits (so of every op).
    """
    check_arguments(locals())
    rectified = _rectified(
        logits, slots, sources, groups, weights, projection, coefficients, biased, decay_constant, epsilon,
        candidate_ids, candidate_bias, candidate_count, keep_rest, base_top_k, base_top_p, base_min_p,
    )  # fmt: skip
    return rectified.clone() if rectified is logits else rectified  # what an op returns is never its argument


def _rectified(
    logits: torch.Tensor,
    slots: torch.Tensor | None,
    sources: Sequence[torch.Tensor] | None,
    groups: Sequence[int] | None,
    weights: torch.Tensor | None,
    projection: torch.Tensor | None,
    coefficients: torch.Tensor | None,
    biased: Sequence[torch.Tensor] | None,
    decay_constant: torch.Tensor | None,
    epsilon: torch.Tensor | None,
    candidate_ids: torch.Tensor | None,
    candidate_bias: torch.Tensor | None,
    candidate_count: torch.Tensor | None,
    keep_rest: bool,
    base_top_k: torch.Tensor | None,
    base_top_p: torch.Tensor | None,
    base_min_p: torch.Tensor | None,
) -> torch.Tensor:
    """``rectify_logits``, which may be the logits themselves."""
    z = rows.sanitize_logits(logits)
    deltas = _mixes(z, sources or (), groups or (), _of_row(weights, slots))
    if projection is not None and coefficients is not None:
        deltas.append(rows.finite_or_zero(rows.low_rank_delta(projection, coefficients)))
    if biased and decay_constant is not None and epsilon is not None:
        constants = (decay_constant if slots is None else decay_constant[slots.long()], epsilon if slots is None else epsilon[slots.long()])
        deltas.append(rows.attenuation_delta(z, biased, *constants))
    thresholds = _base_thresholds(z, _of_row(base_top_k, slots), _of_row(base_top_p, slots), _of_row(base_min_p, slots))
    if candidate_ids is None or candidate_bias is None:
        return rows.rectify(z, deltas, thresholds)
    if candidate_count is None:
        return rows.rectify(z, deltas, thresholds, [(candidate_ids.long(), candidate_bias, keep_rest)])
    added, removed = _counted_candidates(z, candidate_ids.long(), candidate_bias, candidate_count)
    guarded = rows.rectify(z, [*deltas, added], thresholds)
    return guarded if keep_rest else guarded.masked_fill(removed, float("-inf"))


def _counted_candidates(z: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates of rows that have different numbers of them, in dense form: (bias f[N, V], bool[N, V] where there is no candidate)."""
    there = torch.arange(ids.shape[1], device=ids.device) < count[:, None]
    ids = ids.clamp(0, z.shape[-1] - 1)  # entries that don't count add nothing wherever they point
    added = torch.zeros_like(z).scatter_add_(-1, ids, rows.finite_or_zero(bias.to(z)).masked_fill(~there, 0.0))
    members = torch.zeros_like(z).scatter_add_(-1, ids, there.to(z))
    return added, (members == 0) & (count >= 0)[:, None]


def sample_logits(
    logits: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    slots: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    sources: Sequence[torch.Tensor] | None = None,
    groups: Sequence[int] | None = None,
    weights: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    coefficients: torch.Tensor | None = None,
    biased: Sequence[torch.Tensor] | None = None,
    decay_constant: torch.Tensor | None = None,
    epsilon: torch.Tensor | None = None,
    candidate_ids: torch.Tensor | None = None,
    candidate_bias: torch.Tensor | None = None,
    candidate_count: torch.Tensor | None = None,
    keep_rest: bool = True,
    base_top_k: torch.Tensor | None = None,
    base_top_p: torch.Tensor | None = None,
    base_min_p: torch.Tensor | None = None,
    counterfactual: bool = False,
    summary: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rectify, warp and draw one token a row. See the module for the terms.

    Args:
        logits: f[N, V], the base.
        seed: i64[S]; position: i64[N]. The noise is a pure function of (seed, position, token).
        temperature: f32[S]; 0 is greedy: the largest rectified logit, the lowest id among equals, no filter.
        top_k: i32[S], top_p, min_p: f32[S], the warp of the rectified law, in this order; 0, 1 and 0 keep everything.
        counterfactual: draw from the base alone, too, with the same noise and warp: what the unguarded model would have said.
        summary: compute log-probability and KL; without it both come back empty.

    Returns:
        (token i64[N], log_probability f32[N], kl f32[N], flags i32[N], counterfactual i64[N], empty unless asked for).
        log_probability is the token's and kl is KL(guarded || base), both of the rectified law at temperature 1 before the warp.
    """
    check_arguments(locals())
    guarded = _rectified(
        logits, slots, sources, groups, weights, projection, coefficients, biased, decay_constant, epsilon,
        candidate_ids, candidate_bias, candidate_count, keep_rest, base_top_k, base_top_p, base_min_p,
    )  # fmt: skip
    warp = tuple(_of_row(parameter, slots) for parameter in (temperature, top_k, top_p, min_p))
    seeds = seed if slots is None else seed[slots.long()]
    token = draw(guarded, seeds, position, *warp)
    other = draw(rows.sanitize_logits(logits), seeds, position, *warp) if counterfactual else token.new_empty(0)
    emptied = torch.isneginf(guarded.amax(-1))
    # amax, unlike any(), is fast, and NaN wins in it
    flags = emptied.int() * EMPTY + torch.isnan(logits.amax(-1)).int() * NAN_LOGITS
    log_probability = kl = torch.empty(0, device=logits.device)
    if summary:
        log_law = torch.log_softmax(guarded, -1)
        log_probability = log_law.gather(-1, token[:, None])[:, 0].masked_fill(emptied, float("-inf")).float()
        kl = rows.kl_divergence(guarded, rows.sanitize_logits(logits)).masked_fill(emptied, 0.0).float()
    return token, log_probability, kl, flags, other


def score_tokens(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    slots: torch.Tensor | None = None,
    sources: Sequence[torch.Tensor] | None = None,
    groups: Sequence[int] | None = None,
    weights: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    coefficients: torch.Tensor | None = None,
    biased: Sequence[torch.Tensor] | None = None,
    decay_constant: torch.Tensor | None = None,
    epsilon: torch.Tensor | None = None,
    candidate_ids: torch.Tensor | None = None,
    candidate_bias: torch.Tensor | None = None,
    candidate_count: torch.Tensor | None = None,
    keep_rest: bool = True,
    base_top_k: torch.Tensor | None = None,
    base_top_p: torch.Tensor | None = None,
    base_min_p: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the rectified law, at temperature 1 and before any warp, says of one given token a row. See the module for the terms.

    Serves the guarded score of a given text (a row a position) and a control's share in a drawn token: its log-odds with the control
    less those without it.

    Args:
        logits: f[N, V], the base.
        tokens: i64[N], each inside the vocabulary.

    Returns:
        (log_probability, log_odds, kl), each f32[N] (f64 for f64 logits; the sums are float64 either way).
        log_odds is log p / (1 - p): -inf for a token that the law doesn't hold, +inf for the only one that it does. kl is
        KL(guarded || base), 0 in a row that has no token left.
    """
    check_arguments(locals())
    base = rows.sanitize_logits(logits)
    guarded = _rectified(
        logits, slots, sources, groups, weights, projection, coefficients, biased, decay_constant, epsilon,
        candidate_ids, candidate_bias, candidate_count, keep_rest, base_top_k, base_top_p, base_min_p,
    )  # fmt: skip
    emptied = torch.isneginf(guarded.amax(-1))
    odds = _log_odds(guarded.double(), tokens)
    # -log(1 + exp(-odds)), which loses nothing where p is close to 1
    log_probability = torch.nn.functional.logsigmoid(odds)
    kl = rows.kl_divergence(guarded.double(), base.double()).masked_fill(emptied, 0.0)
    return log_probability.to(base.dtype), odds.to(base.dtype), kl.to(base.dtype)


def _log_odds(z: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log p / (1 - p) of one token a row, f64[N], from f64[N, V]; the other tokens are summed without it, never by a difference."""
    own = z.gather(-1, tokens[:, None])[:, 0]
    others = z.scatter(-1, tokens[:, None], float("-inf"))
    top = others.amax(-1)
    # log_softmax of the largest is the logsumexp relative to it; unlike logsumexp it sums a row in one order whatever the batch
    odds = own - top + torch.log_softmax(others, -1).amax(-1)
    odds = odds.masked_fill(torch.isneginf(top), float("inf"))
    return odds.masked_fill(torch.isneginf(own), float("-inf"))


def draw(
    logits: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """Tokens i64[N] from sanitised logits f[N, V] under a warp of one value a row; rows with equal settings are drawn together."""
    count = logits.shape[0]
    columns = [
        [neutral] * count if parameter is None else parameter.tolist()
        for parameter, neutral in ((temperature, 1.0), (top_k, 0), (top_p, 1.0), (min_p, 0.0))
    ]
    settings = list(zip(*columns, strict=True))
    if len(set(settings)) == 1:
        return _draw_alike(logits, seed, position, *settings[0])
    token = torch.empty(count, dtype=torch.int64, device=logits.device)
    for distinct in dict.fromkeys(settings):
        chosen = torch.tensor([i for i, own in enumerate(settings) if own == distinct], device=logits.device)
        token[chosen] = _draw_alike(logits[chosen], seed[chosen], position[chosen], *distinct)
    return token


def _draw_alike(
    logits: torch.Tensor, seed: torch.Tensor, position: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return rows.warped_draw(logits, seed, position, temperature, top_k, top_p, min_p)
