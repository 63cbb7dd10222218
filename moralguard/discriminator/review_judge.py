"""A discriminator as a review asks it: one text at a time, against a policy's values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moralguard.discriminator.base import BaseDiscriminator
from moralguard.discriminator.discriminator import shipped_discriminator
from moralguard.discriminator.prefix import TextPrefixScorer
from moralguard.values import Value


@dataclass(frozen=True)
class ReviewJudge:
    """``moralguard.review.desk.Judge``; the weights are loaded when something is first judged.

    Args:
        values: the policy's, at least one.
        given: what judges; the shipped discriminator where it is None.
        onnx: the shipped one is read on onnxruntime, where the guarded model runs without torch.
    """

    values: Sequence[Value]
    given: BaseDiscriminator | None = None
    onnx: bool = False

    @property
    def discriminator(self) -> BaseDiscriminator:
        if self.given is not None:
            return self.given
        return shipped_discriminator(onnx=True) if self.onnx else shipped_discriminator()

    def score(self, text: str) -> np.ndarray:
        """P(v|y), float64 [values]."""
        return self.discriminator.score(text, list(self.values))[0]

    def prefixes(self, min_probability: float | None, consecutive: int) -> TextPrefixScorer:
        values = self.values
        if min_probability is not None:
            values = [value.replaced(threshold=min_probability) for value in values]
        return TextPrefixScorer(self.discriminator, list(values), consecutive=consecutive)
