"""final-check: a finished text that breaks a value isn't handed out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from moralguard.decoding.records import Completion
from moralguard.review.base import ReviewMethod
from moralguard.review.refusals import refuse

if TYPE_CHECKING:
    from moralguard.review.desk import Desk


class FinalCheck(ReviewMethod):
    """A text whose P(v|y) is below ``min_probability`` for any of the policy's values is replaced by a refusal.

    An output filter; no single paper's. The continuation alone is judged, not the prompt.

    Attributes:
        min_probability: P(v|y) under which a text is refused; 0 switches the method off. 0.5 is where the shipped discriminator is
            calibrated.
        refusal: the sentence; the prompt's script chooses one where none is given.
    """

    method_name: ClassVar[str] = "final-check"
    stage: ClassVar[int] = 4
    min_probability: Annotated[float, Field(ge=0, le=1)] = 0.5
    refusal: Annotated[str, Field(min_length=1)] | None = None

    @property
    def active(self) -> bool:
        return self.min_probability > 0

    def run(self, desk: Desk, requests: Sequence[Completion]) -> None:
        for request in requests:
            if min(desk.standing(request).values()) < self.min_probability:
                refuse(desk.lm, request, self.versioned_name(), self.refusal)
