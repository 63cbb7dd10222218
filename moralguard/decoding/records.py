"""What generation returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from moralguard.trace.records import TokenTrace


@dataclass
class Completion:
    """One continuation as it grows.

    Attributes:
        prompt_ids, token_ids: ids of the prompt and of the continuation (an end-of-text token included).
        finish_reason: "stop" (end of text), "length", or "guard_error".
        error: what a failed control said, where finish_reason is "guard_error"; failed_control its name, cause its exception.
        trace: one record a token, when asked for.
    """

    prompt_ids: list[int]
    return_index: int
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    error: str | None = None
    failed_control: str | None = None
    cause: Exception | None = None
    trace: list[TokenTrace] = field(default_factory=list)


@dataclass(frozen=True)
class GenerationResult:
    """Continuations of all prompts: prompts x num_return_sequences, prompt by prompt.

    Attributes:
        texts: continuations without the prompt and without special tokens; empty strings where there is no tokenizer.
        token_ids: ids of the continuations.
        prompt_ids: ids of the prompt of each.
        finish_reasons: "stop", "length" or "guard_error".
        errors: messages of failed controls, None elsewhere.
        traces: token records of each, or None when no trace was asked for.
        seed: the seed that was used; with it the same call gives the same text.
    """

    texts: list[str]
    token_ids: list[list[int]]
    prompt_ids: list[list[int]]
    finish_reasons: list[str]
    errors: list[str | None]
    traces: list[list[TokenTrace]] | None
    seed: int
    _score: Callable[[], np.ndarray] = field(repr=False)

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
                    **({"trace": [t.as_dict() for t in self.traces[i]]} if self.traces is not None else {}),
                }
                for i, (text, ids, reason, error) in enumerate(
                    zip(self.texts, self.token_ids, self.finish_reasons, self.errors, strict=True)
                )
            ],
        }
