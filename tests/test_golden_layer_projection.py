"""Layer-wise projections and filters against their formulas in float64, and every rule that a control keeps."""

from __future__ import annotations

import json

import control_runs
import numpy as np
import pytest
import tiny_models
import torch
from numpy_model import NumpyModel
from odd_models import basis
from oracles import TOLERANCE, Reference, check_greedy, distance, run_attached
from safetensors.torch import save_file
from word_tokenizer import WordTokenizer

import moralguard as mg
from moralguard.backends.edits import edited
from moralguard.backends.hf import LanguageModel
from moralguard.controls import LayerProjection, NullspaceProjection
from moralguard.controls.registry import write_control
from moralguard.errors import DataError, ModelError, PolicyError
from moralguard.fitting.labelled import checked
from moralguard.fitting.probe import probe
from moralguard.fitting.subspace_fit import fit_subspace
from moralguard.packs import write_pack
from moralguard.testing import check_control

PROMPTS = [[8], [5, 9, 20, 7, 33, 41, 2], [100, 3, 77]]
D = tiny_models.HIDDEN
U, U_OUT, MU = basis(3), basis(3, seed=6) * 0.8, torch.linspace(-1, 1, D)
NAMES = {"llama": ("model.layers.0", "model.layers.1.mlp"), "gpt2": ("transformer.h.1", "transformer.h.2.attn")}


def random(*shape, seed):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


FILTER = ((random(20, D, seed=1), random(20, seed=2)), (random(D, 20, seed=3), random(D, seed=4)))


@pytest.fixture(params=["llama", "gpt2"])
def family(request):
    return request.param


def guard_of(model, *controls, **policy):
    return mg.Guard(mg.Policy(controls=controls, **policy), (model, None))


def oracle(model, names, rule):
    """The law of a float64 copy in which the methods that compute the named modules' outputs are wrapped: no hooks."""
    reference = Reference(model)
    for name in names:
        module = reference.model.get_submodule(name)

        def wrapped(*args, plain=module.forward, **kwargs):
            out = plain(*args, **kwargs)
            return (rule(out[0]), *out[1:]) if isinstance(out, tuple) else rule(out)

        module.forward = wrapped
    return reference.log_law


def project(u_in, u_out, mu=None, keep=0.0):
    u_in, u_out = u_in.double(), u_out.double()
    mu = torch.zeros(D).double() if mu is None else mu.double()
    return lambda h: keep * h + (1 - keep) * (h - torch.einsum("btd,dr,er->bte", h - mu, u_in, u_out))


def filtered(layers, keep=0.0):
    (w0, b0), (w1, b1) = ((w.double(), b.double()) for w, b in layers)
    return lambda h: keep * h + (1 - keep) * (torch.relu(h @ w0.T + b0) @ w1.T + b1)


