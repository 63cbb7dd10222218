"""POST /v1/chat/completions: answers to conversations, under the guard."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Header, Request, Response
from starlette.concurrency import run_in_threadpool

from moralguard.serving.admission import Admitted, admit, check_request, encode, generations
from moralguard.serving.answers import ChatChoice, ChatCompletion, ChatMessage, FinishReason
from moralguard.serving.generation import Generation, TokenLogprob
from moralguard.serving.logprob_tables import chat_logprobs
from moralguard.serving.openai_errors import ApiError, error_response
from moralguard.serving.openapi import EVENTS, errors
from moralguard.serving.protocol import ChatRequest
from moralguard.serving.running import DisconnectedError, Run
from moralguard.serving.state import ServerState
from moralguard.serving.streaming import EventStream, finish_reason

GONE = 499  # the client closed the request; nobody reads the answer


def router(state: ServerState) -> APIRouter:
    """The endpoint of a server."""
    routes = APIRouter(tags=["openai"])

    @routes.post("/v1/chat/completions", response_model=ChatCompletion, responses={**EVENTS, **errors(400, 404, 429)})
    async def chat_completions(body: ChatRequest, request: Request, x_moralguard_policy: str | None = Header(None)) -> Response:
        """Answer a conversation under the guard."""
        admitted, running, prompt_tokens = await run_in_threadpool(_prepare, state, body, x_moralguard_policy)
        run = Run(state, "chat", admitted, running, prompt_tokens)
        run.submit()
        if body.stream:
            return _stream(state, body, run)
        try:
            await run.wait(request)
        except DisconnectedError:
            return error_response(GONE, "the client closed the request", "client_closed_request")
        return Response(_answer(state, body, run).model_dump_json(), media_type="application/json")

    return routes


def _prepare(state: ServerState, body: ChatRequest, header: str | None) -> tuple[Admitted, list[Generation], int]:
    check_request(state, body)
    admitted = admit(state, body.moralguard, header)
    if getattr(state.tokenizer, "chat_template", None) is None:
        raise ApiError(400, "this model has no chat template; use POST /v1/completions, or start the server with one", "no_chat_template")
    turns = [message.turn for message in body.messages]
    ids = encode(state, turns, "messages")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return admitted, generations(state, admitted, body, [ids], body.most_tokens, logprobs, [turns]), len(ids)


def _answer(state: ServerState, body: ChatRequest, run: Run) -> ChatCompletion:
    choices = []
    for index, generation in enumerate(run.generations):
        denied = generation.decision == "deny"
        choices.append(
            ChatChoice(
                index=index,
                message=ChatMessage(content=state.refusal(generation) if denied else generation.text),
                logprobs=chat_logprobs(state.strings, generation.scores) if body.logprobs and not denied else None,
                finish_reason=finish_reason(generation),
            )
        )
    return ChatCompletion(
        id=run.id,
        created=run.created,
        model=state.settings.served_model_name,
        choices=choices,
        usage=run.usage(),
        moralguard=run.summary(),
    )


def _stream(state: ServerState, body: ChatRequest, run: Run) -> EventStream:
    def chunk(index: int, text: str, scores: tuple[TokenLogprob, ...], reason: FinishReason | None) -> dict[str, Any]:
        logprobs = chat_logprobs(state.strings, scores).model_dump(mode="json") if scores else None
        delta = {"content": text} if reason is None else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    first = [
        {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        for index in range(len(run.generations))
    ]
    head = {"id": run.id, "object": "chat.completion.chunk", "created": run.created, "model": state.settings.served_model_name}
    usage = body.stream_options is not None and body.stream_options.include_usage
    return EventStream(run, head, chunk, first, state.refusal, usage)
