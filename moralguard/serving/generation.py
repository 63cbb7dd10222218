"""One continuation of a served request: what it asks for, and what becomes of it while the engine runs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moralguard.decoding.loop import noise_key
from moralguard.decoding.settings import DecodingSettings
from moralguard.guard import Guard
from moralguard.trace.records import TokenTrace

Decision = Literal["allow", "steer", "deny"]
"""allow: no control acted; steer: controls acted on some tokens; deny: the answer is a refusal."""


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities (nats) of one position under the guarded law at temperature 1, before top-k, top-p and min-p.

    Attributes:
        token_id, logprob: the token that stands there; -inf where the law doesn't hold it.
        top: (id, log-probability) of the most probable tokens, best first, the lowest id first among equals.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """Text that is certain now, and the log-probabilities of the tokens that were read since the piece before."""

    text: str
    logprobs: tuple[TokenLogprob, ...]


@dataclass(eq=False)
class Generation:
    """A continuation under a guard of its own, or given tokens that are scored under it.

    Attributes:
        prompt_ids: ids, at least one.
        settings: how tokens are drawn; ``max_new_tokens`` at most.
        seed, return_index: of the noise. The text is the one that ``guard.generate(..., seed=seed)`` gives.
        guard: None is unguarded.
        policy, strength: what the guard goes by in metrics and in the audit log.
        given: ids that are read one by one in place of drawn ones, and scored; None draws.
        stop: strings before which the text ends. stop_ids: tokens that end it like an end-of-text token.
        logprobs: how many of the most probable tokens to tell of each position; None tells nothing.
        trace: record what the guard did at every token.
        attempt, retry, kept: as of a ``Completion``: drafts of a review.
        told: called in the engine's thread with each token, those of ``kept`` too. It must not raise, and must be quick.
        source: the prompt as the request gave it, for reviews. refusal: in place of the server's own, where a review chose one.
        notify: called in the engine's thread with each piece of text (where ``stream``), and with None at the end. It must not raise.

        token_ids, text, scores, traces: what came of it; ``text`` is complete at the end only.
        rows_guarded, interventions: tokens that were rectified, and those at which a control acted.
        failed_open: control failures that were passed over because the policy says so.
        finish_reason: "stop", "length", "content_filter" or "cancelled"; "" while it runs.
        reason: "guard_error", "engine_error", "time_limit" or "review" where one of these ended it; failed_control (a review's method),
            error_type say more.
        submitted, started, first_token, ended: seconds of ``time.monotonic()``; 0 where it didn't come to that.
    """

    prompt_ids: Sequence[int]
    settings: DecodingSettings
    seed: int = 0
    return_index: int = 0
    guard: Guard | None = None
    policy: str | None = None
    strength: float = 1.0
    given: Sequence[int] | None = None
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    trace: bool = False
    stream: bool = False
    attempt: int = 0
    retry: int = 0
    kept: Sequence[int] = ()
    told: Callable[[Generation, int], None] | None = None
    source: Any = None
    refusal: str | None = None
    notify: Callable[[Generation, Piece | None], None] = lambda generation, piece: None

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    scores: list[TokenLogprob] = field(default_factory=list)
    traces: list[TokenTrace] = field(default_factory=list)
    rows_guarded: int = 0
    interventions: int = 0
    failed_open: int = 0
    finish_reason: str = ""
    reason: str | None = None
    failed_control: str | None = None
    error_type: str | None = None
    cancelled: bool = False
    submitted: float = 0.0
    started: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0

    def __post_init__(self) -> None:
        self.key = noise_key(self.seed, self.prompt_ids, self.return_index, self.attempt, self.retry)

    @property
    def forced(self) -> int | None:
        """The token that is read in place of a drawn one: the next given or kept; None draws."""
        known = self.kept if self.given is None else self.given
        return int(known[len(self.token_ids)]) if len(self.token_ids) < len(known) else None

    @property
    def open_on_error(self) -> bool:
        return self.guard is not None and self.guard.policy.on_error == "open"

    @property
    def decision(self) -> Decision:
        if self.finish_reason == "content_filter":
            return "deny"
        return "steer" if self.interventions else "allow"

    @property
    def position(self) -> int:
        """Tokens read so far, the prompt's included: where the noise of the next one is."""
        return len(self.prompt_ids) + len(self.token_ids)

    def end(self, finish_reason: str, reason: str | None = None) -> None:
        """It is over, for whichever reason came first."""
        if not self.finish_reason:
            self.finish_reason, self.reason, self.ended = finish_reason, reason, time.monotonic()

    def deny(self, reason: str, control: str | None, error_type: str) -> None:
        """A failure ends it closed; what was generated so far isn't handed out."""
        if not self.finish_reason:
            self.failed_control, self.error_type = control, error_type
            self.end("content_filter", reason)
