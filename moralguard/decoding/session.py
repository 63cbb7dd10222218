"""A batch of running requests under one set of bound controls: their passes, their columns, one rectification a step.

The own decode loop, transformers' logits processor and ``attach`` all drive a session: they give it (or let it compute) the base
logits of a step, draw tokens, and commit them. A session is written once for torch tensors and NumPy arrays (``backends.arrays``).
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from moralguard.backends.arrays import namespace_of
from moralguard.controls.base import BoundControl
from moralguard.controls.order import in_order
from moralguard.decoding.conditions import Conditions, admitted, facts_of, gates_of, reads_hidden
from moralguard.decoding.gate import BoundGate
from moralguard.decoding.history import Continuation
from moralguard.decoding.outcome import Failure, Outcome, Parts, RequestState
from moralguard.decoding.passes import Pass, PassTable
from moralguard.decoding.rectification import Rectified, rectify
from moralguard.decoding.step import Columns, Step
from moralguard.decoding.terms import Terms
from moralguard.errors import ControlError

if TYPE_CHECKING:
    import torch

    from moralguard.backends.hf import LanguageModel


@dataclass
class _Pending:
    """The step that waits for its tokens."""

    step: Step
    terms: list[Terms] = field(default_factory=list)


class Session:
    """R requests that started together.

    Args:
        lm: the base model.
        controls: bound, active controls, in any order: they run in the canonical one, so that no law depends on it. Those whose
            conditions none of the prompts meets are left out, with their passes.
        prompts: token ids of the requests, none empty.
        own_base: the session runs the base's rows itself (own loop); otherwise each step is given the base logits.
        gate: when all controls act.
        given_hidden: each step is given the base's hidden state too. Where it isn't and something reads it, the session runs the
            base's rows beside the other passes.
        state: of the one request, where it has been running before; its prompt then ends in what it has generated.
        asked: the prompts themselves, where ``prompts`` end in what was generated.
    """

    def __init__(
        self,
        lm: LanguageModel,
        controls: Sequence[BoundControl],
        prompts: Sequence[Sequence[int]],
        *,
        own_base: bool,
        gate: BoundGate | None = None,
        given_hidden: bool = False,
        state: RequestState | None = None,
        asked: Sequence[Sequence[int]] | None = None,
    ):
        facts = facts_of(lm, gates_of(gate, controls), prompts if asked is None else asked)
        self.lm, self.controls, self.gate = lm, in_order(admitted(controls, facts)), gate
        self._arrays = namespace_of(lm)
        self._base_pass = Pass(lm) if own_base else None
        hidden = reads_hidden(gate, self.controls)
        self._state_pass = Pass(lm) if hidden and not own_base and not given_hidden else None
        passes = [item for control in self.controls for item in control.passes]
        if self._base_pass is not None:
            passes.insert(0, self._base_pass)
        if self._state_pass is not None:
            passes.insert(0, self._state_pass)
        own_states = (own_base and hidden) or self._state_pass is not None
        lengths = None if asked is None else [len(prompt) for prompt in asked]
        self.table = PassTable(passes, prompts, hidden_for=lm if own_states else None, asked=lengths)
        self._restart(prompts)
        self.conditions = Conditions.fresh(gate, self.controls, facts, self.generated)
        if state is not None:
            self._restore(state)

    def _restart(self, prompts: Sequence[Sequence[int]]) -> None:
        arrays, count = self._arrays, len(prompts)
        self.history, self.mask = arrays.left_padded(prompts, self.lm)
        self.generated = arrays.full((count,), 0, arrays.int64, self.history)
        self.columns: list[Columns | None] = [None] * len(self.controls)
        self.disabled = arrays.full((len(self.controls), count), False, arrays.bool_)
        self._pending: _Pending | None = None
        self.advanced = True  # the passes have read the newest token

    def _restore(self, state: RequestState) -> None:
        self.generated = self.generated + state.generated
        self.conditions = self.conditions.restored(state.gates)
        self.columns, self.disabled = list(state.columns), state.disabled

    def state(self, row: int) -> RequestState:
        """What the guard remembers of a request beside its tokens."""
        columns = tuple(None if columns is None else _row_of(columns, row) for columns in self.columns)
        return RequestState(int(self.generated[row]), self.conditions.states(row), columns, self.disabled[:, row : row + 1])

    def pass_over(self, tokens: int) -> None:
        """Take note that requests have that many tokens more than they had at the step that was never committed.

        Raises:
            ControlError: a control keeps columns, which only ``commit`` moves on.
        """
        keeping = [control.name for control in self.controls if type(control).columns is not BoundControl.columns]
        if keeping:
            names = ", ".join(keeping)
            raise ControlError(
                f"control {names} keeps state of its own, and the stack took the request off before it said which token was drawn; "
                "serve it where requests aren't preempted, or leave the control out",
                names,
            )
        self.generated = self.generated + tokens

    @property
    def rows(self) -> int:
        return self.history.shape[0]

    def step(
        self,
        base: torch.Tensor | None = None,
        *,
        temperature: float | torch.Tensor = 1.0,
        hidden: torch.Tensor | None = None,
        head_logits: torch.Tensor | None = None,
    ) -> Outcome:
        """Rectify the logits at the newest position of every request.

        Args:
            base: f32[R, V]; not given where the session runs the base itself.
            temperature: what will be applied afterwards (PPLM's fusion needs it), one or f32[R].
            hidden, head_logits: of the base, where the caller has them.
        """
        if self._base_pass is not None:
            view = self.table.view(self._base_pass)
            base = view.logits
            if view.group.hidden is not None:
                hidden, head_logits = view.hidden, view.head_logits
        elif self._state_pass is not None:
            view = self.table.view(self._state_pass)
            hidden, head_logits = view.hidden, view.head_logits
        if base is None:
            raise RuntimeError("this session doesn't run the base model: give the base logits")
        step = Step(
            logits=base,
            temperature=(
                self._arrays.full((self.rows,), temperature, self._arrays.float32, base)
                if isinstance(temperature, (int, float))
                else self._arrays.beside(temperature, base)
            ),
            history=self.history,
            mask=self.mask,
            generated=self.generated,
            hidden=hidden,
            head_logits=head_logits,
            view=self.table.view,
        )
        self._pending = _Pending(step)
        if not self.controls:
            return Outcome(base, rectify(base, ()), ())
        self.conditions, open_rows = self.conditions.look(step)
        try:
            if self.disabled.any():
                raise _DisabledError
            terms = [self._gated(self._terms_of(i, step), open_rows[i]) for i in range(len(self.controls))]
            rectified = rectify(base, terms)
            if not self._arrays.on_gpu(base):
                rectified.logits  # noqa: B018 -- computed now, so that a control's mistake shows where its row can be told
        except Exception as error:  # whichever control it was, each row is tried alone, so that neighbours don't end with it
            rectified, carries, failures, parts = self._row_by_row(step, open_rows)
            if not failures and not isinstance(error, _DisabledError):
                warnings.warn(
                    f"a control failed on {self.rows} rows together but on none alone, so the step was run row by row, which is slower: "
                    f"{type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self._pending = replace(self._pending, terms=carries)
            return Outcome(base, rectified, None, tuple(failures), parts)
        self._pending = replace(self._pending, terms=terms)
        names = (control.name for control in self.controls)
        return Outcome(base, rectified, tuple(terms), parts=(tuple(zip(names, terms, strict=True)),))

    def _terms_of(self, index: int, step: Step) -> Terms:
        control = self.controls[index]
        columns = self.columns[index]
        if columns is None:
            columns = self.columns[index] = control.columns(step)
        return control.terms(replace(step, columns=columns))

    @staticmethod
    def _gated(terms: Terms, open_rows: torch.Tensor | None) -> Terms:
        if open_rows is None:
            return terms
        return replace(terms, rows=open_rows if terms.rows is None else terms.rows & open_rows)

    def _row_by_row(
        self, step: Step, open_rows: Sequence[torch.Tensor | None]
    ) -> tuple[Rectified, list[Terms], list[Failure], tuple[Parts, ...]]:
        """Every row alone: a control that raises is left out of that row, for good."""
        failures: list[Failure] = []
        rectified: list[Rectified] = []
        parts: list[Parts] = []
        carries: list[list[Columns | None]] = [[] for _ in self.controls]
        for index in range(len(self.controls)):
            if self.columns[index] is None:
                self.columns[index] = self._first_columns(index, step, failures)
        for row in range(self.rows):
            single, terms = step.row(row), []
            for index, control in enumerate(self.controls):
                opened, carry = open_rows[index], None
                if not self.disabled[index, row]:
                    try:
                        mine = _row_of(self.columns[index] or {}, row)
                        added = control.terms(replace(single, columns=mine))
                        gated = self._gated(added, None if opened is None else opened[row : row + 1])
                        rectify(single.logits, [gated]).logits  # noqa: B018 -- does it fit?
                        terms.append((control.name, gated))
                        carry = added.carry
                    except Exception as error:
                        failures.append(Failure(row, control.name, error))
                        self.disabled[index, row] = True
                carries[index].append(carry)
            rectified.append(rectify(single.logits, [added for _, added in terms]))
            parts.append(tuple(terms))
        touched = self._arrays.cat([r.touched for r in rectified])
        joined = Rectified(step.logits, touched, computed=self._arrays.cat([r.logits for r in rectified]))
        return joined, [Terms(carry=self._join(carry)) for carry in carries], failures, tuple(parts)

    def _each_row(self, index: int, failures: list[Failure], compute: Callable[[int], Columns]) -> Columns:
        """Columns of all rows, computed row by row; a row in which it raises is disabled for this control."""
        found: list[Columns | None] = []
        for row in range(self.rows):
            columns: Columns | None = None
            if not self.disabled[index, row]:
                try:
                    columns = compute(row)
                except Exception as error:
                    failures.append(Failure(row, self.controls[index].name, error))
                    self.disabled[index, row] = True
            found.append(columns)
        return self._join(found)

    def _join(self, carries: Sequence[Columns | None]) -> Columns:
        """One carry for the batch; rows in which the control failed borrow a neighbour's, as nobody will read it."""
        known = next((carry for carry in carries if carry), None)
        if known is None:
            return {}
        return {name: self._arrays.cat([(carry or known)[name] for carry in carries]) for name in known}

    def commit(self, tokens: torch.Tensor, parents: torch.Tensor | None = None) -> list[Failure]:
        """Record the drawn tokens i64[n]; ``parents`` i64[n] are the rows they extend (beams), None for one a row.

        The passes don't read the tokens yet: ``advance`` does, so that requests that are over cost nothing more.

        Returns:
            Controls that raised while taking note of a row's token; they are left out of that row from now on.
        """
        if self._pending is None:
            raise RuntimeError("commit follows step")
        pending, self._pending = self._pending, None
        arrays = self._arrays
        failures: list[Failure] = []
        if parents is not None:
            self.select(parents)
        for index in range(len(self.controls)):
            columns = self.columns[index]
            if columns is None or not pending.terms:
                continue
            step = pending.step if parents is None else pending.step.select(parents)
            carry = pending.terms[index].carry
            if parents is not None:
                carry = {name: arrays.take_rows(value, parents) for name, value in carry.items()}
            self.columns[index] = self._committed(index, replace(step, columns=columns), carry, tokens, failures)
        self.conditions = self.conditions.commit()
        tokens = arrays.beside(tokens, self.history)
        self._read(tokens[:, None])
        self.advanced = False
        self.generated = self.generated + 1
        return failures

    def _read(self, tokens: torch.Tensor) -> None:
        """Tokens i64[R, n] behind the history."""
        arrays = self._arrays
        self.history = arrays.cat([self.history, tokens], -1)
        self.mask = arrays.cat([self.mask, arrays.full(tuple(tokens.shape), 1, arrays.int64, self.mask)], -1)

    def _first_columns(self, index: int, step: Step, failures: list[Failure]) -> Columns:
        return self._each_row(index, failures, lambda row: self.controls[index].columns(step.row(row)))

    def _committed(self, index: int, step: Step, carry: Columns, tokens: torch.Tensor, failures: list[Failure]) -> Columns:
        control = self.controls[index]
        if not self.disabled[index].any():
            with suppress(Exception):  # whichever row it was, each is tried alone below
                return control.commit(step, carry, tokens)
        return self._each_row(index, failures, lambda row: control.commit(step.row(row), _row_of(carry, row), tokens[row : row + 1]))

    def advance(self) -> None:
        """Let every pass read the newest committed token."""
        self.table.advance(self.history[:, -1:])
        self.advanced = True

    def select(self, rows: torch.Tensor) -> None:
        """Keep and reorder requests (i64[n]; an index may repeat: a fork)."""
        self._pending = self._pending_of(rows, self.table)
        self.table.select(rows)
        self._take(rows)

    def _take(self, rows: torch.Tensor) -> None:
        take = self._arrays.take_rows
        index = self._arrays.beside(rows, self.history)
        self.history, self.mask, self.generated = self.history[index], self.mask[index], self.generated[index]
        self.disabled = self.disabled[:, self._arrays.on_host(rows)]
        self.conditions = self.conditions.select(rows)
        self._drop_unused_columns()
        self.columns = [
            None if columns is None else {name: take(value, rows) for name, value in columns.items()} for columns in self.columns
        ]

    def _drop_unused_columns(self) -> None:
        """What only requests that left needed, so that a batch that never ends doesn't grow for ever."""
        unused = self.history.shape[1] - int(self.mask.sum(-1).max())
        self.history, self.mask = self.history[:, unused:], self.mask[:, unused:]
        self.conditions = self.conditions.trimmed(int(self.generated.max()))

    @property
    def splittable(self) -> bool:
        """Whether ``split`` and ``join`` work: every cache holds keys and values only."""
        return self.table.rewindable

    def split(self, rows: Sequence[int]) -> Session:
        """These requests as a session of their own, a step that waits for its tokens included; the others stay."""
        index, rest = (self._arrays.integers(chosen) for chosen in (list(rows), [row for row in range(self.rows) if row not in set(rows)]))
        own = copy.copy(self)
        own.table = self.table.fork(index)
        own._take(index)
        own._pending = self._pending_of(index, own.table)
        self.select(rest)
        return own

    def _pending_of(self, rows: torch.Tensor, table: PassTable) -> _Pending | None:
        pending, take = self._pending, self._arrays.take_rows
        if pending is None:
            return None
        return _Pending(
            replace(pending.step.select(rows), view=table.view),
            [Terms(carry={name: take(value, rows) for name, value in terms.carry.items()}) for terms in pending.terms],
        )

    def joins(self, other: Session) -> bool:
        """Whether another session can be joined: the same controls, read equally far, with state of equal shapes."""
        if self.controls != other.controls or self.gate is not other.gate or not (self.splittable and other.splittable):
            return False
        if self.advanced != other.advanced:
            return False
        for mine, theirs in zip(self.columns, other.columns, strict=True):
            if (mine is None) != (theirs is None):
                return False
            if mine is None or theirs is None:
                continue
            if mine.keys() != theirs.keys() or any(mine[name].shape[1:] != theirs[name].shape[1:] for name in mine):
                return False
        return True

    def join(self, other: Session) -> None:
        """Requests of another session (see ``joins``), which is not to be used afterwards, behind one's own."""
        arrays = self._arrays
        self._pending = None
        self.table.join(other.table)
        width = max(self.history.shape[1], other.history.shape[1])
        self.history = arrays.cat([arrays.pad_left(session.history, width, 0) for session in (self, other)])
        self.mask = arrays.cat([arrays.pad_left(session.mask, width, 0) for session in (self, other)])
        self.conditions = self.conditions.join(other.conditions)
        self.generated = arrays.cat([self.generated, other.generated])
        self.disabled = arrays.cat([self.disabled, other.disabled], 1)
        self.columns = [
            None if mine is None or theirs is None else {name: arrays.cat([mine[name], theirs[name]]) for name in mine}
            for mine, theirs in zip(self.columns, other.columns, strict=True)
        ]

    def rewind(self, found: Continuation, histories: Sequence[Sequence[int]]) -> None:
        """Forget the newest tokens of the parents and read others instead; histories are the unpadded ids afterwards."""
        self._pending = None
        arrays = self._arrays
        if found.parents is not None:
            self.select(arrays.integers(found.parents, self.lm))
        before, self.generated = self.generated, self.generated + found.tokens.shape[1] - found.dropped
        self.conditions = self.conditions.rewind(before, found.dropped, int(self.generated.max()))
        tokens = arrays.integers(found.tokens, self.lm)
        kept = self.history.shape[1] - found.dropped
        self.history, self.mask = self.history[:, :kept], self.mask[:, :kept]
        self._read(tokens)
        if not self.table.rewindable or self.table.sums_states:
            self.table.reread(histories)
            return
        if found.dropped:
            self.table.rewind(found.dropped)
        self.table.advance(tokens)

    @property
    def rooms(self) -> list[int]:
        """Tokens that still fit the context of every pass, one number a request."""
        rooms = [sys.maxsize] * self.rows
        for group in self.table.groups:
            if group.lm.context_length is not None:
                for row, length in enumerate(group.lengths):
                    request = row % self.rows
                    rooms[request] = min(rooms[request], group.lm.context_length - length)
        return rooms

    @property
    def stateful(self) -> bool:
        """Whether a control keeps columns, which can't be rewound."""
        return any(bool(columns) for columns in self.columns)


class _DisabledError(Exception):
    """Some control is disabled in some row: the step is run row by row."""


def _row_of(columns: Columns, row: int) -> Columns:
    return {name: value[row : row + 1] for name, value in columns.items()}
