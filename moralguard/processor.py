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
from moralguard.decoding.gate import Gate
from moralguard.decoding.grad import plain_no_grad
from moralguard.decoding.history import Continuation, follow, left_padding
from moralguard.decoding.session import Outcome, Session
from moralguard.errors import BypassError, ControlError, PromptError, UnsupportedPathError
from moralguard.generation_frame import running_left_padding

_latest = threading.local()


class GuardLogitsProcessor(LogitsProcessor):
    """Guards any transformers ``generate()``; one object may serve many calls, one after the other.

    Requests are told by their token history. The processor runs where transformers runs processors of the user: after its own
    (bans, penalties, which the guard keeps) and before temperature, top-k and top-p. It returns normalised log-probabilities in
    rows where a control acted, and the scores as received elsewhere. The same guard listed twice acts once.

    Attributes:
        rows_guarded: rows of logits that went through this processor.
        steps: calls so far.
    """

    def __init__(
        self,
        lm: LanguageModel,
        controls: Sequence[BoundControl],
        gate: Gate | None,
        open_on_error: bool,
        counters: Counters,
        *,
        attention_mask: torch.Tensor | None = None,
        temperature: float = 1.0,
        captured: Captured | None = None,
    ):
        self._lm, self._controls, self._gate = lm, tuple(controls), gate
        self._open, self._counters = open_on_error, counters
        self._padding = None if attention_mask is None else (attention_mask == 0).int().cumprod(-1).sum(-1).cpu()
        self._temperature, self._captured = temperature, captured
        self._session: Session | None = None
        self._ids: torch.Tensor | None = None
        self._prompt_width = 0
        self.rows_guarded = 0
        self.steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Guarded scores f[R, V] for ids i64[R, T] and scores f[R, V].

        Raises:
            ControlError: a control failed and the policy fails closed.
        """
        if self._already_guarded(scores):
            return scores
        self.steps += 1
        self.rows_guarded += scores.shape[0]
        if not self._controls:
            self._counters.add(rows_guarded=scores.shape[0], tokens_emitted=scores.shape[0])
            return scores
        with plain_no_grad():
            # clones: tensors made in a caller's inference mode can't be used by autograd
            session = self._track(input_ids.detach().clone())
            hidden, head_logits = self._newest_hidden()
            outcome = session.step(
                scores.detach().to(session.lm.device, torch.float32, copy=True),
                temperature=self._temperature,
                hidden=hidden,
                head_logits=head_logits,
            )
            self._check(outcome)
            touched = outcome.touched
            self._counters.add(rows_guarded=scores.shape[0], rows_touched=int(touched.sum()), tokens_emitted=scores.shape[0])
            if not bool(touched.any()):
                return scores
            guarded = torch.log_softmax(outcome.logits, -1).to(scores)
            if not bool(touched.all()):
                guarded = torch.where(touched.to(scores.device)[:, None], guarded, scores)
        _latest.output, _latest.controls = weakref.ref(guarded), self._controls
        return guarded

    def _already_guarded(self, scores: torch.Tensor) -> bool:
        """Whether these scores are what this very guard has just returned in this thread."""
        output = getattr(_latest, "output", None)
        return output is not None and output() is scores and _latest.controls == self._controls and bool(self._controls)

    def _newest_hidden(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self._captured is None:
            return None, None
        if self._captured.hidden is None or self._captured.head_logits is None:
            raise UnsupportedPathError(
                "the model's head ran without its hook, so hidden states can't be read; enter guard.attach() before compiling the model"
            )
        return self._captured.hidden[:, -1].clone(), self._captured.head_logits[:, -1].clone()

    def _track(self, ids: torch.Tensor) -> Session:
        """The session at these histories: started, extended, reordered or rewound."""
        if ids.shape[1] == 0:
            raise PromptError("generate was called with inputs_embeds and no input_ids; the guard follows token ids: pass both")
        session, before = self._session, self._ids
        if session is None or before is None or not self._same_call(ids):
            return self._start(ids)
        found = follow(before, ids)
        if found is None:
            return self._start(ids)
        self._ids = ids
        if found.dropped == 0 and found.tokens.shape[1] == 1:
            session.commit(found.tokens[:, 0], found.parents)
            session.advance()
            return session
        return self._rewind(session, found, ids)

    def _same_call(self, ids: torch.Tensor) -> bool:
        """Whether ids go on with the running call: they begin with its prompts and aren't longer than one token more."""
        before = self._ids
        if before is None or not self._prompt_width < ids.shape[1] <= before.shape[1] + 1:
            return False
        prompts, known = ids[:, : self._prompt_width], before[:, : self._prompt_width]
        return bool((prompts[:, None] == known[None]).all(-1).any(-1).all())

    def _rewind(self, session: Session, found: Continuation, ids: torch.Tensor) -> Session:
        """Rejected drafts: forget them and read what came instead."""
        if session.stateful:
            raise UnsupportedPathError("this way of decoding takes tokens back, which a control with state of its own can't follow")
        padding = self._padding_of(ids)
        session.rewind(found, [row[int(pad) :] for row, pad in zip(ids.tolist(), padding, strict=True)])
        return session

    def _start(self, ids: torch.Tensor) -> Session:
        padding = self._padding_of(ids)
        prompts = [row[int(pad) :] for row, pad in zip(ids.tolist(), padding, strict=True)]
        empty = next((i for i, prompt in enumerate(prompts) if not prompt), None)
        if empty is not None:
            raise PromptError(f"row {empty} of input_ids holds nothing but padding; give at least one token")
        self._session = Session(self._lm, self._controls, prompts, own_base=False, gate=self._gate)
        self._ids, self._prompt_width = ids, ids.shape[1]
        self._counters.add(requests=len(prompts))
        return self._session

    def _padding_of(self, ids: torch.Tensor) -> torch.Tensor:
        if self._padding is None:
            known = running_left_padding(ids.shape[0])
            return left_padding(ids, self._lm.pad_token_id) if known is None else known
        repeats, rest = divmod(ids.shape[0], len(self._padding))
        if rest:
            raise PromptError(f"attention_mask has {len(self._padding)} rows, but input_ids has {ids.shape[0]}: not a multiple of it")
        return self._padding.repeat_interleave(repeats)

    def _check(self, outcome: Outcome) -> None:
        emptied = torch.isneginf(outcome.logits).all(-1) & ~torch.isneginf(outcome.base).all(-1)
        if bool(emptied.any()):
            if not self._open:
                self._counters.add(failed_closed=int(emptied.sum()))
                raise ControlError("the controls together removed every token; loosen a filter or a strength", "rectification")
            self._counters.add(failed_open=int(emptied.sum()))
            outcome.logits[emptied] = outcome.base[emptied]
        if not outcome.failures:
            return
        if self._open:
            self._counters.add(failed_open=len(outcome.failures))
            return
        failure = outcome.failures[0]
        self._counters.add(failed_closed=len({f.row for f in outcome.failures}))
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
        missing = int(sequences.shape[1]) - prompt_width - self.steps
        if missing <= 0:
            return
        rows = int(sequences.shape[0])
        if not self._open:
            raise BypassError(f"{missing} positions of {rows} rows were generated without the guard, which was called {self.steps} times")
        self._counters.add(unguarded_tokens=missing * rows)
