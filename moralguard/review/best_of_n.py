"""best-of-n: several drafts, the one that keeps the values best."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from moralguard.decoding.records import Completion, Draft, ReviewRecord
from moralguard.review.base import ReviewMethod, stands

if TYPE_CHECKING:
    from moralguard.review.desk import Desk


class BestOfN(ReviewMethod):
    """n drafts of every continuation; the one with the highest P(v|y) stands (best-of-n, or rejection, sampling).

    The first draft is the one that would have come without the method; the others differ from it in the noise alone. An equal score
    leaves the earlier one. An empty draft breaks no value, so it stands only where all drafts are empty. Drafts that a control failed on or
    ``rollback`` refused aren't chosen; where the first is one of them, nothing is drawn in its place.

    Attributes:
        n: drafts a continuation; 1 switches the method off.
        choose: "min" compares the least P(v|y) over the values, "mean" the mean.
        temperature: of the drafts after the first where the request is greedy, which would write the same text n times.
    """

    method_name: ClassVar[str] = "best-of-n"
    stage: ClassVar[int] = 2
    n: Annotated[int, Field(ge=1)] = 4
    choose: Literal["min", "mean"] = "min"
    temperature: Annotated[float, Field(gt=0)] = 1.0

    @property
    def active(self) -> bool:
        return self.n > 1

    def run(self, desk: Desk, requests: Sequence[Completion]) -> None:
        others = [
            Completion(request.prompt_ids, request.return_index, attempt=attempt, source=request.source, review=ReviewRecord())
            for request in requests
            for attempt in range(1, self.n)
        ]
        desk.write(others, desk.drawn_again(self.temperature))
        for place, request in enumerate(requests):
            self._choose(desk, request, others[place * (self.n - 1) : (place + 1) * (self.n - 1)])

    def _choose(self, desk: Desk, request: Completion, others: Sequence[Completion]) -> None:
        record = request.review
        if record is None:
            return
        best, highest = request, self._rank(desk, record.drafts[record.standing])
        for other in others:
            if other.review is not None:
                record.drafts.extend(other.review.drafts)  # what a rollback took back
            if not stands(other):
                continue
            draft = Draft(self.method_name, desk.text(other), tuple(other.token_ids))
            record.drafts.append(draft)
            rank = self._rank(desk, draft)
            if rank > highest:
                best, highest, record.standing = other, rank, len(record.drafts) - 1
        request.token_ids, request.text, request.trace = best.token_ids, best.text, best.trace
        request.finish_reason = best.finish_reason

    def _rank(self, desk: Desk, draft: Draft) -> tuple[bool, float]:
        scores = desk.judged(draft).values()
        return bool(draft.text.strip()), min(scores) if self.choose == "min" else fmean(scores)
