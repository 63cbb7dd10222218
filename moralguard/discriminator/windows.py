"""Texts longer than a model reads, as overlapping windows, and one reading made of them: the worst window decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from moralguard.discriminator.base import Reading
from moralguard.errors import DataError, ModelError

if TYPE_CHECKING:
    from torch import nn

Window = tuple[int, int]
MIN_ROOM = 8


def token_offsets(tokenizer: Any, text: str) -> list[Window]:
    """Characters [start, end) of each token of a text; of each character where the tokenizer (a slow one) tells no offsets."""
    if not getattr(tokenizer, "is_fast", False):
        return [(i, i + 1) for i in range(len(text))]
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return [(start, end) for start, end in found if end > start]


def split_texts(
    texts: Sequence[str], tokenizer: Any, lengths: Callable[[Sequence[str]], Sequence[int]], limit: int | None, room: int, asked: str
) -> list[list[Window]]:
    """Windows (characters [start, end)) of each text that a model reads whole; none for a text without any token.

    Neighbouring windows share a quarter of their tokens, so that what one cuts apart the other has in one piece.

    Args:
        lengths: tokens of the whole rows that texts become, what stands around them included.
        limit: tokens that the model reads at most, None for no limit.
        room: tokens that are left for the text.
        asked: what takes the rest, for the message.

    Raises:
        DataError: a text must be cut, but there is hardly any room for it.
    """
    spoken = [i for i, text in enumerate(texts) if text.strip()]
    found: list[list[Window]] = [[] for _ in texts]
    for i, length in zip(spoken, lengths([texts[i] for i in spoken]) if spoken else (), strict=True):
        if limit is None or length <= limit:
            found[i] = [(0, len(texts[i]))] if length else []
        elif room < MIN_ROOM:
            raise DataError(
                f"texts[{i}] must be read in windows of {limit} tokens, of which {asked} leave {max(room, 0)} for the text, and "
                f"{MIN_ROOM} are the least; shorten the context or the value's statement, or use a model that reads more"
            )
        else:
            found[i] = _windows(texts[i], token_offsets(tokenizer, texts[i]), lengths, limit, room)
    return found


def _windows(text: str, offsets: list[Window], lengths: Callable[[Sequence[str]], Sequence[int]], limit: int, room: int) -> list[Window]:
    while True:
        step = max(1, room - room // 4)
        firsts = [*range(0, max(1, len(offsets) - room), step), max(0, len(offsets) - room)]
        found = [(offsets[first][0], offsets[min(first + room, len(offsets)) - 1][1]) for first in dict.fromkeys(firsts)]
        found[-1] = (found[-1][0], len(text))
        excess = max(lengths([text[start:end] for start, end in found])) - limit
        if excess <= 0:
            return found
        if room == 1:
            raise ModelError(f"one token of a text makes a row {excess} tokens longer than the {limit} that the model reads")
        # a piece cut from its surroundings may fall into more tokens than it did inside them
        room = max(1, room - excess)


def worst_reading(windows: list[list[Window]], relevance: np.ndarray, valence: np.ndarray, path: str) -> Reading:
    """The reading of n texts against m values, of the windows' relevance and valence, float64 [sum of windows, m].

    Of each text and value the window with the least P(v|y) is kept; a text with no window breaks nothing.
    """
    size = (len(windows), relevance.shape[1])
    window = np.zeros((*size, 2), dtype=np.int64)
    counts = np.array([max(1, len(spans)) for spans in windows], dtype=np.int64)
    reading = Reading(np.zeros(size), np.ones(size), window, counts, [path if spans else "empty" for spans in windows])
    first = 0
    columns = np.arange(size[1])
    for i, spans in enumerate(windows):
        if not spans:
            continue
        own = slice(first, first := first + len(spans))
        worst = (relevance[own] * (1.0 - valence[own])).argmax(0)
        reading.relevance[i], reading.valence[i] = relevance[own][worst, columns], valence[own][worst, columns]
        reading.window[i] = np.array(spans, dtype=np.int64)[worst]
    return reading


def refuse_nan(rows: np.ndarray, windows: list[list[Window]], name: str) -> None:
    """Raise where a row [sum of windows, ...] isn't finite.

    Raises:
        ModelError: names the text.
    """
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=tuple(range(1, rows.ndim))))
    if len(bad):
        owner = np.repeat(np.arange(len(windows)), [len(spans) for spans in windows])[bad[0]]
        raise ModelError(
            f"{name} gave a number that isn't finite for texts[{owner}]; expected finite logits. Its weights may be damaged, or its "
            "precision too low: load it in float32"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout; every module's mode is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
