"""An HTTP request whose continuations run in the engine: their events in the event loop, and the books once they are over."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from fastapi import Request
from starlette.types import Receive

from moralguard.errors import GuardError
from moralguard.serving.admission import Admitted
from moralguard.serving.answers import ChoiceGuard, GuardSummary, Usage
from moralguard.serving.generation import Generation, Piece
from moralguard.serving.state import ServerState
from moralguard.serving.telemetry import record

_log = logging.getLogger(__name__)


class DisconnectedError(Exception):
    """The client left; its continuations were given up."""


class Run:
    """Continuations of one request.

    Args:
        operation: "chat" or "text_completion"; it decides the prefix of the id.
        admitted: the guard that they run under.
        generations: what runs; possibly nothing, where a request asks for no token.
        prompt_tokens: of all prompts, for the usage.
    """

    def __init__(self, state: ServerState, operation: str, admitted: Admitted, generations: Sequence[Generation], prompt_tokens: int):
        self.id = ("chatcmpl-" if operation == "chat" else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())
        self.generations = list(generations)
        self._state, self._operation, self._began = state, operation, time.time_ns()
        self._admitted, self._prompt_tokens = admitted, prompt_tokens
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[Generation, Piece | None]] = asyncio.Queue()
        self._booked = False

    def submit(self) -> None:
        """Hand them to the engine.

        Raises:
            BusyError: there is no room; nothing was begun.
        """
        for generation in self.generations:
            generation.notify = self._notify
        self._state.submit(self.generations)

    def _notify(self, generation: Generation, piece: Piece | None) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, (generation, piece))

    async def events(self) -> AsyncIterator[tuple[Generation, Piece | None]]:
        """Pieces as they come, and None behind the last one of each continuation, until all are over."""
        left = len(self.generations)
        while left:
            generation, piece = await self._events.get()
            left -= piece is None
            yield generation, piece

    async def wait(self, request: Request) -> None:
        """Until all are over.

        Raises:
            DisconnectedError: the client left before.
        """
        over, gone = asyncio.ensure_future(self._over()), asyncio.ensure_future(disconnected(request.receive))
        try:
            await asyncio.wait({over, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not over.done():
                raise DisconnectedError
            over.result()
        finally:
            for task in (over, gone):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            self.close()

    async def _over(self) -> None:
        async for _ in self.events():
            pass

    def close(self) -> None:
        """Give up what still runs, and note what became of each: metrics, audit log, telemetry. Once; later calls do nothing."""
        if self._booked:
            return
        self._booked = True
        self._state.engine.cancel([generation for generation in self.generations if not generation.finish_reason])
        for generation in self.generations:
            generation.end("cancelled")
        for index, generation in enumerate(self.generations):
            self._state.metrics.ended(generation)
            self._note(index, generation)
        if not self.generations:
            return
        record(self.id, self._state.settings.served_model_name, self._operation, self.generations, self._began)

    def _note(self, index: int, generation: Generation) -> None:
        audit = self._state.audit
        if audit is None:
            return
        output = list(generation.given if generation.given is not None else generation.token_ids)
        fields = {
            "request": self.id,
            "index": index,
            "kind": "generate" if generation.given is None else "score",
            "policy": generation.policy,
            "policy_digest": self._state.digest(generation.guard),
            "strength": generation.strength,
            "prompt_tokens": len(generation.prompt_ids),
            "output_tokens": len(output),
            "rows_guarded": generation.rows_guarded,
            "interventions": generation.interventions,
            "failed_open": generation.failed_open,
            "decision": generation.decision,
            "finish_reason": generation.finish_reason,
            "reason": generation.reason,
            "control": generation.failed_control,
            "prompt_hash": audit.digest(generation.prompt_ids),
            "output_hash": audit.digest(output),
        }
        if audit.text:
            decode = self._state.tokenizer.decode
            fields |= {"prompt": decode(list(generation.prompt_ids)), "output": decode(output)}
        try:
            audit.write(fields)
        except GuardError as error:  # /health says so from now on; the answer itself stands
            self._state.audit_failed = True
            _log.error("%s", error)

    def usage(self) -> Usage:
        """Tokens of the prompts, each counted once, and of what was drawn."""
        drawn = sum(len(generation.token_ids) for generation in self.generations if generation.given is None)
        return Usage(prompt_tokens=self._prompt_tokens, completion_tokens=drawn, total_tokens=self._prompt_tokens + drawn)

    def summary(self, choices: Sequence[Sequence[Generation]] | None = None) -> GuardSummary:
        """What the guard did.

        Args:
            choices: the continuations behind each choice of the answer; one each where it isn't said.
        """
        choices = [[generation] for generation in self.generations] if choices is None else choices
        told = [_choice(index, generations) for index, generations in enumerate(choices)]
        decisions = {choice.decision for choice in told}
        return GuardSummary(
            decision="deny" if "deny" in decisions else "steer" if "steer" in decisions else "allow",
            policy=self._admitted.policy,
            policy_digest=self._state.digest(self._admitted.guard),
            strength=self._admitted.strength,
            rows_guarded=sum(generation.rows_guarded for generation in self.generations),
            interventions=sum(generation.interventions for generation in self.generations),
            failed_open=sum(generation.failed_open for generation in self.generations),
            reason=next((choice.reason for choice in told if choice.reason), None),
            choices=told,
        )


def _choice(index: int, generations: Sequence[Generation]) -> ChoiceGuard:
    decisions = {generation.decision for generation in generations}
    return ChoiceGuard(
        index=index,
        decision="deny" if "deny" in decisions else "steer" if "steer" in decisions else "allow",
        interventions=sum(generation.interventions for generation in generations),
        reason=next((generation.reason for generation in generations if generation.reason), None),
        control=next((generation.failed_control for generation in generations if generation.failed_control), None),
        trace=[trace.as_dict() for generation in generations for trace in generation.traces] or None,
    )


async def disconnected(receive: Receive) -> None:
    """Until the client has left; ``receive`` is the request's, its body read."""
    while (await receive())["type"] != "http.disconnect":
        pass