CASES = {
    "inlp": ({"basis": U}, project(U, U)),
    "inlp, a share stays": ({"basis": U, "keep": 0.4}, project(U, U, keep=0.4)),
    "leace": ({"basis": (U, U_OUT, MU)}, project(U, U_OUT, MU)),
    "one direction": ({"basis": U[:, 0]}, project(U[:, :1], U[:, :1])),
    "filter": ({"filter": FILTER}, filtered(FILTER)),
    "filter, a share stays": ({"filter": FILTER, "keep": 0.7}, filtered(FILTER, 0.7)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_law(family, case):
    settings, rule = case
    model = tiny_models.FAMILIES[family](0)
    expected = oracle(model, NAMES[family], rule)  # modules that give tensors and ones that give tuples
    check_greedy(guard_of(model, LayerProjection(modules=NAMES[family], **settings)), model, expected, PROMPTS, 5)


def test_layers_by_number():
    model = tiny_models.llama(0)
    expected = oracle(model, ("model.layers.1",), project(U, U))
    check_greedy(guard_of(model, LayerProjection(modules=(2,), basis=U)), model, expected, PROMPTS, 5)


@pytest.mark.parametrize("removed", [U, (U, U_OUT, MU)], ids=["inlp", "leace"])
def test_behind_the_final_norm_it_is_nullspace_projection(removed):
    """Two ways to the same law: the edited pass, and the low-rank term on the head."""
    model = tiny_models.llama(0)
    edited, low_rank = (
        run_attached(guard_of(model, control), model, PROMPTS, 5).laws
        for control in (LayerProjection(modules=("model.norm",), basis=removed), NullspaceProjection(basis=removed))
    )
    assert float((edited.exp() - low_rank.exp()).abs().max()) <= TOLERANCE


WRONG = {
    "keep off": (NAMES["llama"], project(U, U, keep=0.1)),
    "half of the modules": (NAMES["llama"][:1], project(U, U)),
    "sides swapped": (NAMES["llama"], project(U, -U)),
    "nothing": ((), project(U, U)),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_a_wrong_oracle_disagrees(case):
    model = tiny_models.llama(0)
    run = run_attached(guard_of(model, LayerProjection(modules=NAMES["llama"], basis=U)), model, PROMPTS, 5)
    assert distance(run, oracle(model, *case), PROMPTS) > 10 * TOLERANCE


def settings_for(_numpy=False):
    return LayerProjection(modules=(1, "model.layers.1.mlp"), basis=(U, U_OUT, MU), keep=0.2)


def test_slots_do_not_matter():
    control_runs.assert_slots_do_not_matter(settings_for)


@pytest.mark.parametrize("control", [LayerProjection(modules=(1,), basis=U, keep=1.0), settings_for().scaled(0.0)], ids=["1", "scaled"])
def test_keeping_all_is_the_base(control):
    control_runs.assert_zero_is_the_base(control)


def test_every_rule_of_the_framework_holds():
    check_control(settings_for())
    check_control(LayerProjection(modules=("model.norm",), filter=FILTER))
    check_control(LayerProjection(modules=(1,), basis=U, keep=1.0))
    control_runs.assert_rows_are_bit_equal_in_a_batch(settings_for())


def test_the_trace_adds_up():
    control_runs.assert_trace_adds_up(settings_for())


def test_scaling_removes_more_up_to_the_whole():
    control = LayerProjection(modules=(1,), basis=U, keep=0.6)
    assert control.scaled(0.5).keep == pytest.approx(0.8)
    assert control.scaled(9.0).keep == 0.0


class TestPolicyData:
    def test_files(self, tmp_path):
        save_file({"basis": U.contiguous()}, tmp_path / "basis.safetensors")
        save_file(
            {f"{part}.{i}": t for i, pair in enumerate(FILTER) for part, t in zip(("weight", "bias"), pair, strict=True)},
            tmp_path / "f.safetensors",
        )
        model = tiny_models.llama(0)
        for name, file, rule in (
            ("basis", "basis.safetensors", project(U, U, keep=0.3)),
            ("filter", "f.safetensors", filtered(FILTER, 0.3)),
        ):
            data = {"control": "layer-projection@1", "modules": [1, "model.layers.1.mlp"], name: str(tmp_path / file), "keep": 0.3}
            control = mg.Policy.load({"controls": [data]}).effective_controls()[0]
            assert json.loads(json.dumps(write_control(control))) == data
            expected = oracle(model, NAMES["llama"], rule)
            check_greedy(guard_of(model, control), model, expected, PROMPTS[:2], 3)
            check_control(control, model=model, prompts=PROMPTS)

    def test_a_pack(self, tmp_path):
        model, folder = tiny_models.llama(0), tmp_path / "pack"
        folder.mkdir()
        save_file({"basis": U.contiguous()}, folder / "basis.safetensors")
        write_pack(
            folder, kind="subspace", method="m", lm=LanguageModel(model, None, "tiny"), name="n", data=(), settings={"layer": 1}, metrics={}
        )
        control = LayerProjection(modules=(1,), basis=str(folder))
        check_greedy(guard_of(model, control), model, oracle(model, ("model.layers.0",), project(U, U)), PROMPTS[:2], 3)
        with pytest.raises(ModelError, match="was fitted on tiny, which isn't"):
            guard_of(tiny_models.llama(1), control)
        with pytest.raises(PolicyError, match=r"states of layer 1, which aren't those of layer 2"):
            LayerProjection(modules=(1, 2), basis=str(folder))
        with pytest.raises(PolicyError, match=r"states of layer 1, and nullspace edits those that the head reads; use layer-projection"):
            NullspaceProjection(basis=str(folder))


class TestFitted:
    """A subspace of a layer's own states, from texts to the guard."""

    @pytest.fixture
    def lm(self):
        return LanguageModel(tiny_models.llama(0, layers=3), WordTokenizer(), "tiny")

    @pytest.fixture
    def texts(self):
        rows = [
            (f"{i % 6} {i // 6} a {word}", label, "test" if i % 5 == 0 else "train")
            for i in range(160)
            for label, word in enumerate(("cat", "dog"))
        ]
        return checked(rows, ["cat", "dog"])

    def test_a_subspace_of_a_layer(self, lm, texts, tmp_path):
        found = fit_subspace(lm, texts, "leace", layer=2)
        assert found.metrics["probe"]["before"] > 0.8
        assert found.metrics["probe"]["after"] < 0.65
        found.save(tmp_path / "pack")
        write_pack(tmp_path / "pack", kind="subspace", method="m", lm=lm, name="n", data=(), settings=found.settings, metrics=found.metrics)
        guard = mg.Guard(mg.Policy(controls=[LayerProjection(modules=(2,), basis=str(tmp_path / "pack"))]), lm)
        rule = project(found.subspace.u_in, found.subspace.u_out, found.subspace.mu)
        check_greedy(guard, lm.model, oracle(lm.model, ("model.layers.1",), rule), PROMPTS[:2], 3)
        ids = torch.tensor([WordTokenizer()(row.text)["input_ids"] for row in texts.rows])
        read = []
        with torch.no_grad(), edited(lm.model, {"model.layers.1": guard.controls[0].settings.edit()}):
            hook = lm.model.model.layers[2].register_forward_pre_hook(lambda _module, args: read.append(args[0]))
            lm.model(ids)
            hook.remove()
        states = read[0][:, -1].double()
        labels = torch.tensor([row.label for row in texts.rows])
        held = torch.tensor([row.split == "test" for row in texts.rows])
        assert probe(states, labels, held=held).before < 0.65  # what the next block reads tells the concept no more

    def test_errors(self, lm, texts):
        for layer in (0, 3):
            with pytest.raises(DataError, match=f"layer is {layer}; expected 1 to 2, or -1"):
                fit_subspace(lm, texts, "leace", layer=layer)
        with pytest.raises(DataError, match="leave the layer out"):
            fit_subspace(lm, texts, "directions", counterparts=[(1, 2)], layer=1)


class TestErrors:
    def test_settings(self, tmp_path):
        save_file({"weight.0": U.contiguous(), "bias.1": MU}, tmp_path / "odd.safetensors")
        for settings, message in (
            ({"modules": (1,)}, "either a basis .* or a filter"),
            ({"modules": (1,), "basis": U, "filter": FILTER}, "either a basis .* or a filter"),
            ({"modules": (), "basis": U}, "at least 1 item"),
            ({"modules": (0,), "basis": U}, "modules"),
            ({"modules": (1,), "basis": 2 * U}, "isn't orthonormal"),
            ({"modules": (1,), "basis": U, "keep": 1.2}, "keep"),
            ({"modules": (1,), "filter": []}, r"pairs \(weight"),
            ({"modules": (1,), "filter": [(U, MU, MU)]}, r"pairs \(weight"),
            ({"modules": (1,), "filter": [("a", "b")]}, "filter holds a str"),
            ({"modules": (1,), "filter": str(tmp_path / "none.safetensors")}, "isn't there"),
            ({"modules": (1,), "filter": str(tmp_path / "odd.safetensors")}, "holds bias.1, weight.0; expected weight.0, bias.0"),
            ({"module": (1,), "basis": U}, "did you mean 'modules'"),
        ):
            with pytest.raises(PolicyError, match=message):
                LayerProjection(**settings)

    def test_are_told_when_the_guard_is_built(self):
        model = tiny_models.llama(0)
        for settings, message in (
            ({"modules": (3,), "basis": U}, r"names layer 3, but .* has layers 1 to 2"),
            ({"modules": ("model.layers.0.mpl",), "basis": U}, r"no module 'model.layers.0.mpl'; did you mean 'model.layers.0.mlp'"),
            ({"modules": ("model.layers.0.mlp.up_proj",), "basis": U}, r"gives states of 48 numbers, but its edit is for 32"),
            ({"modules": ("model.rotary_emb",), "basis": U}, r"'model.rotary_emb' gives states of 8 numbers"),
            ({"modules": (1,), "filter": FILTER[:1]}, r"a filter maps 32 numbers to 20"),
            ({"modules": (1,), "filter": [(U.T, MU)]}, r"layer 0 of a filter has weight \(3, 32\), bias \(32,\)"),
        ):
            with pytest.raises((PolicyError, ModelError), match=message):
                guard_of(model, LayerProjection(**settings))
        with pytest.raises(PolicyError, match=r"needs .*edits, which .* doesn't offer; .* PyTorch model"):
            mg.Guard(mg.Policy(controls=[settings_for()]), NumpyModel(tiny_models.llama(0)))
        assert not np.any([len(module._forward_hooks) for module in model.modules()])
