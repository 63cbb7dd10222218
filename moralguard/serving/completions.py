"""POST /v1/completions: continuations of texts or token ids, and log-probabilities of given tokens, through the guard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Header, Request, Response
from starlette.concurrency import run_in_threadpool

from moralguard.decoding.settings import DecodingSettings
from moralguard.serving.admission import Admitted, admit, check_number, check_request, encode, generations, room
from moralguard.serving.answers import Completion, CompletionChoice, CompletionLogprobs, FinishReason
from moralguard.serving.generation import Generation, TokenLogprob
from moralguard.serving.logprob_tables import completion_logprobs
from moralguard.serving.openai_errors import ApiError, error_response
from moralguard.serving.openapi import EVENTS, errors
from moralguard.serving.protocol import CompletionRequest
from moralguard.serving.running import DisconnectedError, Run
from moralguard.serving.state import ServerState
from moralguard.serving.streaming import EventStream, finish_reason
from moralguard.serving.token_strings import text_lengths

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
GONE = 499  # the client closed the request; nobody reads the answer


@dataclass(frozen=True)
class _Choice:
    """One choice of an answer: its prompt as text and as ids, what scores the prompt, and what continues it."""

    prompt: str
    ids: list[int]
    scored: Generation | None
    drawn: Generation | None

    @property
    def parts(self) -> list[Generation]:
        return [part for part in (self.scored, self.drawn) if part is not None]


def router(state: ServerState) -> APIRouter:
    """The endpoint of a server."""
    routes = APIRouter(tags=["openai"])

    @routes.post("/v1/completions", response_model=Completion, responses={**EVENTS, **errors(400, 404, 429)})
    async def completions(body: CompletionRequest, request: Request, x_moralguard_policy: str | None = Header(None)) -> Response:
        """Continue prompts under the guard; with `echo` and `logprobs`, score their tokens under the guarded law."""
        admitted, choices = await run_in_threadpool(_prepare, state, body, x_moralguard_policy)
        # choices of one prompt share what scores it
        running = list(dict.fromkeys(generation for choice in choices for generation in choice.parts))
        run = Run(state, "text_completion", admitted, running, sum(len(choice.ids) for choice in choices[:: body.n or 1]))
        run.submit()
        if body.stream:
            return _stream(state, body, run, choices)
        try:
            await run.wait(request)
        except DisconnectedError:
            return error_response(GONE, "the client closed the request", "client_closed_request")
        answer = await run_in_threadpool(_answer, state, body, run, choices)
        return Response(answer.model_dump_json(), media_type="application/json")

    return routes


def _prepare(state: ServerState, body: CompletionRequest, header: str | None) -> tuple[Admitted, list[_Choice]]:
    check_request(state, body)
    admitted = admit(state, body.moralguard, header)
    scoring = bool(body.echo) and body.logprobs is not None
    if body.stream and scoring:
        raise ApiError(400, "stream with echo and logprobs isn't supported; leave one of them out", "unsupported_parameter", "stream")
    prompts, n = _prompts(body.prompt), body.n or 1
    tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    check_number(state, len(prompts) * (n * bool(tokens) + scoring))
    ids = [encode(state, prompt, "the prompt" if len(prompts) == 1 else f"prompt {i}") for i, prompt in enumerate(prompts)]
    texts = [
        prompt if isinstance(prompt, str) else state.tokenizer.decode(each, skip_special_tokens=True)
        for prompt, each in zip(prompts, ids, strict=True)
    ]
    scored = [_scoring(state, admitted, each, body.logprobs or 0) if scoring else None for each in ids]
    drawn: list[Generation] = generations(state, admitted, body, ids, tokens, body.logprobs, prompts) if tokens else []
    return admitted, [_Choice(texts[i], ids[i], scored[i], drawn[i * n + j] if drawn else None) for i in range(len(ids)) for j in range(n)]


def _prompts(given: Any) -> list[Any]:
    if isinstance(given, str):
        return [given]
    if not given:
        raise ApiError(400, "prompt is an empty list; give a text, token ids, or a list of these", "invalid_prompt", "prompt")
    return [given] if isinstance(given[0], int) else list(given)


def _scoring(state: ServerState, admitted: Admitted, ids: list[int], logprobs: int) -> Generation | None:
    """A text's tokens from the second on, scored one by one; None for a single token, of which no law says anything."""
    if len(ids) == 1:
        return None
    room(state, admitted, ids, 0, "the prompt")
    return Generation(
        prompt_ids=ids[:1],
        settings=DecodingSettings(),
        guard=admitted.guard,
        policy=admitted.policy,
        strength=admitted.strength,
        given=ids[1:],
        logprobs=logprobs,
        trace=admitted.trace,
    )


def _answer(state: ServerState, body: CompletionRequest, run: Run, choices: Sequence[_Choice]) -> Completion:
    return Completion(
        id=run.id,
        created=run.created,
        model=state.settings.served_model_name,
        choices=[_choice(state, body, index, choice) for index, choice in enumerate(choices)],
        usage=run.usage(),
        moralguard=run.summary([choice.parts for choice in choices]),
    )


def _choice(state: ServerState, body: CompletionRequest, index: int, choice: _Choice) -> CompletionChoice:
    denied = next((part for part in choice.parts if part.decision == "deny"), None)
    if denied is not None:
        return CompletionChoice(index=index, text=state.refusal(denied), finish_reason="content_filter")
    text = choice.prompt if body.echo else ""
    if choice.drawn is not None:
        text += choice.drawn.text
    reason: FinishReason = "length" if choice.drawn is None else finish_reason(choice.drawn)
    logprobs = None if body.logprobs is None else _logprobs(state, bool(body.echo), choice)
    return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)


def _logprobs(state: ServerState, echo: bool, choice: _Choice) -> CompletionLogprobs:
    scores, offsets, start = [], [], 0
    if echo:
        scores += choice.scored.scores if choice.scored is not None else []
        offsets, start = text_lengths(state.tokenizer, choice.ids), len(choice.prompt)
    if choice.drawn is not None:
        scores += choice.drawn.scores
        offsets += [start + length for length in text_lengths(state.tokenizer, choice.drawn.token_ids)]
    return completion_logprobs(state.strings, choice.ids[0] if echo else None, scores, offsets)


def _stream(state: ServerState, body: CompletionRequest, run: Run, choices: Sequence[_Choice]) -> EventStream:
    offsets = [0] * len(choices)

    def chunk(index: int, text: str, scores: tuple[TokenLogprob, ...], reason: FinishReason | None) -> dict[str, Any]:
        logprobs = None
        if scores:
            lengths = text_lengths(state.tokenizer, [score.token_id for score in scores])
            told = completion_logprobs(state.strings, None, scores, [offsets[index] + length for length in lengths])
            logprobs = told.model_dump(mode="json")
        offsets[index] += len(text)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    first = []
    if body.echo or not run.generations:  # nothing is drawn where max_tokens is 0, and every choice ends with a reason all the same
        reason: FinishReason | None = None if run.generations else "length"
        first = [chunk(index, choice.prompt if body.echo else "", (), reason) for index, choice in enumerate(choices)]
    head = {"id": run.id, "object": "text_completion", "created": run.created, "model": state.settings.served_model_name}
    usage = body.stream_options is not None and body.stream_options.include_usage
    return EventStream(run, head, chunk, first, state.refusal, usage)
