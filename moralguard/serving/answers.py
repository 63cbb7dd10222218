"""Bodies of answers, as OpenAI's clients read them, and what the guard says of itself in each."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "content_filter"]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChoiceGuard(BaseModel):
    """What the guard did to one continuation; ``reason`` and ``control`` say why it was denied."""

    index: int
    decision: Literal["allow", "steer", "deny"]
    interventions: int
    reason: str | None = None
    control: str | None = None
    trace: list[dict[str, Any]] | None = None


class GuardSummary(BaseModel):
    """What the guard did to a request.

    Attributes:
        decision: "deny" where a choice is a refusal, else "steer" where a control acted on a token, else "allow".
        policy: its id; None where the request was unguarded. policy_digest: of its data, at this strength.
        rows_guarded, interventions: tokens whose law was rectified, and those at which a control acted; scored tokens count, too.
        failed_open: control failures that were passed over because the policy says ``on_error: open``.
        reason: why the first denied choice was denied, or "time_limit".
    """

    decision: Literal["allow", "steer", "deny"]
    policy: str | None
    policy_digest: str | None
    strength: float
    rows_guarded: int
    interventions: int
    failed_open: int
    reason: str | None
    choices: list[ChoiceGuard]


class CompletionLogprobs(BaseModel):
    """Parallel lists, one entry a token; the first token of an echoed prompt has null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    moralguard: GuardSummary | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    moralguard: GuardSummary


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every error is answered with."""

    error: ErrorDetail


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["moralguard"] = "moralguard"
    max_model_len: int | None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """``broken`` names what doesn't work."""

    status: Literal["ok", "broken"]
    broken: list[Literal["engine", "audit"]]


class NamedValue(BaseModel):
    id: str
    statement: str


class GuardCard(BaseModel):
    """A served policy; ``selectable`` says whether a request may name it."""

    id: str
    object: Literal["guard"] = "guard"
    name: str
    description: str
    digest: str | None
    values: list[NamedValue]
    controls: list[str]
    review: list[str]
    on_error: Literal["closed", "open"]
    default: bool
    selectable: bool


class GuardList(BaseModel):
    object: Literal["list"] = "list"
    default: str | None
    max_strength: float
    data: list[GuardCard]


class ScoredValue(NamedValue):
    threshold: float


class GuardScores(BaseModel):
    """``scores[i][j]`` is P(v|y) of text i and value j."""

    object: Literal["guard.scores"] = "guard.scores"
    values: list[ScoredValue]
    scores: list[list[float]]


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int | None


class Detokenized(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """Special tokens, by their text; some models have several chat templates, by name."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int | None
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | dict[str, str] | None
