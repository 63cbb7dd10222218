"""How tokens are drawn: the decoding settings, named as in transformers."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moralguard.schema import StrictModel


class DecodingSettings(StrictModel):
    """Settings of ``guard.generate``; a policy may carry its own defaults.

    Attributes:
        max_new_tokens: tokens a continuation at most.
        do_sample: draw from the law; False takes the most probable token.
        temperature: divides the rectified logits; 0 is greedy.
        top_k, top_p, min_p: what stays of the rectified law, in this order; 0, 1 and 0 keep everything.
        num_return_sequences: continuations a prompt.
        batch_size: continuations decoded side by side; the text doesn't depend on it.
    """

    max_new_tokens: Annotated[int, Field(ge=1)] = 40
    do_sample: bool = False
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    num_return_sequences: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 8

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0
