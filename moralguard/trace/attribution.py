"""From a rectified step to trace records: counterfactual token, KL, contributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import moralguard_kernels as ops
from moralguard.decoding.rectification import rectify
from moralguard.decoding.session import Outcome
from moralguard.trace.records import TokenTrace


def log_odds(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log p / (1 - p) of one token a row, f64[R], from logits f[R, V]; +inf where every other token is removed."""
    z = logits.double()
    others = z.scatter(-1, tokens[:, None], float("-inf"))
    return z.gather(-1, tokens[:, None])[:, 0] - torch.logsumexp(others, -1)


def trace_step(
    outcome: Outcome,
    tokens: torch.Tensor,
    counterfactual: torch.Tensor,
    positions: torch.Tensor,
    names: Sequence[str],
    values: dict[str, list[str]],
    spell: Callable[[int], str],
) -> list[TokenTrace]:
    """One record a row.

    A control's contribution is what leaving it out would change: log-odds of the drawn token under the whole rectification minus
    those under the rectification without it. With one control that is its change against the base.
    """
    kl = ops.kl_divergence(outcome.logits, outcome.base)
    guarded = log_odds(outcome.logits, tokens)
    shares: dict[str, list[float]] = {}
    for index, name in enumerate(names):
        if outcome.terms is None:
            shares[name] = [float("nan")] * len(tokens)
            continue
        terms = outcome.terms[:index] + outcome.terms[index + 1 :]
        without = rectify(outcome.base, terms).logits if terms else outcome.base
        shares[name] = (guarded - log_odds(without, tokens)).tolist()
    finite = float("inf")
    return [
        TokenTrace(
            position=int(positions[row]),
            token_id=int(tokens[row]),
            token=spell(int(tokens[row])),
            counterfactual_id=int(counterfactual[row]),
            counterfactual=spell(int(counterfactual[row])),
            kl=float(kl[row]),
            contributions={name: (share[row] if abs(share[row]) < finite else None) for name, share in shares.items()},
            values=values,
        )
        for row in range(len(tokens))
    ]
