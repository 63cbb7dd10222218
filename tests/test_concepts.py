"""The built-in concepts: balanced, checked sentences whose evaluation never meets their fitting."""

from __future__ import annotations

import re

import pytest
import tiny_models

from moralguard.backends.hf import LanguageModel
from moralguard.errors import DataError, ModelError
from moralguard.fitting.concepts import concept_names, concept_rows, counterpart_tokens, held_back

CLASSES = {"gender": 2, "religion": 5, "race": 5}


@pytest.mark.parametrize("name", CLASSES)
def test_rows(name):
    texts = concept_rows(name)
    assert len(texts.classes) == CLASSES[name]
    counts = {label: sum(row.label == label for row in texts.rows) for label in range(CLASSES[name])}
    assert len(set(counts.values())) == 1  # as many of each class
    assert min(counts.values()) >= 60
    for row in texts.rows:
        assert not re.search(r"[{}]|  |^\s|^[a-z]", row.text), row.text
    share = len(texts.of("test")) / len(texts.rows)
    assert 0.08 < share < 0.35
    assert {row.label for row in texts.of("test")} == set(range(CLASSES[name]))
    # no text names two classes
    assert len({row.text for row in texts.rows}) == len(texts.rows)


def test_the_seed_chooses_the_templates_held_back():
    assert concept_rows("gender", 3) == concept_rows("gender", 3)
    assert {row.text for row in concept_rows("gender", 3).of("test")} != {row.text for row in concept_rows("gender", 4).of("test")}
    assert concept_names() == list(CLASSES)


def test_evaluation_meets_nothing_of_the_fitting():
    held = held_back("gender")
    occupations = {
        re.sub(r"^(The|After the meeting the|Before the) (.+?) said that$", r"\2", p) for p in held.prompts if p.endswith("said that")
    }
    assert len(occupations) >= 60
    assert len(held.prompts) == len(set(held.prompts)) >= 6 * len(occupations)
    fitted = [row.text.lower() for row in concept_rows("gender").rows]
    for occupation in occupations:
        pattern = re.compile(rf"\b{re.escape(occupation.lower())}s?\b")
        assert not [text for text in fitted if pattern.search(text)], occupation
    prompts = {prompt.lower() for prompt in (*held.prompts, *(text for text, _ in held.agreement))}
    assert not prompts & set(fitted)
    assert {cls for _, cls in held.agreement} == {"female", "male"}


class PairTokenizer:
    """Knows a few words, with their space; every other word is two tokens."""

    words = {
        " she": 1,
        " he": 2,
        " She": 3,
        " He": 4,
        " her": 5,
        " his": 6,
        " woman": 7,
        "She": 8,
        "He": 9,
        " mum": 10,
        " mom": 11,
        " dad": 12,
    }

    def __call__(self, text, **_):
        return {"input_ids": [self.words[text]] if text in self.words else [20, 21]}


def test_counterparts_are_single_tokens_in_the_classes_order():
    lm = LanguageModel(tiny_models.llama(0), PairTokenizer())
    # " woman" has no counterpart of one token; his is the counterpart of her and of hers
    assert counterpart_tokens(lm, "gender") == [(1, 2), (3, 4), (8, 9), (5, 6), (11, 12), (10, 12)]
    assert counterpart_tokens(lm, "race") == []


def test_errors():
    with pytest.raises(DataError, match="did you mean 'gender'"):
        concept_rows("gendre")
    with pytest.raises(DataError, match="nothing is held back"):
        held_back("race")
    with pytest.raises(ModelError, match="tokenizer"):
        counterpart_tokens(LanguageModel(tiny_models.llama(0)), "gender")
