"""rollback: when a text goes wrong while it is written, take its newest tokens back and draw them again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from moralguard.decoding.loop import FLAGGED
from moralguard.decoding.records import Completion, Draft
from moralguard.decoding.settings import DecodingSettings
from moralguard.review.base import ReviewMethod
from moralguard.review.refusals import refuse
from moralguard.text_stream import TextStream

if TYPE_CHECKING:
    from moralguard.review.desk import Desk


class Rollback(ReviewMethod):
    """Rollback and retry: P(v | text so far) is read at every token; low twice in a row, the end of the text is taken back.

    The backtracking of Zhang et al. 2024, "Backtracking improves generation safety" (arXiv 2409.14586), without its training: the
    discriminator, and not the model, says when. A text goes back to ``max_rollback`` tokens before the farthest point it ever reached, so
    that a stream need hold back no more than that. The kept tokens are read again one by one, so that every control sees what it saw;
    what is drawn behind them differs in its noise by the number of the retry.

    Attributes:
        max_rollback: tokens to take back at most; 0 switches the method off.
        max_retries: how often, for one draft.
        min_probability: P(v|y) under which a position is flagged; each value's own threshold where none is given.
        consecutive: positions in a row that must be flagged; half-written words and phrases look worse than they turn out.
        temperature: of the retries where the request is greedy, which would write the same text again.
        on_exhausted: what happens where the last retry is flagged as well: "closed" refuses, "open" lets it go on unwatched.
        refusal: the sentence; the prompt's script chooses one where none is given.
    """

    method_name: ClassVar[str] = "rollback"
    stage: ClassVar[int] = 1
    whole_text: ClassVar[bool] = False
    max_rollback: Annotated[int, Field(ge=0)] = 16
    max_retries: Annotated[int, Field(ge=0)] = 3
    min_probability: Annotated[float, Field(ge=0, le=1)] | None = None
    consecutive: Annotated[int, Field(ge=1)] = 2
    temperature: Annotated[float, Field(gt=0)] = 1.0
    on_exhausted: Literal["closed", "open"] = "closed"
    refusal: Annotated[str, Field(min_length=1)] | None = None

    @property
    def active(self) -> bool:
        return self.max_rollback > 0

    def run(self, desk: Desk, requests: Sequence[Completion]) -> None:
        """Nothing is left to do: it acts while drafts are written (``write_and_roll_back``)."""


class PrefixReader:
    """Reads one draft token by token, and goes back with it.

    Args:
        scorer: a ``TextPrefixScorer``.
    """

    def __init__(self, scorer: Any, tokenizer: Any):
        self._scorer, self._tokenizer = scorer, tokenizer
        self._states = [scorer.start()]  # after 0, 1, ... tokens
        self._text = TextStream(tokenizer)

    def flagged(self, token: int) -> bool:
        """Whether the text with this token behind it has gone wrong."""
        piece = self._text.push(token)
        state = self._states[-1]
        # no new text (half a character, a special token) is no new position
        self._states.append(self._scorer.extend(state, piece) if piece else state)
        return bool(self._states[-1].flagged.any())

    @property
    def probabilities(self) -> list[float]:
        """P(v|y) of the text so far, by value."""
        return [float(p) for p in self._states[-1].probability]

    def go_back(self, kept: Sequence[int]) -> None:
        """Forget all but the first tokens, which are these."""
        del self._states[len(kept) + 1 :]
        self._text = TextStream(self._tokenizer)
        for token in kept:
            self._text.push(token)


def write_and_roll_back(
    desk: Desk, method: Rollback, requests: Sequence[Completion], settings: DecodingSettings
) -> Iterator[tuple[int, int]]:
    """Write drafts; yields (index, token id) of tokens that won't be taken back.

    Flagged requests leave the batch, and are run again together once it is over, with what they keep as given: their neighbours never
    notice.
    """
    scorer = desk.judge.prefixes(method.min_probability, method.consecutive)
    readers = [PrefixReader(scorer, desk.lm.tokenizer) for _ in requests]
    farthest, told = [0] * len(requests), [0] * len(requests)
    running = list(range(len(requests)))
    while running:
        batch = [requests[i] for i in running]

        def watch(pairs: Sequence[tuple[int, int]], running: list[int] = running) -> set[int]:
            return {place for place, token in pairs if _is_flagged(method, requests[running[place]], readers[running[place]], token)}

        for place, _ in desk.draw(batch, settings, watch):
            i = running[place]
            farthest[i] = max(farthest[i], len(requests[i].token_ids))
            while told[i] < min(farthest[i] - method.max_rollback, len(requests[i].token_ids)):
                yield i, requests[i].token_ids[told[i]]
                told[i] += 1
        flagged = [i for i in running if requests[i].finish_reason == FLAGGED]
        for i in (i for i in running if i not in flagged):
            for token in requests[i].token_ids[told[i] :]:
                yield i, token
        running = []
        for i in flagged:
            request = requests[i]
            scores = dict(zip(desk.statements, readers[i].probabilities, strict=True))
            draft = Draft(method.method_name, desk.decoded(request.token_ids), tuple(request.token_ids), scores)
            if request.review is not None:
                request.review.drafts.append(draft)
                request.review.standing = len(request.review.drafts) - 1
            if request.retry == method.max_retries:
                refuse(desk.lm, request, method.versioned_name(), method.refusal)
                continue
            request.kept = request.token_ids[: max(0, farthest[i] - method.max_rollback)]
            readers[i].go_back(request.kept)
            request.token_ids, request.trace, request.finish_reason, request.retry = [], [], "", request.retry + 1
            running.append(i)
        settings = settings if not settings.greedy else desk.drawn_again(method.temperature)


def _is_flagged(method: Rollback, request: Completion, reader: PrefixReader, token: int) -> bool:
    if len(request.token_ids) <= len(request.kept):  # it was read before
        return False
    if method.on_exhausted == "open" and request.retry == method.max_retries:
        return False
    return reader.flagged(token)
