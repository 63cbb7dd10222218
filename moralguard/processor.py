"""The guard as a transformers logits processor."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor

from moralguard.backends.hf import Captured, LanguageModel
from moralguard.controls.base import BoundControl
from moralguard.decoding.counters import Counters
from moralguard.decoding.gate import BoundGate
from moralguard.decoding.grad import plain_no_grad
from moralguard.decoding.history import follow, left_padding
from moralguard.decoding.session import Failure, Outcome, Session
from moralguard.errors import BypassError, ControlError, PromptError, UnsupportedPathError
from moralguard.generation_frame import running_call

_latest = threading.local()


class GuardLogitsProcessor(LogitsProcessor):
    """Guards any transformers ``generate()``; one object may serve many calls, one after the other.

    Requests are told by their token history. The processor runs where transformers runs processors of the user: after its own
    (bans, penalties, which the guard keeps) and before temperature, top-k and top-p. It returns normalised log-probabilities in
    rows where a control acted, and the scores as received elsewhere. The same guard listed twice acts once.

    Attributes:
        rows_guarded: rows of logits that went through this processor.
        positions: new tokens of the running call that were guarded; drafts that were taken back don't count.
    """

    def __init__(
        self,
        lm: LanguageModel,
        controls: Sequence[BoundControl],
        gate: BoundGate | None,
        open_on_error: bool,
        counters: Counters,
        *,
        attention_mask: torch.Tensor | None = None,
        temperature: float = 1.0,
        captured: Captured | None = None,
    ):
        self._lm, self._controls, self._gate = lm, tuple(controls), gate
        self._open, self._counters = open_on_error, counters
        self._given_padding = None if attention_mask is None else (attention_mask == 0).int().cumprod(-1).sum(-1).cpu()
        self._temperature, self._captured = temperature, captured
        self._call: weakref.ref[Any] | None = None
        self._padding: torch.Tensor | None = None
        self._session: Session | None = None
        self._ids: torch.Tensor | None = None
        self._prompt_width = 0
        self.rows_guarded = 0
        self.positions = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Guarded scores f[R, V] for ids i64[R, T] and scores f[R, V].

        Raises:
            ControlError: a control failed and the policy fails closed.
            BypassError: tokens were emitted since the last call that the guard never saw, and the policy fails closed.
        """
        if input_ids.shape[1] == 0:
            raise PromptError("generate was called with inputs_embeds and no input_ids; the guard follows token ids: pass both")
        with plain_no_grad():
            fresh = self._is_new_call(input_ids)
            # Padding as -1, so that equal ids under different masks aren't taken for each other. A clone, too: tensors made in a
            # caller's inference mode can't be used by autograd.
            columns = torch.arange(input_ids.shape[1], device=input_ids.device)
            ids = input_ids.masked_fill(columns < self._padding_of(input_ids.shape[0]).to(input_ids.device)[:, None], -1)
            before = self.positions
            self._count_positions(ids, fresh)
            if self._already_guarded(input_ids, scores):
                return scores
            rows = scores.shape[0]
            self.rows_guarded += rows
            emitted = rows * (self.positions - (0 if fresh else before))
            self._counters.add(requests=rows if fresh else 0, rows_guarded=rows, tokens_emitted=emitted)
            guarded = self._rectify(ids, scores, fresh) if self._controls else scores
        _latest.output, _latest.ids, _latest.controls = weakref.ref(guarded), weakref.ref(input_ids), self._controls
        return guarded

    def _rectify(self, ids: torch.Tensor, scores: torch.Tensor, fresh: bool) -> torch.Tensor:
        # read before any auxiliary pass runs through the same head
        hidden, head_logits = self._newest_hidden()
        session = self._start(ids) if fresh or self._session is None else self._follow(self._session, ids)
        base = scores.detach().to(session.lm.device, torch.float32, copy=True)
        outcome = session.step(base, temperature=self._temperature, hidden=hidden, head_logits=head_logits)
        self._check(outcome)
        touched = outcome.touched
        self._counters.add(rows_touched=int(touched.sum()))
        if not bool(touched.any()):
            return scores
        guarded = torch.log_softmax(outcome.logits, -1).to(scores)
        return guarded if bool(touched.all()) else torch.where(touched.to(scores.device)[:, None], guarded, scores)

    def _already_guarded(self, ids: torch.Tensor, scores: torch.Tensor) -> bool:
        """Whether these scores are what this very guard has just returned in this thread, for this very step."""
        output = getattr(_latest, "output", None)
        return output is not None and output() is scores and _latest.ids() is ids and _latest.controls == self._controls

    def _newest_hidden(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self._captured is None:
            return None, None
        if self._captured.hidden is None or self._captured.head_logits is None:
            raise UnsupportedPathError(
                "the model's head ran without its hook, so hidden states can't be read; enter guard.attach() before compiling the model"
            )
        return self._captured.hidden[:, -1].clone(), self._captured.head_logits[:, -1].clone()

    def _is_new_call(self, ids: torch.Tensor) -> bool:
        """Whether another ``generate`` has begun; in a loop of the user's own, whether ids don't go on from the last ones."""
        call = running_call(ids.shape[0])
        if call is not None:
            same = self._call is not None and self._call() is call.identity
            self._call = weakref.ref(call.identity)
            found = call.padding
        else:
            same, found, self._call = self._call is None and self._goes_on(ids), None, None
        if same:
            return False
        if self._given_padding is not None:
            repeats, rest = divmod(ids.shape[0], len(self._given_padding))
            if rest:
                raise PromptError(f"attention_mask has {len(self._given_padding)} rows, but input_ids has {ids.shape[0]}: not a multiple")
            found = self._given_padding.repeat_interleave(repeats)
        self._padding = left_padding(ids, self._lm.pad_token_id) if found is None else found
        return True

    def _goes_on(self, ids: torch.Tensor) -> bool:
        before = self._ids
        if before is None or not self._prompt_width < ids.shape[1] <= before.shape[1] + 1:
            return False
        prompts, known = ids[:, : self._prompt_width], before[:, : self._prompt_width]
        return bool(((prompts[:, None] == known[None]) | (known[None] < 0)).all(-1).any(-1).all())

    def _padding_of(self, rows: int) -> torch.Tensor:
        if self._padding is None or len(self._padding) != rows:
            raise UnsupportedPathError(f"the number of rows changed to {rows} within one call; the guard can't tell which rows are gone")
        return self._padding

    def _count_positions(self, ids: torch.Tensor, fresh: bool) -> None:
        if fresh:
            self._prompt_width, self.positions, self._session = ids.shape[1], 0, None
        reached = ids.shape[1] - self._prompt_width + 1
        if reached > self.positions + 1:
            self._report_bypass(reached - self.positions - 1, ids.shape[0])
        self.positions = reached

    def _start(self, ids: torch.Tensor) -> Session:
        prompts = _unpadded(ids)
        empty = next((i for i, prompt in enumerate(prompts) if not prompt), None)
        if empty is not None:
            raise PromptError(f"row {empty} of input_ids holds nothing but padding; give at least one token")
        given = self._captured is not None
        self._session = Session(self._lm, self._controls, prompts, own_base=False, gate=self._gate, given_hidden=given)
        self._ids = ids
        return self._session

    def _follow(self, session: Session, ids: torch.Tensor) -> Session:
        """The session at these histories: extended by a token, reordered, or taken back (rejected drafts)."""
        found = None if self._ids is None else follow(self._ids, ids)
        if found is None:
            return self._start(ids)
        self._ids = ids
        if found.dropped == 0 and found.tokens.shape[1] == 1:
            self._handle(session.commit(found.tokens[:, 0], found.parents))
            session.advance()
            return session
        if session.stateful:
            raise UnsupportedPathError("this way of decoding takes tokens back, which a control with state of its own can't follow")
        session.rewind(found, _unpadded(ids))
        return session

    def _check(self, outcome: Outcome) -> None:
        emptied = torch.isneginf(outcome.logits).all(-1) & ~torch.isneginf(outcome.base).all(-1)
        if bool(emptied.any()):
            if not self._open:
                self._counters.add(failed_closed=int(emptied.sum()))
                raise ControlError("the controls together removed every token; loosen a filter or a strength", "rectification")
            self._counters.add(failed_open=int(emptied.sum()))
            outcome.logits[emptied] = outcome.base[emptied]
        self._handle(outcome.failures)

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

    def verify(self, sequences: torch.Tensor, prompt_width: int) -> None:
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
                "this way of generating skips logits processors: use guard.generate"
            )
        self._counters.add(unguarded_tokens=positions * rows)


def _unpadded(ids: torch.Tensor) -> list[list[int]]:
    return [[i for i in row if i >= 0] for row in ids.tolist()]
