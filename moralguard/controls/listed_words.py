"""Which tokens finish a listed word, given the text before them: the rules of ``word_list`` without any model.

Texts are compared folded: case (Unicode's full case folding) and the kind and amount of white space don't matter. A word is listed as
a whole: where it begins, and where it ends, no two characters of one spaced word may meet. A spaced word is made of letters, digits,
marks and "_" of scripts that put spaces between words; next to a character of any other script (Chinese, Japanese, Thai, Lao, Khmer,
Burmese) or of none there is always a boundary.

Tokens may cut characters. Their bytes are read as UTF-8 with lone surrogates for what is no whole character (one a byte), so that the
bytes that a text still waits for and those that a token brings are compared like letters.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Ids = NDArray[np.int64]

_SPACE = re.compile(r"\s+")
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff]"
)
_LONGEST_FOLD = 3  # characters that one character becomes at most when its case is folded
# Characters with a case lie under this one.
_LAST_CASED = 0x1F000


def fold(text: str) -> str:
    """A text as it is compared: case folded, white space as single spaces."""
    return _SPACE.sub(" ", text).casefold()


@lru_cache(maxsize=1 << 16)
def spaced(character: str) -> bool:
    """Whether it is of a word that spaces set apart: "a", "é" and "7", but not "-", "猫" or a lone byte."""
    wordy = character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")
    return wordy and not _UNSPACED.match(character)


def read(raw: bytes) -> tuple[str, str]:
    """(folded text, the bytes at its end that a character may still come of, as lone surrogates)."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text = decoder.decode(raw)
    return fold(text), _as_surrogates(decoder.getstate()[0])


