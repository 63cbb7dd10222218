"""DExperts against its formula: z' = nucleus(z, filter_p) + alpha (z+ - z-) on raw logits."""

from __future__ import annotations

import oracles
import pytest
import tiny_models
import torch
from oracles import TOLERANCE, Reference, check_greedy, distance, run_attached

import moralguard as mg
from moralguard.controls import DExperts
from moralguard.controls.experts import Prompt

PROMPTS = [[5, 9, 20, 7, 33]]
EXPERT_PREFIX, ANTI_PREFIX = [3, 4], [60, 61, 62]


@pytest.fixture(autouse=True)
def _one_thread():
    with oracles.one_thread():
        yield


def guard_of(model, **settings):
    return mg.Guard(mg.Policy(controls=[DExperts(**settings)]), (model, None))


@pytest.fixture(params=["llama", "gpt2"])
def family(request):
    return tiny_models.FAMILIES[request.param]


CASES = {
    "defaults": {},
    "alpha 3.2": {"alpha": 3.2},
    "filter_p 1": {"filter_p": 1.0},
    "filter_p 0.5": {"filter_p": 0.5},
    "alpha 0.5, filter_p 0.7": {"alpha": 0.5, "filter_p": 0.7},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
class TestLaw:
    """Every kind of expert with every setting."""

    def oracle(self, base, expert, anti_expert, settings):
        return oracles.dexperts(base, expert, anti_expert, **({"alpha": 2.0, "filter_p": 0.9} | settings))

    def test_two_models(self, family, settings):
        model, expert, anti = family(0), family(1), family(2)
        oracle = self.oracle(Reference(model), (Reference(expert), []), (Reference(anti), []), settings)
        check_greedy(guard_of(model, expert=expert, anti_expert=anti, **settings), model, oracle, PROMPTS)

    def test_two_prompts(self, family, settings):
        model = family(0)
        base = Reference(model)
        oracle = self.oracle(base, (base, EXPERT_PREFIX), (base, ANTI_PREFIX), settings)
        guard = guard_of(model, expert=Prompt(EXPERT_PREFIX), anti_expert=Prompt(ANTI_PREFIX), **settings)
        check_greedy(guard, model, oracle, PROMPTS)

    def test_prompt_and_model(self, family, settings):
        model, anti = family(0), family(2)
        base = Reference(model)
        oracle = self.oracle(base, (base, EXPERT_PREFIX), (Reference(anti), []), settings)
        check_greedy(guard_of(model, expert=Prompt(EXPERT_PREFIX), anti_expert=anti, **settings), model, oracle, PROMPTS)

    def test_anti_only(self, family, settings):
        model, anti = family(0), family(2)
        base = Reference(model)
        oracle = self.oracle(base, None, (Reference(anti), []), settings)
        check_greedy(guard_of(model, anti_expert=anti, **settings), model, oracle, PROMPTS)

    def test_expert_only(self, family, settings):
        model, expert = family(0), family(1)
        base = Reference(model)
        oracle = self.oracle(base, (Reference(expert), []), None, settings)
        check_greedy(guard_of(model, expert=expert, **settings), model, oracle, PROMPTS)


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_batch_of_different_lengths(name):
    model, expert = tiny_models.FAMILIES[name](3), tiny_models.FAMILIES[name](4)
    base = Reference(model)
    prompts = [[8], [5, 9, 20, 7, 33, 41, 2], [100, 3, 77]]
    oracle = oracles.dexperts(base, (Reference(expert), []), (base, ANTI_PREFIX), alpha=2.0, filter_p=0.9)
    check_greedy(guard_of(model, expert=expert, anti_expert=Prompt(ANTI_PREFIX)), model, oracle, prompts)


def test_anti_only_is_one_plus_alpha_times_base_minus_alpha_times_anti(family):
    model, anti = family(0), family(2)
    base, reference = Reference(model), Reference(anti)

    def law(ids):
        z = base.logits(ids)
        kept = torch.where(oracles.nucleus(z, 0.8), z, -torch.inf)
        return torch.log_softmax((1 + 1.5) * kept - 1.5 * reference.logits(ids), -1)

    check_greedy(guard_of(model, anti_expert=anti, alpha=1.5, filter_p=0.8), model, law, PROMPTS)


def test_an_expert_of_another_architecture_with_the_same_vocabulary():
    model, expert, anti = tiny_models.llama(0), tiny_models.gpt2(1), tiny_models.gpt_neox(2)
    oracle = oracles.dexperts(Reference(model), (Reference(expert), []), (Reference(anti), []), alpha=2.0, filter_p=0.9)
    check_greedy(guard_of(model, expert=expert, anti_expert=anti), model, oracle, PROMPTS)


def test_temperature_comes_after_the_contrast(family):
    model, expert, anti = family(0), family(1), family(2)
    oracle = oracles.dexperts(Reference(model), (Reference(expert), []), (Reference(anti), []), alpha=2.0, filter_p=0.9)

    def tempered(ids):
        return torch.log_softmax(oracle(ids) / 0.6, -1)

    torch.manual_seed(0)
    run = run_attached(guard_of(model, expert=expert, anti_expert=anti), model, PROMPTS, do_sample=True, temperature=0.6, top_k=0)
    assert distance(run, tempered, PROMPTS) <= TOLERANCE
    assert distance(run, oracle, PROMPTS) > 10 * TOLERANCE


def test_only_the_base_is_filtered(family):
    """The support is the base's nucleus, whatever the experts think of these tokens."""
    model, expert, anti = family(0), family(1), family(2)
    base = Reference(model)
    run = run_attached(guard_of(model, expert=expert, anti_expert=anti, filter_p=0.5), model, PROMPTS)
    for i in range(8):
        inside = oracles.nucleus(base.logits([*PROMPTS[0], *run.tokens[0][:i]]), 0.5)
        assert torch.equal(torch.isfinite(run.scores[0, i]), inside)
        assert 1 < int(inside.sum()) < 100


WRONG = {
    "alpha off by 10 %": {"alpha": 2.2},
    "filter_p off by 0.05": {"filter_p": 0.85},
    "no filter": {"filter_p": 1.0},
    "experts swapped": {"swap": True},
    "anti-expert without its prefix": {"prefix": []},
    "anti-expert with another prefix": {"prefix": [60, 61]},
}


@pytest.mark.parametrize("mistake", WRONG.values(), ids=WRONG)
def test_a_wrong_oracle_disagrees(family, mistake):
    model, expert = family(0), family(1)
    base = Reference(model)
    run = run_attached(guard_of(model, expert=expert, anti_expert=Prompt(ANTI_PREFIX)), model, PROMPTS)
    plus, minus = (Reference(expert), []), (base, mistake.get("prefix", ANTI_PREFIX))
    if mistake.get("swap"):
        plus, minus = minus, plus
    wrong = oracles.dexperts(base, plus, minus, alpha=mistake.get("alpha", 2.0), filter_p=mistake.get("filter_p", 0.9))
    assert distance(run, wrong, PROMPTS) > 10 * TOLERANCE


def test_the_guarded_law_is_not_the_base_law(family):
    model, expert, anti = family(0), family(1), family(2)
    base = Reference(model)
    run = run_attached(guard_of(model, expert=expert, anti_expert=anti), model, PROMPTS)
    assert distance(run, base.log_law, PROMPTS) > 0.05
    assert run.tokens[0] != oracles.greedy(base.log_law, PROMPTS[0], 8)
