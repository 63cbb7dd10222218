"""One control along every path of the framework, against itself: on NumPy arrays, in slots, at strength 0, in the trace, under a veto."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy_model import NumpyModel
from odd_models import PROMPTS
from scipy.special import log_softmax
from tiny_models import llama

import moralguard as mg
from moralguard.controls import Control
from moralguard.decoding.rectification import rectify
from moralguard.decoding.session import Session
from moralguard.decoding.slots import Slots
from moralguard.testing import check_control

TEXTS = [*(list(prompt) for prompt in PROMPTS), [8] * 11]
SAMPLING = {"do_sample": True, "temperature": 1.1, "top_k": 90, "top_p": 0.98, "max_new_tokens": 8}
GREEDY = {"do_sample": False, "max_new_tokens": 6}

Settings = Callable[[bool], Control]
"""A control for a model of NumPy arrays (True) or of torch tensors (False); experts that are models differ."""


def guard_of(control: Control, numpy: bool = False) -> mg.Guard:
    model: Any = NumpyModel(llama()) if numpy else (llama(), None)
    return mg.Guard(mg.Policy(controls=[control]), model)


def assert_numpy_agrees(settings: Settings) -> None:
    """Tokens, counterfactuals, KL and contributions on NumPy arrays are those on torch tensors, in one batch."""
    for decoding in (GREEDY, SAMPLING):
        mine, wanted = (guard_of(settings(numpy), numpy).generate(TEXTS, seed=7, trace=True, **decoding).traces for numpy in (True, False))
        assert max(record.kl for trace in wanted for record in trace) > 1e-3, "a control that does nothing tells nothing"
        for own, other in zip(mine, wanted, strict=True):
            for one, two in zip(own, other, strict=True):
                assert (one.token_id, one.counterfactual_id) == (two.token_id, two.counterfactual_id)
                assert math.isclose(one.kl, two.kl, rel_tol=1e-3, abs_tol=1e-4)
                assert one.contributions.keys() == two.contributions.keys()
                for name, share in one.contributions.items():
                    expected = two.contributions[name]
                    assert (share is None) == (expected is None)
                    assert share is None or math.isclose(share, expected, rel_tol=2e-3, abs_tol=2e-3)


def assert_zero_is_the_base(control: Control) -> None:
    """An inactive control leaves nothing behind: no control, no pass, and the base's scores bit for bit."""
    assert not control.active
    model = llama()
    guard = mg.Guard(mg.Policy(controls=[control]), (model, None))
    assert guard.controls == ()
    ids = torch.tensor([TEXTS[0]])
    arguments: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    plain = model.generate(ids, **arguments)
    with guard.attach(model):
        guarded = model.generate(ids, **arguments)
    assert torch.equal(plain.sequences, guarded.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.scores, guarded.scores, strict=True))


def assert_trace_adds_up(control: Control) -> None:
    """The only control's contribution is its change of the drawn token's log-odds, worked out from the laws themselves."""
    guard = guard_of(control)
    result = guard.generate(TEXTS[:1], seed=3, trace=True, do_sample=True, max_new_tokens=5)
    ids, found = TEXTS[0], 0
    with torch.no_grad():
        session = Session(guard.lm, guard.controls, [ids], own_base=True)
        for record in result.traces[0]:
            outcome = session.step()
            laws = [log_softmax(np.array(z[0], dtype=np.float64)) for z in (outcome.logits, outcome.base)]
            with np.errstate(divide="ignore"):  # the only token that a law holds
                odds = [law[record.token_id] - np.log(-np.expm1(law[record.token_id])) for law in laws]
            share = record.contributions[guard.controls[0].name]
            if share is not None:
                assert math.isclose(share, odds[0] - odds[1], rel_tol=1e-3, abs_tol=2e-3)
                found += abs(share) > 1e-3
            session.commit(torch.tensor([record.token_id]))
            session.advance()
    assert found, "no step at which the control moved the drawn token"


