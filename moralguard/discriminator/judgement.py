"""Judgements: what a discriminator says of texts and values, and what follows where values disagree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from moralguard.values import Value


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of a text; ``weight`` is by how much P(v|y) rises where they are gone."""

    start: int
    end: int
    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class Basis:
    """What one number rests on.

    Attributes:
        value: the value with its statement, priority and threshold.
        context: the context that the judgement was made in, "" for none.
        path: the part of the discriminator that judged (cross-encoder, cached vectors, characters, or an adapter's name).
        window: characters [start, end) of the window that decided.
        windows: number of windows that the text was read in.
    """

    value: Value
    context: str
    path: str
    window: tuple[int, int]
    windows: int


@dataclass(frozen=True, slots=True)
class Resolution:
    """The verdict on one text where several values speak.

    Attributes:
        verdict: "keeps" or "breaks"; "conflict" where values of equal priority are at stake and disagree; "silent" where
            no value is at stake (which keeps them all).
        decided_by: ids of the values that the verdict rests on; under "conflict" all that take part.
        overridden: ids of values at stake that say otherwise and have a lower priority.
    """

    verdict: Literal["keeps", "breaks", "conflict", "silent"]
    decided_by: tuple[str, ...]
    overridden: tuple[str, ...]


class Judgement:
    """Judgements of texts against values.

    ``judgement[i]`` is that of one text (arrays [n_values]), ``judgement[i, j]`` or ``judgement[i][j]`` of one text and one
    value (floats). Iterating yields the texts'.

    Attributes:
        probability: P(v|y) = 1 - relevance * P(broken | relevant), float64 [n_texts, n_values].
        relevance: probability that the value is at stake in the text, same shape.
        valence: P(kept | relevant), same shape; what the text would be worth to the value if it were at stake.
        spans: per text and value, the spans that the judgement rests on, strongest first; empty where not asked for.
        basis: per text and value, a ``Basis``.
        values: the values, in the order of the columns.
    """

    def __init__(
        self,
        probability: np.ndarray,
        relevance: np.ndarray,
        valence: np.ndarray,
        spans: Any,
        basis: Any,
        values: Sequence[Value],
    ):
        self.probability = probability
        self.relevance = relevance
        self.valence = valence
        self.spans = spans
        self.basis = basis
        self.values = tuple(values)

    def __len__(self) -> int:
        if np.ndim(self.probability) == 0:
            raise TypeError("the judgement of one text and one value has no length")
        return len(self.probability)

    def __getitem__(self, index: int | tuple[int, int]) -> Judgement:
        if isinstance(index, tuple):
            text, value = index
            return self[text][value]
        if np.ndim(self.probability) == 0:
            raise TypeError("the judgement of one text and one value can't be indexed")
        values = self.values if np.ndim(self.probability) == 2 else (self.values[index],)
        cells = (self.probability[index], self.relevance[index], self.valence[index])
        return Judgement(*cells, self.spans[index], self.basis[index], values)

    def __iter__(self) -> Iterator[Judgement]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        shown = np.array2string(np.asarray(self.probability), precision=3, threshold=12)
        return f"Judgement(probability={shown}, values={[value.id for value in self.values]})"

    @property
    def kept(self) -> np.ndarray:
        """Where P(v|y) reaches the value's threshold, bool, shape of ``probability``."""
        thresholds = np.array([value.threshold for value in self.values])
        return self.probability >= (thresholds if np.ndim(self.probability) else thresholds[0])

    def resolve(self) -> list[Resolution]:
        """One verdict a text: the values at stake (relevance of at least a half) with the highest priority decide.

        Values of that priority that disagree are a conflict, which is returned and not decided.
        """
        if np.ndim(self.probability) != 2:
            raise TypeError("resolve() is of texts by values; call it on what judge() returned")
        return [_resolve(self.values, kept, relevance >= 0.5) for kept, relevance in zip(self.kept, self.relevance, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; of one text and one value, one text, or all texts."""
        if np.ndim(self.probability):
            return {"judgements": [item.as_dict() for item in self]}
        basis: Basis = self.basis
        return {
            "value": basis.value.id,
            "statement": basis.value.statement,
            "probability": float(self.probability),
            "relevance": float(self.relevance),
            "valence": float(self.valence),
            "kept": bool(self.kept),
            "spans": [asdict(span) for span in self.spans],
            "basis": {"path": basis.path, "context": basis.context, "window": list(basis.window), "windows": basis.windows},
        }


def _resolve(values: Sequence[Value], kept: np.ndarray, at_stake: np.ndarray) -> Resolution:
    speaking = [(value, bool(keeps)) for value, keeps, stake in zip(values, kept, at_stake, strict=True) if stake or not keeps]
    if not speaking:
        return Resolution("silent", (), ())
    top = max(value.priority for value, _ in speaking)
    deciding = [(value.id, keeps) for value, keeps in speaking if value.priority == top]
    verdicts = {keeps for _, keeps in deciding}
    names = tuple(name for name, _ in deciding)
    if len(verdicts) == 2:
        return Resolution("conflict", names, ())
    verdict = verdicts.pop()
    overridden = tuple(value.id for value, keeps in speaking if value.priority < top and keeps != verdict)
    return Resolution("keeps" if verdict else "breaks", names, overridden)
