"""SafeDecoding against its formula: p + alpha (p_e - p) on the common tokens of the smallest sufficient top-k, for the first tokens."""

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
from moralguard.controls import Prompt, SafeDecoding
from moralguard.controls.registry import write_control
from moralguard.errors import PolicyError
from moralguard.testing import check_control

PREFIX = [3, 4]
PROMPTS = [[8], [5, 9, 20, 7, 33, 41, 2], [100, 3, 77]]


@pytest.fixture(params=["llama", "gpt2"])
def family(request):
    return tiny_models.FAMILIES[request.param]


def guard_of(model, **settings):
    return mg.Guard(mg.Policy(controls=[SafeDecoding(**settings)]), (model, None))


def space(own, theirs, least):
    """Ids common to both top k, for the smallest k that has at least so many."""
    orders = [np.argsort(-law, kind="stable").tolist() for law in (own, theirs)]
    for k in range(1, len(own) + 1):
        common = set(orders[0][:k]) & set(orders[1][:k])
        if len(common) >= least:
            return sorted(common)
    raise ValueError("the vocabulary is smaller than the space")


def oracle(base, safe, prompt, alpha=3.0, first_m=2, num_common_tokens=5, in_logs=False):
    """``safe`` is (model, prefix); ``prompt`` tells which token is the first. ``in_logs`` is a mistake, for negative controls."""

    def law(ids):
        own = log_softmax(base.logits(ids).numpy())
        if len(ids) - len(prompt) >= first_m:
            return torch.from_numpy(own)
        theirs = log_softmax(safe[0].logits([*safe[1], *ids]).numpy())
        moved = np.full(len(own), -np.inf)
        for v in space(own, theirs, num_common_tokens):
            p, q = np.exp(own[v]), np.exp(theirs[v])
            moved[v] = own[v] + alpha * (theirs[v] - own[v]) if in_logs else np.log(max(p + alpha * (q - p), 1e-8))
        return torch.from_numpy(log_softmax(moved))

    return law


CASES = {
    "defaults": {},
    "alpha 0.5": {"alpha": 0.5},
    "first_m 6": {"first_m": 6, "alpha": 1.0},
    "c 1": {"num_common_tokens": 1, "first_m": 4},
    "c 40": {"num_common_tokens": 40, "first_m": 4, "alpha": 0.7},
}


@pytest.mark.parametrize("kind", ["prompt", "model"])
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_law(family, settings, kind):
    model, other = family(0), family(1)
    base = Reference(model)
    given, theirs = (Prompt(PREFIX), (base, PREFIX)) if kind == "prompt" else (other, (Reference(other), []))
    for prompt in PROMPTS[:2]:
        check_greedy(guard_of(model, expert=given, **settings), model, oracle(base, theirs, prompt, **settings), [prompt])


def test_a_batch_of_different_lengths(family):
    model = family(0)
    base = Reference(model)
    run = run_attached(guard_of(model, expert=Prompt(PREFIX), first_m=3), model, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        single = type(run)([run.tokens[row]], run.laws[row : row + 1], run.scores[row : row + 1], run.base[row : row + 1])
        assert distance(single, oracle(base, (base, PREFIX), prompt, first_m=3), [prompt]) <= TOLERANCE


def test_the_space_holds_c_tokens_or_one_more(family):
    sizes = set()
    for seed in range(6):
        model = family(seed)
        run = run_attached(guard_of(model, expert=Prompt(PREFIX), first_m=4), model, PROMPTS, count=4)
        sizes |= set(torch.isfinite(run.scores).sum(-1).flatten().tolist())
    assert sizes == {5, 6}


def test_later_tokens_are_the_bases_own_bit_for_bit():
    model = tiny_models.llama(0)
    run = run_attached(guard_of(model, expert=Prompt(PREFIX)), model, PROMPTS)
    assert torch.equal(run.scores[:, 2:], run.base[:, 2:])
    assert not torch.equal(run.scores[:, :2], run.base[:, :2])


WRONG = {
    "alpha off by 10 %": {"alpha": 3.3},
    "one token fewer in common": {"num_common_tokens": 4},
    "a token longer": {"first_m": 3},
    "log-probabilities combined": {"in_logs": True},
}


@pytest.mark.parametrize("mistake", WRONG.values(), ids=WRONG)
def test_a_wrong_oracle_disagrees(mistake):
    model, other = tiny_models.llama(0), tiny_models.llama(1)
    base, safe = Reference(model), (Reference(other), [])
    run = run_attached(guard_of(model, expert=other), model, PROMPTS[1:2])
    assert distance(run, oracle(base, safe, PROMPTS[1], **mistake), PROMPTS[1:2]) > 10 * TOLERANCE
    assert distance(run, oracle(base, safe, PROMPTS[1]), PROMPTS[1:2]) <= TOLERANCE


def settings_for(numpy):
    return SafeDecoding(expert=NumpyModel(expert()) if numpy else expert(), first_m=4)


def test_the_numpy_runtime_agrees():
    control_runs.assert_numpy_agrees(settings_for)


@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
def test_slots_do_not_matter(numpy):
    control_runs.assert_slots_do_not_matter(settings_for, numpy)


ZERO = {
    "alpha 0": SafeDecoding(expert=Prompt(PREFIX), alpha=0.0),
    "first_m 0": SafeDecoding(expert=Prompt(PREFIX), first_m=0),
    "a request's strength 0": settings_for(False).scaled(0.0),
}


@pytest.mark.parametrize("control", ZERO.values(), ids=ZERO)
def test_zero_is_the_base_filter_and_all(control):
    control_runs.assert_zero_is_the_base(control)


def test_every_rule_of_the_framework_holds():
    check_control(SafeDecoding(expert=Prompt([5, 6, 7]), first_m=3))
    check_control(SafeDecoding(expert=Prompt([5]), alpha=0.0))
    control_runs.assert_rows_are_bit_equal_in_a_batch(settings_for(False))


def test_the_trace_adds_up():
    control_runs.assert_trace_adds_up(settings_for(False))


def test_policy_data():
    data = {"control": "safe-decoding@1", "expert": {"prompt": [3, 4]}, "first_m": 5}
    control = mg.Policy.load({"controls": [data]}).effective_controls()[0]
    assert control == SafeDecoding(expert=Prompt(PREFIX), first_m=5)
    assert mg.Policy.load({"controls": [write_control(control)]}).effective_controls()[0] == control
    assert control.scaled(2.0).alpha == 6.0


def test_bad_settings_are_told_when_the_guard_is_built():
    for wrong in ({"alpha": -1.0}, {"first_m": -1}, {"num_common_tokens": 0}):
        with pytest.raises(PolicyError, match=next(iter(wrong))):
            SafeDecoding(expert=Prompt(PREFIX), **wrong)
    with pytest.raises(PolicyError, match="has no expert"):
        guard_of(tiny_models.llama(0))
    with pytest.raises(PolicyError, match=r"num_common_tokens is 199, but .* has 199 tokens; give fewer"):
        guard_of(tiny_models.llama(0), expert=Prompt(PREFIX), num_common_tokens=199)
