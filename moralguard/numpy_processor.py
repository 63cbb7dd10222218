"""The guard as a logits processor of a loop over an ONNX model: optimum's ``generate``, onnxruntime-genai's Generator, one's own.

Torch is imported only by those who hand in torch tensors.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from moralguard.controls.base import BoundControl
from moralguard.decoding.counters import Counters
from moralguard.decoding.gate import BoundGate
from moralguard.decoding.history import Continuation
from moralguard.decoding.session import Failure, Outcome, Session
from moralguard.errors import BypassError, ControlError, PromptError, UnsupportedPathError
from moralguard_kernels import numpy_form


class NumpyLogitsProcessor:
    """Called with all token ids so far and the scores of the next token, gives the guarded scores; for models of NumPy arrays.

    ``moralguard.processor.GuardLogitsProcessor`` for models without torch, and like it: requests are told by their token history, a
    row in which a control acts comes back as normalised log-probabilities, any other as it was. Beams, and drafts that are taken
    back, are followed. The passes that controls need are the guard's own, on its own caches.

    Attributes:
        rows_guarded: rows of logits that went through this processor.
        positions: new tokens of the running call that were guarded.
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
        self._given = None if attention_mask is None else _leading(np.asarray(attention_mask) == 0)
        self._call: weakref.ref[Any] | None = None
        self._padding = np.zeros(0, np.int64)
        self._session: Session | None = None
        self._ids = np.zeros((0, 0), np.int64)
        self._prompt_width = 0
        self.rows_guarded = 0
        self.positions = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Guarded scores f[R, V], in the kind of array and on the device they came in.

        Args:
            input_ids: i[R, T], all ids so far, padded on the left. scores: f[R, V].

        Raises:
            PromptError: there are no ids, or a row holds nothing but padding.
            ControlError: a control failed and the policy fails closed.
            BypassError: tokens were emitted since the last call that the guard never saw, and the policy fails closed.
        """
        ids, base = _numpy(input_ids).astype(np.int64), _numpy(scores).astype(np.float32)
        if ids.ndim != 2 or base.ndim != 2 or ids.shape[0] != base.shape[0] or ids.shape[1] == 0:
            raise PromptError(
                f"the processor was given ids {list(ids.shape)} and scores {list(base.shape)}; expected [R, T > 0] and [R, V]"
            )
        fresh = self._is_new_call(ids)
        if len(self._padding) != len(ids):
            raise UnsupportedPathError(
                f"the number of rows changed to {len(ids)} within one call; the guard can't tell which rows are gone"
            )
        # padding as -1, so that equal ids under different masks aren't taken for each other
        ids = np.where(np.arange(ids.shape[1]) < self._padding[:, None], -1, ids)
        emitted = self._count(ids, fresh)
        self.rows_guarded += len(ids)
        self._counters.add(requests=len(ids) if fresh else 0, rows_guarded=len(ids), tokens_emitted=emitted)
        if not self._controls:
            return scores
        session = self._start(ids) if fresh or self._session is None else self._follow(self._session, ids)
        outcome = session.step(_array(base), temperature=self._temperature)
        law = self._checked(outcome)
        self._counters.add(rows_touched=int(outcome.touched.sum()))
        if not outcome.touched.any():
            return scores
        return _like(np.where(outcome.touched[:, None], numpy_form.log_softmax(law), base), scores)

    def _is_new_call(self, ids: np.ndarray) -> bool:
        found = None
        running = None
        if "transformers" in sys.modules:  # its generate may be what calls
            from moralguard.generation_frame import running_call

            running = running_call(len(ids))
        if running is not None:
            same = self._call is not None and self._call() is running.identity
            self._call = weakref.ref(running.identity)
            found = None if running.padding is None else running.padding.numpy()
        else:
            same, self._call = self._call is None and self._goes_on(ids), None
        if same:
            return False
        if self._given is not None:
            repeats, rest = divmod(len(ids), len(self._given))
            if rest:
                raise PromptError(f"attention_mask has {len(self._given)} rows, but input_ids has {len(ids)}: not a multiple")
            found = self._given.repeat(repeats)
        self._padding = self._guessed_padding(ids) if found is None else found
        return True

    def _guessed_padding(self, ids: np.ndarray) -> np.ndarray:
        """The longest prompt of a batch has none, so pad tokens that every row begins with are text."""
        pad = self._lm.pad_token_id
        if pad is None:
            return np.zeros(len(ids), np.int64)
        leading = _leading(ids == pad)
        return leading - leading.min()

    def _goes_on(self, ids: np.ndarray) -> bool:
        before, width = self._ids, self._prompt_width
        if self.positions == 0 or not width < ids.shape[1] <= before.shape[1] + 1:
            return False
        prompts, known = ids[:, :width], before[:, :width]
        return bool(((prompts[:, None] == known[None]) | (known[None] < 0)).all(-1).any(-1).all())

    def _count(self, ids: np.ndarray, fresh: bool) -> int:
        """Tokens emitted since the last call."""
        before = 0 if fresh else self.positions
        if fresh:
            self._prompt_width, self._session = ids.shape[1], None
        reached = ids.shape[1] - self._prompt_width + 1
        missed = reached - before - 1
        if missed > 0:
            if not self._open:
                raise BypassError(
                    f"{missed} positions of {len(ids)} rows were generated without the guard, which was called for {before} before; call "
                    "it for every token, or use guard.generate"
                )
            self._counters.add(unguarded_tokens=missed * len(ids))
        self.positions = reached
        if not self._controls:
            self._ids = ids
        return len(ids) * (reached - before)

    def _start(self, ids: np.ndarray) -> Session:
        prompts = _unpadded(ids)
        empty = next((i for i, prompt in enumerate(prompts) if not prompt), None)
        if empty is not None:
            raise PromptError(f"row {empty} of input_ids holds nothing but padding; give at least one token")
        self._session = Session(self._lm, self._controls, prompts, own_base=False, gate=self._gate)
        self._ids = ids
        return self._session

    def _follow(self, session: Session, ids: np.ndarray) -> Session:
        """The session at these histories: extended by a token, reordered, or taken back (rejected drafts)."""
        found = _continuation(self._ids, ids)
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

    def _checked(self, outcome: Outcome) -> np.ndarray:
        """The guarded logits; the base's in rows whose every token was removed, where the policy fails open."""
        logits, base = np.asarray(outcome.logits), np.asarray(outcome.base)
        emptied = (logits == -np.inf).all(-1) & (base != -np.inf).any(-1)
        if emptied.any():
            if not self._open:
                self._counters.add(failed_closed=int(emptied.sum()))
                raise ControlError("the controls together removed every token; loosen a filter or a strength", "rectification")
            self._counters.add(failed_open=int(emptied.sum()))
            logits = np.where(emptied[:, None], base, logits)
        self._handle(outcome.failures)
        return logits

    def _handle(self, failures: Sequence[Failure]) -> None:
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


