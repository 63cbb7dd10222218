"""Requests that come, wait and leave while others run, against the same requests alone."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy_model import NumpyModel
from odd_models import PROMPTS, basis, expert, mistral
from scipy.special import softmax
from tiny_models import HIDDEN, VOCAB, gpt2, llama

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.controls import BoundControl, Control, Dense, DExperts, FactoredHead, Fudge, NullspaceProjection, Prompt, SelfDebias, Terms
from moralguard.decoding.gate import Gate
from moralguard.decoding.session import Session
from moralguard.decoding.slots import Slots
from moralguard.errors import PromptError
from moralguard.packs import write_pack

NEW = 7
TEXTS = [*(list(prompt) for prompt in PROMPTS), [8] * 11, [3], [90, 14, 2, 77]]
CLOSE = 2e-5


def random(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class BoundCount(BoundControl["Count"]):
    """Raises a token by how many even tokens the request has generated: state that only ``commit`` moves."""

    def columns(self, step: Any) -> dict[str, Any]:
        return {"even": step.weight(0.0)}

    def terms(self, step: Any) -> Terms:
        delta = step.arrays.full((step.rows, VOCAB), 0.0, step.arrays.float32, step.logits)
        delta[:, 5] = step.columns["even"]
        return Terms((Dense(delta),), carry={"even": step.columns["even"] + 0.5})

    def commit(self, step: Any, carry: dict[str, Any], tokens: Any) -> dict[str, Any]:
        return {"even": step.arrays.where(tokens % 2 == 0, carry["even"], step.columns["even"])}


class Count(Control):
    control_name: ClassVar[str] = "count"
    any_arrays: ClassVar[bool] = True

    @property
    def active(self) -> bool:
        return True

    def bind(self, lm: Any, values: Any) -> BoundCount:
        return BoundCount(self, lm)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("risk")
    FactoredHead(random(3, HIDDEN, seed=4), random(3, HIDDEN, seed=5), random(HIDDEN, seed=6), -0.5, random(HIDDEN, seed=7)).save(folder)
    lm = LanguageModel(llama(), None)
    write_pack(folder, kind="prefix-head", method="random", lm=lm, name="risk", data=(), settings={}, metrics={})
    return str(folder)


def policies(head: str, numpy: bool) -> list[mg.Policy]:
    """Several of different kinds; the third remembers what its gate saw."""
    other = expert()
    return [
        mg.Policy(controls=[SelfDebias(prefixes=[[11, 12, 13], [14]], decay_constant=300.0), NullspaceProjection(basis=basis())]),
        mg.Policy(controls=[DExperts(expert=NumpyModel(other) if numpy else other, anti_expert=Prompt([9, 8, 7]), alpha=1.5)]),
        mg.Policy(
            controls=[Fudge(discriminator=head, strength=3.0), Count()],
            gate=Gate(risk=head, min_risk=0.62, risk_window=3, stay_open=True),
        ),
    ]


def bound(head: str, model: Any, numpy: bool) -> list[mg.Guard]:
    lm = NumpyModel(model) if numpy else LanguageModel(model, None)
    return [mg.Guard(policy, lm) for policy in policies(head, numpy)]


def alone(guard: mg.Guard, prompt: list[int], steps: int = NEW) -> tuple[list[int], list[np.ndarray]]:
    """Greedy tokens of a request, and the guarded logits behind each."""
    with torch.no_grad():
        session = Session(guard.lm, guard.controls, [prompt], own_base=True, gate=guard.gate)
        tokens, laws = [], []
        for _ in range(steps):
            logits = np.array(session.step().logits)
            laws.append(logits[0])
            tokens.append(int(logits[0].argmax()))
            session.commit(session._arrays.integers([tokens[-1]], guard.lm))
            session.advance()
    return tokens, laws


class Stack:
    """A serving stack that schedules as it is told and draws greedily."""

    def __init__(self, guards: list[mg.Guard], own_base: bool, given_hidden: bool = False):
        self.guards, self.own_base = guards, own_base
        self.lm = guards[0].lm
        self.slots = Slots(self.lm, own_base=own_base, given_hidden=given_hidden)
        self.given_hidden = given_hidden
        self.tokens: dict[int, list[int]] = {}
        self.prompts: dict[int, list[int]] = {}
        self.laws: dict[int, list[np.ndarray]] = {}

    def add(self, slot: int, guard: int, prompt: list[int], state: Any = None) -> None:
        self.slots.add(slot, self.guards[guard].controls, self.guards[guard].gate, prompt, state)
        self.prompts[slot] = prompt
        self.tokens.setdefault(slot, [])
        self.laws.setdefault(slot, [])

    def base(self, slots: list[int]) -> dict[str, Any]:
        """What the stack's own model says, each request read anew."""
        rows = []
        for slot in slots:
            cache = self.lm.new_cache()
            ids = [self.prompts[slot] + self.tokens[slot]]
            array = np.array(ids) if isinstance(self.lm, NumpyModel) else torch.tensor(ids)
            rows.append(self.lm.forward(cache=cache, input_ids=array, hidden=True))
        joined = {"base": [row.logits for row in rows]}
        if self.given_hidden:
            joined |= {"hidden": [row.hidden for row in rows], "head_logits": [row.head_logits for row in rows]}
        cat = np.concatenate if isinstance(self.lm, NumpyModel) else torch.cat
        return {name: None if parts[0] is None else cat(parts) for name, parts in joined.items()}

    def step(self, slots: list[int], discard: frozenset[int] = frozenset()) -> None:
        """One step of these requests; the tokens of some are discarded, as of a prompt that is only half read."""
        with torch.no_grad():
            given = {} if self.own_base else self.base(slots)
            steps, failures = self.slots.step({slot: self.tokens[slot] for slot in slots}, **given)
        assert not failures
        assert sorted(slot for step in steps for slot in step.slots) == sorted(slots)
        for step in steps:
            for slot, logits in zip(step.slots, np.array(step.outcome.logits), strict=True):
                if slot not in discard:
                    self.laws[slot].append(logits)
                    self.tokens[slot].append(int(logits.argmax()))


