"""Listed words against an oracle that looks at whole decoded texts: no path of tokens gets around the list, nothing else is removed."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from word_oracle import decoded, holds

from moralguard.controls.listed_words import ListedWords, Tail, fold, read

ENTRIES = ("ass", "kill yourself", "as", "傻逼", "étron", "straße", "a-b", "笨 蛋", "c++", "стоп", "ไอ้", "k", "ss x")
PIECES = [
    "ass", "Ass", " ASS", "assume", "ume", "cl", "as", "s", "a", "kill", " kill", "yourself", " your", "self", "  ", "\n", "\u3000", "\xa0",
    "傻", "逼", "傻逼了", "你", "étron", "É", "TRON", "tron", "stra", "ße", "SSE", "strasse", "a-", "b", "-", ".", "!", "c+", "+", "c++",
    "笨", "蛋", "СТОП", "стоп", "Ст", "оп", "ы", "ไอ้", "ก", "\u212a", "k", "ſ", "_", "7", "'s", "e\u0301", "\u0301", "x", " x", "’", "🙂",
]  # fmt: skip
END = 0


def vocabulary(random: Random) -> list[bytes]:
    """Every byte, and pieces of texts with listed words, cut anywhere, also inside characters."""
    pieces = [piece.encode() for piece in PIECES]
    joined = ["".join(random.choices(PIECES, k=3)).encode() for _ in range(60)]
    cut = [raw[random.randrange(len(raw)) :][: random.randint(1, 6)] for raw in joined + pieces * 2]
    return [b"", b"", *(bytes([i]) for i in range(256)), *pieces, *cut]


def tail_of(raw: bytes, reach: int, given: int = 0) -> Tail:
    text, pending = read(raw)
    return Tail(text[-reach - 1 :], pending, len(raw) - given > len(pending))


def walk(random: Random, listed: ListedWords, spellings: list[bytes], steps: int):
    """Adversarial texts: tokens that go on with some listed word are drawn far more often than others; yields (bytes, forbidden)."""
    raw = b""
    for _ in range(steps):
        mask = listed.finishing(tail_of(raw, listed.reach))
        yield raw, mask
        allowed = [i for i in range(2, len(spellings)) if not mask[i]]
        texts = [decoded(raw[-12:] + spellings[i])[-14:] for i in allowed]
        eager = [any(fold(e).startswith(t[-n:]) for e in ENTRIES for n in range(1, 8) if n < len(t)) for t in texts]
        raw += spellings[random.choices(allowed, [60 if e else 1 for e in eager])[0]]


@pytest.mark.parametrize("seed", range(3))
def test_a_token_is_removed_exactly_where_the_text_with_it_would_hold_a_listed_word(seed):
    random = Random(seed)
    spellings = vocabulary(random)
    listed = ListedWords([fold(e) for e in ENTRIES], spellings, frozenset({END}), unfinished=False)
    removed = 0
    for raw, mask in walk(random, listed, spellings, 30):
        assert not holds(decoded(raw), ENTRIES), raw
        wanted = np.array([bool(s) and holds(decoded(raw + s), ENTRIES) for s in spellings])
        different = np.flatnonzero(wanted != mask)
        assert not different.size, [(raw[-20:], spellings[i], bool(wanted[i])) for i in different[:5]]
        removed += int(mask.sum())
    assert removed > 100


def test_unfinished_words_are_decided_by_the_token_behind_them():
    open_words = 0
    for seed in range(3):
        random = Random(100 + seed)
        spellings = vocabulary(random)
        listed = ListedWords([fold(e) for e in ENTRIES], spellings, frozenset({END}), unfinished=True)
        for raw, mask in walk(random, listed, spellings, 30):
            assert not holds(decoded(raw), ENTRIES, ended=False), raw
            wanted = np.array([bool(s) and holds(decoded(raw + s), ENTRIES, ended=False) for s in spellings])
            wanted[END] = holds(decoded(raw), ENTRIES)
            different = np.flatnonzero(wanted != mask)
            assert not different.size, [(raw[-20:], spellings[i], bool(wanted[i])) for i in different[:5]]
            open_words += bool(wanted[END])
    assert open_words > 5


WRITTEN = (
    "ass", "aSS", "aß", "kill yourself", "KILL\u3000YOURSELF", "\u212aill \xa0 your\u017felf", "傻逼", "étron", "ÉTRON", "stra\u1e9ee",
    "STRASSE", "a-b", "笨\u3000\n蛋", "C++", "СтОП", "ไอ้", "\u017fs x",
)  # fmt: skip
"""Listed words as they may be written."""


@pytest.mark.parametrize("unfinished", [False, True])
@pytest.mark.parametrize("written", WRITTEN)
def test_wherever_a_listed_word_is_cut(written, unfinished):
    """At every byte of it, inside characters too, behind a boundary and behind a letter, with and without more in the token."""
    raw, found = written.encode(), 0
    rests = [
        raw[cut:] + more for cut in range(len(raw)) for more in (b"", b"!", b"e", "é".encode(), "é".encode()[:1], "傻".encode(), b" x")
    ]
    spellings = [b"", b"", *rests, *(b" " + rest for rest in rests), *("é".encode()[1:] + rest for rest in rests[:7])]
    listed = ListedWords([fold(e) for e in ENTRIES], spellings, frozenset({END}), unfinished)
    for before in (b"", b"x ", b"x", "é".encode(), "é".encode()[:1], "傻".encode(), b"-"):
        for cut in range(len(raw)):
            text = before + raw[:cut]
            if holds(decoded(text), ENTRIES, ended=not unfinished):
                continue  # never gets that far: a shorter listed word stands there
            mask = listed.finishing(tail_of(text, listed.reach))
            wanted = np.array([bool(s) and holds(decoded(text + s), ENTRIES, ended=not unfinished) for s in spellings])
            wanted[END] = unfinished and holds(decoded(text), ENTRIES)
            different = np.flatnonzero(wanted != mask)
            assert not different.size, [(text, spellings[i], bool(wanted[i])) for i in different[:5]]
            found += int(wanted.sum())
    assert found > 10


@pytest.mark.parametrize("unfinished", [False, True])
def test_what_the_prompt_holds_is_not_the_texts(unfinished):
    spellings = [b"", b"", b" stop", b"ume", b"s", b"!"]
    listed = ListedWords(["ass"], spellings, frozenset({END}), unfinished)

    def removed(prompt: bytes) -> list[int]:
        return np.flatnonzero(listed.finishing(tail_of(prompt, listed.reach, given=len(prompt)))).tolist()

    assert removed(b"you ass") == []
    assert removed(b"you as") == ([] if unfinished else [4])
    assert removed(b"clas") == []


def test_longer_words_stay_possible():
    spellings = [b"", b"", *(word.encode() for word in ("class", "cl", "ass", " assume", " ass", "ume", " assets", "as", "sume"))]
    strict = ListedWords(["ass"], spellings, frozenset({END}), unfinished=False)
    assert np.flatnonzero(strict.finishing(tail_of(b"the", 3))).tolist() == [6]
    assert np.flatnonzero(strict.finishing(tail_of(b"the cl", 3))).tolist() == [6]
    assert np.flatnonzero(strict.finishing(tail_of(b"the ", 3))).tolist() == [4, 6]
    waiting = ListedWords(["ass"], spellings, frozenset({END}), unfinished=True)
    assert not waiting.finishing(tail_of(b"the", 3)).any()
    assert np.flatnonzero(waiting.finishing(tail_of(b"the ass", 3))).tolist() == [END, 5, 6, 8]


def test_the_oracle_finds_words_and_leaves_longer_ones_alone():
    assert holds("you ass!", ENTRIES)
    assert holds("kill yourself", ENTRIES)
    assert holds("我傻逼了", ENTRIES)
    assert not holds("the class assumes", ENTRIES)
    assert not holds("you ass", ("ass",), ended=False)
