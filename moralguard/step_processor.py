"""What every logits processor of the guard does, whichever arrays it is given: requests told by their history, steps counted, failures."""

from __future__ import annotations

import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from moralguard.backends.arrays import Array, namespace_of
from moralguard.controls.base import BoundControl
from moralguard.decoding.counters import Counters
from moralguard.decoding.gate import BoundGate
from moralguard.decoding.history import Continuation, Ids, follow, goes_on, host_ids, leading, left_padding, unpadded
from moralguard.decoding.outcome import Failure, Outcome
from moralguard.decoding.session import Session
from moralguard.errors import BypassError, ControlError, PromptError, UnsupportedPathError

_latest = threading.local()


class StepProcessor(ABC):
    """Guards a loop that calls it at every step with all ids so far and the scores of the next token.

    Beams, and drafts that are taken back, are followed. The same guard listed twice acts once. What a backend adds is how scores
    become base logits, where hidden states come from, and the kind of array that is given back.

    Attributes:
        rows_guarded: rows of logits that went through this processor.
        positions: new tokens of the running call that were guarded; drafts that were taken back don't count.
    """

    def __init__(
        self,
        lm: Any,
        controls: Sequence[BoundControl],
        gate: BoundGate | None,
        open_on_error: bool,
        counters: Counters,
        *,
        attention_mask: Any = None,
        temperature: float = 1.0,
    ):
        self._lm, self._controls, self._gate = lm, tuple(controls), gate
        self._open, self._counters, self._temperature = open_on_error, counters, temperature
        self._given_padding = None if attention_mask is None else leading(host_ids(attention_mask) == 0)
        self._arrays = namespace_of(lm)
        self._call: weakref.ref[Any] | None = None
        self._padding: Ids = np.zeros(0, np.int64)
        self._session: Session | None = None
        self._ids: Ids = np.zeros((0, 0), np.int64)
        self._prompt_width = 0
        self.rows_guarded = 0
        self.positions = 0

    @abstractmethod
    def _base_logits(self, scores: Any) -> Array:
        """f32[R, V] where the model computes, in memory of their own."""

    def _hidden(self) -> tuple[Array | None, Array | None]:
        """The base's newest hidden states [R, H] and head logits [R, V], where the loop's own pass gave them."""
        return None, None

    @property
    def _given_hidden(self) -> bool:
        return False

    @abstractmethod
    def _scores(self, logits: Array, touched: Array, scores: Any) -> Any:
        """Normalised log-probabilities in touched rows and the given scores elsewhere, in the kind of array of ``scores``."""

    def _guarded(self, input_ids: Any, scores: Any) -> Any:
        given = host_ids(input_ids)
        if given.ndim != 2 or scores.ndim != 2 or given.shape[0] != scores.shape[0]:
            raise PromptError(
                f"the processor was given ids {list(given.shape)} and scores {list(scores.shape)}; expected [R, T] and [R, V]"
            )
        if given.shape[1] == 0:
            raise PromptError("the processor was given no ids (generate with inputs_embeds only?); the guard follows token ids: pass both")
        fresh = self._is_new_call(given)
        if len(self._padding) != len(given):
            raise UnsupportedPathError(
                f"the number of rows changed to {len(given)} within one call; the guard can't tell which rows are gone"
            )
        # padding as -1, so that equal ids under different masks aren't taken for each other
        ids = np.where(np.arange(given.shape[1]) < self._padding[:, None], -1, given)
        emitted = self._count_positions(ids, fresh)
        if self._already_guarded(input_ids, scores):
            return scores
        self.rows_guarded += len(ids)
        self._counters.add(requests=len(ids) if fresh else 0, rows_guarded=len(ids), tokens_emitted=emitted)
        guarded = self._rectify(ids, scores, fresh) if self._controls else scores
        _latest.output, _latest.ids, _latest.controls = weakref.ref(guarded), weakref.ref(input_ids), self._controls
        return guarded

    def _already_guarded(self, ids: Any, scores: Any) -> bool:
        """Whether these scores are what this very guard has just returned in this thread, for this very step."""
        output = getattr(_latest, "output", None)
        return output is not None and output() is scores and _latest.ids() is ids and _latest.controls == self._controls

    def _rectify(self, ids: Ids, scores: Any, fresh: bool) -> Any:
        # read before any auxiliary pass runs through the same head
        hidden, head_logits = self._hidden()
        session = self._start(ids) if fresh or self._session is None else self._follow(self._session, ids)
        outcome = session.step(self._base_logits(scores), temperature=self._temperature, hidden=hidden, head_logits=head_logits)
        logits = self._checked(outcome)
        self._counters.add(rows_touched=int(outcome.touched.sum()))
        return self._scores(logits, outcome.touched, scores) if bool(outcome.touched.any()) else scores

    def _is_new_call(self, ids: Ids) -> bool:
        """Whether another ``generate`` has begun; in a loop of the user's own, whether ids don't go on from the last ones."""
        running = None
        if "transformers" in sys.modules:  # its generate may be what calls
            from moralguard.generation_frame import running_call

            running = running_call(len(ids))
        if running is not None:
            same = self._call is not None and self._call() is running.identity
            self._call = weakref.ref(running.identity)
            found = running.padding
        else:
            same = self._call is None and self.positions > 0 and goes_on(self._ids, ids, self._prompt_width)
            found, self._call = None, None
        if same:
            return False
        if self._given_padding is not None:
            repeats, rest = divmod(len(ids), len(self._given_padding))
            if rest:
                raise PromptError(f"attention_mask has {len(self._given_padding)} rows, but input_ids has {len(ids)}: not a multiple")
            found = self._given_padding.repeat(repeats)
        self._padding = left_padding(ids, self._lm.pad_token_id) if found is None else found
        return True

    def _count_positions(self, ids: Ids, fresh: bool) -> int:
        """Tokens emitted since the last call."""
        if fresh:
            self._prompt_width, self.positions, self._session = ids.shape[1], 0, None
        before, reached = self.positions, ids.shape[1] - self._prompt_width + 1
        if reached > before + 1:
            self._report_bypass(reached - before - 1, len(ids))
        self.positions = reached
        if not self._controls:
            self._ids = ids
        return len(ids) * (reached - before)

    def _start(self, ids: Ids) -> Session:
        prompts = unpadded(ids)
        empty = next((i for i, prompt in enumerate(prompts) if not prompt), None)
        if empty is not None:
            raise PromptError(f"row {empty} of input_ids holds nothing but padding; give at least one token")
        given, asked = self._given_hidden, unpadded(ids[:, : self._prompt_width])
        self._session = Session(self._lm, self._controls, prompts, own_base=False, gate=self._gate, given_hidden=given, asked=asked)
        self._ids = ids
        return self._session

    def _follow(self, session: Session, ids: Ids) -> Session:
        """The session at these histories: extended by a token, reordered, or taken back (rejected drafts)."""
        found = follow(self._ids, ids)
        if found is None:
            return self._start(ids)
        self._ids = ids
        if found.dropped == 0 and found.tokens.shape[1] == 1:
            integers = self._arrays.integers
            parents = None if found.parents is None else integers(found.parents, self._lm)
            self._handle(session.commit(integers(found.tokens[:, 0], self._lm), parents))
            session.advance()
        else:
            self._rewind(session, found, ids)
        return session

    def _rewind(self, session: Session, found: Continuation, ids: Ids) -> None:
        if session.stateful:
            raise UnsupportedPathError("this way of decoding takes tokens back, which a control with state of its own can't follow")
        session.rewind(found, unpadded(ids))

    def _checked(self, outcome: Outcome) -> Array:
        """The guarded logits; the base's in rows whose every token was removed, where the policy fails open."""
        arrays, logits = self._arrays, outcome.logits
        emptied = outcome.emptied
        if bool(emptied.any()):
            if not self._open:
                self._counters.add(failed_closed=int(emptied.sum()))
                row = arrays.flat_nonzero(emptied).tolist()[0]
                raise ControlError(f"in row {row}, {outcome.why_emptied(row)}", "rectification")
            self._counters.add(failed_open=int(emptied.sum()))
            logits = arrays.where(emptied[:, None], outcome.base, logits)
        self._handle(outcome.failures)
        return logits

    def _handle(self, failures: Sequence[Failure]) -> None:
        """Count failed controls, or stop with an error where the policy fails closed."""
        if self._open:
            self._counters.add(failed_open=len(failures))
        elif failures:
            failure = failures[0]
            self._counters.add(failed_closed=len({f.row for f in failures}))
            raise ControlError(
                f"control {failure.control!r} failed in row {failure.row} and the policy fails closed: {type(failure.error).__name__}: "
                f"{failure.error}",
                failure.control,
            ) from failure.error

    def verify(self, sequences: Any, prompt_width: int) -> None:
        """Compare what was emitted with what was guarded: one guarded step for every new position.

        Args:
            sequences: i64[R, T] as ``generate`` returned them.
            prompt_width: columns of the prompts.

        Raises:
            BypassError: tokens were emitted that the guard never saw (counted instead where the policy fails open).
        """
        missing = int(sequences.shape[1]) - prompt_width - self.positions
        if missing > 0:
            self._report_bypass(missing, int(sequences.shape[0]))

    def _report_bypass(self, positions: int, rows: int) -> None:
        if not self._open:
            raise BypassError(
                f"{positions} positions of {rows} rows were generated without the guard, which was called for {self.positions} before; "
                "this way of generating skips logits processors, or the loop didn't call it for every token: use guard.generate"
            )
        self._counters.add(unguarded_tokens=positions * rows)