def apart(mine: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference of probabilities."""
    return float(np.abs(softmax(mine.astype(float)) - softmax(theirs.astype(float))).max())


def check(stack: Stack, expected: dict[int, tuple[list[int], list[np.ndarray]]]) -> None:
    for slot, (tokens, laws) in expected.items():
        assert stack.tokens[slot] == tokens[: len(stack.tokens[slot])]
        for mine, theirs in zip(stack.laws[slot], laws, strict=False):
            assert (np.isfinite(mine) == np.isfinite(theirs)).all()
            assert apart(mine, theirs) < CLOSE


@pytest.fixture(scope="module")
def alone_tokens() -> Callable[[mg.Guard, int], tuple[list[int], list[np.ndarray]]]:
    known: dict[tuple[mg.Guard, int], tuple[list[int], list[np.ndarray]]] = {}

    def find(guard: mg.Guard, text: int) -> tuple[list[int], list[np.ndarray]]:
        key = (guard, text)
        if key not in known:
            known[key] = alone(guard, TEXTS[text])
        return known[key]

    return find


@pytest.fixture(scope="module", params=["torch", "numpy"])
def guards(request: pytest.FixtureRequest, head: str) -> list[mg.Guard]:
    torch.set_num_threads(1)
    return bound(head, llama(), request.param == "numpy")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["own base", "given logits", "given states"])
def test_a_request_is_its_own_whatever_is_scheduled_beside_it(kind: str, seed: int, guards: list[mg.Guard], alone_tokens: Any) -> None:
    chance = Random(seed)
    stack = Stack(guards, kind == "own base", kind == "given states")
    who: dict[int, tuple[int, int]] = {}
    running: list[int] = []
    parked: dict[int, Any] = {}
    for _ in range(14):
        if len(who) < 6 and (not running or chance.random() < 0.5):
            slot = len(who)
            who[slot] = (chance.randrange(len(guards)), chance.randrange(len(TEXTS)))
            stack.add(slot, who[slot][0], TEXTS[who[slot][1]])
            running.append(slot)
        if parked and chance.random() < 0.5:  # preempted requests come back with what they had
            slot, state = parked.popitem()
            stack.add(slot, who[slot][0], TEXTS[who[slot][1]], state)
            running.append(slot)
        scheduled = [slot for slot in chance.sample(running, len(running)) if len(stack.tokens[slot]) < NEW]
        scheduled = scheduled[: chance.randint(1, max(1, len(scheduled)))]
        if scheduled:
            stack.step(scheduled, frozenset(slot for slot in scheduled if not stack.tokens[slot] and chance.random() < 0.5))
        if running and chance.random() < 0.25:
            slot = running.pop(chance.randrange(len(running)))
            if chance.random() < 0.7 and stack.tokens[slot]:
                # which token was drawn last may not be known yet; a control with state of its own needs it
                known = stack.tokens[slot] if who[slot][0] == 2 or chance.random() < 0.5 else stack.tokens[slot][:-1]
                parked[slot] = stack.slots.park(slot, known)
            else:
                stack.slots.remove(slot)
            assert slot not in stack.slots
    assert sum(map(len, stack.tokens.values())) > 8
    check(stack, {slot: alone_tokens(guards[guard], text) for slot, (guard, text) in who.items()})


def test_a_batch_that_stays_as_it_is_runs_as_one(guards: list[mg.Guard]) -> None:
    stack = Stack(guards, own_base=True)
    for slot in range(6):
        stack.add(slot, slot % 2, TEXTS[slot])
    for _ in range(3):
        stack.step(list(range(6)))
    assert stack.slots.batches == 2, "one a guard"
    stack.add(6, 0, TEXTS[0])
    stack.step(list(range(7)))
    assert stack.slots.batches == 3, "the new one reads its prompt alone"
    stack.step(list(range(7)))
    assert stack.slots.batches == 2
    assert len(stack.slots) == 7


def test_a_batch_that_never_ends_does_not_grow(guards: list[mg.Guard]) -> None:
    """Requests come and go for a while; columns that only those gone needed are dropped."""
    stack = Stack(guards, own_base=True)
    for slot in range(30):
        stack.add(slot, 2, TEXTS[slot % len(TEXTS)])
        stack.step([s for s in (slot - 2, slot - 1, slot) if s in stack.slots])
        if slot >= 2:
            stack.slots.remove(slot - 2)
    longest = max(map(len, TEXTS)) + 3
    for batch in stack.slots._batches:
        assert batch.session.history.shape[1] <= longest
        assert all(memory.log_odds.shape[1] <= 3 for memory in batch.session.conditions.memories)
        assert all(group.mask.shape[1] <= longest for group in batch.session.table.groups)


def test_tokens_taken_back_are_read_anew(guards: list[mg.Guard]) -> None:
    stack = Stack(guards[:1], own_base=True)
    stack.add(0, 0, TEXTS[1])
    for _ in range(4):
        stack.step([0])
    stack.tokens[0], stack.laws[0] = [*stack.tokens[0][:2], 7], []
    stack.step([0])
    expected = alone(guards[0], [*TEXTS[1], *stack.tokens[0][:3]], 1)[1][0]
    assert apart(stack.laws[0][0], expected) < CLOSE


@pytest.mark.parametrize(
    ("controls", "gate", "failed"), [(2, True, "its gate saw 0 steps"), (2, False, "count keeps state"), (0, True, None)]
)
def test_tokens_that_a_guard_with_memory_never_saw_are_an_error(
    controls: int, gate: bool, failed: str | None, guards: list[mg.Guard]
) -> None:
    """A request that comes with tokens and without what its guard remembers of them."""
    guard, slots = guards[controls], Slots(guards[0].lm, own_base=True)
    slots.add(0, guard.controls, guard.gate if gate else None, TEXTS[0])
    with torch.no_grad():
        steps, failures = slots.step({0: [5, 6]})
    if failed is None:
        assert [step.slots for step in steps] == [(0,)]
    else:
        assert not steps
        assert failed in str(failures[0].error)


def test_an_empty_prompt_and_a_prompt_without_room(guards: list[mg.Guard]) -> None:
    slots = Slots(guards[0].lm, own_base=True)
    with pytest.raises(PromptError, match="slot 3 has an empty prompt"):
        slots.add(3, guards[0].controls, None, [])
    slots.add(0, guards[0].controls, None, [5] * 127)
    slots.add(1, guards[0].controls, None, TEXTS[0])
    with torch.no_grad():
        steps, failures = slots.step({0: [], 1: []})
    assert [step.slots for step in steps] == [(1,)]
    assert [(failure.slot, failure.control) for failure in failures] == [(0, "auxiliary pass")]
    assert "shorten the prompt or the prefix" in str(failures[0].error)


def test_a_request_that_outgrows_its_context_ends_alone(guards: list[mg.Guard]) -> None:
    slots = Slots(guards[0].lm, own_base=True)
    slots.add(0, guards[0].controls, None, [5] * 124)  # with a prefix of three tokens one more fits
    slots.add(1, guards[0].controls, None, TEXTS[0])
    generated: dict[int, list[int]] = {0: [], 1: []}
    ended = []
    with torch.no_grad():
        for _ in range(4):
            _, failures = slots.step({slot: generated[slot] for slot in generated})
            for failure in failures:
                ended.append((failure.slot, len(generated.pop(failure.slot))))
                assert "outgrown" in str(failure.error)
                slots.remove(failure.slot)
            for tokens in generated.values():
                tokens.append(9)
    assert ended == [(0, 2)]
    assert len(generated[1]) == 4


@pytest.mark.parametrize("factory", [gpt2, mistral])
def test_other_models(factory: Callable[[], Any], head: str) -> None:
    model = factory()
    lm_guards = [mg.Guard(mg.Policy(controls=[SelfDebias(prefixes=[[11, 12, 13], [14]], decay_constant=300.0)]), (model, None))]
    stack = Stack(lm_guards, own_base=True)
    for slot in range(4):
        stack.add(slot, 0, TEXTS[slot])
        stack.step(list(range(slot + 1)))
    stack.step([3, 1])
    check(stack, {slot: alone(lm_guards[0], TEXTS[slot]) for slot in range(4)})
