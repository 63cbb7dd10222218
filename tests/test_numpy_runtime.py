"""The guard on NumPy arrays against the guard on torch tensors: the same weights, the same tokens, the same traces."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy_model import NumpyModel
from odd_models import BAG, PROMPTS, basis, byte_llama, byte_tokenizer, cohere, expert, future, gemma2, granite
from tiny_models import HIDDEN, gpt2, llama

import moralguard as mg
import moralguard_kernels as ops
from moralguard.backends.hf import LanguageModel
from moralguard.controls import (
    PPLM,
    BoundControl,
    Control,
    Dense,
    DExperts,
    FactoredHead,
    Fudge,
    Keep,
    Mix,
    NullspaceProjection,
    Prompt,
    SelfDebias,
    Sparse,
    Terms,
)
from moralguard.decoding.gate import Gate
from moralguard.decoding.session import Session
from moralguard.errors import ControlError, ModelError, PolicyError, UnsupportedPathError
from moralguard.packs import write_pack

NEW = 8
GREEDY = {"do_sample": False, "max_new_tokens": NEW}
SAMPLING = {"do_sample": True, "temperature": 1.1, "top_k": 90, "top_p": 0.98, "min_p": 1e-3, "max_new_tokens": NEW}
FIVE = [*(list(prompt) for prompt in PROMPTS), [8] * 11]


def random(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def numpy_future(token_ids: np.ndarray, candidates: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
    assert all(isinstance(part, np.ndarray) for part in (token_ids, candidates, attention_mask))
    length, total = attention_mask.sum(-1), (token_ids * attention_mask).sum(-1)
    return 3 * np.sin(0.37 * candidates + (0.11 * total + length)[:, None])


HEAD = FactoredHead(random(3, HIDDEN, seed=4), random(3, HIDDEN, seed=5), random(HIDDEN, seed=6), -0.5, random(HIDDEN, seed=7))
LEACE = (basis(2), basis(2, seed=6), torch.linspace(-1, 1, HIDDEN))
LINEAR = (random(2, HIDDEN, seed=8), random(2, seed=9))

Settings = Callable[[bool], Control]
CONTROLS: dict[str, Settings] = {
    "expert model": lambda own: DExperts(expert=NumpyModel(expert()) if own else expert(), anti_expert=Prompt([9, 8, 7]), alpha=1.5),
    "anti-only": lambda own: DExperts(anti_expert=Prompt([9, 8, 7]), alpha=1.0, filter_p=1.0),
    "expert only": lambda own: DExperts(expert=Prompt([4]), alpha=1.5, filter_p=0.95),
    "fudge callable": lambda own: Fudge(discriminator=numpy_future if own else future, strength=2.0, top_k=30),
    "fudge head": lambda own: Fudge(discriminator=HEAD, strength=2.0, top_k=40),
    "self-debias": lambda own: SelfDebias(prefixes=[[11, 12, 13], [14]], decay_constant=300.0),
    "nullspace": lambda own: NullspaceProjection(basis=basis(), keep=0.25),
    "nullspace array": lambda own: NullspaceProjection(basis=basis().numpy(), keep=0.25),
    "leace": lambda own: NullspaceProjection(basis=LEACE),
    "a-inlp": lambda own: NullspaceProjection(basis=basis(1), adaptive=True),
    "pplm bag": lambda own: PPLM(bag_of_words=[BAG, (3, 4)], stepsize=2.0, num_iterations=3, scope="hidden"),
    "pplm head": lambda own: PPLM(head=LINEAR, stepsize=2.0, num_iterations=2, gamma=1.0, scope="hidden"),
    "pplm both": lambda own: PPLM(bag_of_words=[BAG], head=LINEAR, target=0, stepsize=1.0, gm_scale=0.7, kl_scale=0.3, scope="hidden"),
}
SETS = {**{name: (name,) for name in CONTROLS}, "many": ("expert model", "fudge head", "self-debias", "nullspace", "leace", "pplm bag")}


def guards(names: tuple[str, ...], model: Any = None, **policy: Any) -> tuple[mg.Guard, mg.Guard]:
    """(on NumPy arrays, on torch tensors)."""
    model = llama() if model is None else model
    ours, theirs = ([CONTROLS[name](own) for name in names] for own in (True, False))
    return (
        mg.Guard(mg.Policy(controls=ours, **policy), NumpyModel(model)),
        mg.Guard(mg.Policy(controls=theirs, **policy), (model, None)),
    )


def same(ours: mg.Guard, theirs: mg.Guard, **settings: Any) -> None:
    """Tokens and what the trace says of them."""
    mine, wanted = (guard.generate(FIVE, seed=7, trace=True, **settings).traces for guard in (ours, theirs))
    assert max(record.kl for trace in wanted for record in trace) > 1e-3, "a control that does nothing tells nothing"
    for own, other in zip(mine, wanted, strict=True):
        assert [t.token_id for t in own] == [t.token_id for t in other]
        assert [t.counterfactual_id for t in own] == [t.counterfactual_id for t in other]
        assert np.allclose([t.kl for t in own], [t.kl for t in other], atol=1e-4)
        for mine, wanted in zip(own, other, strict=True):
            assert mine.contributions.keys() == wanted.contributions.keys()
            for name, share in mine.contributions.items():
                expected = wanted.contributions[name]
                assert (share is None) == (expected is None)
                assert share is None or expected is None or math.isclose(share, expected, rel_tol=1e-3, abs_tol=1e-3)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLING], ids=["greedy", "sampled"])
@pytest.mark.parametrize("names", SETS.values(), ids=SETS)
def test_every_control_gives_the_tokens_and_traces_of_the_torch_guard(names: tuple[str, ...], settings: dict[str, Any]) -> None:
    ours, theirs = guards(names)
    same(ours, theirs, **settings)
    assert ours.counters.as_dict() == theirs.counters.as_dict()


@pytest.mark.parametrize("build", [gemma2, granite, cohere, gpt2], ids=lambda build: build.__name__)
@pytest.mark.parametrize("name", ["nullspace", "fudge head", "pplm both"])
def test_heads_with_a_scale_or_a_soft_cap(build: Callable[[], Any], name: str) -> None:
    same(*guards((name,), build()), **SAMPLING)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("risk")
    HEAD.save(folder)
    lm = LanguageModel(llama(), None)
    write_pack(folder, kind="prefix-head", method="random", lm=lm, name="risk", data=(), settings={}, metrics={})
    return str(folder)


@pytest.fixture(scope="module")
def middles(pack: str) -> dict[str, Any]:
    """Settings of a gate that half of the prompts pass."""
    lm = LanguageModel(llama(), None)
    gate = Gate(risk=pack, min_risk=0.5).bind(lm)
    session = Session(lm, (), FIVE, own_base=True, gate=gate)
    with torch.no_grad():
        session.step()
        assert session._pending is not None
        step = session._pending.step
        log_odds, entropy = gate.log_odds(step), ops.entropy(step.logits)
    assert log_odds is not None
    return {"risk": pack, "min_risk": float(torch.sigmoid(log_odds.median() + 1e-3)), "min_entropy": float(entropy.median() + 1e-3)}


@pytest.mark.parametrize(
    ("named", "more"),
    [
        (["min_entropy"], {}),
        ([], {"first_tokens": 3}),
        (["risk", "min_risk"], {}),
        (["risk", "min_risk"], {"risk_window": 3}),
        (["risk", "min_risk", "min_entropy"], {"stay_open": True}),
    ],
    ids=["entropy", "first", "risk", "window", "stay"],
)
def test_gates_open_at_the_same_steps(named: list[str], more: dict[str, Any], middles: dict[str, Any]) -> None:
    ours, theirs = guards(("expert model", "fudge head"), gate=Gate(**{name: middles[name] for name in named}, **more))
    same(ours, theirs, **SAMPLING)
    mine, wanted = ours.counters.as_dict(), theirs.counters.as_dict()
    assert mine == wanted
    assert 0 < mine["rows_touched"] < mine["rows_guarded"]


def test_packs_of_the_model_fit_it_here_too(pack: str) -> None:
    controls = [Fudge(discriminator=pack, strength=3.0)]
    ours = mg.Guard(mg.Policy(controls=controls), NumpyModel(llama()))
    same(ours, mg.Guard(mg.Policy(controls=controls), (llama(), None)), **SAMPLING)
    with pytest.raises(ModelError, match="fingerprint"):
        mg.Guard(mg.Policy(controls=controls), NumpyModel(llama(seed=3)))


def test_a_text_is_its_own_whatever_runs_beside_it() -> None:
    guard, _ = guards(SETS["many"])
    alone = [guard.generate([prompt], seed=7, **SAMPLING).token_ids[0] for prompt in FIVE]
    assert guard.generate(FIVE, seed=7, **SAMPLING).token_ids == alone
    assert guard.generate(FIVE[::-1], seed=7, batch_size=2, **SAMPLING).token_ids == alone[::-1]
    several = guard.generate(FIVE, seed=7, num_return_sequences=3, batch_size=4, **SAMPLING)
    assert several.token_ids[::3] == alone
    assert guard.generate(FIVE, seed=8, **SAMPLING).token_ids != alone


class Unpadded(NumpyModel):
    """A model that takes no attention mask."""

    takes_padding: ClassVar[bool] = False

    def forward(self, *, attention_mask: np.ndarray | None = None, **arguments: Any) -> Any:
        assert attention_mask is None, "rows of different lengths share a pass"
        return super().forward(**arguments)


def test_a_model_that_takes_no_mask_reads_rows_of_one_length_together() -> None:
    names = ("expert model", "self-debias", "pplm both")
    _, theirs = guards(names)
    ours = mg.Guard(mg.Policy(controls=[CONTROLS[name](True) for name in names]), Unpadded(llama()))
    same(ours, theirs, **SAMPLING)
    settings = SAMPLING | {"num_return_sequences": 2, "batch_size": 5}
    assert ours.generate(FIVE, seed=7, **settings).token_ids == theirs.generate(FIVE, seed=7, **settings).token_ids


def text_guard(own: bool) -> mg.Guard:
    controls = [DExperts(anti_expert=Prompt("Rude words:\n"), alpha=1.0), NullspaceProjection(basis=basis(), keep=0.2)]
    model = NumpyModel(byte_llama(), byte_tokenizer()) if own else (byte_llama(), byte_tokenizer())
    return mg.Guard(mg.Policy(controls=controls), model)


def test_text_streams_and_async_calls_agree() -> None:
    ours, theirs = text_guard(True), text_guard(False)
    text = ours.generate("Hello", seed=3, **SAMPLING).texts[0]
    assert text == theirs.generate("Hello", seed=3, **SAMPLING).texts[0]
    assert "".join(ours.stream("Hello", seed=3, **SAMPLING)) == text
    assert asyncio.run(ours.agenerate("Hello", seed=3, **SAMPLING)).texts[0] == text


# --- Failures -------------------------------------------------------------------------------------------------------------------


class Fragile(Control):
    """Moves the law, and raises for requests whose first token is 7, at their third token."""

    control_name: ClassVar[str] = "fragile"
    any_arrays: ClassVar[bool] = True

    @property
    def active(self) -> bool:
        return True

    def bind(self, lm: Any, values: Any) -> BoundControl[Any]:
        return BoundFragile(self, lm)


class BoundFragile(BoundControl[Fragile]):
    def columns(self, step: Any) -> dict[str, Any]:
        first = step.arrays.gather(step.history, step.mask.argmax(-1)[:, None])[:, 0]
        return {"first": first, "seen": step.generated}

    def terms(self, step: Any) -> Terms:
        if bool(((step.columns["first"] == 7) & (step.columns["seen"] == 2)).any()):
            raise ValueError("seven")
        return Terms((Dense(0.9 * step.logits),))

    def commit(self, step: Any, carry: Any, tokens: Any) -> dict[str, Any]:
        return step.columns | {"seen": step.columns["seen"] + 1}


def fragile(own: bool, on_error: str) -> mg.Guard:
    policy = mg.Policy(controls=[Fragile(), CONTROLS["self-debias"](own)], on_error=on_error)
    return mg.Guard(policy, NumpyModel(llama()) if own else (llama(), None))


def test_a_failed_control_ends_its_own_request_and_no_other() -> None:
    results = []
    for own in (True, False):
        with pytest.raises(ControlError, match="seven") as caught:
            fragile(own, "closed").generate(FIVE, seed=1, **SAMPLING)
        results.append(caught.value.result)
        assert caught.value.control == "fragile"
    assert results[0].token_ids == results[1].token_ids
    assert results[0].finish_reasons == ["length", "guard_error", "length", "length", "length"]
    assert len(results[0].token_ids[1]) == 2


def test_an_open_policy_goes_on_without_the_failed_control() -> None:
    ours, theirs = fragile(True, "open"), fragile(False, "open")
    assert ours.generate(FIVE, seed=1, **SAMPLING).token_ids == theirs.generate(FIVE, seed=1, **SAMPLING).token_ids
    assert ours.counters.as_dict() == theirs.counters.as_dict()
    assert ours.counters.as_dict()["failed_open"] == 1


class Nothing(Control):
    """Leaves no token."""

    control_name: ClassVar[str] = "nothing"
    any_arrays: ClassVar[bool] = True

    @property
    def active(self) -> bool:
        return True

    def bind(self, lm: Any, values: Any) -> BoundControl[Any]:
        return BoundNothing(self, lm)


class BoundNothing(BoundControl[Nothing]):
    def terms(self, step: Any) -> Terms:
        ids = step.arrays.integers([[0]] * step.rows)
        last = step.arrays.integers([[1]] * step.rows)
        bias = step.arrays.full((step.rows, 1), 0.0, step.arrays.float32)
        return Terms((Sparse(ids, bias, keep_rest=False), Sparse(last, bias, keep_rest=False)))


def test_a_law_with_no_token_left() -> None:
    with pytest.raises(ControlError, match="removed every token"):
        mg.Guard(mg.Policy(controls=[Nothing()]), NumpyModel(llama())).generate(FIVE, **GREEDY)
    ours = mg.Guard(mg.Policy(controls=[Nothing()], on_error="open"), NumpyModel(llama()))
    plain = mg.Guard(mg.Policy(controls=[]), NumpyModel(llama()))
    assert ours.generate(FIVE, seed=2, **SAMPLING).token_ids == plain.generate(FIVE, seed=2, **SAMPLING).token_ids


# --- Refusals -------------------------------------------------------------------------------------------------------------------


class TorchOnly(Nothing):
    """Says nothing of NumPy arrays."""

    any_arrays: ClassVar[bool] = False


def test_what_a_model_without_torch_cannot_do(tmp_path: Path) -> None:
    lm = NumpyModel(llama())

    def guard(*controls: Control) -> mg.Guard:
        return mg.Guard(mg.Policy(controls=list(controls)), lm)

    with pytest.raises(PolicyError, match=r'needs grad, cache, which .* doesn.t offer; .*scope="hidden" steers the last hidden state'):
        guard(PPLM(bag_of_words=[BAG]))
    with pytest.raises(ModelError, match="on PyTorch; use two of a kind"):
        guard(DExperts(expert=(llama(), None)))
    with pytest.raises(ModelError, match="on PyTorch; use two of a kind"):
        mg.Guard(mg.Policy(controls=[DExperts(expert=lm)]), (llama(), None))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="moralguard export MODEL OUT --adapter"):
        guard(DExperts(expert=str(tmp_path)))
    with pytest.raises(UnsupportedPathError, match=r"use guard\.generate"), guard(SelfDebias(prefixes=[[3]])).attach():
        pass
    with pytest.raises(PolicyError, match=r"computes with torch tensors.* set TorchOnly\.any_arrays = True"):
        guard(TorchOnly())
    with pytest.raises(PolicyError, match="hidden states of 32"):
        guard(PPLM(head=(random(2, 5, seed=0), random(2, seed=1)), scope="hidden"))


# --- Terms ----------------------------------------------------------------------------------------------------------------------


def test_terms_of_every_kind_add_up_alike() -> None:
    """More terms than one launch of the kernels takes, on some rows and on all."""
    from moralguard.backends.arrays import namespace
    from moralguard.controls import Attenuation, LowRank
    from moralguard.decoding.rectification import rectify

    rows, vocabulary = 4, 60
    base = random(rows, vocabulary, seed=0) * 3
    base[0, 5], base[1, 7] = -np.inf, np.nan
    some = np.array([True, False, True, False])

    def terms(kind: str) -> list[Terms]:
        arrays = namespace(kind)
        give = arrays.float_array
        one = [give(random(rows, vocabulary, seed=i)) for i in range(1, 8)]
        weight = [give(random(rows, seed=20 + i)) for i in range(6)]
        acts = torch.from_numpy(some) if kind == "torch" else some
        ids = np.stack([np.random.default_rng(i).permutation(vocabulary)[:30] for i in range(rows)])
        other = np.stack([np.random.default_rng(9 + i).permutation(vocabulary)[:30] for i in range(rows)])
        first, second = (torch.from_numpy(i) if kind == "torch" else i for i in (ids, other))
        bias = give(random(rows, 30, seed=40))
        low = [LowRank(give(random(vocabulary, r, seed=r)), give(random(rows, r, seed=50 + r))) for r in (2, 3, 40)]
        softer = Attenuation((one[0], one[1]), give(np.full(rows, 30.0)), give(np.full(rows, 0.1)))
        return [
            Terms((Mix((one[0], one[1]), (weight[0], weight[1]), weight[2]), Keep(top_k=50, top_p=0.99, min_p=1e-4)), acts),
            Terms((Mix((one[2], one[3], one[4]), (weight[3], weight[4], weight[5])), Keep(top_p=0.97, top_k=55))),
            Terms((Dense(one[5]), low[0], low[1]), acts),
            Terms((softer, low[2])),
            Terms((softer,), acts),
            Terms((Sparse(first, bias), Sparse(second, bias, keep_rest=False)), acts),
            Terms((Sparse(first, bias, keep_rest=False),)),
        ]

    for chosen in [[i] for i in range(7)] + [[0, 1, 2], [3, 4], [5, 6], list(range(7))]:
        ours = rectify(base, [terms("numpy")[i] for i in chosen])
        theirs = rectify(torch.from_numpy(base), [terms("torch")[i] for i in chosen])
        assert ours.touched.tolist() == theirs.touched.tolist()
        mine, wanted = ours.logits, theirs.logits.numpy()
        assert np.array_equal(np.isneginf(mine), np.isneginf(wanted)), chosen
        assert np.allclose(mine, wanted, atol=2e-5, equal_nan=True), chosen


def test_a_fitted_entry_may_be_for_one_runtime() -> None:
    inner = llama()
    lm, numpy_lm = mg.LanguageModel(inner), NumpyModel(inner)
    entry = {"model": "tiny", "fingerprint": lm.fingerprint, "controls": []}
    both = mg.Policy.load({"fitted": [entry | {"runtime": "onnx"}, entry | {"runtime": "torch"}]})
    assert mg.Policy.load(both.as_dict()) == both
    assert both.fitted_for(lm) is both.fitted[1]
    assert both.fitted_for(numpy_lm) is both.fitted[0]
    assert mg.Policy.load({"fitted": [entry | {"runtime": "onnx"}]}).fitted_for(lm) is None
    assert mg.Policy.load({"fitted": [entry]}).fitted_for(numpy_lm) is not None
