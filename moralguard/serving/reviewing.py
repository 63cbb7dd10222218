"""Reviews in a server: every draft is a continuation of the engine's, beside those of other requests; a thread a reviewed continuation.

Nothing of a reviewed text is told before the review is over, not even in a stream.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moralguard.decoding.loop import FLAGGED, Watch
from moralguard.decoding.passes import check_passes_fit
from moralguard.decoding.records import CONTENT_FILTER, Completion
from moralguard.decoding.settings import DecodingSettings
from moralguard.review.desk import Desk
from moralguard.serving.engine import BusyError, Engine
from moralguard.serving.engine_step import whereabouts
from moralguard.serving.generation import Generation, Piece

if TYPE_CHECKING:
    from moralguard.guard import Guard

_log = logging.getLogger(__name__)
_Heard = queue.SimpleQueue[tuple[int, int | None, int]]
"""(draft, its newest token or None at its end, its interventions so far)."""
_WAIT = 0.05  # seconds between two looks at whether a client has left, and at whether there is room for a draft


def is_reviewed(generation: Generation) -> bool:
    """Whether it is drawn under a policy with a review."""
    return generation.given is None and generation.guard is not None and bool(generation.guard.review)


class Reviews:
    """Continuations under review, as many as the engine takes on.

    Args:
        engine: runs the drafts.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._lock = threading.Lock()
        self._running = 0

    def submit(self, generations: Sequence[Generation]) -> None:
        """Begin to review continuations, all or none; their owners are told as if the engine had run them.

        Raises:
            BusyError: too many are under review.
        """
        most = self._engine.max_running + self._engine.max_waiting
        with self._lock:
            if self._running + len(generations) > most:
                raise BusyError(f"the server is busy: {self._running} continuations are under review, of at most {most}; try again later")
            self._running += len(generations)
        for generation in generations:
            generation.submitted = time.monotonic()
            threading.Thread(target=self._review, args=(generation,), name="moralguard-review", daemon=True).start()

    def _review(self, owner: Generation) -> None:
        try:
            if owner.guard is not None:
                _reviewed(self._engine, owner, owner.guard)
        except Exception as error:  # the discriminator, or a text that it can't read: nothing unjudged is handed out
            _log.error("a review failed: %s", whereabouts(error))
            owner.deny("engine_error", None, type(error).__name__)
        finally:
            with self._lock:
                self._running -= 1
            owner.notify(owner, None)


def _reviewed(engine: Engine, owner: Generation, guard: Guard) -> None:
    request = Completion(list(owner.prompt_ids), owner.return_index, source=owner.source)
    statements = {value.id: value.statement for value in guard.policy.values}
    desk = EngineDesk(engine.lm, statements, guard.review_judge, owner.settings, guard.review, engine=engine, owner=owner)
    for _ in desk.review([request]):
        pass
    if request.finish_reason == "cancelled":
        owner.end("cancelled")
        return
    if request.finish_reason == "guard_error":
        owner.deny(desk.reason or "guard_error", request.failed_control, request.error or "")
        return
    owner.token_ids[:], owner.traces[:] = request.token_ids, request.trace
    if request.finish_reason == CONTENT_FILTER and request.review is not None:
        owner.refusal = request.text
        owner.deny("review", request.review.refused_by, "refused")
        return
    owner.text = desk.text(request)
    if owner.stream and owner.text:
        owner.notify(owner, Piece(owner.text, ()))
    owner.end(request.finish_reason, desk.reason)


@dataclass
class EngineDesk(Desk):
    """A desk whose drafts the engine writes.

    Attributes:
        owner: the continuation under review: its guard, seed, and stop strings are the drafts', too.
        reason: why the newest draft ended, where the engine says it.
    """

    engine: Engine = field(kw_only=True)
    owner: Generation = field(kw_only=True)
    reason: str | None = None

    def check_fits(self, ids: Sequence[int]) -> None:
        controls = () if self.owner.guard is None else self.owner.guard.controls
        check_passes_fit([item for control in controls for item in control.passes], ids, "the model's own critique")

    def draw(self, requests: Sequence[Completion], settings: DecodingSettings, watch: Watch | None) -> Iterator[tuple[int, int]]:
        """Write drafts. A watch reads in this thread, so that the engine and what runs beside never wait for it.

        What the engine drew beyond the token that a watch stopped at is left out, so that nothing depends on how far it got.
        """
        heard: _Heard = queue.SimpleQueue()
        drafts = [self._draft(index, request, settings, watch is not None, heard) for index, request in enumerate(requests)]
        stopped: dict[int, int] = {}
        try:
            # one by one: there need not be room for all of them at once
            left = sum(self._submitted(draft) for draft in drafts)
            while left:
                index, token, interventions = self._next(heard, drafts)
                if token is None:
                    left -= 1
                elif watch is not None and index not in stopped:
                    requests[index].token_ids.append(token)  # the watch counts them
                    if watch([(index, token)]):
                        stopped[index] = interventions
                        self.engine.cancel([drafts[index]])
        except Exception:
            self.engine.cancel(drafts)
            raise
        for index, (request, draft) in enumerate(zip(requests, drafts, strict=True)):
            self._take(request, draft, stopped.get(index))
            for token in request.token_ids:
                yield index, token

    def _next(self, heard: _Heard, drafts: Sequence[Generation]) -> tuple[int, int | None, int]:
        while True:
            if self.owner.cancelled:
                self.engine.cancel(drafts)
            with suppress(queue.Empty):
                return heard.get(timeout=_WAIT)

    def _draft(self, index: int, request: Completion, settings: DecodingSettings, watched: bool, heard: _Heard) -> Generation:
        owner = self.owner

        def notify(generation: Generation, piece: Piece | None) -> None:
            if piece is None:
                heard.put((index, None, generation.interventions))

        def told(generation: Generation, token: int) -> None:
            heard.put((index, token, generation.interventions))

        return Generation(
            prompt_ids=request.prompt_ids,
            settings=settings,
            seed=owner.seed,
            return_index=request.return_index,
            attempt=request.attempt,
            retry=request.retry,
            kept=tuple(request.kept),
            told=told if watched else None,
            guard=owner.guard,
            policy=owner.policy,
            strength=owner.strength,
            stop=owner.stop,
            stop_ids=owner.stop_ids,
            trace=owner.trace,
            notify=notify,
        )

    def _submitted(self, draft: Generation) -> bool:
        """Whether the engine has it; it waits for room until the client has left."""
        while not self.owner.cancelled and self.engine.alive:
            try:
                self.engine.submit([draft])
                return True
            except BusyError:
                time.sleep(_WAIT)
        draft.end("cancelled")
        return False

    def _take(self, request: Completion, draft: Generation, interventions: int | None) -> None:
        """Hand a draft's end to its request; ``interventions`` up to where a watch stopped it, None where none did."""
        owner = self.owner
        owner.rows_guarded += draft.rows_guarded
        owner.interventions += draft.interventions if interventions is None else interventions
        owner.failed_open += draft.failed_open
        owner.started, owner.first_token = owner.started or draft.started, owner.first_token or draft.first_token
        if interventions is not None:
            self.reason, request.finish_reason, request.text = None, FLAGGED, None
            request.trace = draft.traces[: len(request.token_ids)]
            return
        self.reason, request.token_ids[:] = draft.reason, draft.token_ids
        request.finish_reason, request.text, request.trace = draft.finish_reason, draft.text, draft.traces
        if draft.finish_reason == CONTENT_FILTER:  # a control failed; a refusal is the review's own word
            request.finish_reason, request.failed_control, request.error = "guard_error", draft.failed_control, draft.error_type
