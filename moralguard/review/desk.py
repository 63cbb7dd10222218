"""Where a review works: something that writes drafts, and something that judges them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from moralguard.decoding.loop import LoopContext, Watch, decode
from moralguard.decoding.passes import check_passes_fit
from moralguard.decoding.records import Completion, Draft, ReviewRecord
from moralguard.decoding.settings import DecodingSettings
from moralguard.review.base import ReviewMethod, stands
from moralguard.review.rollback import Rollback, write_and_roll_back


class Judge(Protocol):
    """P(v|y) by the policy's values."""

    def score(self, text: str) -> np.ndarray:
        """float64 [values] of one text. Texts are judged one by one: in a batch the last bits would depend on the neighbours."""

    def prefixes(self, min_probability: float | None, consecutive: int) -> Any:
        """A ``discriminator.prefix.TextPrefixScorer``; ``min_probability`` in place of the values' own thresholds, where given."""


@dataclass
class Desk(ABC):
    """One review of one batch.

    Attributes:
        lm: the model, with a tokenizer. statements: the policy's values, id -> statement.
        settings: how the request's own draft is drawn.
        methods: the active methods, in order.
    """

    lm: Any
    statements: dict[str, str]
    judge: Judge
    settings: DecodingSettings
    methods: tuple[ReviewMethod, ...]
    _scores: dict[str, dict[str, float]] = field(default_factory=dict, repr=False)

    @abstractmethod
    def draw(self, requests: Sequence[Completion], settings: DecodingSettings, watch: Watch | None) -> Iterator[tuple[int, int]]:
        """Run requests to their end under the guard, as ``decoding.loop.decode`` does; yields (index, token id)."""

    @abstractmethod
    def check_fits(self, ids: Sequence[int]) -> None:
        """Raises PromptError where a pass has no room for this prompt."""

    def drawn_again(self, temperature: float) -> DecodingSettings:
        """How further drafts are drawn: as the first, but where that one is greedy, at this temperature."""
        return self.settings.replaced(do_sample=True, temperature=temperature) if self.settings.greedy else self.settings

    def written(
        self, requests: Sequence[Completion], settings: DecodingSettings | None = None, *, watched: bool = True
    ) -> Iterator[tuple[int, int]]:
        """Write drafts; yields (index, token id) of tokens that won't be taken back.

        Args:
            watched: under the policy's rollback, if it has one.
        """
        rollback = next((method for method in self.methods if isinstance(method, Rollback)), None)
        settings = settings or self.settings
        if rollback is None or not watched:
            yield from self.draw(requests, settings, None)
        else:
            yield from write_and_roll_back(self, rollback, requests, settings)

    def write(self, requests: Sequence[Completion], settings: DecodingSettings | None = None, *, watched: bool = True) -> None:
        for _ in self.written(requests, settings, watched=watched):
            pass

    def text(self, request: Completion) -> str:
        return self.decoded(request.token_ids) if request.text is None else request.text

    def decoded(self, ids: Sequence[int]) -> str:
        return str(self.lm.tokenizer.decode(list(ids), skip_special_tokens=True))

    def scores(self, text: str) -> dict[str, float]:
        """P(v|y) by value id; a text is judged once."""
        if text not in self._scores:
            self._scores[text] = dict(zip(self.statements, (float(p) for p in self.judge.score(text)), strict=True))
        return self._scores[text]

    def standing(self, request: Completion) -> dict[str, float]:
        """P(v|y) by value id of the draft that stands for a request under review."""
        if request.review is None:
            raise RuntimeError("only a request under review has a draft that stands")
        return self.judged(request.review.drafts[request.review.standing])

    def judged(self, draft: Draft) -> dict[str, float]:
        """P(v|y) by value id of a draft, which keeps them."""
        draft.scores = self.scores(draft.text)
        return draft.scores

    def review(self, requests: Sequence[Completion]) -> Iterator[tuple[int, int]]:
        """Write requests and run the methods over them; yields (index, token id) as the first drafts are written.

        Which of these tokens stand is known at the end only, except where ``rollback`` is the only method.
        """
        while_written = [method.versioned_name() for method in self.methods if not method.whole_text]
        for request in requests:
            request.review = ReviewRecord(methods=list(while_written))
        yield from self.written(requests)
        for request in requests:
            if request.review is not None and request.finish_reason != "cancelled" and not request.review.refused:
                request.review.drafts.append(Draft("draft", self.text(request), tuple(request.token_ids)))
                request.review.standing = len(request.review.drafts) - 1
        for method in (method for method in self.methods if method.whole_text):
            open_ones = [request for request in requests if stands(request)]
            for request in open_ones:
                if request.review is not None:
                    request.review.methods.append(method.versioned_name())
            method.run(self, open_ones)


@dataclass
class LoopDesk(Desk):
    """A desk whose drafts come from the guard's own decode loop, ``settings.batch_size`` side by side.

    Attributes:
        context: of the loop; its settings are replaced by those of each draft.
    """

    context: LoopContext = field(kw_only=True)

    def check_fits(self, ids: Sequence[int]) -> None:
        check_passes_fit([item for control in self.context.controls for item in control.passes], ids, "the model's own critique")

    def draw(self, requests: Sequence[Completion], settings: DecodingSettings, watch: Watch | None) -> Iterator[tuple[int, int]]:
        context = replace(self.context, settings=settings)
        for start in range(0, len(requests), settings.batch_size):
            for index, token in decode(context, requests[start : start + settings.batch_size], _shifted(watch, start)):
                yield start + index, token


def _shifted(watch: Watch | None, start: int) -> Watch | None:
    """A watch of all requests, for the part that begins at ``start``."""
    if watch is None:
        return None
    return lambda pairs: {index - start for index in watch([(start + index, token) for index, token in pairs])}
