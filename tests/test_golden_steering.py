"""Steering against its formulas, layer by layer in float64, and every rule that a control keeps."""

from __future__ import annotations

import json

import control_runs
import numpy as np
import pytest
import tiny_models
import torch
from numpy_model import NumpyModel
from oracles import TOLERANCE, Reference, check_greedy, distance, run_attached
from safetensors.torch import save_file

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.controls import Prompt, SteeringVectors
from moralguard.controls.guidance import Guidance
from moralguard.controls.registry import write_control
from moralguard.decoding.gate import Gate
from moralguard.errors import ModelError, PolicyError
from moralguard.packs import write_pack
from moralguard.testing import check_control

PROMPTS = [[8], [5, 9, 20, 7, 33, 41, 2], [100, 3, 77]]
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
LAYERS = {"llama": 2, "gpt2": 3, "gpt_neox": 2}


def vector(seed=0, size=2.0):
    v = torch.randn(tiny_models.HIDDEN, generator=torch.Generator().manual_seed(seed))
    return size * v


@pytest.fixture(params=["llama", "gpt2", "gpt_neox"])
def family(request):
    return request.param


def guard_of(model, *controls, **policy):
    return mg.Guard(mg.Policy(controls=controls, **policy), (model, None))


class Edited(torch.nn.Module):
    """A block whose output goes through a plain function."""

    def __init__(self, block, rule):
        super().__init__()
        self.block, self.rule = block, rule

    def forward(self, *args, **kwargs):
        return self.rule(self.block(*args, **kwargs))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


def oracle(family, seed, rules):
    """The law of a float64 copy whose block n (from 1) is followed by rules[n], a function of states f64[1, T, d]."""
    reference = Reference(tiny_models.FAMILIES[family](seed))
    blocks = reference.model.get_submodule(BLOCKS[family])
    for layer, rule in rules.items():
        blocks[layer - 1] = Edited(blocks[layer - 1], rule)
    return reference.log_law


def add(v, strength=1.0, keep_norm=False):
    v = v.double()

    def rule(h):
        new = h + strength * v
        return new * h.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True) if keep_norm else new

    return rule


def ablate(v, strength=1.0):
    u = v.double() / v.double().norm()
    return lambda h: h - strength * torch.einsum("btd,d->bt", h, u)[..., None] * u


CASES = {
    "add": ({"vectors": {1: vector()}}, lambda _: {1: add(vector())}),
    "add at two layers": (
        {"vectors": {1: vector(), 2: vector(1)}, "strength": 1.5},
        lambda _: {1: add(vector(), 1.5), 2: add(vector(1), 1.5)},
    ),
    "one of two layers": ({"vectors": {1: vector(), 2: vector(1)}, "layers": (2,)}, lambda _: {2: add(vector(1))}),
    "away": ({"vectors": {2: vector()}, "strength": -0.7}, lambda _: {2: add(vector(), -0.7)}),
    "norm kept": ({"vectors": {1: vector()}, "keep_norm": True, "strength": 3.0}, lambda _: {1: add(vector(), 3.0, True)}),
    "one vector at all": ({"vectors": {1: vector()}, "layers": "all"}, lambda n: {k: add(vector()) for k in range(1, n + 1)}),
    "ablate": ({"vectors": {1: vector()}, "operation": "ablate"}, lambda n: {k: ablate(vector()) for k in range(1, n + 1)}),
    "ablate half at one": (
        {"vectors": {1: vector()}, "operation": "ablate", "layers": (2,), "strength": 0.5},
        lambda _: {2: ablate(vector(), 0.5)},
    ),
}


