"""Continuous batching over ``Slots``: continuations join and leave at every step, each under a guard of its own.

One thread drives the model. It says nothing about texts in its logs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Protocol

from moralguard.backends.arrays import kind_of
from moralguard.controls.base import BoundControl
from moralguard.decoding.loop import grad_mode
from moralguard.decoding.slots import SlotFailure, Slots
from moralguard.errors import GuardError, PromptError
from moralguard.serving.engine_step import Drawer, whereabouts
from moralguard.serving.generation import Generation
from moralguard.serving.stop_strings import StoppedText

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel

_log = logging.getLogger(__name__)


class BusyError(GuardError):
    """The server runs and keeps waiting as much as it may; ``retry_after`` is in seconds."""

    def __init__(self, message: str, retry_after: int = 1):
        super().__init__(message)
        self.retry_after = retry_after


class Observer(Protocol):
    """What is told of the engine's work, in its thread. It must not raise."""

    def step(self, seconds: float, rows: int) -> None: ...

    def tokens(self, policy: str | None, drawn: int, intervened: int) -> None: ...


class Engine:
    """Runs continuations of one model, at most ``max_running`` at a time.

    Args:
        lm: the model.
        controls: every control that may run, of all guards: they decide whether tensors must be ones that autograd can use.
        max_running: continuations side by side.
        max_waiting: continuations that may wait for a place.
        max_seconds: how long one may run; it then ends with finish_reason "length" and reason "time_limit".
        observer: told of every step.
    """

    def __init__(
        self,
        lm: LanguageModel,
        controls: Iterable[BoundControl] = (),
        *,
        max_running: int = 16,
        max_waiting: int = 128,
        max_seconds: float = 600.0,
        observer: Observer | None = None,
    ):
        self.lm = lm
        self.max_running, self.max_waiting, self.max_seconds = max_running, max_waiting, max_seconds
        self._controls, self._observer = tuple(controls), observer
        self._drawer = Drawer(lm, observer)
        self._slots = Slots(lm, own_base=True)
        self._changed = threading.Condition()
        self._waiting: deque[Generation] = deque()
        self._running: dict[int, Generation] = {}
        self._unguarded: set[int] = set()  # slots whose guard failed as a whole and was passed over
        self._texts: dict[int, StoppedText] = {}
        self._thread: threading.Thread | None = None
        self._closing = False

    @property
    def running(self) -> int:
        """Continuations that hold a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the thread is there to run what is submitted."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread; nothing happens where it runs."""
        if not self.alive:
            self._closing = False
            self._thread = threading.Thread(target=self._run, name="moralguard-engine", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End what runs (finish_reason "cancelled") and the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def submit(self, generations: Sequence[Generation]) -> None:
        """Take continuations on, all or none.

        Raises:
            BusyError: there is no room for all of them now.
            PromptError: a prompt or the tokens to be scored are empty.
        """
        if any(len(generation.prompt_ids) == 0 or generation.given == [] for generation in generations):
            raise PromptError("a continuation has no prompt, or no tokens to be scored; give at least one token of either")
        with self._changed:
            room = self.max_running + self.max_waiting - len(self._running) - len(self._waiting)
            if self._closing or len(generations) > room:
                raise BusyError(
                    f"the server is busy: {len(self._running)} continuations run and {len(self._waiting)} wait, of at most "
                    f"{self.max_running} and {self.max_waiting}; try again later"
                )
            for generation in generations:
                generation.submitted = time.monotonic()
                self._waiting.append(generation)
            self._changed.notify_all()

    def cancel(self, generations: Iterable[Generation]) -> None:
        """Give them up: their slots are free at the next step. Nothing happens to those that are over."""
        with self._changed:
            for generation in generations:
                generation.cancelled = True
            self._changed.notify_all()

    def _mode(self) -> AbstractContextManager[None]:
        return grad_mode(self._controls) if kind_of(self.lm) == "torch" else nullcontext()

    def _run(self) -> None:
        with self._mode():
            while True:
                try:
                    if not self._scheduled():
                        return
                    self._step()
                except Exception as error:
                    self._recover(error)

    def _recover(self, error: Exception) -> None:
        """Whatever it was, what ran with it ends and the server goes on."""
        _log.error("the engine failed on %d continuations: %s", len(self._running), whereabouts(error))
        self._slots = Slots(self.lm, own_base=True)
        for slot, generation in list(self._running.items()):
            generation.deny("engine_error", None, type(error).__name__)
            self._leave(slot)

    def _scheduled(self) -> bool:
        """Wait for work, let cancelled and outdated continuations go, and fill the free slots; False to end the thread.

        The lock is held for moments only: the event loop waits for it in ``submit``.
        """
        with self._changed:
            while not (self._closing or self._running or self._waiting):
                self._changed.wait()
            closing = self._closing
            gone = [generation for generation in self._waiting if generation.cancelled or closing]
            for generation in gone:
                self._waiting.remove(generation)
        for generation in gone:
            generation.end("cancelled")
            generation.notify(generation, None)
        now = time.monotonic()
        for slot, generation in list(self._running.items()):
            if generation.cancelled or closing:
                generation.end("cancelled")
            elif now - generation.started > self.max_seconds:
                generation.end("length", "time_limit")
            if generation.finish_reason:
                self._leave(slot)
        if closing:
            return False
        with self._changed:
            free = [slot for slot in range(self.max_running) if slot not in self._running]
            while self._waiting and free:
                self._join(free.pop(0), self._waiting.popleft())
        return True

    def _join(self, slot: int, generation: Generation) -> None:
        generation.started = time.monotonic()
        self._running[slot] = generation
        self._texts[slot] = StoppedText(self.lm.tokenizer, generation.stop)
        guard = generation.guard
        if guard is None:
            self._slots.add(slot, (), None, generation.prompt_ids)
        else:
            guard.counters.add(requests=1)
            self._slots.add(slot, guard.controls, guard.gate, generation.prompt_ids)

    def _leave(self, slot: int) -> None:
        """Free the slot of a continuation that is over, and tell its owner."""
        with self._changed:
            generation, text = self._running.pop(slot), self._texts.pop(slot)
        self._slots.remove(slot)
        self._unguarded.discard(slot)
        self._drawer.close(generation, text)

    def _step(self) -> None:
        if not self._running:
            return
        began = time.perf_counter()
        tokens = {slot: generation.token_ids for slot, generation in self._running.items()}
        temperatures = {slot: 1.0 if g.settings.greedy else g.settings.temperature for slot, g in self._running.items()}
        steps, failures = self._slots.step(tokens, temperature=temperatures)
        for failure in failures:
            self._note(failure)
        for step in steps:
            try:
                self._drawer.draw(step, self._running, self._texts, self._unguarded)
            except Exception as error:  # these rows end, the others' steps are sound
                _log.error("a draw of %d rows failed: %s", len(step.slots), whereabouts(error))
                for slot in step.slots:
                    self._running[slot].deny("engine_error", None, type(error).__name__)
        if self._observer is not None:
            self._observer.step(time.perf_counter() - began, len(tokens))
        for slot, generation in list(self._running.items()):
            if generation.finish_reason:
                self._leave(slot)

    def _note(self, failure: SlotFailure) -> None:
        """A control failed, or a whole session: the policy says whether its request ends or goes on without."""
        generation, error = self._running[failure.slot], failure.error
        whole = failure.control == "auxiliary pass"
        if generation.finish_reason:
            return
        if whole and isinstance(error, PromptError) and generation.token_ids:
            generation.end("length")  # as in the own loop: a pass has no room for another token
            return
        guard = generation.guard
        if guard is None or failure.slot in self._unguarded:
            _log.error("a forward pass without a guard failed: %s", whereabouts(error))
            generation.deny("engine_error", None, type(error).__name__)
            return
        _log.warning("control %s of policy %s failed: %s", failure.control, generation.policy, whereabouts(error))
        if not generation.open_on_error:
            guard.counters.add(failed_closed=1)
            generation.deny("guard_error", failure.control, type(error).__name__)
            return
        guard.counters.add(failed_open=1)
        generation.failed_open += 1
        if whole:  # none of its passes is left: the base's own row starts anew, at the next step
            self._unguarded.add(failure.slot)
            self._slots.add(failure.slot, (), None, generation.prompt_ids)
