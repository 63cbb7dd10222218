"""Edits of hidden states outside a guard: the rules against their formulas, and what must hold of the hooks."""

from __future__ import annotations

import threading

import pytest
import tiny_models
import torch
from torch import nn

from moralguard.backends.edit_rules import Ablation, Addition, Filter, Projection
from moralguard.backends.edits import apply_edits, bind_edits, edited, find_modules, layer_modules
from moralguard.backends.hf import LanguageModel
from moralguard.errors import ModelError
from moralguard.testing import _snapshot

WIDTH = 6


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STATES = random(3, 4, WIDTH)
V, MU = random(WIDTH, seed=1), random(WIDTH, seed=2)
U_IN, U_OUT = random(WIDTH, 2, seed=3), random(WIDTH, 2, seed=4)
LAYERS = ((random(5, WIDTH, seed=5), random(5, seed=6)), (random(WIDTH, 5, seed=7), random(WIDTH, seed=8)))


def unit(v):
    return v / v.double().norm()


def rescaled(h, new):
    return new * (h.norm() / new.norm())


# what happens to one state h f64[d] at one strength
RULES = {
    "add": (lambda s: Addition(V, strength=s), lambda h, s: h + s * V),
    "add, norm kept": (lambda s: Addition(V, keep_norm=True, strength=s), lambda h, s: rescaled(h, h + s * V)),
    "ablate": (lambda s: Ablation(V, strength=s), lambda h, s: h - s * (h @ unit(V.double())) * unit(V)),
    "ablate, norm kept": (
        lambda s: Ablation(V, keep_norm=True, strength=s),
        lambda h, s: rescaled(h, h - s * (h @ unit(V.double())) * unit(V)),
    ),
    "project": (
        lambda s: Projection(U_IN, U_OUT, MU, strength=s),
        lambda h, s: h - s * U_OUT.double() @ (U_IN.double().T @ (h - MU)),
    ),
    "project about 0": (lambda s: Projection(U_IN, U_IN, strength=s), lambda h, s: h - s * U_IN.double() @ (U_IN.double().T @ h)),
    "filter": (
        lambda s: Filter(LAYERS, strength=s),
        lambda h, s: (
            (1 - s) * h + s * (LAYERS[1][0].double() @ torch.clamp(LAYERS[0][0].double() @ h + LAYERS[0][1], min=0) + LAYERS[1][1])
        ),
    ),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
class TestRules:
    def test_formula_row_by_row(self, rule):
        strengths = torch.tensor([1.0, -0.5, 0.0])
        build, naive = rule
        found = build(strengths)(STATES)
        for row, strength in enumerate(strengths):
            for place in range(STATES.shape[1]):
                expected = naive(STATES[row, place].double(), float(strength))
                assert torch.allclose(found[row, place].double(), expected, atol=1e-5)
        assert torch.equal(found[2], STATES[2])  # strength 0, bit for bit
        assert torch.equal(build(1.0)(STATES)[0], found[0])
        assert not torch.allclose(found[0], STATES[0], atol=1e-2)

    def test_in_double_and_of_vectors(self, rule):
        build, naive = rule
        vectors = STATES[:, 0].double()  # [R, d], as a pooled text
        expected = torch.stack([naive(h, 0.7) for h in vectors])
        assert torch.allclose(build(0.7)(vectors), expected, atol=1e-6)

    def test_strengths_that_do_not_fit(self, rule):
        with pytest.raises(ModelError, match=r"shape \(2,\); expected one number, or one for each of 3 rows"):
            rule[0](torch.ones(2))(STATES)


def test_a_state_of_length_0_keeps_it():
    assert torch.equal(Addition(V, keep_norm=True)(torch.zeros(1, 1, WIDTH)), torch.zeros(1, 1, WIDTH))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Addition(U_IN), r"shape \(6, 2\); expected 1 dimensions"),
        (lambda: Addition(V * float("nan")), "finite"),
        (lambda: Ablation(0 * V), "has no direction"),
        (lambda: Projection(U_IN, U_OUT[:, :1]), r"got shapes \(6, 2\), \(6, 1\), None"),
        (lambda: Projection(U_IN, U_OUT, MU[:2]), r"\(2,\)"),
        (lambda: Filter(()), "no layers"),
        (lambda: Filter(LAYERS[:1]), "maps 6 numbers to 5"),
        (lambda: Filter((LAYERS[0], LAYERS[0])), r"layer 1 of a filter .* expected \[n, 5\]"),
    ],
)
def test_wrong_tensors(build, message):
    with pytest.raises(ModelError, match=message):
        build()


class Pair(nn.Module):
    """A module with several outputs."""

    def forward(self, x):
        return x + 1, "kept"


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(WIDTH, WIDTH), Pair(), nn.Linear(2, 2)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(WIDTH))
            self.first.bias.zero_()

    def forward(self, x):
        return self.second(self.first(x))


