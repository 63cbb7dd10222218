"""The contrast controls on the real SmolLM2, with text prompts: the law of given text against the formulas, from the model's own logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

import moralguard as mg
from moralguard.controls import ContrastiveDecoding, Guidance, ModelArithmetic, Prompt

PROMPT, TEXT = "My new neighbour is", " a very nice man"
KIND, RUDE = "The following text is very polite:\n", "The following text is very rude:\n"


def contrastive(base, rude):
    theirs = log_softmax(rude / 0.5, axis=-1)
    plausible = np.exp(base) >= 1e-4 * np.exp(base).max(-1, keepdims=True)
    return log_softmax(np.where(plausible, base - 0.5 * theirs, -np.inf), axis=-1)


CASES = {
    "guidance": (
        Guidance(positive=Prompt(KIND), negative=Prompt(RUDE), gamma=2.0),
        lambda base, kind, rude: log_softmax(rude + 2 * (kind - rude), axis=-1),
    ),
    "contrastive": (
        ContrastiveDecoding(amateur=Prompt(RUDE), coef=0.5, alpha=1e-4),
        lambda base, kind, rude: contrastive(base, rude),
    ),
    "arithmetic": (
        ModelArithmetic(formula="base - 0.6*max(base, rude)", passes={"rude": Prompt(RUDE)}),
        lambda base, kind, rude: log_softmax((base - 0.6 * np.maximum(base, rude)) / 0.4, axis=-1),
    ),
}


@pytest.mark.smollm
def test_given_text_has_the_probability_of_the_formula():
    lm = mg.load_model("smollm2-135m")
    prompt, text = (lm.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (PROMPT, TEXT))
    assert lm.tokenizer(PROMPT)["input_ids"] == prompt, "no beginning-of-text token: the prefix stands in front"

    def laws(prefix):
        ids = [*(lm.tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []), *prompt, *text]
        with torch.no_grad():
            logits = lm.model(torch.tensor([ids])).logits[0, -len(text) - 1 : -1]
        return log_softmax(logits.double().numpy(), axis=-1)

    base, kind, rude = (laws(prefix) for prefix in ("", KIND, RUDE))
    plain = base[range(len(text)), text]
    for name, (control, law) in CASES.items():
        guard = mg.Guard(mg.Policy(controls=[control]), lm)
        [(ids, found)] = guard.log_probabilities([PROMPT], [TEXT])
        assert ids == text
        expected = law(base, kind, rude)[range(len(text)), text]
        assert np.array_equal(np.isneginf(found), np.isneginf(expected)), name
        kept = np.isfinite(expected)
        assert np.abs(found[kept] - expected[kept]).max() < 5e-3, name
        assert np.abs(found[kept] - plain[kept]).max() > 0.05, name
