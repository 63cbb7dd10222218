"""From a request's body to continuations that the engine can run: whose policy, which tokens, how many, drawn how."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moralguard.backends.prompts import PromptLike, encode_prompt
from moralguard.decoding.passes import check_passes_fit
from moralguard.decoding.settings import DecodingSettings
from moralguard.errors import GuardError, PolicyError, PromptError
from moralguard.guard import Guard
from moralguard.serving.generation import Generation
from moralguard.serving.openai_errors import ApiError
from moralguard.serving.protocol import GuardOptions, Sampling
from moralguard.serving.state import ServerState

_GREEDY_UNDER = 1e-4  # a temperature under which float32 logits overflow when they are divided by it


@dataclass(frozen=True)
class Admitted:
    """The guard of a request; None is unguarded."""

    policy: str | None
    strength: float
    guard: Guard | None
    trace: bool


def admit(state: ServerState, options: GuardOptions | None, header: str | None) -> Admitted:
    """Which guard a request runs under.

    Args:
        options: the body's ``moralguard`` field. header: ``X-Moralguard-Policy``, another way to name the policy.

    Raises:
        ApiError: 400 where the policy isn't served, would loosen the default, or isn't the one that the header names.
    """
    options = options or GuardOptions()
    if header is not None and options.policy is not None and header != options.policy:
        raise ApiError(
            400, "the header X-Moralguard-Policy and the field moralguard.policy name different policies; send one", "policy_conflict"
        )
    try:
        policy, strength = state.config.admit({"policy": options.policy or header, "strength": options.strength})
        guard = None if policy is None else state.guards.guard(policy, strength)
    except PolicyError as error:
        raise ApiError(400, str(error), "policy_refused", "moralguard") from None
    return Admitted(policy, strength, guard, options.trace)


def check_request(state: ServerState, body: Sampling) -> None:
    """Refuse what this server doesn't do, and models that it doesn't serve.

    Raises:
        ApiError: 404 for another model, 400 for a field that would change the answer.
    """
    if body.model is not None and body.model != state.settings.served_model_name:
        message = f"the model {body.model!r} isn't served here; this server has {state.settings.served_model_name!r}"
        raise ApiError(404, message, "model_not_found", "model")
    if (field := body.unsupported()) is not None:
        raise ApiError(400, f"{field}: this server doesn't support this value; leave the field out", "unsupported_parameter", field)


def encode(state: ServerState, prompt: PromptLike, where: str) -> list[int]:
    """Token ids of a prompt.

    Raises:
        ApiError: 400; code "context_length_exceeded" where it is too long.
    """
    context = state.lm.context_length
    if isinstance(prompt, list) and context is not None and len(prompt) > context and not isinstance(prompt[0], dict):
        raise _too_long(f"{where} has {len(prompt)} tokens", context)
    try:
        return encode_prompt(state.lm, prompt, where)
    except PromptError as error:
        code = "context_length_exceeded" if "context of" in str(error) else "invalid_prompt"
        raise ApiError(400, str(error), code, "messages" if where == "messages" else "prompt") from None
    except GuardError:
        raise
    except Exception as error:  # a chat template raises whatever it likes where it refuses a conversation
        message = f"{where} can't be encoded ({type(error).__name__}); the model's chat template or tokenizer refuses it"
        raise ApiError(400, message, "invalid_prompt") from None


def _too_long(what: str, context: int) -> ApiError:
    return ApiError(
        400, f"{what}, but the model's context holds {context} tokens; shorten the prompt or max_tokens", "context_length_exceeded"
    )


def room(state: ServerState, admitted: Admitted, ids: Sequence[int], asked: int | None, where: str) -> int:
    """Tokens that may be drawn after a prompt.

    Args:
        asked: what the request says; None is what fits, up to the server's own limit.

    Raises:
        ApiError: 400, code "context_length_exceeded": the prompt and what is asked for don't fit, or the prompt and a pass's prefix.
    """
    context = state.lm.context_length
    if admitted.guard is not None:
        try:
            check_passes_fit([item for control in admitted.guard.controls for item in control.passes], ids, where)
        except PromptError as error:
            raise ApiError(400, str(error), "context_length_exceeded", "prompt") from None
    most = state.settings.default_max_tokens if context is None else min(state.settings.default_max_tokens, context - len(ids))
    if asked is None:
        return most
    if context is not None and len(ids) + asked > context:
        raise _too_long(f"{where} has {len(ids)} tokens and max_tokens is {asked}", context)
    return asked


def decoding(admitted: Admitted, body: Sampling, most_tokens: int) -> DecodingSettings:
    """How tokens are drawn: what the request says, else what its policy says, else as OpenAI does."""
    policy = admitted.guard.policy.decoding.model_dump(exclude_none=True) if admitted.guard is not None else {}
    asked: dict[str, Any] = {
        name: value for name in ("temperature", "top_p", "top_k", "min_p") if (value := getattr(body, name)) is not None
    }
    if asked.get("top_k") == -1:
        asked["top_k"] = 0
    settings = {"do_sample": True, **policy, **asked}
    if "temperature" in asked:
        settings["do_sample"] = asked["temperature"] >= _GREEDY_UNDER
    return DecodingSettings(**{**settings, "max_new_tokens": max(1, most_tokens)})


def generations(
    state: ServerState,
    admitted: Admitted,
    body: Sampling,
    prompts: Sequence[list[int]],
    asked: int | None,
    logprobs: int | None,
    sources: Sequence[PromptLike] | None = None,
) -> list[Generation]:
    """n continuations of every prompt, prompt by prompt.

    Args:
        sources: the prompts as they were given, for a policy's review.

    Raises:
        ApiError: 400 where they are more than the server ever takes on at once, or don't fit the context, or where log-probabilities of
            a text are asked for that a review may replace.
    """
    if logprobs is not None and admitted.guard is not None and admitted.guard.review:
        message = f"logprobs: policy {admitted.policy!r} reviews texts and may replace them; leave the field out"
        raise ApiError(400, message, "unsupported_parameter", "logprobs")
    n = body.n or 1
    check_number(state, len(prompts) * n)
    seed = secrets.randbits(63) if body.seed is None else body.seed
    strings = tuple(body.stop_strings)
    special = set(state.tokenizer.all_special_tokens)
    found = []
    for number, ids in enumerate(prompts):
        where = "the prompt" if len(prompts) == 1 else f"prompt {number}"
        settings = decoding(admitted, body, room(state, admitted, ids, asked, where))
        for index in range(n):
            found.append(
                Generation(
                    prompt_ids=ids,
                    settings=settings,
                    seed=seed,
                    return_index=index,
                    guard=admitted.guard,
                    policy=admitted.policy,
                    strength=admitted.strength,
                    # a special token leaves no text that a string could be found in
                    stop=tuple(stop for stop in strings if stop not in special),
                    stop_ids=frozenset(int(state.tokenizer.convert_tokens_to_ids(stop)) for stop in strings if stop in special),
                    logprobs=logprobs,
                    trace=admitted.trace,
                    stream=bool(body.stream),
                    source=None if sources is None else sources[number],
                )
            )
    return found


def check_number(state: ServerState, number: int) -> None:
    """Raises ApiError (400) where a request asks for more continuations than there can ever be room for."""
    most = state.engine.max_running + state.engine.max_waiting
    if number > most:
        message = f"the request asks for {number} continuations; this server takes on {most} at once: send fewer prompts or a smaller n"
        raise ApiError(400, message, "too_many_continuations")
