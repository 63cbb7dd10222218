"""From a rectified step to trace records: counterfactual token, KL, contributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moralguard.backends.arrays import namespace_for
from moralguard.decoding.outcome import Outcome
from moralguard.decoding.rectification import Rectified, rectify
from moralguard.trace.records import TokenTrace
from moralguard_kernels.numpy_rows import quiet

if TYPE_CHECKING:
    import torch


def score(law: Rectified, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a law says of one token a row: its log-odds log p / (1 - p) and KL(law || base), each f[R]; tokens i64[R].

    +inf for the only token that the law holds, -inf for one that it doesn't. On a GPU the rectified logits are never stored; on the
    CPU, where the draw has left them in memory, the log-odds are f64.
    """
    arrays = namespace_for(law.base)
    ops = arrays.ops
    if arrays.on_gpu(law.base) and law.computed is None:
        _, odds, kl = ops.score_tokens(law.base, tokens, **law.arguments)
        return odds, kl.masked_fill(~law.touched, 0.0)  # exactly, where the law is the base's own
    logits = law.logits if arrays.on_gpu(law.base) else arrays.as_double(law.logits)
    return ops.score_tokens(logits, tokens)[1], ops.kl_divergence(law.logits, law.base)


@quiet
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
    guarded, kl = score(outcome.law, tokens)
    shares: dict[str, list[float]] = {}
    for index, name in enumerate(names):
        if outcome.terms is None:
            shares[name] = [float("nan")] * len(tokens)
            continue
        terms = outcome.terms[:index] + outcome.terms[index + 1 :]
        shares[name] = (guarded - score(rectify(outcome.base, terms), tokens)[0]).tolist()
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
