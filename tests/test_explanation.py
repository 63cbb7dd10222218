"""Explanations: spans lie in the text, and removing what was named moves the score more than removing something else."""

import numpy as np
import pytest

import moralguard as mg
from moralguard.discriminator.explanation import occlusion_spans, units, without_overlap
from moralguard.errors import DataError

TEXTS = [
    ("We met at the station and then you said I was a pathetic worthless idiot in front of my sister.", "no_insult"),
    ("The weather is mild and I will stab you in the neck when you get home from the market.", "no_threat"),
    ("Bring bread, milk and two lemons, and by the way all immigrants are filthy vermin.", "no_hate"),
    ("Last week we painted the kitchen and that fucking shit took until Friday evening to dry.", "no_profanity"),
    ("Her talk on bridges was long, but women are too stupid to be engineers anyway.", "no_sexism"),
    ("Thanks for the notes. Shut up, you ugly moron. See you on Monday at the usual place.", "no_offense"),
]


@pytest.fixture(scope="module")
def judge():
    return mg.Discriminator.load()


@pytest.mark.parametrize("method", ["occlusion", "gradient"])
def test_removing_the_named_span_moves_the_score_more_than_a_random_one(judge, method):
    generator = np.random.default_rng(0)
    named, others = [], []
    for text, value in TEXTS:
        before = judge.score(text, value)[0, 0]
        span = judge.explain(text, value, method=method).spans[0]
        assert text[span.start : span.end] == span.text
        named.append(judge.score(text[: span.start] + text[span.end :], value)[0, 0] - before)
        words = units(text, (0, len(text)))
        length = len(units(span.text, (0, len(span.text))))
        for first in generator.integers(0, len(words) - length + 1, 8):
            cut = text[: words[first][0]] + text[words[first + length - 1][1] :]
            others.append(judge.score(cut, value)[0, 0] - before)
    assert np.mean(named) > np.mean(others) + 0.05


def test_the_span_of_a_long_text_is_in_the_window_that_decided(judge):
    calm = "The committee met on Tuesday and talked about the new roof of the school. " * 20
    text = calm + "You are a worthless, pathetic idiot. " + calm
    judged = judge.explain(text, "no_insult")
    assert judged.spans
    assert text[judged.spans[0].start : judged.spans[0].end] == judged.spans[0].text
    assert len(calm) - 5 <= judged.spans[0].start <= len(calm) + 40


def test_chinese_is_explained_by_occlusion(judge):
    judged = judge.explain("今天天气很好，可是你这个垃圾快滚出去", "no_offense")
    assert judged.spans
    with pytest.raises(DataError, match="occlusion"):
        judge.explain("今天天气很好，可是你这个垃圾快滚出去", "no_offense", method="gradient")


def test_occlusion_finds_the_word_that_carries_a_score():
    def probability(texts):
        return np.array([0.1 if "bad" in text else 0.9 for text in texts])

    (span, *_) = occlusion_spans(probability, "one bad word", (0, 12))
    assert (span.text, span.start, span.end) == ("bad", 4, 7)
    assert span.weight == pytest.approx(0.8)


def test_occlusion_finds_a_phrase_where_no_word_carries_it_alone():
    def probability(texts):
        return np.array([0.1 if "very" in text or "bad" in text else 0.9 for text in texts])

    (span, *_) = occlusion_spans(probability, "this is very bad indeed", (0, 23))
    assert span.text == "very bad"


def test_spans_do_not_overlap():
    assert without_overlap([(0, 5, 0.9), (3, 8, 0.5), (5, 7, 0.4), (8, 9, 0.0)]) == [(0, 5, 0.9), (5, 7, 0.4)]


def test_unknown_method(judge):
    with pytest.raises(DataError, match="method"):
        judge.explain("text", "no_insult", method="magic")
    with pytest.raises(DataError, match="one text and one value"):
        judge.explain("text", ["no_insult", "no_hate"])
