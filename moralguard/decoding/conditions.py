"""Where the controls of a batch of requests act: the policy's gate, the controls' own conditions, and what these remember.

Equal conditions of several controls are looked at once a step. Everything here is a value: a session holds the newest one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moralguard.backends.arrays import namespace_for
from moralguard.controls.base import BoundControl
from moralguard.decoding.gate import BoundGate
from moralguard.decoding.outcome import GateState
from moralguard.decoding.step import Step
from moralguard.decoding.when import BoundWhen, PromptFacts, prompt_facts

if TYPE_CHECKING:
    import torch

    from moralguard.backends.hf import LanguageModel

_NEVER = sys.maxsize


def gates_of(gate: BoundGate | None, controls: Sequence[BoundControl]) -> tuple[BoundGate, ...]:
    """The policy's gate, where there is one, and then the distinct conditions of the controls."""
    found = [] if gate is None else [gate]
    seen = []
    for control in controls:
        if control.when is not None and control.when.settings not in seen:
            seen.append(control.when.settings)
            found.append(control.when)
    return tuple(found)


def reads_hidden(gate: BoundGate | None, controls: Sequence[BoundControl]) -> bool:
    """Whether something reads the base's hidden states."""
    return any(each.needs.hidden for each in (*gates_of(gate, controls), *(control.settings for control in controls)))


def facts_of(lm: LanguageModel, gates: Sequence[BoundGate], prompts: Sequence[Sequence[int]]) -> list[PromptFacts] | None:
    """Facts of each prompt; None where no gate asks for any."""
    if not any(isinstance(gate, BoundWhen) and gate.asks_prompt for gate in gates):
        return None
    known = {prompt: prompt_facts(lm, prompt) for prompt in {tuple(prompt) for prompt in prompts}}
    return [known[tuple(prompt)] for prompt in prompts]


def admitted(controls: Sequence[BoundControl], facts: Sequence[PromptFacts] | None) -> tuple[BoundControl, ...]:
    """The controls that can act in some of the requests; the others cost nothing, no pass either."""
    if facts is None:
        return tuple(controls)
    return tuple(c for c in controls if c.when is None or any(c.when.admits(each) for each in facts))


@dataclass(frozen=True)
class _Memory:
    """One gate and what it remembers of R requests.

    Attributes:
        admitted: bool[R], requests whose prompt meets it; None for all.
        opened: i64[R], tokens that a request had when it first opened.
        log_odds: f32[R, n], of the steps before; newest f32[R] that of the step that waits for its tokens.
    """

    gate: BoundGate
    admitted: torch.Tensor | None
    opened: torch.Tensor
    log_odds: torch.Tensor
    newest: torch.Tensor | None = None

    def look(self, step: Step) -> tuple[_Memory, torch.Tensor | None]:
        """The rows bool[R] that are open at a step, None for all, and the memory with the step in it."""
        arrays = step.arrays
        newest = self.gate.log_odds(step)
        rows = self.gate.open_rows(step, None if newest is None else arrays.cat([self.log_odds, newest[:, None]], -1))
        if self.admitted is not None:
            rows = self.admitted if rows is None else rows & self.admitted
        opened = self.opened
        if rows is not None and self.gate.settings.stay_open:
            opened = arrays.where(rows, arrays.minimum(opened, step.generated), opened)
            rows = opened <= step.generated
        return replace(self, opened=opened, newest=newest), rows

    def select(self, rows: torch.Tensor) -> _Memory:
        take = namespace_for(self.opened).take_rows
        return _Memory(
            self.gate,
            None if self.admitted is None else take(self.admitted, rows),
            take(self.opened, rows),
            take(self.log_odds, rows),
            None if self.newest is None else take(self.newest, rows),
        )

    def commit(self) -> _Memory:
        if self.newest is None:
            return self
        return replace(self, log_odds=namespace_for(self.opened).cat([self.log_odds, self.newest[:, None]], -1), newest=None)

    def join(self, other: _Memory) -> _Memory:
        arrays = namespace_for(self.opened)
        steps = max(self.log_odds.shape[1], other.log_odds.shape[1])
        both = (self, other)
        return _Memory(
            self.gate,
            None if self.admitted is None or other.admitted is None else arrays.cat([self.admitted, other.admitted]),
            arrays.cat([self.opened, other.opened]),
            arrays.cat([arrays.pad_left(memory.log_odds, steps, float("nan")) for memory in both]),
        )

    def rewind(self, generated: torch.Tensor, dropped: int, now: int) -> _Memory:
        arrays = namespace_for(self.opened)
        # what opened it behind the last token that stays was another text
        opened = arrays.masked_fill(self.opened, self.opened > generated - dropped, _NEVER)
        log_odds = self.log_odds
        if log_odds.shape[1]:
            known = log_odds[:, : max(0, int(generated.max()) - dropped)]
            unknown = arrays.full((known.shape[0], now - known.shape[1]), float("nan"), arrays.float32, known)
            log_odds = arrays.cat([known, unknown], -1)
        return replace(self, opened=opened, log_odds=log_odds, newest=None)


