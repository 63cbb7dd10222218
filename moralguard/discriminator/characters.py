"""Reading text as characters: sizes of the character network, and hashed n-grams of a normalised text as its input.

No character is unknown (emoji and Latin are hashed too). Position 0 of a row is a start mark, so that an empty text has a position
as well. L positions, G = n-gram orders.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ORDERS = 3  # n-grams of 1, 2 and 3 characters
BAG_ORDERS = 2  # trigrams made the bag worse on COLD's dev rows (.891 against .893)
START = 0x110000  # above every code point: no text can contain the start mark
_STRIDES = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class CharacterConfig:
    """Sizes of a `CharacterPath`; the hash tables' sizes are the numbers of buckets."""

    characters: int = 8192
    bigrams: int = 32768
    bag: int = 131072
    character_width: int = 64
    bigram_width: int = 24
    bag_width: int = 4
    width: int = 96
    lexical_width: int = 32
    blocks: int = 2
    sentence_width: int = 384
    max_characters: int = 256
    dropout: float = 0.2


def normalise(text: str, limit: int | None = None) -> tuple[str, list[tuple[int, int]]]:
    """NFKC, lower case, runs of white space as one space; with each character's (start, end) in ``text``. At most ``limit`` characters."""
    characters: list[str] = []
    offsets: list[tuple[int, int]] = []
    start = 0
    while start < len(text) and (limit is None or len(characters) < limit):
        end = start + 1
        # A mark belongs to the character before it: normalised alone, "e" + U+0301 would not become "é".
        while end < len(text) and unicodedata.combining(text[end]) and end - start < 8:
            end += 1
        for character in unicodedata.normalize("NFKC", text[start:end]).lower():
            if character.isspace():
                if not characters or characters[-1] == " ":
                    continue
                character = " "
            characters.append(character)
            offsets.append((start, end))
        start = end
    if characters and characters[-1] == " ":
        characters.pop()
        offsets.pop()
    kept = len(characters) if limit is None else min(limit, len(characters))
    return "".join(characters[:kept]), offsets[:kept]


def hash_ngrams(text: str) -> np.ndarray:
    """Fixed hashes of the n-grams that start at each position of a normalised text: int64 [1 + len(text), G]; 0 where none fits.

    Python's own ``hash`` differs from run to run, so weights fitted on it would mean nothing in the next one.
    """
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64) + np.uint64(1)
    points = np.concatenate([np.array([START + 1], dtype=np.uint64), points])
    hashes = np.zeros((len(points), ORDERS), dtype=np.int64)
    rolling = np.zeros(len(points), dtype=np.uint64)
    for order in range(ORDERS):
        fit = len(points) - order
        if fit <= 0:
            break
        rolling = rolling[:fit] + points[order:] * _STRIDES[order]  # uint64 wraps around
        mixed = rolling ^ (rolling >> np.uint64(29))
        mixed = (mixed * np.uint64(0xBF58476D1CE4E5B9)) ^ np.uint64(order * 0x51ED27)
        # 31 bits, never 0: 0 stands for "no n-gram here".
        hashes[:fit, order] = (mixed >> np.uint64(33)).astype(np.int64) | np.int64(1 << 31)
    return hashes


def pad_hashes(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Hash arrays [L_i, G] as ``ids`` int64 [B, L, G], 0 where nothing is, and ``mask`` bool [B, L]."""
    length = max((len(array) for array in arrays), default=1)
    ids = np.zeros((len(arrays), length, ORDERS), dtype=np.int64)
    mask = np.zeros((len(arrays), length), dtype=np.bool_)
    for row, array in enumerate(arrays):
        ids[row, : len(array)] = array
        mask[row, : len(array)] = True
    return ids, mask


def hash_texts(texts: Sequence[str], max_characters: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts as ``pad_hashes`` gives them; what lies beyond ``max_characters`` of a text is left out."""
    return pad_hashes([hash_ngrams(normalise(text, max_characters)[0]) for text in texts])
