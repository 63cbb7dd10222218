"""What a review method is: settings, and what it does to requests that have been written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from moralguard.decoding.records import CONTENT_FILTER, Completion
from moralguard.schema import StrictModel

if TYPE_CHECKING:
    from moralguard.review.desk import Desk


class ReviewMethod(StrictModel, ABC):
    """Settings of one method. Subclasses are pydantic models; policies name them as ``name@version``.

    Class attributes:
        method_name: the name in policies.
        version: grows when the meaning of saved settings changes.
        stage: where it stands among the methods; lower ones come first.
        whole_text: it needs the whole text before any of it may be shown.
    """

    method_name: ClassVar[str]
    version: ClassVar[int] = 1
    stage: ClassVar[int]
    whole_text: ClassVar[bool] = True

    @classmethod
    def versioned_name(cls) -> str:
        return f"{cls.method_name}@{cls.version}"

    @property
    @abstractmethod
    def active(self) -> bool:
        """False where its settings switch it off: it is left out entirely."""

    @abstractmethod
    def run(self, desk: Desk, requests: Sequence[Completion]) -> None:
        """Look at requests whose newest draft is written, and change what stands; those that ended otherwise are not among them."""


def stands(request: Completion) -> bool:
    """Whether a request holds a text that a method may look at: it neither failed nor was refused nor given up."""
    return request.finish_reason not in ("guard_error", CONTENT_FILTER, "cancelled")