@dataclass(frozen=True)
class Conditions:
    """The gates of a batch of R requests.

    Attributes:
        memories: one a distinct gate.
        of_control: which of them each control is under.
    """

    memories: tuple[_Memory, ...]
    of_control: tuple[tuple[int, ...], ...]

    @classmethod
    def fresh(
        cls, gate: BoundGate | None, controls: Sequence[BoundControl], facts: Sequence[PromptFacts] | None, generated: torch.Tensor
    ) -> Conditions:
        """Of requests that begin: ``generated`` i64[R] tells their number and their place, ``facts`` their prompts."""
        arrays, count = namespace_for(generated), generated.shape[0]
        gates = gates_of(gate, controls)
        never = arrays.full((count,), _NEVER, arrays.int64, generated)
        nothing = arrays.full((count, 0), 0.0, arrays.float32, generated)
        memories = tuple(_Memory(each, _admitted_rows(each, facts, arrays, generated), never, nothing) for each in gates)
        own = () if gate is None else (0,)
        # the policy's gate stands first, and may be equal to a control's conditions without being one of them
        whens = {index: each.settings for index, each in enumerate(gates) if index >= len(own)}
        return cls(
            memories,
            tuple(
                own if control.when is None else (*own, next(i for i, settings in whens.items() if settings == control.when.settings))
                for control in controls
            ),
        )

    def look(self, step: Step) -> tuple[Conditions, list[torch.Tensor | None]]:
        """The rows bool[R] that each control may act in, None for all, and the conditions with the step in them."""
        looked = [memory.look(step) for memory in self.memories]
        rows: list[Any] = []
        for indices in self.of_control:
            known = [found for index in indices if (found := looked[index][1]) is not None]
            rows.append(None if not known else known[0] if len(known) == 1 else known[0] & known[1])
        return replace(self, memories=tuple(memory for memory, _ in looked)), rows

    def select(self, rows: torch.Tensor) -> Conditions:
        """Keep and reorder requests (i64[n]; an index may repeat)."""
        return replace(self, memories=tuple(memory.select(rows) for memory in self.memories))

    def commit(self) -> Conditions:
        """The tokens of the step that was looked at are known."""
        return replace(self, memories=tuple(memory.commit() for memory in self.memories))

    def trimmed(self, steps: int) -> Conditions:
        """Without columns of log-odds that are older than any request's first step."""
        kept = (replace(memory, log_odds=memory.log_odds[:, max(0, memory.log_odds.shape[1] - steps) :]) for memory in self.memories)
        return replace(self, memories=tuple(kept))

    def join(self, other: Conditions) -> Conditions:
        """Requests of other conditions of the same gates behind one's own."""
        pairs = zip(self.memories, other.memories, strict=True)
        return replace(self, memories=tuple(mine.join(theirs) for mine, theirs in pairs))

    def rewind(self, generated: torch.Tensor, dropped: int, now: int) -> Conditions:
        """Forget the newest ``dropped`` of ``generated`` i64[R] tokens; the longest request has ``now`` tokens afterwards."""
        return replace(self, memories=tuple(memory.rewind(generated, dropped, now) for memory in self.memories))

    def states(self, row: int) -> tuple[GateState, ...]:
        rows = slice(row, row + 1)
        return tuple(
            GateState(memory.opened[rows], memory.log_odds[rows], None if memory.newest is None else memory.newest[rows, None])
            for memory in self.memories
        )

    def restored(self, states: Sequence[GateState]) -> Conditions:
        """Of one request that has been running before."""
        pairs = zip(self.memories, states, strict=True)
        return replace(self, memories=tuple(replace(memory, opened=state.opened, log_odds=state.log_odds) for memory, state in pairs))


def _admitted_rows(gate: BoundGate, facts: Sequence[PromptFacts] | None, arrays: Any, like: torch.Tensor) -> torch.Tensor | None:
    if facts is None or not isinstance(gate, BoundWhen) or not gate.asks_prompt:
        return None
    rows = arrays.integers([int(gate.admits(each)) for each in facts])
    found: torch.Tensor = arrays.beside(arrays.cast(rows, arrays.bool_), like)
    return found
