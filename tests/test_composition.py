"""Several controls in one policy: any order gives the same bits, and what can't stand together is told, before or while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from control_examples import example_model, examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy_model import NumpyModel
from tiny_models import llama

import moralguard as mg
from moralguard.controls import (
    ARGS,
    PPLM,
    RAD,
    BoundControl,
    Control,
    Dense,
    DExperts,
    Fudge,
    GeDi,
    Guidance,
    Keep,
    LowRank,
    Mix,
    Only,
    Prompt,
    ProxyTuning,
    SelfDebias,
    Sparse,
    SteeringVectors,
    Step,
    Terms,
    When,
    WordList,
)
from moralguard.controls.registry import control_names
from moralguard.decoding import rectification
from moralguard.decoding import session as session_module
from moralguard.decoding.loop import grad_mode
from moralguard.decoding.rectification import rectify
from moralguard.decoding.session import Session
from moralguard.decoding.slots import Slots
from moralguard.decoding.terms import taken
from moralguard.errors import ControlError, PolicyError
from moralguard.serving.running_requests import RunningRequests

PROMPTS = [[8, 3, 90], [5], [100, 3, 77, 4, 9]]
GREEDY = {"do_sample": False, "max_new_tokens": 3}
A, B = Prompt([5, 6]), Prompt([7])


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Control]:
    return examples(tmp_path_factory.mktemp("examples"))


def test_every_control_has_an_example(known: dict[str, Control]) -> None:
    built_in = {name for name, place in control_names().items() if place.startswith("moralguard.")}
    assert set(known) == built_in, "tests/control_examples.py lacks an example of a control, or names one that is gone"
    for name, control in known.items():
        assert control.control_name == name
        assert control.active


def laws(lm: Any, controls: Sequence[Control], steps: int = 2) -> list[np.ndarray]:
    """Guarded logits f32[R, V] of each greedy step."""
    guard = mg.Guard(mg.Policy(controls=controls), lm)
    found = []
    with grad_mode(guard.controls):
        session = Session(guard.lm, guard.controls, PROMPTS, own_base=True)
        for _ in range(steps):
            outcome = session.step()
            assert not outcome.failures
            found.append(np.array(outcome.logits.detach() if isinstance(outcome.logits, torch.Tensor) else outcome.logits))
            session.commit(outcome.logits.argmax(-1))
            session.advance()
    return found


def same_bits(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


@settings(max_examples=14, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_order_of_a_policy_gives_the_same_bits(known: dict[str, Control], data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(known)), min_size=2, max_size=4, unique=True))
    other = data.draw(st.permutations(names))
    lm = example_model()
    assert same_bits(laws(lm, [known[name] for name in names]), laws(lm, [known[name] for name in other]))


@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
def test_controls_of_one_method_in_any_order(numpy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More passes than one op takes, so that sums are grouped; without the canonical order the bits differ."""
    controls = [DExperts(expert=Prompt([i, i + 1]), anti_expert=Prompt([i + 2]), alpha=0.3 * (1 + i), filter_p=1.0) for i in (1, 4, 7)]
    lm: Any = NumpyModel(llama()) if numpy else (llama(), None)
    assert same_bits(laws(lm, controls), laws(lm, controls[::-1]))
    monkeypatch.setattr(session_module, "in_order", tuple)
    assert not same_bits(laws(lm, controls), laws(lm, controls[::-1]))


