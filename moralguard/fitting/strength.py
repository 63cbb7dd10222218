"""Choosing strengths by measurement: every combination on the same prompts and seed, its violation against its perplexity."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moralguard.backends.hf import LanguageModel
from moralguard.errors import DataError, PolicyError
from moralguard.fitting.effect import Effect, Judge, measure_effect
from moralguard.policy import Policy
from moralguard.schema import nearest

Settings = dict[str, float]
""""control.setting" or "gate.setting" -> value."""


@dataclass(frozen=True)
class Tried:
    """A combination of strengths and its effect; ``front`` where no other has both less violation and less perplexity."""

    settings: Settings
    effect: Effect
    front: bool = False


@dataclass(frozen=True)
class Search:
    """Attributes:
    unguarded: the effect of no control.
    tried: all combinations, in the order of the grid.
    chosen: the least violation among those within the limit, or None where none is.
    policy: the policy with the chosen strengths.
    """

    unguarded: Effect
    tried: tuple[Tried, ...]
    chosen: Tried | None
    policy: Policy | None

    @property
    def without_effect(self) -> bool:
        """Whether no combination changed anything: a gate that never opened, or controls that don't act on these prompts."""
        return all(item.effect == self.unguarded for item in self.tried)


def search_strengths(
    policy: Policy,
    lm: LanguageModel,
    prompts: Sequence[str],
    judge: Judge,
    grid: Mapping[str, Sequence[float]],
    *,
    most_perplexity: float = 1.3,
    least_distinct: float = 0.9,
    checkpoint: Path | None = None,
    report: Callable[[Settings, Effect], None] = lambda settings, effect: None,
    **measured: Any,
) -> Search:
    """Measure every combination of the grid and choose the least violation within the limits.

    Args:
        policy: its controls for this model, where it has fitted ones, are what is searched.
        grid: "control.setting" -> values, such as {"dexperts.alpha": [0.5, 1, 2]}; "2.alpha" names the third control of the policy,
            "gate.min_risk" a setting of its gate.
        most_perplexity: largest ratio of the continuations' perplexity to the unguarded model's.
        least_distinct: smallest ratio of their distinct 2-grams.
        checkpoint: JSON file of what has been measured; a run goes on from it.
        measured: as for ``measure_effect`` (continuations, max_new_tokens, seed, ...).

    Raises:
        PolicyError: the grid names a control or setting that the policy hasn't.
        DataError: an empty grid, or a checkpoint of another search.
    """
    if not grid or not all(grid.values()):
        raise DataError("the grid is empty; name settings and values, for example dexperts.alpha=0.5,1,2")
    policy = policy.for_model(lm)
    _with_strengths(policy, dict.fromkeys(grid, 0.0) | {name: values[0] for name, values in grid.items()})
    key = json.dumps(
        [policy.digest, list(prompts), {k: list(v) for k, v in grid.items()}, measured, lm.fingerprint], sort_keys=True, default=str
    )
    known = _read(checkpoint, key)

    def effect_of(settings: Settings) -> Effect:
        name = json.dumps(settings)
        if name not in known:
            chosen = _with_strengths(policy, settings) if settings else Policy(controls=())
            known[name] = measure_effect(chosen, lm, prompts, judge, **measured)
            _write(checkpoint, key, known)
            report(settings, known[name])
        return known[name]

    unguarded = effect_of({})
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    effects = [effect_of(settings) for settings in combinations]
    front = pareto_front(effects)
    tried = tuple(Tried(s, e, i in front) for i, (s, e) in enumerate(zip(combinations, effects, strict=True)))
    within = [
        item
        for item in tried
        if item.effect.perplexity <= most_perplexity * unguarded.perplexity and item.effect.distinct >= least_distinct * unguarded.distinct
    ]
    chosen = min(within, key=lambda item: (item.effect.violation, item.effect.perplexity), default=None)
    return Search(unguarded, tried, chosen, None if chosen is None else _with_strengths(policy, chosen.settings))


