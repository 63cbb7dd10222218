"""How the built-in discriminator reads a window of text: one path a script, each giving relevance and broken logits.

A text is read in windows; each path says how it cuts them and what it makes of them. English: ``torch_paths.WordPath``, and
``onnx_path.OnnxPath`` without torch; Chinese: ``han_path.HanPath`` over the character network in torch or NumPy.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

import numpy as np

from moralguard.discriminator.inputs import known_values
from moralguard.discriminator.tokens import WordPieces

WINDOW = 96  # tokens, or characters of Chinese times two
OVERLAP = 24
_TOKENS_A_BATCH = 4096
PAIRS_A_BATCH = 8192  # texts times values whose features are held at once, some 50 MB
CACHED_VALUES = 4096

ReadingMode = Literal["cached", "cross"]


@dataclass(frozen=True, slots=True)
class Window:
    """Characters [start, end) of a text, and what its path made of them."""

    start: int
    end: int
    content: Any


class Path(Protocol):
    """A way to read text."""

    name: str

    def cut(self, texts: Sequence[str]) -> list[list[Window]]:
        """Each text's windows, at least one."""

    def logits(
        self, windows: Sequence[Window], statements: Sequence[str], context: str, mode: ReadingMode
    ) -> tuple[np.ndarray, np.ndarray, str]:
        """Relevance and broken logits, float64 [n_windows, n_values], and the calibration that they need."""

    def features(self, windows: Sequence[Window]) -> np.ndarray:
        """What an adaptation reads of each window, float64 [n_windows, f]."""


class LeastRecent:
    """A bounded mapping that several threads may use."""

    def __init__(self, size: int):
        self._size = size
        self._items: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Any:
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
            return self._items.get(key)

    def put(self, key: Hashable, item: Any) -> None:
        with self._lock:
            self._items[key] = item
            while len(self._items) > self._size:
                self._items.popitem(last=False)


def batches(lengths: Sequence[int], tokens: int = _TOKENS_A_BATCH) -> Iterator[list[int]]:
    """Indices in batches of similar length, each of at most ``tokens`` tokens with its padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def cut_by_pieces(pieces: WordPieces, texts: Sequence[str]) -> list[list[Window]]:
    """Windows of word pieces; a window's content is (ids, offsets)."""
    found = []
    for text, (ids, offsets) in zip(texts, pieces.pieces(texts), strict=True):
        starts = range(0, max(1, len(ids) - OVERLAP), WINDOW - OVERLAP) if len(ids) > WINDOW else (0,)
        windows = []
        for start in starts:
            part = offsets[start : start + WINDOW]
            windows.append(Window(part[0][0] if part else 0, part[-1][1] if part else len(text), (ids[start : start + WINDOW], part)))
        found.append(windows)
    return found


@cache
def chinese_wordings() -> dict[str, str]:
    """The Chinese statement of each known value's English one."""
    return {item["en"]: item["zh"] for item in known_values().values() if "zh" in item}


def is_han(text: str) -> bool:
    """Whether a text is for the character path: at least three in ten of its letters are Chinese characters or kana."""
    letters = han = 0
    for character in text[:2000]:
        if character.isalpha():
            letters += 1
            han += "\u3400" <= character <= "\u9fff" or "\u3040" <= character <= "\u30ff" or "\uf900" <= character <= "\ufaff"
    return letters > 0 and han >= 0.3 * letters
