"""What a session gives: a step's outcome, what failed in it, and what a request that stops running is remembered by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moralguard.backends.arrays import namespace_for
from moralguard.decoding.rectification import Rectified, rectify
from moralguard.decoding.step import Columns
from moralguard.decoding.terms import Terms

if TYPE_CHECKING:
    import torch


Parts = Sequence[tuple[str, Terms]]


@dataclass(frozen=True)
class Failure:
    """A control that raised for one row."""

    row: int
    control: str
    error: Exception


@dataclass(frozen=True)
class Outcome:
    """A rectified step.

    Attributes:
        base: f32[R, V] logits of the unguarded model.
        law: the guarded law: logits, and draws from it.
        terms: what each control added, in the controls' order, for the trace; None where the step was run row by row.
        failures: controls that raised; their rows hold the law of the remaining controls.
        parts: (control, its terms) of each row alone, where the step was run row by row; of all rows together, in one entry, otherwise.
    """

    base: torch.Tensor
    law: Rectified
    terms: tuple[Terms, ...] | None
    failures: tuple[Failure, ...] = ()
    parts: tuple[Parts, ...] = ()

    @property
    def logits(self) -> torch.Tensor:
        """f32[R, V] guarded logits; untouched rows are the base's own."""
        return self.law.logits

    @property
    def touched(self) -> torch.Tensor:
        """bool[R], rows in which a control acts."""
        return self.law.touched

    @property
    def emptied(self) -> torch.Tensor:
        """bool[R], rows in which the controls together removed every token."""
        arrays = namespace_for(self.base)
        rows: torch.Tensor = arrays.isneginf(self.logits).all(-1) & ~arrays.isneginf(self.base).all(-1)
        return rows

    def why_emptied(self, row: int) -> str:
        """What removed every token of a row of ``emptied``, and how to mend it: the controls whose filters left tokens out there."""
        alone = self.terms is None
        base = self.base[row : row + 1] if alone else self.base
        removing = []
        for name, terms in self.parts[row if alone else 0] if self.parts else ():
            logits = rectify(base, [terms]).logits[0 if alone else row]
            if bool((namespace_for(base).isneginf(logits) & ~namespace_for(base).isneginf(self.base[row])).any()):
                removing.append(name)
        if len(removing) == 1:
            return f"control {removing[0]!r} removed every token; loosen its filter"
        names = " and ".join(repr(name) for name in removing)
        return f"the controls {names} together removed every token: no token passes all their filters; loosen one, or drop a control"


@dataclass(frozen=True)
class GateState:
    """What a gate remembers of one request.

    Attributes:
        opened: i64[1], tokens that the request had when it first opened.
        log_odds: f32[1, n], of the newest steps; newest f32[1, 1] that of a step whose token wasn't committed.
    """

    opened: torch.Tensor
    log_odds: torch.Tensor
    newest: torch.Tensor | None


@dataclass(frozen=True)
class RequestState:
    """What a request's guard remembers beside its tokens: kept while the request isn't running, given back when it runs again.

    Attributes:
        generated: tokens generated so far.
        gates: of the policy's gate and of each distinct condition of its controls.
        columns: of every control, rows [1, ...]; None before its first step.
        disabled: bool[controls, 1], controls that failed.
    """

    generated: int
    gates: tuple[GateState, ...]
    columns: tuple[Columns | None, ...]
    disabled: torch.Tensor

    def resumed(self, generated: int) -> RequestState:
        """The state at the start of the next step: a step whose token came meanwhile counts, one that is done again doesn't."""
        if generated == self.generated:
            return self
        return replace(self, gates=tuple(_with_newest(gate) for gate in self.gates))


def _with_newest(gate: GateState) -> GateState:
    if gate.newest is None:
        return gate
    return replace(gate, log_odds=namespace_for(gate.log_odds).cat([gate.log_odds, gate.newest], -1), newest=None)
