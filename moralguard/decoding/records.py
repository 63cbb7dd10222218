"""What generation returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from moralguard.trace.records import TokenTrace

CONTENT_FILTER = "content_filter"
"""The finish_reason of a text that was replaced by a refusal, here and on the wire."""


@dataclass
class Draft:
    """A text that the model wrote and a review looked at.

    Attributes:
        method: what had it written: "draft" for the first, else the review method; "rollback" for one whose end was taken back.
        token_ids: as drawn. scores: P(v|y) by value id, once it was judged.
    """

    method: str
    text: str = field(repr=False)
    token_ids: tuple[int, ...] = field(repr=False)
    scores: dict[str, float] | None = None


@dataclass
class ReviewRecord:
    """What the policy's ``review`` did to a continuation.

    Attributes:
        methods: the methods that looked at it, in this order.
        drafts: every draft, those that were replaced or refused included. Python code may read them; they are in no log, no JSON and no
            answer of a server.
        standing: index of the draft that stands, or that was refused.
        refused_by: the method that put a refusal in its place; None where none did.
        notes: why a method left the text as it was, where it couldn't do its work.
    """

    methods: list[str] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    standing: int = 0
    refused_by: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        return self.refused_by is not None

    @property
    def revised(self) -> bool:
        """Whether what stands was written in place of a draft, behind another prompt."""
        return bool(self.drafts) and self.drafts[self.standing].method == "self-critique"

    @property
    def rollbacks(self) -> int:
        """How often tokens were taken back."""
        return sum(draft.method == "rollback" for draft in self.drafts)

    @property
    def scores(self) -> dict[str, float]:
        """P(v|y) by value id of the draft that stands or was refused; empty where nothing judged it."""
        return dict(self.drafts[self.standing].scores or {}) if self.drafts else {}

    def as_dict(self) -> dict[str, Any]:
        """For JSON: everything but the drafts, of which it says how many there are."""
        found = {"methods": self.methods, "drafts": len(self.drafts), "rollbacks": self.rollbacks, "scores": self.scores}
        return {**found, "refused": self.refused, "refused_by": self.refused_by, "notes": self.notes}


@dataclass
class Completion:
    """One continuation as it grows.

    Attributes:
        prompt_ids, token_ids: ids of the prompt and of the continuation (an end-of-text token included).
        finish_reason: "stop" (end of text), "length", "guard_error", or "content_filter" (a review put a refusal in its place).
        error: what a failed control said, where finish_reason is "guard_error"; failed_control its name, cause its exception.
        trace: one record a token, when asked for.
        attempt, retry: of the noise, beside the seed: another draft, and what is drawn again behind ``kept``.
        kept: token ids that are read in place of the first ones drawn.
        source: the prompt as it was given, where a review needs its words; None where only ids are known.
        text: what stands in place of the decoded ids; None where nothing does.
        review: what the policy's review did; None without one.
    """

    prompt_ids: list[int]
    return_index: int
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    error: str | None = None
    failed_control: str | None = None
    cause: Exception | None = None
    trace: list[TokenTrace] = field(default_factory=list)
    attempt: int = 0
    retry: int = 0
    kept: Sequence[int] = ()
    source: Any = field(default=None, repr=False)
    text: str | None = field(default=None, repr=False)
    review: ReviewRecord | None = None


@dataclass(frozen=True)
class GenerationResult:
    """Continuations of all prompts: prompts x num_return_sequences, prompt by prompt.

    Attributes:
        texts: continuations without the prompt and without special tokens; empty strings where there is no tokenizer.
        token_ids: ids of the continuations.
        prompt_ids: ids of the prompt of each.
        finish_reasons: "stop", "length", "guard_error" or "content_filter".
        errors: messages of failed controls, None elsewhere.
        traces: token records of each, or None when no trace was asked for.
        seed: the seed that was used; with it the same call gives the same text.
        reviews: what the policy's review did to each; None without one.
    """

    texts: list[str]
    token_ids: list[list[int]]
    prompt_ids: list[list[int]]
    finish_reasons: list[str]
    errors: list[str | None]
    traces: list[list[TokenTrace]] | None
    seed: int
    _score: Callable[[], np.ndarray] = field(repr=False)
    reviews: list[ReviewRecord] | None = None

    @cached_property
    def scores(self) -> np.ndarray:
        """P(v|y), float array [n, values], of every continuation and value by the shipped discriminator; computed when first read."""
        return self._score()

    def as_dict(self) -> dict[str, Any]:
        """Everything but the scores, ready for JSON."""
        return {
            "seed": self.seed,
            "completions": [
                {
                    "text": text,
                    "token_ids": ids,
                    "finish_reason": reason,
                    **({"error": error} if error else {}),
                    **({"review": self.reviews[i].as_dict()} if self.reviews is not None else {}),
                    **({"trace": [t.as_dict() for t in self.traces[i]]} if self.traces is not None else {}),
                }
                for i, (text, ids, reason, error) in enumerate(
                    zip(self.texts, self.token_ids, self.finish_reasons, self.errors, strict=True)
                )
            ],
        }
