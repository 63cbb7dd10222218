"""What a session gives: a step's outcome, what failed in it, and what a request that stops running is remembered by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moralguard.backends.arrays import namespace_for
from moralguard.decoding.rectification import Rectified
from moralguard.decoding.step import Columns
from moralguard.decoding.terms import Terms

if TYPE_CHECKING:
    import torch


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
    """

    base: torch.Tensor
    law: Rectified
    terms: tuple[Terms, ...] | None
    failures: tuple[Failure, ...] = ()

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


@dataclass(frozen=True)
class RequestState:
    """What a request's guard remembers beside its tokens: kept while the request isn't running, given back when it runs again.

    Attributes:
        generated: tokens generated so far.
        opened: tokens that it had when its gate first opened.
        log_odds: f32[1, n], the gate's, of its newest steps; newest f32[1, 1] that of a step whose token wasn't committed.
        columns: of every control, rows [1, ...]; None before its first step.
        disabled: bool[controls, 1], controls that failed.
    """

    generated: int
    opened: torch.Tensor
    log_odds: torch.Tensor
    newest: torch.Tensor | None
    columns: tuple[Columns | None, ...]
    disabled: torch.Tensor
