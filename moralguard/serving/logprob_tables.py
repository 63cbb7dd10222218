"""Log-probabilities in the forms of OpenAI's two endpoints. -9999.0 stands for -inf, which JSON can't hold."""

from __future__ import annotations

from collections.abc import Sequence

from moralguard.serving.answers import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob
from moralguard.serving.generation import TokenLogprob
from moralguard.serving.token_strings import TokenStrings

LEAST = -9999.0


def _finite(value: float) -> float:
    return max(value, LEAST)


def completion_logprobs(
    strings: TokenStrings, first: int | None, scores: Sequence[TokenLogprob], offsets: Sequence[int]
) -> CompletionLogprobs:
    """Parallel lists over the tokens of a choice.

    ``top_logprobs`` holds the most probable tokens and the token that stands there, as OpenAI's does; their numbers come from one array, so
    that a token is the greedy one exactly where ``token_logprob == max(top_logprobs.values())``.

    Args:
        first: the first token of an echoed prompt, of which no law says anything; None where there is none.
        scores: of all other tokens.
        offsets: characters of text before each token.
    """
    tokens = [] if first is None else [strings.spell(first)]
    numbers: list[float | None] = [] if first is None else [None]
    tops: list[dict[str, float] | None] = [] if first is None else [None]
    for score in scores:
        token = strings.spell(score.token_id)
        tokens.append(token)
        numbers.append(_finite(score.logprob))
        tops.append({strings.spell(i): _finite(value) for i, value in score.top} | {token: _finite(score.logprob)})
    return CompletionLogprobs(tokens=tokens, token_logprobs=numbers, top_logprobs=tops, text_offset=list(offsets))


def chat_logprobs(strings: TokenStrings, scores: Sequence[TokenLogprob]) -> ChatLogprobs:
    """One entry a token, with its bytes."""

    def entry(token_id: int, value: float) -> TopLogprob:
        raw = strings.raw(token_id)
        return TopLogprob(token=strings.spell(token_id), logprob=_finite(value), bytes=None if raw is None else list(raw))

    return ChatLogprobs(
        content=[
            ChatLogprob(**entry(score.token_id, score.logprob).model_dump(), top_logprobs=[entry(i, value) for i, value in score.top])
            for score in scores
        ]
    )