def greedy_laws(guard: mg.Guard, prompt: Sequence[int], count: int) -> tuple[list[int], list[np.ndarray]]:
    """Greedy tokens of a request alone and the laws (probabilities f64[V]) they come from."""
    tokens, laws = [], []
    with torch.no_grad():
        session = Session(guard.lm, guard.controls, [list(prompt)], own_base=True)
        for _ in range(count):
            logits = np.array(session.step().logits)[0]
            laws.append(np.exp(log_softmax(logits.astype(np.float64))))
            tokens.append(int(logits.argmax()))
            session.commit(session._arrays.integers(tokens[-1:], guard.lm))
            session.advance()
    return tokens, laws


def assert_slots_do_not_matter(settings: Settings, numpy: bool = False) -> None:
    """Requests that start at different times, wait, are parked, come back and leave in the same table give the texts they give alone."""
    guard = guard_of(settings(numpy), numpy)
    slots, tokens, laws = Slots(guard.lm, own_base=True), {}, {}
    parked: dict[int, Any] = {}

    def step(which: list[int]) -> None:
        with torch.no_grad():
            steps, failures = slots.step({slot: tokens[slot] for slot in which})
        assert not failures
        for done in steps:
            for slot, logits in zip(done.slots, np.array(done.outcome.logits), strict=True):
                laws[slot].append(np.exp(log_softmax(logits.astype(np.float64))))
                tokens[slot].append(int(logits.argmax()))

    def add(slot: int, state: Any = None) -> None:
        slots.add(slot, guard.controls, guard.gate, TEXTS[slot], state)
        tokens.setdefault(slot, [])
        laws.setdefault(slot, [])

    add(0)
    add(1)
    step([0, 1])
    add(2)  # joins requests that are further on
    step([2])
    step([0, 1, 2])
    step([1])  # is split off, and joined again
    parked[0] = slots.park(0, tokens[0])
    add(3)
    step([3, 2])
    add(0, parked.pop(0))
    step([0, 1, 2, 3])
    slots.remove(1)  # its row is used again
    add(4)
    step([4, 0, 3])
    step([0, 2, 3, 4])
    for slot, drawn in tokens.items():
        alone, expected = greedy_laws(guard, TEXTS[slot], len(drawn))
        assert drawn == alone, f"slot {slot}"
        for mine, theirs in zip(laws[slot], expected, strict=True):
            assert np.array_equal(mine == 0, theirs == 0)
            assert np.abs(mine - theirs).max() < 2e-5


def assert_rows_are_bit_equal_in_a_batch(control: Control) -> None:
    """The terms of a row alone, computed from the very numbers it has in a batch, rectify it to the same bits."""
    guard = guard_of(control)
    bound = guard.controls[0]
    with torch.no_grad():
        session = Session(guard.lm, guard.controls, TEXTS, own_base=True)
        for _ in range(3):
            outcome = session.step()
            assert session._pending is not None
            full = replace(session._pending.step, columns=session.columns[0] or {})
            whole = rectify(full.logits, [bound.terms(full)]).logits
            for row in range(full.rows):
                single = full.row(row)
                alone = rectify(single.logits, [bound.terms(single)]).logits
                assert torch.equal(alone[0].view(torch.int32), whole[row].view(torch.int32)), f"row {row}"
            session.commit(outcome.logits.argmax(-1))
            session.advance()


class OnTorch:
    """The tests of a control's ``settings`` on a PyTorch model; a module's own class inherits them and parametrizes ``settings``."""

    def test_invariants(self, settings: Settings) -> None:
        check_control(settings(False), model=(llama(0), None))

    def test_slots(self, settings: Settings) -> None:
        assert_slots_do_not_matter(settings)

    def test_trace(self, settings: Settings) -> None:
        assert_trace_adds_up(settings(False))

    def test_strength_zero(self, settings: Settings) -> None:
        assert_zero_is_the_base(settings(False).scaled(0))


class OnEveryPath(OnTorch):
    """Those, and NumPy arrays and rows equal bit for bit."""

    def test_on_numpy_arrays(self, settings: Settings) -> None:
        assert_numpy_agrees(settings)

    def test_rows_are_bit_equal(self, settings: Settings) -> None:
        assert_rows_are_bit_equal_in_a_batch(settings(False))
