"""Model arithmetic against formulas worked out by hand: log softmax(sum w log p / sum w), max and min with their own sum of weights."""

from __future__ import annotations

import warnings

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
from moralguard.controls import DExperts, ModelArithmetic, Prompt
from moralguard.controls.registry import write_control
from moralguard.errors import PolicyError
from moralguard.testing import check_control

TOXIC, KIND = [60, 61, 62], [3, 4]
PROMPTS = [[8], [5, 9, 20, 7, 33, 41, 2], [100, 3, 77]]


@pytest.fixture(params=["llama", "gpt2"])
def family(request):
    return tiny_models.FAMILIES[request.param]


def guard_of(model, formula, passes, **settings):
    return mg.Guard(mg.Policy(controls=[ModelArithmetic(formula=formula, passes=passes, **settings)]), (model, None))


def oracle(sources, law, strength=1.0):
    """``sources`` (model, prefix) a name; ``law`` gives (sum w log p, sum w) of their log-probabilities f64[V]."""

    def guarded(ids):
        logs = {name: log_softmax(model.logits([*prefix, *ids]).numpy()) for name, (model, prefix) in sources.items()}
        value, norm = law(**logs)
        return torch.from_numpy(log_softmax((1 - strength) * logs["base"] + strength * log_softmax(value / norm)))

    return guarded


def larger(a, b, weight_of_a, weight_of_b):
    """(values, weights) of the larger, token by token."""
    return np.where(a >= b, a, b), np.where(a >= b, weight_of_a, weight_of_b)


def union_of_unlike(base, toxic, kind):
    best, weight = larger(2 * base, toxic, 2.0, 1.0)
    return 3 * kind + best, 3 + weight


def smaller_of_three(base, toxic, kind):
    stacked = np.stack([base, 0.5 * toxic, 2 * kind])
    chosen = stacked.argmin(0)
    return base + np.take_along_axis(stacked, chosen[None], 0)[0], 1 + np.array([1.0, 0.5, 2.0])[chosen]


FORMULAS = {
    "base - 0.5*toxic": lambda base, toxic: (base - 0.5 * toxic, 0.5),
    "base + 2*kind - 0.7*toxic": lambda base, toxic, kind: (base + 2 * kind - 0.7 * toxic, 2.3),
    "kind": lambda base, kind: (kind, 1.0),
    "(base + kind)/4": lambda base, kind: (base / 4 + kind / 4, 0.5),
    "base - 0.8*max(base, toxic)": lambda base, toxic: (base - 0.8 * np.maximum(base, toxic), 0.2),
    "base - 0.5*min(toxic, kind)": lambda base, toxic, kind: (base - 0.5 * np.minimum(toxic, kind), 0.5),
    "3*kind + max(2*base, toxic)": union_of_unlike,
    "base + min(base, 0.5*toxic, 2*kind)": smaller_of_three,
}


def passes_of(formula):
    return {name: Prompt(ids) for name, ids in (("toxic", TOXIC), ("kind", KIND)) if name in formula}


def sources_of(formula, base):
    return {"base": (base, [])} | {name: (base, list(prompt.prompt)) for name, prompt in passes_of(formula).items()}


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("formula", FORMULAS)
def test_law(family, formula, strength):
    model = family(0)
    expected = oracle(sources_of(formula, Reference(model)), FORMULAS[formula], strength)
    check_greedy(guard_of(model, formula, passes_of(formula), strength=strength), model, expected, PROMPTS)


def test_other_models_as_passes(family):
    model, other = family(0), family(1)
    base = Reference(model)
    formula = "base - 0.6*max(base, other)"
    sources = {"base": (base, []), "other": (Reference(other), [])}
    expected = oracle(sources, lambda base, other: (base - 0.6 * np.maximum(base, other), 0.4))
    check_greedy(guard_of(model, formula, {"other": other}), model, expected, PROMPTS)


def test_a_negative_sum_of_weights_is_the_equation_as_published_and_warns():
    model = tiny_models.llama(0)
    formula = "0.7*base - 0.96*max(base, toxic)"
    with pytest.warns(UserWarning, match="add up to less than 0, which turns it round"):
        guard = guard_of(model, formula, passes_of(formula))
    expected = oracle(sources_of(formula, Reference(model)), lambda base, toxic: (0.7 * base - 0.96 * np.maximum(base, toxic), -0.26))
    check_greedy(guard, model, expected, PROMPTS)


WRONG = {
    "not divided by the sum of weights": lambda base, toxic: (base - 0.8 * np.maximum(base, toxic), 1.0),
    "min for max": lambda base, toxic: (base - 0.8 * np.minimum(base, toxic), 0.2),
    "another weight": lambda base, toxic: (base - 0.7 * np.maximum(base, toxic), 0.3),
    "probabilities for logs": lambda base, toxic: (np.log(np.clip(np.exp(base) - 0.8 * np.exp(toxic), 1e-9, None)), 1.0),
}


