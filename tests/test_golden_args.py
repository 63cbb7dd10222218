"""ARGS against its formula in float64 NumPy: the k most probable candidates, z + w * r, nothing else."""

from __future__ import annotations

import control_runs
import numpy as np
import oracles
import pytest
import tiny_models
import torch
from oracles import TOLERANCE, Reference, check_greedy, distance, gap, run_attached
from reward_functions import batched_reward, head, head_logits, single_reward
from scipy.special import log_softmax

import moralguard as mg
from moralguard.controls import ARGS
from moralguard.controls.registry import read_control, write_control
from moralguard.errors import ControlError, PolicyError

RAGGED = [[8], [5, 9, 20, 7, 33, 41, 2], [100, 3, 77]]


@pytest.fixture(autouse=True)
def _one_thread():
    with oracles.one_thread():
        yield


def guard_of(model, *controls):
    return mg.Guard(mg.Policy(controls=list(controls)), (model, None))


def args(base, reward, *, w=1.0, k=10, temperature=1.0):
    """The law from the paper: reward gives f64[V] of a text and every token behind it."""

    def law(ids):
        z = base.logits(ids).numpy()
        candidates = sorted(range(len(z)), key=lambda v: -z[v])[:k]
        scores = np.full(len(z), -np.inf)
        for v, r in zip(candidates, reward(ids)[candidates], strict=True):
            scores[v] = (z[v] + w * r) / temperature
        return torch.from_numpy(log_softmax(scores))

    return law


CASES = {
    "as published": ({}, 3.0),
    "w 4, k 40": ({"w": 4.0, "k": 40}, 1.0),
    "rewards of any size and sign": ({"w": 0.5, "k": 25}, -30.0),
    "k over the vocabulary": ({"k": 1000}, 5.0),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("settings", "scale"), CASES.values(), ids=CASES)
def test_greedy_search_by_a_callable(family, settings, scale):
    model = tiny_models.FAMILIES[family](0)
    oracle = args(Reference(model), lambda ids: single_reward(ids, scale), **settings)
    check_greedy(guard_of(model, ARGS(reward=batched_reward(scale=scale), **settings)), model, oracle, RAGGED)


def test_a_heads_reward_is_its_logit():
    model, factored = tiny_models.llama(0), head()
    base = Reference(model)
    oracle = args(base, lambda ids: head_logits(factored, base.states(ids)[-1].numpy(), base.unembedding.numpy()), w=2.0)
    check_greedy(guard_of(model, ARGS(reward=factored, w=2.0)), model, oracle, RAGGED)


def test_stochastic_search_divides_by_the_temperature_after_the_reward():
    model = tiny_models.llama(0)
    guard = guard_of(model, ARGS(reward=batched_reward(scale=4.0)))
    torch.manual_seed(0)
    run = run_attached(guard, model, RAGGED, do_sample=True, temperature=0.7, top_k=0)
    oracle = args(Reference(model), lambda ids: single_reward(ids, 4.0), temperature=0.7)
    for row, prompt in enumerate(RAGGED):
        assert gap(run.laws[row], oracles.follow(oracle, prompt, run.tokens[row])) <= TOLERANCE


WRONG = {"w": {"w": 1.1}, "k": {"k": 9}, "temperature": {"temperature": 0.9}}


@pytest.mark.parametrize("mistake", WRONG.values(), ids=WRONG)
def test_a_wrong_oracle_disagrees(mistake):
    model = tiny_models.llama(0)
    run = run_attached(guard_of(model, ARGS(reward=batched_reward(scale=3.0))), model, RAGGED)
    assert distance(run, args(Reference(model), lambda ids: single_reward(ids, 3.0), **mistake), RAGGED) > 10 * TOLERANCE


CONTROLS = {
    "callable": lambda numpy: ARGS(reward=batched_reward(numpy, scale=3.0)),
    "head": lambda numpy: ARGS(reward=head(), w=2.0, k=30),
}


@pytest.mark.parametrize("settings", CONTROLS.values(), ids=CONTROLS)
class TestEverywhere(control_runs.OnEveryPath):
    """``CONTROLS`` along every path."""


def test_a_removed_token_stays_removed_whatever_its_reward():
    base = torch.linspace(2, 0, tiny_models.VOCAB)[None].clone()
    base[0, 3] = -np.inf
    guard = guard_of(tiny_models.llama(0), ARGS(reward=lambda ids, candidates, mask: 100 * (candidates == 3).float()))
    guarded = guard.logits_processor()(torch.tensor([[1, 2]]), base)
    assert np.isneginf(guarded[0, 3])
    assert torch.isfinite(guarded[0]).sum() == 10


def test_policy_data(tmp_path):
    head().save(tmp_path)
    data = {"control": "args@1", "reward": str(tmp_path), "w": 2.0, "k": 5}
    assert write_control(read_control(data)) == data
    assert read_control(data).scaled(2).w == 4.0


BAD = {
    "nothing there": ({"reward": "no/such/file"}, "args reward 'no/such/file' isn't there"),
    "no reward": ({}, "reward"),
    "negative w": ({"reward": head(), "w": -1}, "greater than or equal to 0"),
    "k of 0": ({"reward": head(), "k": 0}, "greater than or equal to 1"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_bad_settings_are_told(settings, message):
    with pytest.raises(PolicyError, match=message):
        ARGS(**settings)


def test_an_infinite_reward_ends_its_request():
    control = ARGS(reward=lambda ids, candidates, mask: torch.full(candidates.shape, float("inf")))
    with pytest.raises(ControlError, match="NaN or infinite"):
        guard_of(tiny_models.llama(0), control).generate([[5, 6]], max_new_tokens=3)
