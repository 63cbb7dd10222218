"""What every request passes first: the key, and the limit on its body. Plain ASGI, so that streams and disconnects pass unchanged."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from moralguard.serving.engine_step import whereabouts
from moralguard.serving.openai_errors import error_response

_log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_OPEN_PATHS = ("/health",)


class ApiKeys:
    """Lets requests through whose ``Authorization: Bearer`` is one of the keys; all of them where there are no keys."""

    def __init__(self, app: App, keys: Sequence[str]):
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._digests or scope["path"] in _OPEN_PATHS or self._known(scope):
            await self._app(scope, receive, send)
            return
        answer = error_response(
            401,
            "no valid API key; send one as `Authorization: Bearer KEY`",
            "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await answer(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = header.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # every key is compared, in constant time, so that how long it takes says nothing of which is close
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(found)


class BodyLimit:
    """Answers 413 where a body is larger than ``most`` bytes, whether its length was announced or not."""

    def __init__(self, app: App, most: int):
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        body, more = bytearray(), True
        too_large = announced.isdigit() and int(announced) > self._most
        while more and not too_large:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client left before its body was complete
            body += message.get("body", b"")
            more = message.get("more_body", False)
            too_large = len(body) > self._most
        if too_large:
            text = f"the body is larger than this server's limit of {self._most} bytes; send less at a time"
            await error_response(413, text, "request_too_large")(scope, receive, send)
            return
        first = True

        async def replay() -> Message:
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": bytes(body), "more_body": False}
            return await receive()

        await self._app(scope, replay, send)


class Faults:
    """Answers 500 where the application raised, and logs where: the error's message, which may hold text, goes nowhere."""

    def __init__(self, app: App):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if scope["type"] != "http":
                raise
            _log.error("%s failed: %s", scope["path"], whereabouts(error))
            if not started:  # a stream that broke off just ends
                await error_response(500, "the server failed on this request; its log says where", "internal_error")(scope, receive, send)


class Rejections:
    """Tells ``note`` the status of every answer that is an error."""

    def __init__(self, app: App, note: Callable[[int], None]):
        self._app, self._note = app, note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                self._note(message["status"])
            await send(message)

        await self._app(scope, receive, watched)
