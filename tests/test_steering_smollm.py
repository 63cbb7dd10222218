"""Steering on the demo model: a vector fitted on pairs moves what the model says, on its own and on texts it never saw."""

from __future__ import annotations

import numpy as np
import pytest

import moralguard as mg
from moralguard.controls import SteeringVectors
from moralguard.fitting.labelled import read_pairs, read_text_pairs
from moralguard.fitting.vectors import fit_vectors

SUBJECTS = ("The film", "The food", "This hotel", "My new phone", "The weather", "Our trip", "That game", "The city")
ENDINGS = (
    ("was wonderful and I loved every minute of it.", "was terrible and I hated every minute of it."),
    ("made me so happy.", "made me so angry."),
    ("is great, I am delighted.", "is awful, I am disgusted."),
)
PAIRS = [
    {"kind": f"{subject} {good}", "harsh": f"{subject} {bad}", "split": "test" if i % 4 == 0 else "train"}
    for i, subject in enumerate(SUBJECTS)
    for good, bad in ENDINGS
]
PROMPTS = ["I think that this place is", "When I got home, my brother said that the evening had been"]
PRAISE, BLAME = (" great, I loved it", " a joy"), (" bad, I hated it", " a disaster")


def leaning(guard):
    """Mean log-odds of praise against blame behind the prompts, nats a text."""
    given = [(prompt, text) for prompt in PROMPTS for text in (*PRAISE, *BLAME)]
    found = [law.sum() for _, law in guard.log_probabilities(*map(list, zip(*given, strict=True)))]
    return float(np.mean([value if text in PRAISE else -value for (_, text), value in zip(given, found, strict=True)]) * 2)


@pytest.mark.smollm
def test_the_vector_moves_the_text():
    lm = mg.load_model("smollm2-135m")
    texts, pairs = read_pairs(PAIRS, "kind", "harsh"), read_text_pairs(PAIRS, "kind", "harsh")
    vectors = {method: fit_vectors(lm, texts, method, pairs=pairs, layers=[12], pooling="mean").vectors[12] for method in ("mean", "pca")}
    base = leaning(mg.Guard(mg.Policy(controls=[]), lm))
    for method, vector in vectors.items():

        def guard(strength, vector=vector, **settings):
            return mg.Guard(mg.Policy(controls=[SteeringVectors(vectors={12: vector}, strength=strength, **settings)]), lm)

        towards, away = leaning(guard(1.0)), leaning(guard(-1.0))
        assert away + 1 < base < towards - 1, f"{method}: {away}, {base}, {towards}"
        if method == "mean":
            assert base + 0.5 < leaning(guard(1.0, keep_norm=True))
    said = {
        strength: mg.Guard(mg.Policy(controls=[SteeringVectors(vectors={12: vectors["mean"]}, strength=strength)]), lm)
        .generate(PROMPTS[0], max_new_tokens=14, do_sample=False)
        .texts[0]
        for strength in (2.0, -2.0)
    }
    assert any(word in said[2.0] for word in ("wonderful", "love", "great", "joy")), said
    assert said[2.0] != said[-2.0]
