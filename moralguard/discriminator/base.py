"""What every discriminator does: score, judge, explain and reward, from one method that reads texts against values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moralguard.discriminator.inputs import as_context, as_texts, as_values
from moralguard.discriminator.judgement import Basis, Judgement, Span
from moralguard.errors import DataError
from moralguard.values import Value

ExplainMethod = Literal["occlusion", "gradient"]


@dataclass(frozen=True)
class Reading:
    """What was read of n texts against m values.

    Attributes:
        relevance: probability that the value is at stake, float64 [n, m].
        valence: P(kept | relevant), float64 [n, m].
        window: characters [start, end) of the window that decided, int64 [n, m, 2].
        windows: number of windows of each text, int64 [n].
        paths: what read each text, n names.
    """

    relevance: np.ndarray
    valence: np.ndarray
    window: np.ndarray
    windows: np.ndarray
    paths: list[str]

    @property
    def probability(self) -> np.ndarray:
        """P(v|y) = 1 - relevance * (1 - valence), float64 [n, m]."""
        return 1.0 - self.relevance * (1.0 - self.valence)


class BaseDiscriminator(ABC):
    """P(v|y), the probability that a text keeps a value. Subclasses say how texts are read against values."""

    @abstractmethod
    def read(self, texts: Sequence[str], values: Sequence[Value], context: str) -> Reading:
        """Read checked texts against checked values in one context ("" for none)."""

    def score(self, texts: Any, values: Any, *, context: str | None = None) -> np.ndarray:
        """P(v|y) of every text and value, float64 [n_texts, n_values], in [0, 1] and never NaN.

        Args:
            texts: a text or texts. An empty text breaks nothing: 1.
            values: statements, ids of known values, ``Value`` objects or a policy.
            context: culture, setting, register, or the turn that the texts answer.

        Raises:
            DataError: a text isn't a string, or a value can't be used.
        """
        return self.read(as_texts(texts), as_values(values), as_context(context)).probability

    def judge(
        self, texts: Any, values: Any, context: str | None = None, *, spans: bool = False, method: ExplainMethod = "occlusion"
    ) -> Judgement:
        """Judgements of texts against values, with their basis; ``.resolve()`` weighs values against each other.

        Args:
            spans: name the spans that each judgement rests on (slower: see ``explain``).

        Raises:
            DataError: as ``score``.
        """
        texts, values, context = as_texts(texts), as_values(values), as_context(context)
        reading = self.read(texts, values, context)
        basis = [
            [
                Basis(value, context, reading.paths[i], (int(start), int(end)), int(reading.windows[i]))
                for value, (start, end) in zip(values, reading.window[i], strict=True)
            ]
            for i in range(len(texts))
        ]
        found: list[list[tuple[Span, ...]]] = [
            [self._spans(text, value, context, basis[i][j], method) if spans else () for j, value in enumerate(values)]
            for i, text in enumerate(texts)
        ]
        return Judgement(reading.probability, reading.relevance, reading.valence, found, basis, values)

    def explain(self, text: str, value: Any, context: str | None = None, *, method: ExplainMethod = "occlusion") -> Judgement:
        """The judgement of one text and one value with its spans, strongest first.

        Args:
            method: "occlusion" scores the text again without each phrase; "gradient" needs one backward pass only, and is an
                estimate to first order.
        """
        values = as_values(value)
        if not isinstance(text, str) or len(values) != 1:
            raise DataError("explain() takes one text and one value; judge(..., spans=True) takes many")
        return self.judge([text], values, context, spans=True, method=method)[0, 0]

    def _spans(self, text: str, value: Value, context: str, basis: Basis, method: ExplainMethod) -> tuple[Span, ...]:
        from moralguard.discriminator.explanation import occlusion_spans

        if method not in ("occlusion", "gradient"):
            raise DataError(f'method is {method!r}; expected "occlusion" or "gradient"')
        if method == "gradient":
            return self.gradient_spans(text, value, context, basis)
        return occlusion_spans(lambda texts: self.read(texts, [value], context).probability[:, 0], text, basis.window)

    def gradient_spans(self, text: str, value: Value, context: str, basis: Basis) -> tuple[Span, ...]:
        """Spans by gradient times input.

        Raises:
            DataError: this discriminator can't be differentiated.
        """
        raise DataError(f'{type(self).__name__} gives no gradients; explain with method="occlusion"')

    def as_reward(self, values: Any, *, context: str | None = None, weights: Sequence[float] | None = None) -> Callable[..., list[float]]:
        """A reward function r(x, y) = weighted mean over values of P(v|y), as TRL's GRPO trainer calls one.

        The function takes ``completions`` (strings, or lists of chat messages whose last one's content is judged) and ignores
        what else it is given.

        Raises:
            DataError: weights that don't fit the values.
        """
        judged = as_values(values)
        shares = np.ones(len(judged)) if weights is None else np.asarray(weights, dtype=np.float64)
        if shares.shape != (len(judged),) or not np.isfinite(shares).all() or (shares < 0).any() or shares.sum() <= 0:
            raise DataError(f"weights must be {len(judged)} numbers of at least 0, not all 0 (one a value)")
        shares = shares / shares.sum()

        def reward(completions: Sequence[Any], **_: Any) -> list[float]:
            texts = [item if isinstance(item, str) else item[-1]["content"] for item in completions]
            return [float(r) for r in self.score(texts, judged, context=context) @ shares] if texts else []

        reward.__name__ = "moralguard_" + "_".join(value.id for value in judged)[:60]
        return reward