def check(family, settings, rules):
    model = tiny_models.FAMILIES[family](0)
    check_greedy(guard_of(model, SteeringVectors(**settings)), model, oracle(family, 0, rules), PROMPTS, 5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_law(family, case):
    settings, rules = case
    check(family, settings, rules(LAYERS[family]))


WRONG = {
    "strength off by 10 %": {1: add(vector(), 1.1)},
    "another layer": {2: add(vector())},
    "the other way": {1: add(vector(), -1.0)},
    "norm kept": {1: add(vector(), 1.0, True)},
    "ablated": {1: ablate(vector())},
    "nothing": {},
}


@pytest.mark.parametrize("rules", WRONG.values(), ids=WRONG)
def test_a_wrong_oracle_disagrees(rules):
    model = tiny_models.llama(0)
    run = run_attached(guard_of(model, SteeringVectors(vectors={1: vector()})), model, PROMPTS, 5)
    assert distance(run, oracle("llama", 0, {1: add(vector())}), PROMPTS) <= TOLERANCE
    assert distance(run, oracle("llama", 0, rules), PROMPTS) > 10 * TOLERANCE


def settings_for(_numpy=False):
    return SteeringVectors(vectors={1: vector(), 2: vector(1)}, strength=0.8)


def test_slots_do_not_matter():
    control_runs.assert_slots_do_not_matter(settings_for)


@pytest.mark.parametrize("control", [SteeringVectors(vectors={1: vector()}, strength=0.0), settings_for().scaled(0.0)], ids=["0", "scaled"])
def test_zero_is_the_base(control):
    control_runs.assert_zero_is_the_base(control)


def test_every_rule_of_the_framework_holds():
    check_control(settings_for())
    check_control(SteeringVectors(vectors={1: vector().tolist()}, operation="ablate", keep_norm=True))
    check_control(SteeringVectors(vectors={1: vector()}, strength=0.0))
    control_runs.assert_rows_are_bit_equal_in_a_batch(settings_for())


def test_the_trace_adds_up():
    control_runs.assert_trace_adds_up(settings_for())


def test_scaling_multiplies_the_strength():
    check("llama", {"vectors": {1: vector()}, "strength": 0.5}, {1: add(vector(), 0.5)})
    assert SteeringVectors(vectors={1: vector()}, strength=2.0).scaled(0.25).strength == 0.5


def test_beside_other_controls_deltas_add():
    """One forward carries the base's row, the edited rows and a prompted row."""
    model = tiny_models.llama(0)
    base, steered = Reference(model), oracle("llama", 0, {1: add(vector())})
    prompted = lambda ids: base.log_law([3, 4, *ids])  # noqa: E731
    expected = lambda ids: torch.log_softmax(steered(ids) + 0.5 * (prompted(ids) - base.log_law(ids)), -1)  # noqa: E731
    guard = guard_of(model, SteeringVectors(vectors={1: vector()}), Guidance(positive=Prompt([3, 4]), gamma=1.0, strength=0.5))
    check_greedy(guard, model, expected, PROMPTS, 5)


def test_closed_gate_leaves_the_base():
    model = tiny_models.llama(0)
    steered, base = oracle("llama", 0, {1: add(vector())}), Reference(model)
    guard = guard_of(model, SteeringVectors(vectors={1: vector()}), gate=Gate(first_tokens=2))
    prompt = PROMPTS[1]
    run = run_attached(guard, model, [prompt], 4)
    for index, law in enumerate((steered, steered, base.log_law, base.log_law)):
        expected = law([*prompt, *run.tokens[0][:index]])
        assert float((run.laws[0, index].exp() - expected.exp()).abs().max()) <= TOLERANCE


def test_what_the_base_removed_stays_removed():
    guard = guard_of(tiny_models.llama(0), settings_for())
    processor = guard.logits_processor()
    ids = torch.tensor([[5, 9, 20]])
    scores = guard.lm.model(ids).logits[:, -1].detach().clone()
    scores[:, ::3] = -torch.inf
    guarded = processor(ids, scores)
    assert torch.isneginf(guarded[:, ::3]).all()
    assert torch.isfinite(guarded[:, 1::3]).all()
    assert not np.allclose(torch.log_softmax(guarded, -1)[:, 1::3], torch.log_softmax(scores, -1)[:, 1::3], atol=1e-2)


class TestPolicyData:
    def test_numbers(self):
        data = {"control": "steering@1", "vectors": {"1": [0.5] * tiny_models.HIDDEN}, "strength": 2.0, "operation": "ablate"}
        control = mg.Policy.load({"controls": [data]}).effective_controls()[0]
        written = write_control(control)
        assert "keep_norm" not in written
        assert json.loads(json.dumps(written)) == data
        assert mg.Policy.load({"controls": [written]}).effective_controls()[0] == control

    def test_a_file_and_a_pack(self, tmp_path):
        model = tiny_models.llama(0)
        expected = oracle("llama", 0, {2: add(vector(3))})
        lm = LanguageModel(model, None, "tiny")
        folder = tmp_path / "pack"
        folder.mkdir()
        for path in (tmp_path / "bare.safetensors", folder / "vectors.safetensors"):
            save_file({"layer.2": vector(3)}, path)
        write_pack(folder, kind="steering-vectors", method="m", lm=lm, name="n", data=(), settings={}, metrics={})
        for source in (tmp_path / "bare.safetensors", folder):
            guard = mg.Guard({"controls": [{"control": "steering@1", "vectors": str(source)}]}, lm)
            check_greedy(guard, model, expected, PROMPTS[:2], 3)
        with pytest.raises(ModelError, match="was fitted on tiny, which isn't"):
            guard_of(tiny_models.llama(1), SteeringVectors(vectors=str(folder)))


class TestErrors:
    def test_settings(self, tmp_path):
        for settings, message in (
            ({"vectors": [1.0]}, "expected a pack, a file, or {layer: vector}"),
            ({"vectors": {}}, "one width and one layer at least"),
            ({"vectors": {"first": vector()}}, "expected the number of a layer"),
            ({"vectors": {0: vector()}}, "expected the number of a layer"),
            ({"vectors": {1: torch.zeros(32)}}, "not all 0"),
            ({"vectors": {1: torch.ones(2, 16)}}, r"shape \(2, 16\)"),
            ({"vectors": {1: ["a"]}}, "expected numbers"),
            ({"vectors": {1: vector(), 2: torch.ones(8)}}, "vectors of 8, 32 numbers"),
            ({"vectors": {1: vector(), 2: vector()}, "layers": (3,)}, "no vector for layer 3; it has layers 1, 2"),
            ({"vectors": {1: vector(), 2: vector()}, "layers": "all"}, "only a single one"),
            ({"vectors": {1: vector()}, "layers": ()}, "empty list of layers"),
            ({"vectors": {1: vector()}, "operation": "ad"}, "add"),
            ({"vectors": {1: vector()}, "strenght": 1.0}, "did you mean 'strength'"),
            ({"vectors": str(tmp_path / "none.safetensors")}, "aren't there"),
        ):
            with pytest.raises(PolicyError, match=message):
                SteeringVectors(**settings)
        save_file({"basis": vector()}, tmp_path / "other.safetensors")
        with pytest.raises(PolicyError, match="holds 'basis'"):
            SteeringVectors(vectors=str(tmp_path / "other.safetensors"))

    def test_are_told_when_the_guard_is_built(self):
        model = tiny_models.llama(0)
        with pytest.raises(PolicyError, match=r"names layer 3, but .* has layers 1 to 2"):
            guard_of(model, SteeringVectors(vectors={3: vector()}))
        with pytest.raises(PolicyError, match=r"'model.layers.0' gives states of 32 numbers, but its edit is for 8"):
            guard_of(model, SteeringVectors(vectors={1: torch.ones(8)}))
        with pytest.raises(PolicyError, match=r"needs .*edits, which .* doesn't offer; .* PyTorch model"):
            mg.Guard(mg.Policy(controls=[SteeringVectors(vectors={1: vector()})]), NumpyModel(tiny_models.llama(0)))
