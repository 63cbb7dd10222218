"""The engine: continuations that run side by side against the same ones alone, and what ends them."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy_model import NumpyModel
from odd_models import BAG
from served import POLICIES, language_model, wait_until

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.controls import PPLM, DExperts, Prompt, SelfDebias
from moralguard.decoding.gate import Gate
from moralguard.decoding.session import Session
from moralguard.decoding.settings import DecodingSettings
from moralguard.errors import PromptError
from moralguard.serving.engine import BusyError, Engine
from moralguard.serving.generation import Generation

LM = language_model()
GUARDS: dict[str, mg.Guard | None] = {
    "none": None,
    **{name: mg.Guard(policy, LM) for name, policy in POLICIES.items()},
    "gated": mg.Guard({**POLICIES["strict"], "gate": Gate(first_tokens=2)}, LM),
}
DRAWS = [
    {"do_sample": False},
    {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
    {"do_sample": True, "top_k": 7},
    {"do_sample": True, "temperature": 1.3, "min_p": 0.02},
]


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(LM, max_running=4, max_waiting=64)
    engine.start()
    yield engine
    engine.close()


class Inbox:
    """Collects what the engine tells of continuations."""

    def __init__(self) -> None:
        self.events: queue.Queue[Any] = queue.Queue()
        self.pieces: dict[Generation, str] = {}

    def make(self, prompt: list[int], guard: str = "none", new: int = 6, **more: Any) -> Generation:
        draw = more.pop("draw", {"do_sample": True})
        settings = DecodingSettings(max_new_tokens=new, **draw)
        return Generation(prompt, settings, guard=GUARDS[guard], policy=guard, notify=lambda g, p: self.events.put((g, p)), **more)

    def wait(self, count: int) -> list[Generation]:
        over: list[Generation] = []
        while len(over) < count:
            generation, piece = self.events.get(timeout=30)
            if piece is None:
                over.append(generation)
            else:
                self.pieces[generation] = self.pieces.get(generation, "") + piece.text
        return over


def alone(generation: Generation, **draw: Any) -> Any:
    guard = generation.guard or mg.Guard({"controls": []}, LM)
    return guard.generate(list(generation.prompt_ids), seed=generation.seed, max_new_tokens=generation.settings.max_new_tokens, **draw)


def test_texts_do_not_depend_on_what_runs_beside() -> None:
    engine, inbox = Engine(LM, max_running=10), Inbox()
    engine.start()
    made = []
    for i in range(24):
        guard = ["gated", "loose", "state", "strict", "none"][i // 4 % 5]  # four with settings of their own under each
        prompt = [(7 * i + j) % 256 for j in range(1 + i % 6)]
        draw = DRAWS[i % 4]
        made.append((inbox.make(prompt, guard, 3 + i % 7, seed=i % 3, draw=draw, stream=bool(i % 2)), draw))
    for start in range(0, 24, 6):  # they come while others run
        engine.submit([generation for generation, _ in made[start : start + 6]])
    inbox.wait(24)
    engine.close()
    assert 0 < sum(generation.interventions for generation, _ in made[:4]) < sum(generation.rows_guarded for generation, _ in made[:4])
    for generation, draw in made:
        expected = alone(generation, **draw)
        assert generation.token_ids == expected.token_ids[0]
        assert generation.text == expected.texts[0]
        assert generation.finish_reason == expected.finish_reasons[0]
        if generation.stream:
            assert inbox.pieces.get(generation, "") == generation.text


def test_controls_that_need_gradients_run_in_the_engine() -> None:
    guard = mg.Guard({"controls": [PPLM(bag_of_words=[BAG], stepsize=0.3, num_iterations=2, gamma=1.0)]}, LM)
    engine, inbox = Engine(LM, guard.controls, max_running=4), Inbox()
    made = [inbox.make([5, 6, 7 + i], new=4, seed=1) for i in range(3)]
    made[0].guard = made[2].guard = guard
    engine.submit(made)
    engine.start()
    inbox.wait(3)
    engine.close()
    assert [generation.token_ids for generation in made] == [alone(generation, do_sample=True).token_ids[0] for generation in made]
    assert guard.generate([5, 6, 7], seed=1, max_new_tokens=4, do_sample=True).token_ids != [made[1].token_ids]


def test_counters_are_those_of_the_own_loop(engine: Engine) -> None:
    guard = mg.Guard(POLICIES["strict"], LM)
    inbox = Inbox()
    made = [inbox.make([1, 2, 3 + i], new=5) for i in range(3)]
    for generation in made:
        generation.guard = guard
    engine.submit(made)
    inbox.wait(3)
    other = mg.Guard(POLICIES["strict"], LM)
    other.generate([list(generation.prompt_ids) for generation in made], max_new_tokens=5, do_sample=True, seed=0)
    assert guard.counters.as_dict() == other.counters.as_dict()
    assert made[0].rows_guarded == made[0].interventions == 5
    assert made[0].decision == "steer"


@pytest.mark.parametrize(("policy", "control"), [("faulty", "faulty"), ("empties", "rectification")])
def test_a_failed_control_ends_its_own_request(engine: Engine, policy: str, control: str) -> None:
    inbox = Inbox()
    closed, neighbour = inbox.make([1] * 4, policy, 8, logprobs=1), inbox.make([1] * 4, "strict", 8)
    before = closed.guard.counters.failed_closed
    engine.submit([closed, neighbour])
    inbox.wait(2)
    assert (closed.finish_reason, closed.decision, closed.reason, closed.failed_control) == (
        "content_filter",
        "deny",
        "guard_error",
        control,
    )
    assert closed.text == ""
    assert len(closed.token_ids) == 4
    assert closed.guard.counters.failed_closed == before + 1
    assert neighbour.token_ids == alone(neighbour, do_sample=True).token_ids[0]


@pytest.mark.parametrize("policy", ["faulty-open", "empties-open"])
def test_a_failure_may_be_passed_over_and_is_counted(engine: Engine, policy: str) -> None:
    inbox = Inbox()
    generation = inbox.make([1] * 4, policy, 8)
    before = generation.guard.counters.failed_open
    engine.submit([generation])
    inbox.wait(1)
    counted = generation.guard.counters.failed_open - before
    assert (generation.finish_reason, generation.decision) == ("length", "allow" if policy == "faulty-open" else "steer")
    assert counted == generation.failed_open >= 1
    assert generation.token_ids == alone(generation, do_sample=True).token_ids[0]
    assert generation.guard.counters.failed_open - before == 2 * counted


def test_given_tokens_are_scored_under_the_guarded_law(engine: Engine) -> None:
    """Against a session that commits them one by one; the control has state, and so would notice a token that was drawn instead."""
    ids = [10, 20, 33, 4, 5, 16, 8]
    inbox = Inbox()
    made = [inbox.make(ids[:1], guard, given=ids[1:], logprobs=3) for guard in ("state", "strict", "none")]
    drawn = inbox.make(ids[:1], "state", 6)  # rides along with the first
    engine.submit([*made, drawn])
    inbox.wait(4)
    assert drawn.token_ids == alone(drawn, do_sample=True).token_ids[0]
    for generation in made:
        guard = generation.guard or mg.Guard({"controls": []}, LM)
        with torch.inference_mode():
            session = Session(LM, guard.controls, [ids[:1]], own_base=True, gate=guard.gate)
            for score, token in zip(generation.scores, ids[1:], strict=True):
                law = session.step().logits[0].double().log_softmax(-1).numpy()
                assert score.token_id == token
                np.testing.assert_allclose(score.logprob, law[token], atol=1e-4)
                assert score.top[0][1] == max(value for _, value in score.top)
                assert [i for i, _ in score.top] == np.argsort(-law, kind="stable")[:3].tolist()
                session.commit(torch.tensor([token]))
                session.advance()
        assert generation.token_ids == ids[1:]
    assert made[0].guard.counters.tokens_emitted <= made[0].guard.counters.rows_guarded


def test_stop_strings_end_the_text_before_them(engine: Engine) -> None:
    inbox = Inbox()
    whole = alone(inbox.make([1, 2, 3], "loose", 30), do_sample=True).texts[0]
    plain = next(i for i in range(3, len(whole) - 1) if "\ufffd" not in whole[i : i + 2])
    stop = whole[plain : plain + 2]
    made = [inbox.make([1, 2, 3], "loose", 30, stop=(stop, "never there"), stream=stream) for stream in (False, True)]
    engine.submit(made)
    inbox.wait(2)
    for generation in made:
        assert generation.text == whole[: whole.index(stop)]
        assert generation.finish_reason == "stop"
        assert len(generation.token_ids) < 30
    assert inbox.pieces[made[1]] == made[1].text


def test_room_is_limited_and_a_cancelled_continuation_makes_some() -> None:
    engine, inbox = Engine(LM, max_running=1, max_waiting=1), Inbox()
    engine.start()
    long = inbox.make([1], new=120, stream=True)
    engine.submit([long])
    wait_until(lambda: engine.running == 1)
    waiting = inbox.make([2], new=2)
    engine.submit([waiting])
    with pytest.raises(BusyError, match="1 continuations run and 1 wait, of at most 1 and 1"):
        engine.submit([inbox.make([3])])
    engine.cancel([long])
    inbox.wait(2)
    assert long.finish_reason == "cancelled"
    assert waiting.finish_reason == "length"
    assert waiting.token_ids == alone(waiting, do_sample=True).token_ids[0]
    assert (engine.running, engine.waiting) == (0, 0)
    engine.close()


def test_closing_ends_what_runs_and_what_waits() -> None:
    engine, inbox = Engine(LM, max_running=1), Inbox()
    made = [inbox.make([1], new=120), inbox.make([2], new=120)]
    engine.submit(made)
    engine.start()
    wait_until(lambda: engine.running == 1)
    engine.close()
    inbox.wait(2)
    assert {generation.finish_reason for generation in made} == {"cancelled"}
    assert not engine.alive
    with pytest.raises(BusyError):
        engine.submit([inbox.make([1])])


def test_a_continuation_ends_where_its_context_or_its_time_does(engine: Engine) -> None:
    inbox = Inbox()
    room = inbox.make([1] * 120, "loose", 50)  # the prefix of a pass leaves 5 tokens
    engine.submit([room])
    inbox.wait(1)
    expected = alone(room, do_sample=True)
    assert (room.finish_reason, room.token_ids) == ("length", expected.token_ids[0])
    hurried = Engine(LM, max_seconds=1e-9)
    late = inbox.make([1], new=100)
    hurried.submit([late])
    hurried.start()
    inbox.wait(1)
    hurried.close()
    assert (late.finish_reason, late.reason) == ("length", "time_limit")
    assert len(late.token_ids) < 100


class Trap(LanguageModel):
    """Its forward pass fails on a token."""

    def forward(self, **arguments: Any) -> Any:
        if (arguments["input_ids"] == 77).any():
            raise RuntimeError("secret words of a user")
        return super().forward(**arguments)


@pytest.mark.parametrize("guarded", [False, True])
def test_an_unexpected_error_ends_its_requests_and_not_the_engine(guarded: bool, caplog: pytest.LogCaptureFixture) -> None:
    lm = Trap(LM.model, LM.tokenizer, "trap")
    engine, inbox = Engine(lm), Inbox()
    engine.start()
    failing, sound = inbox.make([77], new=3), inbox.make([1], new=3)
    if guarded:
        failing.guard, failing.policy = mg.Guard(POLICIES["strict"], lm), "strict"
    engine.submit([failing])
    inbox.wait(1)
    engine.submit([sound])
    inbox.wait(1)
    engine.close()
    assert (failing.finish_reason, failing.reason) == ("content_filter", "guard_error" if guarded else "engine_error")
    assert sound.finish_reason == "length"
    assert caplog.text
    assert "secret" not in caplog.text


def test_a_guard_whose_pass_fails_may_be_passed_over() -> None:
    """Its session is gone with its passes: the base goes on alone, and every token says so."""
    lm = Trap(LM.model, LM.tokenizer, "trap")
    guard = mg.Guard({"controls": [DExperts(anti_expert=Prompt([77]), alpha=1.0)], "on_error": "open"}, lm)
    engine, inbox = Engine(lm), Inbox()
    generation = inbox.make([1, 2], new=5, seed=9, trace=True)
    generation.guard = guard
    engine.submit([generation])
    engine.start()
    inbox.wait(1)
    engine.close()
    unguarded = mg.Guard({"controls": []}, LM).generate([1, 2], max_new_tokens=5, seed=9, do_sample=True)
    assert (generation.finish_reason, generation.token_ids) == ("length", unguarded.token_ids[0])
    assert (generation.failed_open, generation.rows_guarded, generation.traces) == (1, 0, [])
    assert (guard.counters.failed_open, guard.counters.unguarded_tokens) == (1, 5)


def test_models_without_torch() -> None:
    lm = NumpyModel(LM.model)
    guards = [mg.Guard({"controls": [SelfDebias(prefixes=[[9, 8]], decay_constant=300.0)]}, lm), None]
    engine, inbox = Engine(lm), Inbox()
    made = [inbox.make([3, 4, 5 + i % 2], new=5, seed=i, draw=DRAWS[i % 4], logprobs=1) for i in range(6)]
    for i, generation in enumerate(made):
        generation.guard = guards[i % 2]
    scored = inbox.make([3], given=[4, 5, 6], logprobs=1)
    engine.submit([*made, scored])
    engine.start()
    inbox.wait(7)
    engine.close()
    for i, generation in enumerate(made):
        guard = guards[i % 2] or mg.Guard({"controls": []}, lm)
        expected = guard.generate(list(generation.prompt_ids), seed=i, max_new_tokens=5, **DRAWS[i % 4])
        assert (generation.finish_reason, generation.token_ids) == ("length", expected.token_ids[0])
    assert len(scored.scores) == 3


def test_empty_prompts_are_refused(engine: Engine) -> None:
    with pytest.raises(PromptError, match="no prompt"):
        engine.submit([Inbox().make([])])
