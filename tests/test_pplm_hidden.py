"""PPLM(scope="hidden"): the gradient worked out by hand against autograd, the steps against a plain loop, and what it does to a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy_model import NumpyModel
from odd_models import BAG, PROMPTS, cohere, gemma2
from tiny_models import HIDDEN, llama

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.controls import PPLM
from moralguard.controls.pplm_hidden import HiddenPPLM, bag_gradient
from moralguard.decoding.history import Continuation
from moralguard.decoding.session import Session
from moralguard.errors import PolicyError

ROWS = [list(prompt) for prompt in PROMPTS]
G = torch.Generator().manual_seed(0)
LINEAR = (torch.randn(3, HIDDEN, generator=G), torch.randn(3, generator=G))
ATTRIBUTES: dict[str, dict[str, Any]] = {
    "bags": {"bag_of_words": [BAG, (3, 4)]},
    "head": {"head": LINEAR, "target": 2},
    "both": {"bag_of_words": [BAG], "head": LINEAR},
}


def stepped(lm: Any, settings: PPLM) -> tuple[HiddenPPLM, Any]:
    """The bound control and the step that it sees at the end of the prompts."""
    bound = settings.bind(lm, ())
    assert isinstance(bound, HiddenPPLM)
    with torch.no_grad():
        session = Session(lm, (bound,), ROWS, own_base=True)
        session.step()
    assert session._pending is not None
    return bound, session._pending.step


def loss(lm: LanguageModel, step: Any, settings: PPLM, delta: torch.Tensor) -> torch.Tensor:
    """What PPLM minimises, f64[R], written out anew."""
    head = lm.head
    assert head is not None
    x = step.head_logits.double() + delta @ head.weight.double().T
    z = head.softcap * torch.tanh(x / head.softcap) if head.softcap else head.scale * x
    p, q = torch.softmax(z, -1), torch.softmax(step.logits.double(), -1)
    found = torch.zeros(len(delta), dtype=torch.float64)
    for bag in settings.bag_of_words or ():
        found = found - torch.log(p[:, list(bag)].sum(-1))
    if settings.head is not None:
        states = []
        for row in ROWS:
            with torch.no_grad():
                states.append(lm.model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0].double())
        mean = torch.stack([(own.sum(0) + move) / len(own) for own, move in zip(states, delta, strict=True)])
        weight, bias = (part.double() for part in LINEAR)
        target = 1 if settings.target is None else settings.target
        found = found - torch.log_softmax(mean @ weight.T + bias, -1)[:, target]
    p, q = p + 1e-15 * (p <= 1e-15), q + 1e-15 * (q <= 1e-15)
    return found + settings.kl_scale * (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("attribute", ATTRIBUTES.values(), ids=ATTRIBUTES)
@pytest.mark.parametrize("build", [llama, gemma2, cohere], ids=lambda build: build.__name__)
def test_the_gradient_is_autograds(build: Callable[[], Any], attribute: dict[str, Any], kind: str) -> None:
    settings = PPLM(**attribute, kl_scale=0.5, scope="hidden")
    plain = LanguageModel(build(), None)
    lm: Any = plain if kind == "torch" else NumpyModel(build())
    bound, step = stepped(lm, settings)
    delta = 0.3 * torch.randn(len(ROWS), HIDDEN, generator=torch.Generator().manual_seed(1))
    own = step.arrays.float_array(delta)
    shift = step.arrays.ops.row_products(bound.weight, own)
    before = step.head_logits if bound.unembedding.softcap else None
    logits = step.logits + bound.unembedding.delta(before, shift)
    found = bound._gradient(step, logits, step.arrays.softmax(step.logits), step.hidden + own, before, shift)
    leaf = delta.double().requires_grad_()
    _, reference = stepped(plain, settings)
    (wanted,) = torch.autograd.grad(loss(plain, reference, settings, leaf).sum(), leaf)
    scale = float(wanted.abs().max())
    assert scale > 1e-2
    assert np.allclose(np.asarray(found), wanted.numpy(), atol=2e-5 * scale, rtol=1e-3)


@pytest.mark.parametrize("attribute", ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_the_steps_are_those_of_a_plain_loop(attribute: dict[str, Any]) -> None:
    settings = PPLM(**attribute, stepsize=0.4, num_iterations=3, gamma=1.2, kl_scale=0.1, gm_scale=0.8, scope="hidden")
    lm = LanguageModel(llama(), None)
    bound, step = stepped(lm, settings)
    delta, running = torch.zeros(len(ROWS), HIDDEN, dtype=torch.float64), torch.zeros(len(ROWS), 1, dtype=torch.float64)
    for _ in range(3):
        leaf = delta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(lm, step, settings, leaf).sum(), leaf)
        fresh = gradient.norm(dim=-1, keepdim=True)
        running = torch.maximum(running, fresh)
        delta = delta - 0.4 * gradient / (running if settings.head is None else fresh) ** 1.2
    assert lm.head is not None
    moved = step.logits.double() + delta @ lm.head.weight.double().T
    outcome = Session(lm, (bound,), ROWS, own_base=True)
    with torch.no_grad():
        found = outcome.step(temperature=1.3).logits.double()
    wanted = 0.8 * torch.log_softmax(moved / 1.3, -1) + 0.2 * torch.log_softmax(step.logits.double(), -1)
    torch.testing.assert_close(torch.softmax(found / 1.3, -1), torch.softmax(wanted, -1), atol=1e-5, rtol=1e-3)


def test_the_bag_grows_likelier_and_the_target_class_too() -> None:
    lm = LanguageModel(llama(), None)
    for attribute in (ATTRIBUTES["bags"], ATTRIBUTES["head"]):
        losses = []
        for stepsize in (0.0, 0.5, 2.0):
            settings = PPLM(**attribute, stepsize=max(stepsize, 1e-9), num_iterations=5, gamma=1.0, kl_scale=0.0, scope="hidden")
            bound, step = stepped(lm, settings)
            moved, _ = bound._move(replace(step, columns=bound.columns(step)), step.logits)
            assert lm.head is not None
            delta = torch.linalg.lstsq(lm.head.weight.double(), (moved - step.logits).double().T.contiguous()).solution.T
            losses.append(float(loss(lm, step, settings, delta).mean()))
        assert losses[0] > losses[1] > losses[2]


def test_strength_zero_and_the_end_of_grad_length_are_the_base() -> None:
    lm = LanguageModel(llama(), None)
    plain = mg.Guard(mg.Policy(controls=[]), lm).generate(ROWS, max_new_tokens=6, do_sample=True, seed=1).token_ids
    assert not PPLM(bag_of_words=[BAG], stepsize=0, scope="hidden").active
    late = PPLM(bag_of_words=[BAG], stepsize=9.0, grad_length=0, scope="hidden")
    assert mg.Guard(mg.Policy(controls=[late]), lm).generate(ROWS, max_new_tokens=6, do_sample=True, seed=1).token_ids == plain
    steering = PPLM(bag_of_words=[BAG], stepsize=9.0, grad_length=3, gamma=1.0, scope="hidden")
    found = mg.Guard(mg.Policy(controls=[steering]), lm).generate(ROWS, max_new_tokens=6, do_sample=True, seed=1).token_ids
    assert found != plain
    assert sum(i in BAG for ids in found for i in ids[:3]) > sum(i in BAG for ids in plain for i in ids[:3])


@pytest.mark.parametrize("attribute", ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_it_keeps_the_rules_of_controls(attribute: dict[str, Any]) -> None:
    from moralguard.testing import check_control

    check_control(PPLM(**attribute, stepsize=1.0, gamma=1.0, scope="hidden"), model=(llama(), None), prompts=ROWS)


def test_a_bag_that_the_base_has_removed_moves_nothing() -> None:
    logits = torch.zeros(2, 6)
    logits[0, :2] = float("-inf")
    found = bag_gradient(logits, torch.softmax(logits, -1), torch.tensor([0, 1]))
    assert found[0].tolist() == [0.0] * 6
    assert float(found[1, 0]) == pytest.approx(1 / 6 - 1 / 2)


def test_settings_that_mean_nothing_there_are_told() -> None:
    for name, value in {"window_length": 5, "decay": True, "horizon_length": 2}.items():
        with pytest.raises(PolicyError, match=f"{name} means nothing"):
            PPLM(bag_of_words=[BAG], scope="hidden", **{name: value})
    with pytest.raises(PolicyError, match="scope"):
        PPLM(bag_of_words=[BAG], scope="state")
    data = mg.Policy(controls=[PPLM(bag_of_words=[BAG], scope="hidden")]).as_dict()
    assert data["controls"][0]["scope"] == "hidden"
    assert mg.Policy.load(data).as_dict() == data


def test_tokens_that_are_taken_back_leave_no_trace_in_the_mean_state() -> None:
    """A session that went back over rejected tokens gives the law of one that never read them."""
    bound = PPLM(scope="hidden", **ATTRIBUTES["head"]).bind(LanguageModel(llama(0), None), ())
    with torch.no_grad():
        session = Session(bound.lm, (bound,), [[5, 9, 20]], own_base=True)
        session.step()
        session.rewind(Continuation(None, 0, np.array([[7, 33]])), [[5, 9, 20, 7, 33]])
        session.rewind(Continuation(None, 2, np.array([[41]])), [[5, 9, 20, 41]])
        again = session.step().logits
        fresh = Session(bound.lm, (bound,), [[5, 9, 20, 41]], own_base=True).step().logits
    torch.testing.assert_close(again, fresh, atol=1e-5, rtol=1e-5)
