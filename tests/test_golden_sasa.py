"""SASA against its formula in float64 NumPy: every candidate read whole, with no cache, and probed; z + beta softmax(margins)."""

from __future__ import annotations

import control_runs
import numpy as np
import oracles
import pytest
import tiny_models
import torch
from odd_models import mistral
from oracles import TOLERANCE, Reference, check_greedy, distance, run_attached
from reward_functions import head, head_logits
from safetensors.numpy import save_file
from scipy.special import log_softmax, softmax

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.controls import SASA, NullspaceProjection
from moralguard.controls.registry import read_control, write_control
from moralguard.errors import PolicyError, UnsupportedPathError
from moralguard.packs import write_pack

RAGGED = [[8], [5, 9, 20, 7, 33, 41, 2], [100, 3, 77]]
RANDOM = np.random.default_rng(5)
PROBE = (RANDOM.normal(size=tiny_models.HIDDEN).astype(np.float32), 0.7)


@pytest.fixture(autouse=True)
def _one_thread():
    with oracles.one_thread():
        yield


def guard_of(model, *controls):
    return mg.Guard(mg.Policy(controls=list(controls)), (model, None))


def linear_margin(base, probe, pooling="last"):
    """W . s + b of the text with the candidate behind it, read from its first token on."""

    def margin(ids, candidate):
        states = base.states([*ids, candidate]).numpy()
        pooled = states[-1] if pooling == "last" else states.mean(0)
        return float(np.asarray(probe[0], np.float64) @ pooled + probe[1])

    return margin


def sasa(base, margin, *, beta, k=20):
    def law(ids):
        z = base.logits(ids).numpy()
        candidates = np.argsort(-z)[:k]
        margins = np.array([margin(ids, int(v)) for v in candidates])
        guarded = np.full(len(z), -np.inf)
        guarded[candidates] = z[candidates] + beta * softmax(margins)
        return torch.from_numpy(log_softmax(guarded))

    return law


@pytest.mark.parametrize("build", [tiny_models.llama, tiny_models.gpt2, tiny_models.gpt_neox], ids=lambda build: build.__name__)
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_law_of_a_linear_probe(build, pooling):
    model = build(0)
    base = Reference(model)
    control = SASA(probe=PROBE, beta=8.0, k=12, pooling=pooling)
    check_greedy(guard_of(model, control), model, sasa(base, linear_margin(base, PROBE, pooling), beta=8.0, k=12), RAGGED, 5)


def test_the_window_of_a_sliding_model_holds_for_candidates_too():
    model = mistral()
    base = Reference(model)
    check_greedy(guard_of(model, SASA(probe=PROBE, beta=8.0, k=8)), model, sasa(base, linear_margin(base, PROBE), beta=8.0, k=8), RAGGED, 8)


def test_the_law_of_a_prefix_head():
    model, factored = tiny_models.llama(0), head()
    base = Reference(model)

    def margin(ids, candidate):
        return head_logits(factored, base.states(ids)[-1].numpy(), base.unembedding.numpy())[candidate]

    check_greedy(guard_of(model, SASA(probe=factored, beta=6.0)), model, sasa(base, margin, beta=6.0), RAGGED[:2], 3)


@pytest.mark.parametrize("mistake", ["beta", "k", "pooling", "sign"])
def test_a_wrong_oracle_disagrees(mistake):
    model = tiny_models.llama(0)
    base = Reference(model)
    run = run_attached(guard_of(model, SASA(probe=PROBE, beta=8.0, k=12)), model, RAGGED, 5)
    probe = (-PROBE[0], PROBE[1]) if mistake == "sign" else PROBE
    margin = linear_margin(base, probe, "mean" if mistake == "pooling" else "last")
    settings = {"beta": 8.0, "k": 12} | {"beta": {"beta": 9.0}, "k": {"k": 11}}.get(mistake, {})
    assert distance(run, sasa(base, margin, **settings), RAGGED) > 10 * TOLERANCE


def test_the_bias_moves_nothing():
    """The softmax over the candidates takes it out, in the formula as here."""
    model = tiny_models.llama(0)
    laws = [run_attached(guard_of(model, SASA(probe=(PROBE[0], b), beta=8.0)), model, RAGGED, 3).laws for b in (0.0, 3.0)]
    assert float((laws[0].exp() - laws[1].exp()).abs().max()) < TOLERANCE


CONTROLS = {
    "last": lambda numpy: SASA(probe=PROBE, beta=8.0),
    "mean": lambda numpy: SASA(probe=PROBE, beta=8.0, pooling="mean"),
    "factored": lambda numpy: SASA(probe=head(), beta=8.0),
}


@pytest.mark.parametrize("settings", CONTROLS.values(), ids=CONTROLS)
class TestEverywhere(control_runs.OnTorch):
    """``CONTROLS`` along every path."""


