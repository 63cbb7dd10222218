"""Listed words in a whole text, found the slow way: by looking at every place, with no token in sight."""

from __future__ import annotations

import re
import unicodedata


def unspaced(character: str) -> bool:
    """Of a script without spaces between words, by its Unicode name."""
    names = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "IDEOGRAPHIC", "BOPOMOFO", "HALFWIDTH KATAKANA")
    return unicodedata.name(character, "").startswith(names)


def one_word(a: str, b: str) -> bool:
    """Whether two characters that meet are of one word."""
    return all((c.isalnum() or c == "_" or unicodedata.category(c)[0] == "M") and not unspaced(c) for c in (a, b))


def holds(text: str, entries: tuple[str, ...], ended: bool = True, behind: int = 0) -> bool:
    """Whether a folded text holds an entry as a whole word; ``ended``: the end of the text ends a word, otherwise it doesn't yet.

    Only those that end behind the first ``behind`` characters count.
    """
    for entry in (re.sub(r"\s+", " ", entry).casefold() for entry in entries):
        start = text.find(entry)
        while start >= 0:
            end = start + len(entry)
            left = start == 0 or not one_word(text[start - 1], text[start])
            following = text[end : end + 1] or ("." if ended else "a")
            if left and end > behind and not one_word(text[end - 1], following):
                return True
            start = text.find(entry, start + 1)
    return False


def decoded(raw: bytes) -> str:
    """Folded; what is no whole character counts as a broken one, which is no letter."""
    return re.sub(r"\s+", " ", raw.decode("utf-8", "replace")).casefold()
