"""The rules that every control keeps, and what this one is for. Needs the package to be installed, as users have it."""

from __future__ import annotations

import pytest
import torch
from moralguard_discouraged_words import DiscouragedWords

import moralguard as mg
from moralguard.errors import PolicyError
from moralguard.testing import check_control, tiny_model


@pytest.mark.parametrize("bias", [-5.0, -100.0, 2.0, 0.0])
def test_it_keeps_the_rules(bias: float) -> None:
    check_control(DiscouragedWords(discouraged=[3, 5, 77, 5], bias=bias))


def test_a_policy_knows_it_by_name() -> None:
    policy = mg.Policy.load({"controls": [{"control": "discouraged-words@1", "discouraged": [3, "stupid"], "bias": -2}]})
    assert policy.controls == (DiscouragedWords(discouraged=(3, "stupid"), bias=-2.0),)


def test_discouraged_tokens_stay_out() -> None:
    model, prompt = tiny_model(), [1, 2, 3]

    def generate(policy: mg.Policy) -> list[int]:
        return mg.Guard(policy, model).generate(prompt, max_new_tokens=8, do_sample=False).token_ids[0]

    free = generate(mg.Policy())
    kept = generate(mg.Policy(controls=[DiscouragedWords(discouraged=[free[0]], bias=-1000.0)]))
    assert free[0] not in kept


def test_the_bias_is_added_to_the_logits() -> None:
    model, prompt = tiny_model(), torch.tensor([[1, 2, 3]])
    guard = mg.Guard(mg.Policy(controls=[DiscouragedWords(discouraged=[7, 9], bias=-1.5)]), model)
    logits = model(prompt).logits[:, -1].detach()
    shift = torch.zeros_like(logits)
    shift[:, [7, 9]] = -1.5
    assert torch.allclose(guard.logits_processor()(prompt, logits), torch.log_softmax(logits + shift, -1), atol=1e-5)


def test_it_says_what_is_wrong() -> None:
    with pytest.raises(PolicyError, match="token id 128, outside the vocabulary"):
        mg.Guard(mg.Policy(controls=[DiscouragedWords(discouraged=[128])]), tiny_model())
    with pytest.raises(PolicyError, match="without a tokenizer"):
        mg.Guard(mg.Policy(controls=[DiscouragedWords(discouraged=["stupid"])]), tiny_model())
    with pytest.raises(PolicyError, match="discouraged"):
        DiscouragedWords(discouraged=[])
