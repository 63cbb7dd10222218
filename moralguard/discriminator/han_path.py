"""Chinese texts, windows and value vectors, whichever library runs the character network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from moralguard.discriminator.paths import CACHED_VALUES, OVERLAP, LeastRecent, ReadingMode, Window, batches, chinese_wordings, is_han


class SentenceEncoder(Protocol):
    """What turns statements into the pre-trained model's sentence vectors."""

    def sentence_vectors(self, statements: Sequence[str]) -> np.ndarray:
        """float32 [n, d], length 1."""


class CharacterReader(Protocol):
    """A character network. Value vectors [1, d] are of its own kind; callers only keep them and hand them back."""

    limit: int
    """Characters that it reads at once."""

    def statement(self, worded: str) -> Any:
        """The vector of a statement in Chinese."""

    def sentence(self, vectors: np.ndarray) -> Any:
        """The vector of a statement in another script, of its sentence vector float32 [1, 384]."""

    def logits(self, texts: Sequence[str], vectors: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Relevance and broken logits, float64 [B, N]."""

    def features(self, texts: Sequence[str]) -> np.ndarray:
        """What an adaptation reads of each text, float64 [B, f]."""


class HanPath:
    """Chinese, by the character network; statements in other scripts go in as the encoder's sentence vectors."""

    name = "characters"

    def __init__(self, reader: CharacterReader, words: SentenceEncoder):
        self._reader = reader
        self._words = words
        self._values = LeastRecent(CACHED_VALUES)

    def cut(self, texts: Sequence[str]) -> list[list[Window]]:
        limit = self._reader.limit
        found = []
        for text in texts:
            starts = range(0, max(1, len(text) - 2 * OVERLAP), limit - 2 * OVERLAP) if len(text) > limit else (0,)
            found.append([Window(s, min(len(text), s + limit), text[s : s + limit]) for s in starts])
        return found

    def logits(
        self, windows: Sequence[Window], statements: Sequence[str], context: str, mode: ReadingMode
    ) -> tuple[np.ndarray, np.ndarray, str]:
        relevance = np.zeros((len(windows), len(statements)))
        broken = np.zeros_like(relevance)
        vectors = self._value_vectors(statements, context)
        for rows in batches([len(window.content) + 1 for window in windows]):
            relevance[rows], broken[rows] = self._reader.logits([windows[i].content for i in rows], vectors)
        return relevance, broken, "characters"

    def features(self, windows: Sequence[Window]) -> np.ndarray:
        return self._reader.features([window.content for window in windows])

    def _value_vectors(self, statements: Sequence[str], context: str) -> list[Any]:
        """A value vector [1, d] a statement; a context is read as the statement's first words."""
        found = []
        for statement in statements:
            statement = chinese_wordings().get(statement, statement)
            worded = f"{context}\uff1a{statement}" if context else statement
            vector = self._values.get(worded)
            if vector is None:
                reader = self._reader
                vector = reader.statement(worded) if is_han(worded) else reader.sentence(self._words.sentence_vectors([worded]))
                self._values.put(worded, vector)
            found.append(vector)
        return found
