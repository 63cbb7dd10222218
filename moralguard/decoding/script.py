"""The language of a text, as far as its letters tell it."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Literal, get_args

Language = Literal["latin", "cyrillic", "arabic", "devanagari", "zh", "ja", "ko", "th", "el", "he"]
"""What a text is written in. A script that hardly any other language uses goes by its language's code: ``zh``, ``ja``, ``ko``, ``th``,
``el``, ``he``. The others go by the script's name, because letters don't tell English from French, nor Russian from Ukrainian."""

LANGUAGES: tuple[str, ...] = get_args(Language)

_SCRIPTS = {
    "LATIN": "latin",
    "CYRILLIC": "cyrillic",
    "ARABIC": "arabic",
    "DEVANAGARI": "devanagari",
    "CJK": "zh",
    "HIRAGANA": "kana",
    "KATAKANA": "kana",
    "KATAKANA-HIRAGANA": "kana",
    "HANGUL": "ko",
    "THAI": "th",
    "GREEK": "el",
    "HEBREW": "he",
}
_EAST_ASIAN = ("zh", "ja", "ko")
_WIDTHS = ("FULLWIDTH ", "HALFWIDTH ")
_LEAST_KANA = 0.1  # of the kana and ideographs of a Japanese text; a Chinese one may show a decorative "の"
# which script a language that goes by its script is written in, for the end of an error message
_WRITTEN_IN = {
    "latin": ("en", "fr", "de", "es", "pt", "it", "nl", "pl", "tr", "vi", "id", "sv"),
    "cyrillic": ("ru", "uk", "bg", "sr"),
    "arabic": ("ar", "fa", "ur"),
    "devanagari": ("hi", "mr", "ne"),
}


def language_of(text: str) -> Language | None:
    """What most letters of a text are written in; None where it has no letter of a script that ``Language`` names.

    An ideograph, a kana or a Hangul syllable stands for several letters and counts as two. A text that is mostly ideographs and kana is
    Japanese where a tenth of these are kana, and Chinese otherwise.
    """
    counts = Counter(script for letter in text if (script := _script(letter)) is not None)
    kana = counts.pop("kana", 0)
    east = counts["zh"] + kana
    if kana >= _LEAST_KANA * east and kana:
        counts["ja"] = east
        del counts["zh"]
    for name in _EAST_ASIAN:
        counts[name] *= 2
    known: list[Language] = [name for name in get_args(Language) if counts[name]]
    return max(known, key=lambda name: counts[name], default=None)


def why_not(name: str) -> str:
    """What to say instead of a name that isn't a ``Language``, for the end of an error message."""
    script = next((script for script, languages in _WRITTEN_IN.items() if name.lower() in languages), None)
    told = f"known: {', '.join(LANGUAGES)}"
    return told if script is None else f"letters alone don't tell it from others of its script: say {script!r} ({told})"


@lru_cache(maxsize=4096)
def _script(letter: str) -> str | None:
    if not letter.isalpha():
        return None
    name = unicodedata.name(letter, "")
    for width in _WIDTHS:
        name = name.removeprefix(width)
    return _SCRIPTS.get(name.split(" ", 1)[0])