@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
def test_a_control_that_acts_in_other_rows_leaves_the_bits_of_a_row(numpy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the terms are more than one op takes: with the first control absent, the others are grouped in another way."""
    random = np.random.default_rng(0)
    give = np.array if numpy else torch.from_numpy
    base = give(random.normal(size=(3, 50)).astype(np.float32))
    sources = [give(random.normal(size=(3, 50)).astype(np.float32)) for _ in range(12)]
    weights = [give(random.normal(size=3).astype(np.float32)) for _ in range(12)]
    low = LowRank(give(random.normal(size=(50, 2)).astype(np.float32)), give(random.normal(size=(3, 2)).astype(np.float32)))
    ids = give(np.stack([random.permutation(50)[:20] for _ in range(3)]))
    sparse = Sparse(ids, give(random.normal(size=(3, 20)).astype(np.float32)), keep_rest=False)
    first = Terms((Mix(tuple(sources[:3]), tuple(weights[:3])), low, sparse), rows=give(np.array([True, False, False])))
    rest = [Terms((Mix(tuple(sources[i : i + 2]), tuple(weights[i : i + 2])),)) for i in (3, 5, 7, 9)]
    rest.append(Terms((low, sparse, Only(give(random.random((3, 50)) < 0.8)))))
    together, without = (rectify(base, terms) for terms in ([first, *rest], rest))
    assert np.array(together.logits)[1:].tobytes() == np.array(without.logits)[1:].tobytes()
    assert np.array(together.logits)[0].tobytes() != np.array(without.logits)[0].tobytes()
    for row in range(3):
        rows = give(np.array([row]))
        mine = [first, *rest] if row == 0 else rest
        alone = rectify(base[rows], [Terms(taken(item.terms, rows)) for item in mine]).logits
        assert np.array(alone)[0].tobytes() == np.array(together.logits)[row].tobytes()
    monkeypatch.setattr(rectification._Packer, "crowded", False)
    packed = np.array(rectify(base, [first, *rest]).logits)
    assert packed.tobytes() != np.array(together.logits).tobytes(), "the case is too small to tell"
    assert np.allclose(np.where(np.isfinite(packed), packed, 0), np.where(np.isfinite(packed), np.array(together.logits), 0), atol=1e-5)


class AllowList(Control):
    """Nothing but these tokens."""

    control_name: ClassVar[str] = "allow-list"
    any_arrays: ClassVar[bool] = True

    tokens: tuple[int, ...]
    told: bool = True
    fails_at: int | None = None

    @property
    def active(self) -> bool:
        return True

    def bind(self, lm: Any, values: Any) -> BoundAllowList:
        return BoundAllowList(self, lm)


class BoundAllowList(BoundControl[AllowList]):
    @property
    def allowed(self) -> frozenset[int] | None:
        return frozenset(self.settings.tokens) if self.settings.told else None

    def terms(self, step: Step) -> Terms:
        if self.settings.fails_at is not None and bool((step.history[:, -1] == self.settings.fails_at).any()):
            raise ValueError("as asked")
        arrays = step.arrays
        nothing = arrays.full((step.rows, self.lm.vocab_size), False, arrays.bool_, step.logits)
        ids = arrays.beside(arrays.integers([list(self.settings.tokens)] * step.rows), step.logits)
        return Terms((Only(arrays.scatter(nothing, ids, True)),))


class OtherList(AllowList):
    control_name: ClassVar[str] = "other-list"


class Push(AllowList):
    """Removes nothing."""

    control_name: ClassVar[str] = "push"

    def bind(self, lm: Any, values: Any) -> BoundPush:
        return BoundPush(self, lm)


class BoundPush(BoundControl[Push]):
    def terms(self, step: Step) -> Terms:
        delta = step.arrays.full((step.rows, self.lm.vocab_size), 0.5, step.arrays.float32, step.logits)
        return Terms((Dense(delta), Keep(top_k=self.lm.vocab_size)))


def build(*controls: Control, lm: Any = None, **policy: Any) -> mg.Guard:
    return mg.Guard(mg.Policy(name="mine", controls=controls, **policy), (llama(), None) if lm is None else lm)


def test_lists_without_a_common_token_are_refused() -> None:
    one, other = AllowList(tokens=(1, 2)), OtherList(tokens=(3,))
    with pytest.raises(PolicyError, match=r"'mine': what allow-list@1 and other-list@1 allow \(2 and 1 tokens\) has no token in common"):
        build(one, other)
    with pytest.raises(PolicyError, match="no token is allowed by all of allow-list@1, allow-list@1, other-list@1"):
        build(AllowList(tokens=(1, 2)), AllowList(tokens=(2, 3)), OtherList(tokens=(1, 3)))
    assert len(build(one, OtherList(tokens=(2, 3))).controls) == 2
    chinese, latin = When(language="zh"), When(language="latin")
    lm = example_model()
    assert len(build(one.replaced(when=chinese), other.replaced(when=latin), lm=lm).controls) == 2
    with pytest.raises(PolicyError, match="no token in common"):
        build(one.replaced(when=chinese), other.replaced(when=When(first_tokens=3)), lm=lm)


CONFLICTS = {
    "dexperts, turned round": (
        DExperts(expert=A, anti_expert=B),
        DExperts(expert=B, anti_expert=A),
        r"dexperts@1 .* the prompt \((5, 6|7,)\)",
    ),
    "one expert only": (DExperts(expert=A), DExperts(anti_expert=A), "dexperts@1 draws the text to"),
    "guidance": (Guidance(positive=A, negative=B), Guidance(positive=B), "guidance@1"),
    "gedi": (GeDi(code_desired=A, code_undesired=B), GeDi(code_desired=B, code_undesired=A), "gedi@1"),
    "across methods": (DExperts(expert=A), SelfDebias(prefixes=[(5, 6)]), "dexperts@1 draws .* self-debias@1"),
    "words": (PPLM(bag_of_words=[["Zebra", "b"]]), WordList(words=("zebra",)), "pplm@1 draws the text to the word 'zebra', .* word-list@1"),
    "vectors": (
        SteeringVectors(vectors={1: [1.0] * 32}, strength=1.0),
        SteeringVectors(vectors={1: [1.0] * 32}, strength=-0.5),
        "steering@1 draws the text to the same vectors",
    ),
}


@pytest.mark.parametrize("case", CONFLICTS.values(), ids=CONFLICTS)
def test_what_one_seeks_and_another_avoids(case: tuple[Control, Control, str]) -> None:
    one, other, message = case
    lm = example_model()
    for controls in ((one, other), (other, one)):
        with pytest.raises(PolicyError, match=message):
            build(*controls, lm=lm)
    build(one, lm=lm)
    apart = (one.replaced(when=When(language="zh")), other.replaced(when=When(language=("latin", "ja"))))
    assert len(build(*apart, lm=lm).controls) == 2


def test_models_and_rewards_are_told_by_themselves() -> None:
    expert, base = llama(seed=5), llama(seed=6)
    with pytest.raises(PolicyError, match="the same source"):
        build(ProxyTuning(expert=expert, anti_expert=base), ProxyTuning(expert=base, anti_expert=expert))

    def reward(token_ids: Any, candidates: Any, attention_mask: Any) -> Any:
        return candidates * 0.0

    with pytest.raises(PolicyError, match="the same reward"):
        build(RAD(reward=reward), RAD(reward=reward, inverse=True))
    assert len(build(RAD(reward=reward), RAD(reward=reward, beta=3.0)).controls) == 2


@pytest.mark.parametrize("other", [lambda reward: ARGS(reward=reward), lambda reward: Fudge(discriminator=reward)], ids=["args", "fudge"])
def test_a_reward_and_its_inverse_conflict_whatever_the_method(other: Any) -> None:
    def reward(token_ids: Any, candidates: Any, attention_mask: Any) -> Any:
        return candidates * 0.0

    with pytest.raises(PolicyError, match="the same reward"):
        build(other(reward), RAD(reward=reward, inverse=True))
    assert len(build(other(reward), RAD(reward=reward)).controls) == 2


EMPTY = (AllowList(tokens=(1, 2), told=False), OtherList(tokens=(3,), told=False), Push(tokens=()))
NAMES = "controls 'allow-list' and 'other-list' together removed every token"


@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
def test_a_step_without_a_token_ends_closed_and_names_the_filters(numpy: bool) -> None:
    lm: Any = NumpyModel(llama()) if numpy else (llama(), None)
    with pytest.raises(ControlError, match=NAMES) as caught:
        build(*EMPTY, lm=lm).generate(PROMPTS, **GREEDY)
    assert "push" not in str(caught.value)
    opened = build(*EMPTY, lm=lm, on_error="open")
    assert opened.generate(PROMPTS, **GREEDY).token_ids == build(lm=lm).generate(PROMPTS, **GREEDY).token_ids
    assert opened.counters.failed_open == 9


def test_on_every_path() -> None:
    guard = build(*EMPTY)
    ids = torch.tensor([[8, 3]])
    with pytest.raises(ControlError, match=f"in row 0, the {NAMES}"):
        guard.lm.model.generate(ids, logits_processor=[guard.logits_processor()], **GREEDY)
    with guard.attach() as model, pytest.raises(ControlError, match=NAMES):
        model.generate(ids, **GREEDY)
    running = RunningRequests(guard.lm)
    running.add(0, guard, [8, 3], 0)
    assert NAMES in str(running.step({0: []}, torch.randn(1, guard.lm.vocab_size))[0])
    slots = Slots(guard.lm, own_base=True)
    slots.add(0, guard.controls, None, [8, 3])
    with torch.inference_mode():
        [step], _ = slots.step({0: []})
    assert bool(step.outcome.emptied.all())
    assert NAMES in step.outcome.why_emptied(0)


def test_one_filter_alone_and_a_step_that_is_run_row_by_row() -> None:
    """Row 1 fails in one control, so every row is run alone; row 0 still says which filters left nothing."""
    alone = build(Push(tokens=()), AllowList(tokens=(), told=False))
    with pytest.raises(ControlError, match="control 'allow-list' removed every token; loosen its filter"):
        alone.generate(PROMPTS[:1], **GREEDY)
    guard = build(AllowList(tokens=(1,), told=False, fails_at=5), OtherList(tokens=(3,), told=False))
    with torch.inference_mode():
        outcome = Session(guard.lm, guard.controls, [[8, 3], [5]], own_base=True).step()
    assert outcome.terms is None
    assert outcome.emptied.tolist() == [True, False]
    assert NAMES in outcome.why_emptied(0)
