"""Running requests of a serving stack: each under controls of its own, coming and going while others run.

An adapter makes three calls: ``add``, ``step`` and ``remove``. Requests under the same controls that have been read equally far share a
``Session``; they are split and joined as the stack schedules them, so that a batch that stays as it is costs nothing beyond its step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moralguard.backends.arrays import Array, namespace_of
from moralguard.controls.base import BoundControl
from moralguard.decoding.conditions import gates_of
from moralguard.decoding.gate import BoundGate
from moralguard.decoding.outcome import Failure, Outcome, RequestState
from moralguard.decoding.session import Session
from moralguard.errors import ControlError, PromptError

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel


@dataclass(frozen=True)
class SlotFailure:
    """A control that raised for the request of one slot, or the pass that couldn't be run for it."""

    slot: int
    control: str
    error: Exception


@dataclass(frozen=True)
class SlotStep:
    """A rectified step of requests that were computed together; row i of the outcome belongs to ``slots[i]``."""

    slots: tuple[int, ...]
    outcome: Outcome


@dataclass(frozen=True)
class _Request:
    controls: tuple[BoundControl, ...]
    gate: BoundGate | None
    prompt: tuple[int, ...]
    state: RequestState | None


@dataclass(eq=False)
class _Batch:
    """Requests that share a session, row by row, and the generated tokens that it has been given of each."""

    session: Session
    slots: list[int]
    read: list[list[int]]

    def split(self, rows: Sequence[int]) -> _Batch:
        """These rows as a batch of their own; all of them leave the batch as it is."""
        if len(rows) == len(self.slots):
            return self
        own = _Batch(self.session.split(rows), [self.slots[row] for row in rows], [self.read[row] for row in rows])
        self._keep([row for row in range(len(self.slots)) if row not in set(rows)])
        return own

    def drop(self, row: int) -> None:
        """Without this row, of several."""
        rest = [other for other in range(len(self.slots)) if other != row]
        self.session.select(namespace_of(self.session.lm).integers(rest))
        self._keep(rest)

    def _keep(self, rows: Sequence[int]) -> None:
        self.slots, self.read = [self.slots[row] for row in rows], [self.read[row] for row in rows]

    def join(self, other: _Batch) -> None:
        self.session.join(other.session)
        self.slots, self.read = self.slots + other.slots, self.read + other.read


