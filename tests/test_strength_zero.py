"""At strength 0 a control is the base model itself, bit for bit, along every path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from odd_models import ANYWHERE, CONTROLS, PROMPTS, ZERO, left_padded
from tiny_models import VOCAB, gpt2, llama

import moralguard as mg

NEW = 6
BATCHES = {"alone": PROMPTS[:1], "batch8": (*PROMPTS, *([i, 2 * i, 3] for i in (5, 6, 7)), [33] * 12)}
MODES = {"greedy": {"do_sample": False}, "sampling": {"do_sample": True, "top_k": 0, "temperature": 0.8, "top_p": 0.9}}
ROUTES = [(name, route) for name in CONTROLS for route in ("processor", "attach") if route == "attach" or name in ANYWHERE]


def plain(model: Any, prompts: Any, settings: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(11)
    arguments = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_scores": True} | settings | more
    return model.generate(**left_padded(prompts), **arguments)


def guarded(guard: mg.Guard, route: str, prompts: Any, settings: dict[str, Any]) -> Any:
    if route == "processor":
        return plain(guard.lm.model, prompts, settings, logits_processor=[guard.logits_processor()])
    with guard.attach(guard.lm.model):
        return plain(guard.lm.model, prompts, settings)


def guard_of(name: str, model: Any, *strength: float) -> mg.Guard:
    return mg.Guard(mg.Policy(controls=[CONTROLS[name](*strength)]), (model, None))


def same_bits(one: Any, other: Any) -> bool:
    return torch.equal(one.sequences, other.sequences) and all(torch.equal(a, b) for a, b in zip(one.scores, other.scores, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("name", "route"), ROUTES)
def test_scores_are_the_models_own(name: str, route: str, batch: str, mode: str) -> None:
    model = llama()
    base = plain(model, BATCHES[batch], MODES[mode])
    assert same_bits(guarded(guard_of(name, model, ZERO[name]), route, BATCHES[batch], MODES[mode]), base)
    changed = guarded(guard_of(name, model), route, BATCHES[batch], MODES[mode])
    assert not same_bits(changed, base)
    assert not torch.equal(changed.scores[-1], base.scores[-1])


@pytest.mark.parametrize("name", CONTROLS)
def test_other_architecture_with_beams(name: str) -> None:
    model = gpt2()
    settings = {"num_beams": 3, "do_sample": False}
    base = plain(model, PROMPTS, settings)
    assert same_bits(guarded(guard_of(name, model, ZERO[name]), "attach", PROMPTS, settings), base)
    assert not same_bits(guarded(guard_of(name, model), "attach", PROMPTS, settings), base)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONTROLS)
def test_own_loop_equals_an_empty_policy(name: str, mode: str) -> None:
    model = llama()
    prompts = [list(prompt) for prompt in BATCHES["batch8"]]

    def texts(policy: mg.Policy) -> list[list[int]]:
        return mg.Guard(policy, (model, None)).generate(prompts, seed=4, max_new_tokens=NEW, **MODES[mode]).token_ids

    base = texts(mg.Policy(controls=[]))
    assert texts(mg.Policy(controls=[CONTROLS[name](ZERO[name])])) == base
    assert texts(mg.Policy(controls=[CONTROLS[name]()])) != base


def test_own_loop_without_controls_is_greedy_transformers() -> None:
    model = llama()
    found = mg.Guard(mg.Policy(controls=[]), (model, None)).generate([list(p) for p in PROMPTS], max_new_tokens=NEW).token_ids
    assert found == plain(model, PROMPTS, MODES["greedy"]).sequences[:, -NEW:].tolist()


@pytest.mark.parametrize("name", CONTROLS)
def test_strength_zero_asks_nothing(name: str) -> None:
    """A control that does nothing runs no pass and is in no way refused."""
    guard = guard_of(name, llama(), ZERO[name])
    assert guard.controls == ()
    guard.logits_processor()(torch.tensor([[1, 2]]), torch.zeros(1, VOCAB))


@pytest.mark.parametrize("name", CONTROLS)
def test_zero_beside_an_active_control(name: str) -> None:
    """The other control's law is what it is alone: no filter of the inactive one is left."""
    model = llama()
    other = CONTROLS["self_debias" if name != "self_debias" else "dexperts"]()
    both = mg.Guard(mg.Policy(controls=[CONTROLS[name](ZERO[name]), other]), (model, None))
    alone = mg.Guard(mg.Policy(controls=[other]), (model, None))
    assert same_bits(guarded(both, "attach", PROMPTS, MODES["greedy"]), guarded(alone, "attach", PROMPTS, MODES["greedy"]))