def _continuation(before: np.ndarray, now: np.ndarray) -> Continuation | None:
    """``decoding.history.follow`` in NumPy: how ids i64[n, T'] follow from i64[m, T]."""
    if now.shape[0] == before.shape[0] and now.shape[1] == before.shape[1] + 1 and bool((now[:, :-1] == before).all()):
        return Continuation(None, 0, _array(now[:, -1:]))
    shared = min(now.shape[1] - 1, before.shape[1])
    if shared < 1:
        return None
    agree = (now[:, None, :shared] == before[None, :, :shared]).cumprod(-1).sum(-1)  # [n, m]
    parents, common = agree.argmax(-1), int(agree.max(-1).min())
    if common < 1:
        return None
    return Continuation(_array(parents), before.shape[1] - common, _array(now[:, common:]))


def _leading(flags: np.ndarray) -> np.ndarray:
    """How many flags of each row are set before the first that isn't."""
    count: np.ndarray = flags.astype(np.int64).cumprod(-1).sum(-1)
    return count


def _unpadded(ids: np.ndarray) -> list[list[int]]:
    return [[i for i in row if i >= 0] for row in ids.tolist()]


def _array(values: np.ndarray) -> Any:
    """Sessions are written in terms of torch tensors, and take NumPy arrays where the model computes with them."""
    return values


def _numpy(values: Any) -> np.ndarray:
    return values.detach().to("cpu").numpy() if hasattr(values, "detach") else np.asarray(values)


def _like(values: np.ndarray, given: Any) -> Any:
    """The values as the kind of array, of the dtype and on the device of ``given``."""
    if not hasattr(given, "detach"):
        return values.astype(np.asarray(given).dtype, copy=False)
    import torch

    return torch.from_numpy(values).to(given)
