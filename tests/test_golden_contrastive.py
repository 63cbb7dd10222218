"""Contrastive decoding against its formula: log p - coef log p_a where p >= alpha max p."""

from __future__ import annotations

import control_runs
import numpy as np
import pytest
import tiny_models
import torch
from numpy_model import NumpyModel
from odd_models import expert
from oracles import TOLERANCE, Reference, check_greedy, distance, run_attached
from scipy.special import log_softmax

import moralguard as mg
from moralguard.controls import ContrastiveDecoding, Prompt
from moralguard.controls.registry import write_control
from moralguard.errors import PolicyError
from moralguard.testing import check_control

PREFIX = [60, 61, 62]
PROMPTS = [[8], [5, 9, 20, 7, 33, 41, 2], [100, 3, 77]]


@pytest.fixture(params=["llama", "gpt2"])
def family(request):
    return tiny_models.FAMILIES[request.param]


def guard_of(model, **settings):
    return mg.Guard(mg.Policy(controls=[ContrastiveDecoding(**settings)]), (model, None))


def oracle(base, amateur, coef=1.0, amateur_temperature=0.5, alpha=0.1):
    """The score of every plausible token, normalised; the amateur is (model, prefix)."""

    def law(ids):
        own = log_softmax(base.logits(ids).numpy())
        theirs = log_softmax(amateur[0].logits([*amateur[1], *ids]).numpy() / amateur_temperature)
        plausible = np.exp(own) >= alpha * np.exp(own).max()
        return torch.from_numpy(log_softmax(np.where(plausible, own - coef * theirs, -np.inf)))

    return law


CASES = {
    "defaults": {},
    "coef 0.5": {"coef": 0.5},
    "amateur temperature 1": {"amateur_temperature": 1.0},
    "alpha 0.01": {"alpha": 0.01},
    "no filter": {"alpha": 0.0, "coef": 0.3},
}


@pytest.mark.parametrize("kind", ["prompt", "model"])
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_law(family, settings, kind):
    model, other = family(0), family(1)
    base = Reference(model)
    amateur, theirs = (Prompt(PREFIX), (base, PREFIX)) if kind == "prompt" else (other, (Reference(other), []))
    check_greedy(guard_of(model, amateur=amateur, **settings), model, oracle(base, theirs, **settings), PROMPTS)


def test_the_support_is_what_the_base_finds_plausible(family):
    model = family(0)
    base = Reference(model)
    run = run_attached(guard_of(model, amateur=Prompt(PREFIX), alpha=0.05), model, PROMPTS[1:2])
    sizes = []
    for i in range(8):
        p = base.log_law([*PROMPTS[1], *run.tokens[0][:i]]).exp()
        inside = p >= 0.05 * p.max()
        assert torch.equal(torch.isfinite(run.scores[0, i]), inside)
        sizes.append(int(inside.sum()))
    assert 1 < max(sizes) < 150


def test_temperature_comes_after_and_plausibility_is_judged_before_it(family):
    model = family(0)
    base = Reference(model)
    expected = oracle(base, (base, PREFIX))
    torch.manual_seed(0)
    run = run_attached(guard_of(model, amateur=Prompt(PREFIX)), model, PROMPTS, do_sample=True, temperature=2.0, top_k=0)
    assert distance(run, lambda ids: torch.log_softmax(expected(ids) / 2.0, -1), PROMPTS) <= TOLERANCE
    assert distance(run, expected, PROMPTS) > 10 * TOLERANCE


WRONG = {
    "coef off by 10 %": {"coef": 1.1},
    "amateur's temperature forgotten": {"amateur_temperature": 1.0},
    "no filter": {"alpha": 0.0},
    "another filter": {"alpha": 0.2},
}


@pytest.mark.parametrize("mistake", WRONG.values(), ids=WRONG)
def test_a_wrong_oracle_disagrees(family, mistake):
    model = family(0)
    base = Reference(model)
    run = run_attached(guard_of(model, amateur=Prompt(PREFIX)), model, PROMPTS)
    assert distance(run, oracle(base, (base, PREFIX), **mistake), PROMPTS) > 10 * TOLERANCE
    assert distance(run, oracle(base, (base, PREFIX)), PROMPTS) <= TOLERANCE


def settings_for(numpy):
    return ContrastiveDecoding(amateur=NumpyModel(expert()) if numpy else expert(), coef=0.7, alpha=0.02)


def test_the_numpy_runtime_agrees():
    control_runs.assert_numpy_agrees(settings_for)


@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
def test_slots_do_not_matter(numpy):
    control_runs.assert_slots_do_not_matter(settings_for, numpy)


@pytest.mark.parametrize("control", [ContrastiveDecoding(amateur=Prompt(PREFIX), coef=0.0), settings_for(False).scaled(0.0)])
def test_coef_0_is_the_base_filter_and_all(control):
    control_runs.assert_zero_is_the_base(control)


def test_every_rule_of_the_framework_holds():
    check_control(ContrastiveDecoding(amateur=Prompt([5, 6, 7])))
    check_control(ContrastiveDecoding(amateur=Prompt([9]), alpha=0.0, coef=0.5))
    check_control(ContrastiveDecoding(amateur=Prompt([9]), coef=0.0))
    control_runs.assert_rows_are_bit_equal_in_a_batch(settings_for(False))


def test_the_trace_adds_up():
    control_runs.assert_trace_adds_up(settings_for(False))


def test_policy_data():
    data = {"control": "contrastive@1", "amateur": {"prompt": [60, 61, 62]}, "coef": 0.5}
    control = mg.Policy.load({"controls": [data]}).effective_controls()[0]
    assert control == ContrastiveDecoding(amateur=Prompt(PREFIX), coef=0.5)
    assert mg.Policy.load({"controls": [write_control(control)]}).effective_controls()[0] == control
    assert control.scaled(2.0).coef == 1.0


def test_bad_settings_are_told_when_the_guard_is_built():
    for wrong in ({"coef": -1.0}, {"alpha": 1.5}, {"amateur_temperature": 0.0}):
        with pytest.raises(PolicyError, match=next(iter(wrong))):
            ContrastiveDecoding(amateur=Prompt(PREFIX), **wrong)
    with pytest.raises(PolicyError, match="has no amateur"):
        guard_of(tiny_models.llama(0))
    guard = mg.Guard(mg.Policy(values=["The text does not insult anyone."], controls=[ContrastiveDecoding(coef=0.0)]), tiny_models.llama(0))
    assert guard.controls == ()
