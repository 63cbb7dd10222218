"""Controls that can't stand in one policy: told when the guard is built, not at some token."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moralguard.controls.order import plain
from moralguard.errors import PolicyError

if TYPE_CHECKING:
    from moralguard.controls.base import BoundControl

Thing = tuple[str, Hashable]
"""(kind, what): one thing that a setting names."""


def things(kind: str, *values: Any) -> tuple[Thing, ...]:
    """What settings name, so that equal ones of two controls are found: prompts, words, files and arrays by what they say, models and
    functions by themselves.

    Args:
        kind: as messages say it: "source" for experts, "prompt" for texts in front of a pass, "word" for words of the text itself, ...
        values: settings; None names nothing.
    """
    found: list[Thing] = []
    for value in values:
        prompt = getattr(value, "prompt", None)
        if value is None:
            continue
        if prompt is not None:
            found.append(("prompt", prompt))
        elif isinstance(value, (str, Path, int, tuple)):
            found.append((kind, str(value) if isinstance(value, Path) else value))
        elif isinstance(value, dict):
            found.append((kind, json.dumps(plain(value), sort_keys=True).encode()))
        else:
            found.append((kind, id(value)))
    return tuple(found)


def check_conflicts(policy: str, controls: Sequence[BoundControl[Any]]) -> None:
    """Compare the bound controls of a policy with each other. Two whose ``when`` no prompt can meet both aren't compared.

    Raises:
        PolicyError: one seeks what another avoids, or what they allow has no token in common.
    """
    for one, other in combinations(controls, 2):
        if _never_meet(one, other):
            continue
        for seeking, avoiding in ((one, other), (other, one)):
            shared = set(seeking.settings.seeks) & set(avoiding.settings.avoids)
            if shared:
                raise PolicyError(
                    f"policy {policy!r}: control {seeking.settings.versioned_name()} draws the text to {_named(shared)}, from which "
                    f"{avoiding.settings.versioned_name()} keeps it; drop one of the two, swap the settings of one, or give them `when` "
                    "conditions that no prompt meets both (language, role)"
                )
        if one.allowed is not None and other.allowed is not None and not one.allowed & other.allowed:
            names = f"{one.settings.versioned_name()} and {other.settings.versioned_name()}"
            raise PolicyError(
                f"policy {policy!r}: what {names} allow ({len(one.allowed)} and {len(other.allowed)} tokens) has no token in common, so "
                "together they leave none; let both allow some, or drop one"
            )
    _check_together(policy, [control for control in controls if control.allowed is not None and control.when is None])


def _check_together(policy: str, limiting: Sequence[BoundControl[Any]]) -> None:
    """Pairs may have tokens in common that all together haven't."""
    allowed = [control.allowed for control in limiting if control.allowed is not None]
    if allowed and not frozenset.intersection(*allowed):
        names = ", ".join(control.settings.versioned_name() for control in limiting)
        raise PolicyError(f"policy {policy!r}: no token is allowed by all of {names}; give their lists a common token, or drop one")


def _never_meet(one: BoundControl[Any], other: BoundControl[Any]) -> bool:
    mine, theirs = one.settings.when, other.settings.when
    return mine is not None and theirs is not None and mine.excludes(theirs)


def _named(shared: set[Thing]) -> str:
    kind, value = min(shared, key=repr)
    return f"the {kind} {value!r}" if isinstance(value, (str, tuple)) else f"the same {kind}"
