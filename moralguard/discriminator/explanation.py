"""Which span a judgement rests on: occlusion, and what is shared with the gradient form."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from moralguard.discriminator.judgement import Span

_UNIT = re.compile(r"[\u3400-\u9fff\u3040-\u30ff]|[^\s\u3400-\u9fff\u3040-\u30ff]+")
_MOST_UNITS = 120
_SPANS = 5


def units(text: str, window: tuple[int, int]) -> list[tuple[int, int]]:
    """Words (single characters in Chinese) of a window as [start, end); neighbours are joined where there are very many."""
    found = [m.span() for m in _UNIT.finditer(text, window[0], window[1])]
    joined = -(-len(found) // _MOST_UNITS)
    return [(group[0][0], group[-1][1]) for group in (found[i : i + joined] for i in range(0, len(found), max(1, joined)))]


def occlusion_spans(probability: Callable[[list[str]], np.ndarray], text: str, window: tuple[int, int]) -> tuple[Span, ...]:
    """Spans whose removal raises P(v|y) most, strongest first.

    Every word of the window is left out in turn, then every run of two and three words, so that a phrase is found where no word
    alone carries it. Zeiler & Fergus 2014 (arXiv 1311.2901); Li et al. 2016 (arXiv 1612.08220).

    Args:
        probability: P(v|y) of texts.
        window: characters [start, end) that decided; only these are looked at, in the window's own text.
    """
    part = text[window[0] : window[1]]
    words = units(part, (0, len(part)))
    runs = [(words[i][0], words[i + n - 1][1], n) for n in (1, 2, 3) for i in range(len(words) - n + 1)]
    if not runs:
        return ()
    without = [part[:start].rstrip() + " " + part[end:].lstrip() for start, end, _ in runs]
    found = probability([part, *(text.strip() for text in without)])
    gains = found[1:] - found[0]
    # a longer run has to earn its further words: what it gains is shared among them
    ranked = sorted(zip(runs, gains, strict=True), key=lambda item: -item[1] / item[0][2] ** 0.5)
    chosen = without_overlap([(start, end, float(gain)) for (start, end, _), gain in ranked])
    spans = [Span(window[0] + s, window[0] + e, part[s:e], gain) for s, e, gain in chosen]
    return tuple(sorted(spans, key=lambda span: -span.weight))


def without_overlap(ranked: Sequence[tuple[int, int, float]], least: float = 1e-4) -> list[tuple[int, int, float]]:
    """The first spans that don't overlap one ranked before, at most five, as long as they weigh something."""
    chosen: list[tuple[int, int, float]] = []
    for start, end, gain in ranked:
        if len(chosen) == _SPANS or gain < least:
            break
        if all(end <= s or start >= e for s, e, _ in chosen):
            chosen.append((start, end, gain))
    return chosen