class Slots:
    """The running requests of one model.

    Args:
        lm: the model that the controls were bound to.
        own_base: the base's logits are computed here; otherwise each step is given them.
        given_hidden: each step is given the base's hidden states, too.
    """

    def __init__(self, lm: LanguageModel, *, own_base: bool, given_hidden: bool = False):
        self.lm = lm
        self._own_base, self._given_hidden = own_base, given_hidden
        self._arrays = namespace_of(lm)
        self._requests: dict[int, _Request] = {}
        self._batches: list[_Batch] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, slot: int) -> bool:
        return slot in self._requests

    @property
    def batches(self) -> int:
        """Sessions that run now."""
        return len(self._batches)

    def add(
        self,
        slot: int,
        controls: Sequence[BoundControl],
        gate: BoundGate | None,
        prompt_ids: Sequence[int],
        state: RequestState | None = None,
    ) -> None:
        """A request in a slot, whoever held it before. ``state`` is what ``park`` gave, where the request has been running before.

        Raises:
            PromptError: the prompt is empty.
        """
        if not prompt_ids:
            raise PromptError(f"the request in slot {slot} has an empty prompt; give at least one token")
        self.remove(slot)
        self._requests[slot] = _Request(tuple(controls), gate, tuple(prompt_ids), state)

    def remove(self, slot: int) -> None:
        """Forget a request; nothing happens where there is none."""
        self._requests.pop(slot, None)
        for batch in self._batches:
            if slot in batch.slots:
                self._drop(batch, batch.slots.index(slot))
                return

    def park(self, slot: int, generated: Sequence[int]) -> RequestState | None:
        """Remove a request that may come back (preemption): what its guard remembers, for ``add``. None where nothing ran there.

        Args:
            generated: ids generated so far, with the one drawn at the last step where it is known.
        """
        failures: list[SlotFailure] = []
        state = None
        for batch in list(self._batches):
            if slot in batch.slots:
                for new, part in self._parts(batch, {slot: generated}):
                    if new == 1:
                        self._commit(part, {slot: generated}, failures)
                    state = part.session.state(0)
        self.remove(slot)
        return state

    def _drop(self, batch: _Batch, row: int) -> None:
        if len(batch.slots) == 1:
            self._batches.remove(batch)
        else:
            batch.drop(row)

    def step(
        self,
        tokens: Mapping[int, Sequence[int]],
        base: Array | None = None,
        *,
        temperature: Mapping[int, float] | None = None,
        hidden: Array | None = None,
        head_logits: Array | None = None,
    ) -> tuple[list[SlotStep], list[SlotFailure]]:
        """Rectify the next token of requests, once they were brought up to the tokens they have generated.

        Args:
            tokens: slot -> ids generated so far, in the order of the rows of ``base``; slots that aren't named wait.
            base: f32[n, V], the base's logits, unless they are computed here.
            temperature: slot -> what will be applied afterwards; 1 where it isn't said.
            hidden, head_logits: of the base, where ``given_hidden``.

        Returns:
            The steps, and what failed. A request whose session failed as a whole is in no step; one of whose controls failed is, under the
            remaining ones.
        """
        failures: list[SlotFailure] = []
        known = {slot for batch in self._batches for slot in batch.slots}
        ready = self._brought_up(tokens, failures)
        ready += self._started([slot for slot in tokens if slot not in known], tokens, failures)
        row_of = {slot: row for row, slot in enumerate(tokens)}
        steps = []
        for batch in ready:
            rows = self._arrays.integers([row_of[slot] for slot in batch.slots], self.lm)
            try:
                outcome = batch.session.step(
                    None if base is None else base[rows],
                    temperature=self._arrays.float_array([(temperature or {}).get(slot, 1.0) for slot in batch.slots], self.lm),
                    hidden=None if hidden is None else hidden[rows],
                    head_logits=None if head_logits is None else head_logits[rows],
                )
            except Exception as error:  # a gate that failed: no row can be told
                self._fail(batch, error, failures)
                continue
            failures += _of_slots(batch, outcome.failures)
            steps.append(SlotStep(tuple(batch.slots), outcome))
        return steps, failures

    def _brought_up(self, tokens: Mapping[int, Sequence[int]], failures: list[SlotFailure]) -> list[_Batch]:
        """The batches of running requests, each committed to its newest token."""
        committed: list[_Batch] = []
        standing: list[_Batch] = []
        for batch in list(self._batches):
            for new, part in self._parts(batch, tokens):
                if new == 0:
                    standing.append(part)
                elif new == 1:
                    self._commit(part, tokens, failures)
                    committed.append(part)
                else:  # tokens were taken back, or several came at once
                    standing += self._restarted(part, tokens, failures)
        ready = []
        for batch in self._joined(committed):
            for row in [row for row, room in enumerate(batch.session.rooms) if room < 1][::-1]:
                error = PromptError("the text has outgrown the context of one of its passes")
                failures.append(SlotFailure(batch.slots[row], "auxiliary pass", error))
                self._drop(batch, row)
            if batch not in self._batches:
                continue
            try:
                batch.session.advance()
            except Exception as error:  # one forward of all its rows
                self._fail(batch, error, failures)
            else:
                ready.append(batch)
        return ready + standing

    def _parts(self, batch: _Batch, tokens: Mapping[int, Sequence[int]]) -> list[tuple[int, _Batch]]:
        """The batch split by how many new tokens its requests have: 0, 1, or -1 for anything else. Requests that wait stay behind."""
        kinds: dict[int, list[int]] = {}
        for row, (slot, read) in enumerate(zip(batch.slots, batch.read, strict=True)):
            if slot in tokens:
                now = tokens[slot]
                new = len(now) - len(read) if list(now[: len(read)]) == read else -1
                kinds.setdefault(new if new in (0, 1) else -1, []).append(row)
        named = [(new, [batch.slots[row] for row in rows]) for new, rows in sorted(kinds.items())]
        parts = []
        for new, slots in named:
            part = batch.split([batch.slots.index(slot) for slot in slots])
            if part is not batch:
                self._batches.append(part)
            parts.append((new, part))
        return parts

    def _commit(self, batch: _Batch, tokens: Mapping[int, Sequence[int]], failures: list[SlotFailure]) -> None:
        newest = [int(tokens[slot][-1]) for slot in batch.slots]
        late = batch.session.commit(self._arrays.integers(newest, self.lm))
        failures += _of_slots(batch, late)
        for read, token in zip(batch.read, newest, strict=True):
            read.append(token)

    def _joined(self, batches: Iterable[_Batch]) -> list[_Batch]:
        """As few batches as can be."""
        found: list[_Batch] = []
        for batch in batches:
            for known in found:
                if known.session.joins(batch.session):
                    known.join(batch)
                    self._batches.remove(batch)
                    break
            else:
                found.append(batch)
        return found

    def _started(self, slots: Iterable[int], tokens: Mapping[int, Sequence[int]], failures: list[SlotFailure]) -> list[_Batch]:
        started = []
        for slot in slots:
            request, read = self._requests[slot], [int(token) for token in tokens[slot]]
            try:
                session = Session(
                    self.lm,
                    request.controls,
                    [[*request.prompt, *read]],
                    own_base=self._own_base,
                    gate=request.gate,
                    given_hidden=self._given_hidden,
                    state=None if request.state is None else request.state.resumed(len(read)),
                    asked=[request.prompt],
                )
                _check_memory(request, len(read))
                missed = len(read) - (0 if request.state is None else request.state.generated)
                if missed:
                    session.pass_over(missed)
            except Exception as error:  # its prompt and a prefix don't fit a context, or the pass itself failed
                failures.append(SlotFailure(slot, "auxiliary pass", error))
                continue
            batch = _Batch(session, [slot], [read])
            self._batches.append(batch)
            started.append(batch)
        return self._joined(started)

    def _restarted(self, batch: _Batch, tokens: Mapping[int, Sequence[int]], failures: list[SlotFailure]) -> list[_Batch]:
        """Requests whose tokens don't go on from what was read, read anew; what their guard remembers stays."""
        for row, slot in enumerate(batch.slots):
            old = self._requests[slot]
            self._requests[slot] = _Request(old.controls, old.gate, old.prompt, batch.session.state(row))
        slots = list(batch.slots)
        self._batches.remove(batch)
        return self._started(slots, tokens, failures)

    def _fail(self, batch: _Batch, error: Exception, failures: list[SlotFailure]) -> None:
        failures += [SlotFailure(slot, "auxiliary pass", error) for slot in batch.slots]
        self._batches.remove(batch)


def _of_slots(batch: _Batch, failures: Iterable[Failure]) -> list[SlotFailure]:
    return [SlotFailure(batch.slots[failure.row], failure.control, failure.error) for failure in failures]


def _check_memory(request: _Request, generated: int) -> None:
    """Raise where the gate looks back at steps that nobody remembers.

    Raises:
        ControlError: the request has tokens that its guard never saw being drawn, or tokens were taken back.
    """
    seen = 0 if request.state is None else request.state.generated
    known = generated == seen or (request.state is not None and generated == seen + 1)
    if not known and any(gate.remembers for gate in gates_of(request.gate, request.controls)):
        raise ControlError(
            f"the request has {generated} tokens, its gate saw {seen} steps, and what opens it depends on the others; hand `add` what "
            "`park` gave, or use a gate (and `when`) without stay_open and risk_window",
            "gate",
        )
