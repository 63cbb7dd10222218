"""Self-debiasing against its formula: p max(exp(-decay max(q - p, 0)), epsilon), normalised."""

from __future__ import annotations

import math

import oracles
import pytest
import tiny_models
import torch
from oracles import TOLERANCE, Reference, check_greedy, distance, run_attached

import moralguard as mg
from moralguard.controls import SelfDebias

PREFIXES = [(60, 61, 62), (3,), (90, 14, 15, 16, 91)]
PROMPTS = [[5, 9, 20, 7, 33]]
RAGGED = [[8], [5, 9, 20, 7, 33, 41, 2], [100, 3, 77]]


@pytest.fixture(autouse=True)
def _one_thread():
    with oracles.one_thread():
        yield


@pytest.fixture(params=["llama", "gpt2"])
def family(request):
    return tiny_models.FAMILIES[request.param]


def guard_of(model, prefixes, **settings):
    return mg.Guard(mg.Policy(controls=[SelfDebias(prefixes=prefixes, **settings)]), (model, None))


@pytest.mark.parametrize(("decay_constant", "epsilon"), [(10, 0.01), (50, 0.01), (100, 0.01), (50, 0.2), (100, 1e-6)])
@pytest.mark.parametrize("count", [1, 3], ids=["1 prefix", "3 prefixes"])
def test_law(family, count, decay_constant, epsilon):
    model = family(0)
    oracle = oracles.self_debias(Reference(model), PREFIXES[:count], decay_constant=decay_constant, epsilon=epsilon)
    check_greedy(guard_of(model, PREFIXES[:count], decay_constant=decay_constant, epsilon=epsilon), model, oracle, PROMPTS)


def test_defaults_are_decay_50_and_epsilon_a_hundredth(family):
    model = family(0)
    oracle = oracles.self_debias(Reference(model), PREFIXES, decay_constant=50, epsilon=0.01)
    check_greedy(guard_of(model, PREFIXES), model, oracle, PROMPTS)


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_batch_of_different_lengths(name):
    model = tiny_models.FAMILIES[name](3)
    oracle = oracles.self_debias(Reference(model), PREFIXES, decay_constant=50, epsilon=0.01)
    check_greedy(guard_of(model, PREFIXES), model, oracle, RAGGED)


def test_scores_are_normalised_and_no_token_is_removed(family):
    model = family(0)
    run = run_attached(guard_of(model, PREFIXES, decay_constant=100), model, RAGGED)
    assert torch.isfinite(run.scores).all()
    assert torch.logsumexp(run.scores.double(), -1).abs().max() <= 1e-5


def test_epsilon_is_the_smallest_factor(family):
    """With a huge decay every token that a prefix favours loses exactly epsilon against the others."""
    model, epsilon = family(0), 0.05
    base = Reference(model)
    run = check_greedy(
        guard_of(model, PREFIXES[:1], decay_constant=1e9, epsilon=epsilon),
        model,
        oracles.self_debias(base, PREFIXES[:1], decay_constant=1e9, epsilon=epsilon),
        PROMPTS,
    )
    for i in range(8):
        ids = [*PROMPTS[0], *run.tokens[0][:i]]
        biased = base.log_law([*PREFIXES[0], *ids])
        unguarded = base.log_law(ids)
        shift = run.laws[0, i] - unguarded
        favoured = biased.exp() > unguarded.exp() + 1e-5
        spared = biased.exp() < unguarded.exp() - 1e-5
        assert min(int(favoured.sum()), int(spared.sum())) > 20
        assert torch.allclose(shift[spared], shift[spared][:1], atol=1e-4)
        assert torch.allclose(shift[favoured], shift[spared][:1] + math.log(epsilon), atol=1e-4)


def test_temperature_comes_after_debiasing(family):
    model = family(0)
    oracle = oracles.self_debias(Reference(model), PREFIXES, decay_constant=50, epsilon=0.01)
    torch.manual_seed(0)
    run = run_attached(guard_of(model, PREFIXES), model, PROMPTS, do_sample=True, temperature=0.6, top_k=0)
    assert distance(run, lambda ids: torch.log_softmax(oracle(ids) / 0.6, -1), PROMPTS) <= TOLERANCE
    assert distance(run, oracle, PROMPTS) > 10 * TOLERANCE


WRONG = {
    "decay off by 10 %": {"decay_constant": 55},
    "epsilon off by 10 %": {"epsilon": 0.33},
    "a prefix forgotten": {"prefixes": PREFIXES[:2]},
    "a prefix cut short": {"prefixes": [PREFIXES[0], PREFIXES[1], PREFIXES[2][:-1]]},
    "prefixes joined": {"prefixes": [[i for prefix in PREFIXES for i in prefix]]},
}


@pytest.mark.parametrize("mistake", WRONG.values(), ids=WRONG)
def test_a_wrong_oracle_disagrees(family, mistake):
    right = {"prefixes": PREFIXES, "decay_constant": 50, "epsilon": 0.3}
    model = family(0)
    run = run_attached(guard_of(model, **right), model, RAGGED)
    assert distance(run, oracles.self_debias(Reference(model), **(right | mistake)), RAGGED) > 10 * TOLERANCE


def test_the_guarded_law_is_not_the_base_law(family):
    model = family(0)
    base = Reference(model)
    run = run_attached(guard_of(model, PREFIXES), model, RAGGED)
    assert distance(run, base.log_law, RAGGED) > 0.05
    assert run.tokens != [oracles.greedy(base.log_law, prompt, 8) for prompt in RAGGED]
