"""Choosing prompts by their measured effect: prefixes of self-debiasing, or the two prompts of a contrast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moralguard.backends.hf import LanguageModel
from moralguard.controls.dexperts import DExperts
from moralguard.controls.experts import Prompt
from moralguard.controls.self_debias import SelfDebias
from moralguard.errors import DataError
from moralguard.fitting.effect import Effect, Judge, measure_effect
from moralguard.policy import Policy

Report = Callable[[tuple[str, ...], Effect], None]


@dataclass(frozen=True)
class Choice:
    """Attributes:
    unguarded: the effect of no control.
    tried: (prompts, effect) in the order they were measured.
    chosen: the prompts; empty where none lowers the violation within the limit.
    control: the control with them, None where there are none.
    """

    unguarded: Effect
    tried: tuple[tuple[tuple[str, ...], Effect], ...]
    chosen: tuple[str, ...]
    control: SelfDebias | DExperts | None


def choose_prefixes(
    lm: LanguageModel,
    candidates: Sequence[str],
    prompts: Sequence[str],
    judge: Judge,
    *,
    most: int = 3,
    decay_constant: float = 50.0,
    most_perplexity: float = 1.3,
    report: Report = lambda chosen, effect: None,
    **measured: Any,
) -> Choice:
    """Self-debiasing prefixes by forward selection: each round adds the candidate that lowers the violation most, while it does.

    Every prefix costs one more row a forward, so one that adds nothing is left out.

    Raises:
        DataError: no candidate.
    """
    tried, known, unguarded = _start(candidates, lm, prompts, judge, report, measured)

    def control(chosen: tuple[str, ...]) -> SelfDebias:
        return SelfDebias(prefixes=list(chosen), decay_constant=decay_constant)

    chosen: tuple[str, ...] = ()
    best = unguarded
    while len(chosen) < most:
        options = [(*chosen, text) for text in candidates if text not in chosen]
        for option in options:
            known[option] = measure_effect(Policy(controls=(control(option),)), lm, prompts, judge, **measured)
            tried.append((option, known[option]))
            report(option, known[option])
        allowed = [
            o for o in options if known[o].perplexity <= most_perplexity * unguarded.perplexity and known[o].violation < best.violation
        ]
        if not allowed:
            break
        chosen = min(allowed, key=lambda o: known[o].violation)
        best = known[chosen]
    return Choice(unguarded, tuple(tried), chosen, control(chosen) if chosen else None)


def choose_contrast(
    lm: LanguageModel,
    keeping: Sequence[str],
    violating: Sequence[str],
    prompts: Sequence[str],
    judge: Judge,
    *,
    alpha: float = 1.0,
    most_perplexity: float = 1.3,
    report: Report = lambda chosen, effect: None,
    **measured: Any,
) -> Choice:
    """The pair (expert prompt, anti-expert prompt) with the least violation within the limit.

    Raises:
        DataError: no candidate on one side.
    """
    pairs = [(kept, broken) for kept in keeping for broken in violating]
    tried, known, unguarded = _start(pairs, lm, prompts, judge, report, measured)

    def control(pair: tuple[str, ...]) -> DExperts:
        return DExperts(expert=Prompt(pair[0]), anti_expert=Prompt(pair[1]), alpha=alpha)

    for pair in pairs:
        known[pair] = measure_effect(Policy(controls=(control(pair),)), lm, prompts, judge, **measured)
        tried.append((pair, known[pair]))
        report(pair, known[pair])
    allowed = [
        p for p in pairs if known[p].perplexity <= most_perplexity * unguarded.perplexity and known[p].violation < unguarded.violation
    ]
    chosen = min(allowed, key=lambda p: known[p].violation, default=())
    return Choice(unguarded, tuple(tried), tuple(chosen), control(chosen) if chosen else None)


def _start(
    candidates: Sequence[Any], lm: LanguageModel, prompts: Sequence[str], judge: Judge, report: Report, measured: dict[str, Any]
) -> tuple[list[tuple[tuple[str, ...], Effect]], dict[tuple[str, ...], Effect], Effect]:
    if not candidates:
        raise DataError("there is no candidate to choose from; give at least one prompt (a contrast: one on either side)")
    unguarded = measure_effect(Policy(controls=()), lm, prompts, judge, **measured)
    report((), unguarded)
    return [((), unguarded)], {}, unguarded