def test_a_prefix_head_on_numpy_arrays():
    control_runs.assert_numpy_agrees(CONTROLS["factored"])
    control_runs.assert_rows_are_bit_equal_in_a_batch(CONTROLS["factored"](False))


def test_a_linear_probe_on_numpy_arrays_is_refused_with_the_way_out():
    with pytest.raises(PolicyError, match="a prefix-head pack runs on every backend"):
        control_runs.guard_of(SASA(probe=PROBE, beta=1.0), numpy=True)


def test_a_logits_processor_is_refused():
    with pytest.raises(UnsupportedPathError, match="attach"):
        guard_of(tiny_models.llama(0), SASA(probe=PROBE, beta=1.0)).logits_processor()


def test_removed_tokens_take_no_share():
    guard = guard_of(tiny_models.llama(0), SASA(probe=head(), beta=9.0, k=4))
    (bound,) = guard.controls
    from moralguard.decoding.step import Step

    logits = torch.full((1, tiny_models.VOCAB), -np.inf)
    logits[0, [5, 6]] = torch.tensor([1.0, 2.0])
    ids, ones = torch.tensor([[3, 4]]), torch.ones(1)
    state = torch.randn(1, tiny_models.HIDDEN, generator=torch.Generator().manual_seed(0))
    (term,) = bound.terms(Step(logits, ones, ids, torch.ones_like(ids), torch.zeros(1, dtype=torch.int64), hidden=state)).terms
    shares = dict(zip(term.ids[0].tolist(), term.bias[0].tolist(), strict=True))
    assert np.isclose(shares[5] + shares[6], 9.0)
    assert sum(shares.values()) == pytest.approx(9.0)


def pack(folder, **settings):
    lm = LanguageModel(tiny_models.llama(0), None)
    random = np.random.default_rng(3)
    tensors = {"weight": random.normal(size=(2, tiny_models.HIDDEN)).astype(np.float32), "bias": np.array([0.2, -0.4], np.float32)}
    save_file(tensors, folder / "head.safetensors")
    about = {"kind": "attribute-head", "method": "random", "lm": lm, "name": "kind", "data": (), "metrics": {}}
    return str(write_pack(folder, settings=settings, **about)), tensors


@pytest.mark.parametrize(("settings", "pooling"), [({"target": 0}, "mean"), ({"target": 1, "pooling": "last"}, "last")])
def test_an_attribute_head_pack_is_the_difference_of_its_classes(tmp_path, settings, pooling):
    source, tensors = pack(tmp_path, **settings)
    data = {"control": "sasa@1", "probe": source, "beta": 8.0}
    assert write_control(read_control(data)) == data
    model, target = tiny_models.llama(0), settings["target"]
    base = Reference(model)
    sign = 1 if target == 1 else -1
    probe = (sign * (tensors["weight"][1] - tensors["weight"][0]), sign * (tensors["bias"][1] - tensors["bias"][0]))
    check_greedy(guard_of(model, read_control(data)), model, sasa(base, linear_margin(base, probe, pooling), beta=8.0), RAGGED[:2], 3)


def test_a_head_on_another_layer_is_refused(tmp_path):
    source, _ = pack(tmp_path, target=1, layer=3)
    with pytest.raises(PolicyError, match=r"reads layer 3; expected a head on the last layer"):
        SASA(probe=source, beta=1.0)


def test_it_composes():
    model = tiny_models.llama(0)
    basis = torch.linalg.qr(torch.randn(tiny_models.HIDDEN, 2, generator=torch.Generator().manual_seed(1))).Q
    run = run_attached(guard_of(model, SASA(probe=PROBE, beta=5.0, k=7), NullspaceProjection(basis=basis)), model, RAGGED, 3)
    assert (torch.isfinite(run.scores).sum(-1) == 7).all()


BAD = {
    "no probe": ({"probe": 3, "beta": 1}, r"sasa probe is \(W \[d\], b\)"),
    "a matrix": ({"probe": (np.ones((3, 4)), 0.0), "beta": 1}, r"expected W \[d\] and one number b"),
    "not finite": ({"probe": (np.array([np.nan, 1.0]), 0.0), "beta": 1}, "aren't finite"),
    "no beta": ({"probe": PROBE}, "beta"),
    "negative beta": ({"probe": PROBE, "beta": -1}, "greater than or equal to 0"),
    "nothing there": ({"probe": "no/such/file", "beta": 1}, "isn't there"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_bad_settings_are_told(settings, message):
    with pytest.raises(PolicyError, match=message):
        SASA(**settings)


def test_a_probe_of_another_width_is_told_when_the_guard_is_built():
    with pytest.raises(PolicyError, match="hidden states of 32"):
        guard_of(tiny_models.llama(0), SASA(probe=(np.ones(5), 0.0), beta=1.0))
