"""What scoring found of one text, free of the arrays it came in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moralguard.cli.texts import TextRow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moralguard.discriminator.base import BaseDiscriminator
    from moralguard.values import Value


@dataclass(frozen=True, slots=True)
class ScoredText:
    """A text's scores.

    Attributes:
        row: the text and where it came from.
        scores: P(v|y) by value id.
        broken: ids of the values whose threshold isn't reached.
        verdict: "keeps", "breaks", "conflict" or "silent", as ``Judgement.resolve`` gives it.
        explanation: per value, what ``Judgement.as_dict`` says of it; None where not asked for.
    """

    row: TextRow
    scores: dict[str, float]
    broken: tuple[str, ...]
    verdict: str
    explanation: list[dict[str, Any]] | None


def score_chunk(
    discriminator: BaseDiscriminator, rows: Sequence[TextRow], values: Sequence[Value], context: str | None, spans_method: str | None
) -> list[ScoredText]:
    """Scores of some texts, with spans where a method is named."""
    texts = [row.text for row in rows]
    if spans_method is None:
        judgement = discriminator.judge(texts, values, context)
    else:
        judgement = discriminator.judge(
            texts, values, context, spans=True, method="gradient" if spans_method == "gradient" else "occlusion"
        )
    verdicts = judgement.resolve()
    kept = judgement.kept
    return [
        ScoredText(
            row=row,
            scores={value.id: float(judgement.probability[i, j]) for j, value in enumerate(values)},
            broken=tuple(value.id for j, value in enumerate(values) if not kept[i, j]),
            verdict=verdicts[i].verdict,
            explanation=None if spans_method is None else judgement[i].as_dict()["judgements"],
        )
        for i, row in enumerate(rows)
    ]