def pareto_front(effects: Sequence[Effect]) -> set[int]:
    """Indices of the effects that no other one beats in violation and perplexity both."""

    def beats(a: Effect, b: Effect) -> bool:
        no_worse = a.violation <= b.violation and a.perplexity <= b.perplexity
        return no_worse and (a.violation < b.violation or a.perplexity < b.perplexity)

    return {i for i, own in enumerate(effects) if not any(beats(other, own) for other in effects)}


def plot_search(search: Search, path: Path) -> None:
    """Violation against perplexity, the front as a line.

    Raises:
        DataError: matplotlib isn't installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise DataError('a plot needs matplotlib: pip install "moralguard[fit]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 5))
    axis.scatter([t.effect.perplexity for t in search.tried], [t.effect.violation for t in search.tried], color="grey", label="tried")
    front = sorted((t.effect.perplexity, t.effect.violation) for t in search.tried if t.front)
    axis.plot(*zip(*front, strict=True), "o-", color="tab:blue", label="Pareto front")
    axis.scatter([search.unguarded.perplexity], [search.unguarded.violation], marker="s", color="black", label="unguarded")
    if search.chosen is not None:
        axis.scatter(
            [search.chosen.effect.perplexity], [search.chosen.effect.violation], s=140, facecolors="none", edgecolors="red", label="chosen"
        )
    for item in search.tried:
        words = ", ".join(f"{name.rpartition('.')[2]} {value:g}" for name, value in item.settings.items())
        axis.annotate(words, (item.effect.perplexity, item.effect.violation), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axis.set(xlabel="perplexity under the unguarded model", ylabel="expected maximum violation")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _with_strengths(policy: Policy, settings: Settings) -> Policy:
    controls, gate = list(policy.effective_controls()), policy.gate
    for name, value in settings.items():
        which, _, setting = name.rpartition(".")
        if which == "gate":
            if gate is None:
                raise PolicyError(f"policy {policy.name!r} has no gate for {name!r}")
            if setting not in type(gate).model_fields:
                raise PolicyError(f"a gate has no setting {setting!r}; {nearest(setting, type(gate).model_fields)}")
            gate = gate.replaced(**{setting: value})
            continue
        names = [control.control_name for control in controls]
        if which.isdecimal() and int(which) < len(controls):
            index = int(which)
        elif names.count(which) == 1:
            index = names.index(which)
        elif which in names:
            raise PolicyError(
                f"policy {policy.name!r} has several controls {which!r}; name one by its place, such as {names.index(which)}.{setting}"
            )
        else:
            raise PolicyError(f"policy {policy.name!r} has no control {which!r} for {name!r}; {nearest(which, names)}")
        fields = type(controls[index]).model_fields
        if setting not in fields:
            raise PolicyError(f"{which} has no setting {setting!r}; {nearest(setting, fields)}")
        controls[index] = controls[index].replaced(**{setting: value})
    return policy.replaced(controls=tuple(controls), gate=gate)


def _read(checkpoint: Path | None, key: str) -> dict[str, Effect]:
    if checkpoint is None or not checkpoint.is_file():
        return {}
    data = json.loads(checkpoint.read_text(encoding="utf-8"))
    if data.get("key") != key:
        raise DataError(f"{checkpoint} is of another search; delete it, or give the policy, prompts and grid it was started with")
    return {name: Effect(**effect) for name, effect in data["measured"].items()}


def _write(checkpoint: Path | None, key: str, known: Mapping[str, Effect]) -> None:
    if checkpoint is None:
        return
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    partial = checkpoint.with_suffix(".partial")
    partial.write_text(
        json.dumps({"key": key, "measured": {name: asdict(effect) for name, effect in known.items()}}) + "\n", encoding="utf-8"
    )
    os.replace(partial, checkpoint)