class TestEdited:
    def test_edits_and_restores(self):
        model = Two()
        before = _snapshot(model)
        with edited(model, {"first": Addition(V), "second": Addition(MU, strength=2.0)}) as same:
            assert same is model
            states, other = model(STATES)
        assert other == "kept"
        assert torch.allclose(states, STATES + V + 1 + 2 * MU, atol=1e-6)
        assert _snapshot(model) == before
        assert torch.equal(model(STATES)[0], STATES + 1)

    def test_nested(self):
        model = Two()
        with edited(model, {"first": Addition(V)}):
            with edited(model, {"first": Ablation(V)}):
                inner = model(STATES)[0]
            outer = model(STATES)[0]
        assert torch.allclose(inner, Ablation(V)(STATES + V) + 1, atol=1e-6)
        assert torch.allclose(outer, STATES + V + 1, atol=1e-6)

    def test_restores_after_an_exception(self):
        model = Two()
        before = _snapshot(model)
        with pytest.raises(ZeroDivisionError), edited(model, {"first": Addition(V)}):
            raise ZeroDivisionError
        assert _snapshot(model) == before

    def test_the_input_of_a_module_is_not_written_to(self):
        given = STATES.clone()
        model = nn.Sequential(nn.Identity())
        with edited(model, {"0": Addition(V)}):
            model(given)
        assert torch.equal(given, STATES)

    def test_gradients_flow(self):
        model, x = Two(), STATES.clone().requires_grad_()
        with edited(model, {"first": Ablation(V)}):
            (model(x)[0] @ V).sum().backward()
        assert float(x.grad.abs().max()) < 1e-5  # what was ablated can't be reached

    def test_half_precision_is_edited_in_single(self):
        model = nn.Sequential(nn.Identity())
        half = STATES.bfloat16()
        with edited(model, {"0": Ablation(V)}):
            found = model(half)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, Ablation(V)(half.float()).bfloat16())

    @pytest.mark.parametrize(
        ("edits", "message"),
        [
            ({"frist": Addition(V)}, "Two has no module 'frist'; did you mean 'first'"),
            ({"xyz": Addition(V)}, "it begins with first, second"),
            ({}, "no module is named"),
            ({"first": Addition(torch.ones(4))}, "'first' gives states of 6 numbers, but its edit is for 4"),
        ],
    )
    def test_errors(self, edits, message):
        model = Two()
        before = _snapshot(model)
        with pytest.raises(ModelError, match=message), edited(model, edits):
            model(STATES)
        assert _snapshot(model) == before

    def test_a_module_that_gives_no_states(self):
        model = nn.Sequential(nn.Flatten(0))
        with pytest.raises(ModelError, match="no hidden states"), edited(model, {"0": Addition(V)}):
            model(STATES)


class TestRows:
    def test_each_row_has_its_own(self):
        model = Two()
        one, other = (find_modules(model, {"first": Addition(V, strength=s)}) for s in (1.0, -2.0))
        with apply_edits([one, None, other]):
            found = model(STATES)[0]
        assert torch.allclose(found[0], STATES[0] + V + 1, atol=1e-6)
        assert torch.equal(found[1], STATES[1] + 1)
        assert torch.allclose(found[2], STATES[2] - 2 * V + 1, atol=1e-6)
        assert torch.equal(model(STATES)[0], STATES + 1)

    def test_other_threads_are_left_alone(self):
        model, found = Two(), []
        with apply_edits([find_modules(model, {"first": Addition(V)})] * 3):
            thread = threading.Thread(target=lambda: found.append(model(STATES)[0]))
            thread.start()
            thread.join()
        assert torch.equal(found[0], STATES + 1)

    @pytest.mark.parametrize("family", tiny_models.FAMILIES)
    def test_layers_by_number(self, family):
        lm = LanguageModel(tiny_models.FAMILIES[family](0))
        names = layer_modules(lm)
        assert list(names) == list(range(1, lm.model.config.num_hidden_layers + 1))
        captured = []
        hook = lm.model.get_submodule(names[1]).register_forward_hook(lambda _m, _a, out: captured.append(out))
        states = lm.model(torch.tensor([[3, 1, 4]]), output_hidden_states=True).hidden_states
        hook.remove()
        assert torch.equal(captured[0], states[1])

    def test_binding_tries_the_edits(self):
        lm = LanguageModel(tiny_models.llama(0), None, "tiny")
        wide = Addition(torch.ones(tiny_models.HIDDEN))
        assert len(bind_edits(lm, {"model.norm": wide, "model.layers.1.mlp": wide}).edits) == 2
        with pytest.raises(ModelError, match=r"did you mean 'model.layers.1.mlp'"):
            bind_edits(lm, {"model.layers.1.mpl": wide})
        with pytest.raises(ModelError, match=r"tiny doesn't call module 'model.layers'"):
            bind_edits(lm, {"model.layers": wide})
        assert not any(len(module._forward_hooks) for module in lm.model.modules())
