"""Rows for open-domain relevance: whether a text mentions a thing can be read off the text, for any thing.

They teach that a statement is read word by word (what is at stake, and whether it is demanded or forbidden), for values of which no
labelled data exist.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from moralguard.fitting.rows import Row

_WORD = re.compile(r"[a-z]{5,14}")
_FORBIDDEN = (
    "The text does not mention {}.",
    "no mention of {}",
    "The text never talks about {}.",
    "Do not write about {}.",
    "The text avoids the subject of {}.",
)
_DEMANDED = ("The text mentions {}.", "The text is about {}.", "The reply speaks of {}.", "{} is mentioned")


def open_rows(texts: Sequence[str], count: int, seed: int = 0) -> list[Row]:
    """``count`` rows about single words of ``texts``, half of them about a word that the text doesn't hold."""
    chooser = random.Random(seed)
    found = [(text, _WORD.findall(text.lower())) for text in texts]
    found = [(text, words) for text, words in found if words]
    rows = []
    for _ in range(count if found else 0):
        text, words = chooser.choice(found)
        present = chooser.random() < 0.5
        word = chooser.choice(words) if present else chooser.choice(chooser.choice(found)[1])
        present = word in text.lower()
        demanded = chooser.random() < 0.4
        statement = chooser.choice(_DEMANDED if demanded else _FORBIDDEN).format(word)
        relevance = 1.0 if demanded else float(present)
        rows.append(Row(text, "mention", float(present == demanded), statement, relevance, source="open"))
    return rows
