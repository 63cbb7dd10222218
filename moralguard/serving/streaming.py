"""Server-sent events: a chunk a piece of text, the guard's summary in the last one, then ``[DONE]``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from moralguard.serving.answers import FinishReason
from moralguard.serving.generation import Generation, TokenLogprob
from moralguard.serving.running import Run, disconnected

Chunk = Callable[[int, str, tuple[TokenLogprob, ...], FinishReason | None], dict[str, Any]]
"""(index of the choice, text, log-probabilities, finish_reason) -> the entry in ``choices``."""

DONE = b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Streams a run, and gives it up where the client leaves.

    Args:
        run: its continuations are the choices; it has been submitted.
        head: what every chunk holds beside ``choices``.
        chunk: makes the entries of ``choices``.
        first: entries that are sent before anything is generated; where nothing is, they are the whole answer.
        refusal: says the text of a denied choice. Behind text that was sent before, it stands in a paragraph of its own.
        usage: send a last chunk with the usage and no choices.
    """

    def __init__(
        self, run: Run, head: dict[str, Any], chunk: Chunk, first: list[dict[str, Any]], refusal: Callable[[Generation], str], usage: bool
    ):
        self._run, self._head, self._chunk, self._first = run, head, chunk, first
        self._refusal, self._usage = refusal, usage
        super().__init__(self._events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # not every pair of starlette and server notices by itself that a client left between two pieces
        gone = asyncio.ensure_future(self._given_up(receive))
        try:
            await super().__call__(scope, receive, send)
        finally:
            gone.cancel()
            self._run.close()

    async def _given_up(self, receive: Receive) -> None:
        await disconnected(receive)
        self._run.close()  # which ends its continuations, and so the stream

    def _data(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        extra = {"usage": None} if self._usage else {}
        body = {**self._head, "choices": choices, **extra, **more}
        return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

    def _summary(self) -> Any:
        choices: list[list[Generation]] | None = None if self._run.generations else [[] for _ in self._first]
        return json.loads(self._run.summary(choices).model_dump_json())  # pydantic writes null for what JSON has no number for

    async def _events(self) -> AsyncIterator[bytes]:
        index = {generation: i for i, generation in enumerate(self._run.generations)}
        spoken: set[Generation] = set()
        left = len(index)
        for place, entry in enumerate(self._first, 1):
            if left or place < len(self._first):
                yield self._data([entry])
            else:
                yield self._data([entry], moralguard=self._summary())
        async for generation, piece in self._run.events():
            choice = index[generation]
            if piece is not None:
                if piece.text:
                    spoken.add(generation)
                yield self._data([self._chunk(choice, piece.text, piece.logprobs, None)])
                continue
            left -= 1
            if generation.decision == "deny":
                yield self._data([self._chunk(choice, ("\n\n" if generation in spoken else "") + self._refusal(generation), (), None)])
            last = self._chunk(choice, "", (), finish_reason(generation))
            if left:
                yield self._data([last])
            else:
                yield self._data([last], moralguard=self._summary())
        if self._usage:
            yield self._data([], usage=self._run.usage().model_dump(), moralguard=self._summary())
        yield DONE


def finish_reason(generation: Generation) -> FinishReason:
    """As clients know it: a continuation that the server gave up (it is closing) has been cut short."""
    found = generation.finish_reason
    return "stop" if found == "stop" else "content_filter" if found == "content_filter" else "length"
