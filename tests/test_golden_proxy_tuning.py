"""Proxy-tuning against its formula: z + alpha (z+ - z-) on the base's vocabulary."""

from __future__ import annotations

import control_runs
import pytest
import tiny_models
import torch
from numpy_model import NumpyModel
from odd_models import byte_llama, byte_tokenizer, expert
from oracles import TOLERANCE, Reference, check_greedy, distance, run_attached
from scipy.special import log_softmax

import moralguard as mg
from moralguard.controls import DExperts, Prompt, ProxyTuning
from moralguard.controls.registry import write_control
from moralguard.errors import ModelError, PolicyError
from moralguard.testing import check_control

PROMPTS = [[8], [5, 9, 20, 7, 33, 41, 2], [100, 3, 77]]
WIDER = tiny_models.VOCAB + 5


@pytest.fixture(params=["llama", "gpt2"])
def family(request):
    return tiny_models.FAMILIES[request.param]


def guard_of(model, **settings):
    return mg.Guard(mg.Policy(controls=[ProxyTuning(**settings)]), (model, None))


def oracle(base, expert, anti_expert, alpha=1.0):
    def law(ids):
        z, plus, minus = (model.logits(ids).numpy() for model in (base, expert, anti_expert))
        return torch.from_numpy(log_softmax(z + alpha * (plus[: len(z)] - minus[: len(z)])))

    return law


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.5}, {"alpha": 2.5}], ids=["defaults", "alpha 0.5", "alpha 2.5"])
@pytest.mark.parametrize("widths", [(tiny_models.VOCAB, tiny_models.VOCAB), (WIDER, tiny_models.VOCAB), (WIDER, WIDER + 1)], ids=str)
def test_law(family, settings, widths):
    model, tuned, untuned = family(0), family(1, vocab=widths[0]), family(2, vocab=widths[1])
    expected = oracle(Reference(model), Reference(tuned), Reference(untuned), **settings)
    check_greedy(guard_of(model, expert=tuned, anti_expert=untuned, **settings), model, expected, PROMPTS)


WRONG = {
    "alpha off by 10 %": lambda base, tuned, untuned: oracle(base, tuned, untuned, alpha=1.1),
    "experts swapped": lambda base, tuned, untuned: oracle(base, untuned, tuned),
    "the tuned model alone": lambda base, tuned, untuned: tuned.log_law,
}


@pytest.mark.parametrize("mistake", WRONG.values(), ids=WRONG)
def test_a_wrong_oracle_disagrees(family, mistake):
    model, tuned, untuned = family(0), family(1), family(2)
    run = run_attached(guard_of(model, expert=tuned, anti_expert=untuned), model, PROMPTS)
    assert distance(run, mistake(Reference(model), Reference(tuned), Reference(untuned)), PROMPTS) > 10 * TOLERANCE


def test_it_is_dexperts_with_alpha_1_and_no_filter():
    model, tuned = tiny_models.llama(0), tiny_models.llama(1)
    settings = {"expert": tuned, "anti_expert": Prompt([3, 4])}
    dexperts = mg.Guard(mg.Policy(controls=[DExperts(**settings, alpha=1.0, filter_p=1.0)]), (model, None))
    runs = [run_attached(guard, model, PROMPTS) for guard in (guard_of(model, **settings), dexperts)]
    assert torch.equal(runs[0].scores, runs[1].scores)


def settings_for(numpy):
    models = (expert(), tiny_models.llama(31, vocab=WIDER, layers=1))
    tuned, untuned = (NumpyModel(model) if numpy else model for model in models)
    return ProxyTuning(expert=tuned, anti_expert=untuned, alpha=0.8)


def test_the_numpy_runtime_agrees():
    control_runs.assert_numpy_agrees(settings_for)


@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
def test_slots_do_not_matter(numpy):
    control_runs.assert_slots_do_not_matter(settings_for, numpy)


@pytest.mark.parametrize("control", [settings_for(False).scaled(0.0), ProxyTuning(expert=Prompt([1]), anti_expert=Prompt([2]), alpha=0.0)])
def test_alpha_0_is_the_base(control):
    control_runs.assert_zero_is_the_base(control)


def test_every_rule_of_the_framework_holds():
    check_control(ProxyTuning(expert=Prompt([5, 6, 7]), anti_expert=Prompt([9])))
    check_control(ProxyTuning(expert=Prompt([5]), anti_expert=Prompt([9]), alpha=0.0))
    control_runs.assert_rows_are_bit_equal_in_a_batch(settings_for(False))


def test_the_trace_adds_up():
    control_runs.assert_trace_adds_up(settings_for(False))


def test_policy_data():
    data = {"control": "proxy-tuning@1", "expert": {"prompt": [3, 4]}, "anti_expert": {"prompt": [60]}, "alpha": 0.7}
    control = mg.Policy.load({"controls": [data]}).effective_controls()[0]
    assert control == ProxyTuning(expert=Prompt([3, 4]), anti_expert=Prompt([60]), alpha=0.7)
    assert mg.Policy.load({"controls": [write_control(control)]}).effective_controls()[0] == control
    assert control.scaled(2.0).alpha == 1.4


def test_bad_settings_are_told_when_the_guard_is_built():
    with pytest.raises(PolicyError, match="anti_expert"):
        ProxyTuning(expert=Prompt([1]))
    with pytest.raises(PolicyError, match="has no expert; give the small model tuned"):
        ProxyTuning(expert=None, anti_expert=Prompt([1]))
    with pytest.raises(PolicyError, match="alpha"):
        ProxyTuning(expert=Prompt([1]), anti_expert=Prompt([2]), alpha=-1.0)
    with pytest.raises(ModelError, match="100 vocabulary entries"):
        guard_of(tiny_models.llama(0), expert=tiny_models.llama(1, vocab=100), anti_expert=Prompt([2]))
    with pytest.raises(ModelError, match="use two of a kind"):
        guard_of(tiny_models.llama(0), expert=NumpyModel(tiny_models.llama(1, vocab=WIDER)), anti_expert=Prompt([2]))


def test_a_wider_expert_must_have_the_base_models_tokens():
    base, tokenizer = byte_llama(), byte_tokenizer()
    wider = tiny_models.llama(4, vocab=len(tokenizer) + 3)
    same, other = byte_tokenizer(), byte_tokenizer()
    same.add_tokens(["<pad>"])
    settings = {"anti_expert": Prompt("rude")}
    guard = mg.Guard(mg.Policy(controls=[ProxyTuning(expert=(wider, same), **settings)]), (base, tokenizer))
    assert len(guard.generate("Hello", max_new_tokens=3, seed=0).token_ids[0]) == 3
    vocabulary = other.get_vocab()
    swapped = {"a": vocabulary["b"], "b": vocabulary["a"]}
    other.get_vocab = lambda: vocabulary | swapped
    with pytest.raises(ModelError, match="has another id there; only entries behind the base's own can be cut"):
        mg.Guard(mg.Policy(controls=[ProxyTuning(expert=(wider, other), **settings)]), (base, tokenizer))