@pytest.mark.parametrize("mistake", WRONG.values(), ids=WRONG)
def test_a_wrong_oracle_disagrees(mistake):
    model, formula = tiny_models.llama(0), "base - 0.8*max(base, toxic)"
    sources = sources_of(formula, Reference(model))
    run = run_attached(guard_of(model, formula, passes_of(formula)), model, PROMPTS)
    assert distance(run, oracle(sources, mistake), PROMPTS) > 10 * TOLERANCE
    assert distance(run, oracle(sources, FORMULAS[formula]), PROMPTS) <= TOLERANCE


def test_the_divisor_of_a_union_of_unlike_sums_differs_from_token_to_token(family):
    model, formula = family(0), "3*kind + max(2*base, toxic)"
    sources = sources_of(formula, Reference(model))
    run = run_attached(guard_of(model, formula, passes_of(formula)), model, PROMPTS)
    for norm in (4.0, 5.0):  # one divisor for all tokens is another law
        wrong = oracle(sources, lambda base, toxic, kind, norm=norm: (3 * kind + np.maximum(2 * base, toxic), norm))
        assert distance(run, wrong, PROMPTS) > 10 * TOLERANCE


def test_dexperts_is_a_formula():
    model = tiny_models.llama(0)
    passes = {"kind": Prompt(KIND), "toxic": Prompt(TOXIC)}
    dexperts = mg.Guard(mg.Policy(controls=[DExperts(expert=Prompt(KIND), anti_expert=Prompt(TOXIC), filter_p=1.0)]), (model, None))
    runs = [run_attached(guard, model, PROMPTS) for guard in (guard_of(model, "base + 2*kind - 2*toxic", passes), dexperts)]
    assert torch.allclose(runs[0].laws, runs[1].laws, atol=1e-4)


def settings_for(numpy):
    passes = {"other": NumpyModel(expert()) if numpy else expert(), "kind": Prompt(KIND)}
    return ModelArithmetic(formula="base + kind - 0.8*max(base, other)", passes=passes)


def linear_for(numpy):
    return ModelArithmetic(formula="base - 0.5*other", passes={"other": NumpyModel(expert()) if numpy else expert()})


@pytest.mark.parametrize("settings", [settings_for, linear_for])
def test_the_numpy_runtime_agrees(settings):
    control_runs.assert_numpy_agrees(settings)


@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
def test_slots_do_not_matter(numpy):
    control_runs.assert_slots_do_not_matter(settings_for, numpy)


ZERO = {
    "strength 0": ModelArithmetic(formula="base - 0.5*toxic", passes={"toxic": Prompt(TOXIC)}, strength=0.0),
    "a request's strength 0": settings_for(False).scaled(0.0),
    "the base alone": ModelArithmetic(formula="2*base + 0.5*max(base, base)"),
}


@pytest.mark.parametrize("control", ZERO.values(), ids=ZERO)
def test_zero_is_the_base(control):
    control_runs.assert_zero_is_the_base(control)


def test_every_rule_of_the_framework_holds():
    passes = {"a": Prompt([5, 6, 7]), "b": Prompt([9])}
    check_control(ModelArithmetic(formula="base - 0.7*max(a, b)", passes=passes))
    check_control(ModelArithmetic(formula="base + a - b/2", passes=passes))
    check_control(ModelArithmetic(formula="base + a - b/2", passes=passes, strength=0.0))
    control_runs.assert_rows_are_bit_equal_in_a_batch(settings_for(False))


def test_the_trace_adds_up():
    control_runs.assert_trace_adds_up(settings_for(False))


def test_policy_data():
    data = {"control": "arithmetic@1", "formula": "base-.5*max( base,toxic )", "passes": {"toxic": {"prompt": [60, 61, 62]}}}
    control = mg.Policy.load({"controls": [data]}).effective_controls()[0]
    assert control == ModelArithmetic(formula="base - 0.5*max(base, toxic)", passes={"toxic": Prompt(TOXIC)})
    written = write_control(control)
    assert written["formula"] == "base - 0.5*max(base, toxic)"
    assert mg.Policy.load({"controls": [written]}).effective_controls()[0] == control
    assert control.scaled(0.5).strength == 0.5


def test_bad_settings_are_told_when_the_guard_is_built():
    toxic = {"toxic": Prompt(TOXIC)}
    wrong = {
        "'toxik', which isn't a pass; did you mean 'toxic'": ("base - 0.5*toxik", toxic),
        "pass 'kind' isn't in the formula": ("base - 0.5*toxic", toxic | {"kind": Prompt(KIND)}),
        "names 'base', which is the guarded model itself": ("base + toxic", toxic | {"base": Prompt(KIND)}),
        "pass 'toxic' is empty": ("base + toxic", {"toxic": None}),
        "add up to 0": ("base - toxic", toxic),
        "division by zero": ("base/0 + toxic", toxic),
    }
    for message, (formula, passes) in wrong.items():
        with pytest.raises(PolicyError, match=message):
            ModelArithmetic(formula=formula, passes=passes)
    with pytest.raises(PolicyError, match=r"arithmetic pass 'toxic' holds token id 4000, outside the vocabulary"):
        guard_of(tiny_models.llama(0), "base - 0.5*toxic", {"toxic": Prompt([4000])})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelArithmetic(formula="base - 0.96*max(base, toxic)", passes=toxic)