def _as_surrogates(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


@cache
def _encodings(folded: str) -> tuple[bytes, ...]:
    """UTF-8 of every character of several bytes that folds to this."""
    if folded == " ":
        return tuple(chr(i).encode() for i in range(0x80, 0x3001) if chr(i).isspace())
    table = _unfolded()
    own = (folded,) if len(folded) == 1 and ord(folded) >= 0x80 else ()
    return tuple(character.encode() for character in {*own, *table.get(folded, ())})


@cache
def _unfolded() -> dict[str, list[str]]:
    """Folded text -> the characters of several bytes that fold to it and are another."""
    found: dict[str, list[str]] = {}
    for code in range(0x80, _LAST_CASED):
        folded = chr(code).casefold()
        if folded != chr(code):
            found.setdefault(folded, []).append(chr(code))
    return found


def _cuts(entry: str) -> Iterator[tuple[str, str]]:
    """Every way in which a text can end in the beginning of an entry and a token begin with the rest: (end, beginning)."""
    for i in range(1, len(entry)):
        yield entry[:i], entry[i:]
        if entry[i - 1] == " ":  # more white space, which the text and the token together fold to one
            yield entry[:i], " " + entry[i:]
    for i in range(len(entry)):
        for length in range(1, min(_LONGEST_FOLD, len(entry) - i) + 1):
            for raw in _encodings(entry[i : i + length]):
                for cut in range(1, len(raw)):
                    ends = [entry[:i] + _as_surrogates(raw[:cut])]
                    begins = [_as_surrogates(raw[cut:]) + entry[i + length :]]
                    if entry[i] == " ":
                        ends.append(entry[:i] + " " + _as_surrogates(raw[:cut]))
                        begins.append(_as_surrogates(raw[cut:]) + " " + entry[i + length :])
                    yield from ((end, begin) for end in ends for begin in begins)


@dataclass(frozen=True)
class Tail:
    """The end of a text, at least as long as ``ListedWords.reach`` plus one character where the text is.

    Attributes:
        text: folded. pending: bytes behind it that no character has come of yet, as lone surrogates.
        own: the last character of ``text`` was generated, not given.
    """

    text: str
    pending: str = ""
    own: bool = True


class ListedWords:
    """Listed words against one vocabulary; immutable.

    Args:
        entries: folded words and phrases, none empty.
        spellings: bytes of every token id; empty for tokens that show nothing.
        ends: ids that end the text.
        unfinished: a word that ends where the text ends isn't finished yet: the next token may make another word of it.

    Attributes:
        reach: characters of the text that matter, beside the one before them.
    """

    def __init__(self, entries: Sequence[str], spellings: Sequence[bytes], ends: frozenset[int], unfinished: bool):
        self._unfinished = unfinished
        self._entries = frozenset(entries)
        self._by_first: dict[str, list[str]] = {}
        for entry in sorted(self._entries):
            self._by_first.setdefault(entry[0], []).append(entry)
        self._texts = ["".join(read(raw)) for raw in spellings]
        # tokens whose first bytes may end a character that the text before them began
        self._continuing = [i for i, text in enumerate(self._texts) if "\udc80" <= text[:1] <= "\udcbf"]
        # whether the character before is of a spaced word -> tokens that hold a whole listed word
        self._whole = {before: np.array([self._holds(text, before) for text in self._texts], dtype=bool) for before in (False, True)}
        self._rest = self._rests()
        self._lengths = sorted({len(entry) for entry in self._entries if spaced(entry[-1])})
        self.reach = max(map(len, [*self._rest, *self._entries]))
        # tokens that don't go on with a word; where the character that they begin isn't whole it may be none of a word
        self._ending = np.array([not spaced(text[0]) if text else i in ends for i, text in enumerate(self._texts)], dtype=bool)

    def finishing(self, tail: Tail) -> Mask:
        """bool[V], the tokens behind this text with which it would hold a listed word that it doesn't hold yet."""
        text = tail.text + tail.pending
        mask = self._whole[_spaced_at(text, len(text) - 1)].copy()
        if tail.pending:
            before = _spaced_at(tail.text, len(tail.text) - 1)
            for token in self._continuing:
                whole = read((tail.pending + self._texts[token]).encode("utf-8", "surrogateescape"))
                mask[token] = self._holds("".join(whole), before)
        for length in range(1, min(self.reach, len(text)) + 1):
            tokens = self._rest.get(text[-length:])
            if tokens is not None:
                mask[tokens[_spaced_at(text, len(text) - length - 1)]] = True
        if self._unfinished and tail.own and self._ends_in_entry(tail.text):
            mask |= self._ending
        return mask

    def _holds(self, text: str, before: bool) -> bool:
        """Whether a text holds a finished listed word; ``before``: the character before it is of a spaced word."""
        for start, first in enumerate(text):
            if first in self._by_first and not (spaced(first) and (_spaced_at(text, start - 1) if start else before)):
                found = (entry for entry in self._by_first[first] if text.startswith(entry, start))
                if any(self._finished(text, start + len(entry), entry[-1]) for entry in found):
                    return True
        return False

    def _rests(self) -> dict[str, dict[bool, Ids]]:
        """End of a text -> whether the character before that end is of a spaced word -> tokens that bring the rest of an entry."""
        shown = sorted((text, i) for i, text in enumerate(self._texts) if text)
        found: dict[str, dict[bool, list[int]]] = {}
        for entry in self._entries:
            for end, begin in _cuts(entry):
                first, last = bisect_left(shown, (begin, -1)), bisect_left(shown, (begin + chr(0x10FFFF), -1))
                tokens = [i for text, i in shown[first:last] if self._finished(text, len(begin), entry[-1])]
                if tokens:
                    known = found.setdefault(end, {False: [], True: []})
                    known[False] += tokens
                    known[True] += [] if spaced(entry[0]) else tokens
        return {end: {before: np.array(ids, dtype=np.int64) for before, ids in tokens.items()} for end, tokens in found.items()}

    def _finished(self, text: str, end: int, last: str) -> bool:
        """Whether an entry that ends in the character ``last`` before ``end`` of a token is whole whatever comes behind the token."""
        if not spaced(last):
            return True
        return not spaced(text[end]) if end < len(text) else not self._unfinished

    def _ends_in_entry(self, text: str) -> bool:
        for length in self._lengths:
            entry = text[-length:]
            if entry in self._entries and not (spaced(entry[0]) and _spaced_at(text, len(text) - length - 1)):
                return True
        return False


def _spaced_at(text: str, place: int) -> bool:
    """Whether the character there is of a spaced word; before the beginning there is none."""
    return place >= 0 and spaced(text[place])
