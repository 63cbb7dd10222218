"""guard.generate: a request's text is its own, whatever runs beside it; failures, gates and traces tell what they say they tell."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch
from odd_models import CONTROLS, PROMPTS, basis, byte_llama, byte_tokenizer, left_padded
from tiny_models import POSITIONS, VOCAB, gpt2, llama

import moralguard as mg
import moralguard_kernels as ops
from moralguard.controls import BoundControl, Control, DExperts, NullspaceProjection, Prompt, SelfDebias
from moralguard.decoding.gate import Gate
from moralguard.decoding.grad import plain_no_grad
from moralguard.decoding.loop import noise_key
from moralguard.decoding.session import Session
from moralguard.decoding.terms import Dense, Sparse, Terms
from moralguard.errors import ControlError, GuardError

NEW = 8
SAMPLING = {"do_sample": True, "temperature": 1.1, "top_k": 0, "top_p": 0.98, "max_new_tokens": NEW}
GREEDY = {"do_sample": False, "max_new_tokens": NEW}
FIVE = [*(list(prompt) for prompt in PROMPTS), [8] * 11]
SETS = {**{name: (name,) for name in CONTROLS}, "all": tuple(CONTROLS), "none": ()}


def guard_of(*names: str, model: Any = None, **policy: Any) -> mg.Guard:
    return mg.Guard(mg.Policy(controls=[CONTROLS[name]() for name in names], **policy), (model or llama(), None))


def text_guard(**policy: Any) -> mg.Guard:
    """A guard whose prompts and continuations are text."""
    controls = [DExperts(anti_expert=Prompt("Rude words:\n"), alpha=1.0), NullspaceProjection(basis=basis(), keep=0.2)]
    return mg.Guard(mg.Policy(controls=controls, **policy), (byte_llama(), byte_tokenizer()))


# --- A text is its own ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", SETS.values(), ids=SETS)
def test_same_seed_gives_the_same_text_everywhere(names: tuple[str, ...]) -> None:
    guard = guard_of(*names)
    alone = [guard.generate([prompt], seed=7, **SAMPLING).token_ids[0] for prompt in FIVE]
    assert guard.generate(FIVE, seed=7, **SAMPLING).token_ids == alone
    assert guard.generate(FIVE, seed=7, batch_size=2, **SAMPLING).token_ids == alone
    assert guard.generate(FIVE[::-1], seed=7, **SAMPLING).token_ids == alone[::-1]
    assert guard.generate([FIVE[1], *FIVE, FIVE[1]], seed=7, **SAMPLING).token_ids == [alone[1], *alone, alone[1]]
    several = guard.generate(FIVE, seed=7, num_return_sequences=3, batch_size=4, **SAMPLING)
    assert several.token_ids[::3] == alone
    assert guard.generate(FIVE, seed=8, **SAMPLING).token_ids != alone
    assert all(len(ids) == NEW for ids in alone)


def test_return_sequences_differ_and_lie_prompt_by_prompt() -> None:
    guard = guard_of("dexperts")
    result = guard.generate(FIVE[:3], seed=1, num_return_sequences=4, **SAMPLING)
    assert result.prompt_ids == [prompt for prompt in FIVE[:3] for _ in range(4)]
    assert len(result.texts) == len(result.finish_reasons) == len(result.errors) == len(result.token_ids) == 12
    for prompt in range(3):
        mine = result.token_ids[4 * prompt : 4 * prompt + 4]
        assert len({tuple(ids) for ids in mine}) == 4, "return indices have noise of their own"
    greedy = guard.generate(FIVE[:3], num_return_sequences=2, **GREEDY)
    assert greedy.token_ids[0::2] == greedy.token_ids[1::2]


def test_prompts_in_one_call_have_noise_of_their_own() -> None:
    """The noise isn't one vector for all rows: forty short prompts don't draw a handful of tokens."""
    guard = guard_of(model=gpt2())
    drawn = guard.generate([[i, 5] for i in range(40)], seed=1, **SAMPLING | {"max_new_tokens": 1}).token_ids
    assert len({ids[0] for ids in drawn}) > 10


def test_unseeded_result_names_its_seed() -> None:
    guard = guard_of("fudge")
    result = guard.generate(FIVE, **SAMPLING)
    assert guard.generate(FIVE, seed=result.seed, **SAMPLING).token_ids == result.token_ids
    assert guard.generate(FIVE, **SAMPLING).token_ids != result.token_ids


def test_draws_follow_the_law() -> None:
    """400 return sequences of one token against the guarded law."""
    guard = guard_of("dexperts")
    settings = SAMPLING | {"max_new_tokens": 1, "temperature": 1.0, "top_p": 1.0}
    drawn = guard.generate([FIVE[0]], seed=3, num_return_sequences=400, batch_size=400, **settings).token_ids
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=VOCAB).double()
    with torch.inference_mode():
        law = torch.softmax(Session(guard.lm, guard.controls, [FIVE[0]], own_base=True).step().logits[0].double(), -1)
    likely = law * 400 >= 5
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    expected = torch.cat([400 * law[likely], 400 * law[~likely].sum()[None]])
    chi_square = float(((observed - expected) ** 2 / expected.clamp_min(1e-9)).sum())
    degrees = len(observed) - 1
    assert degrees >= 5
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)
    assert counts[law == 0].sum() == 0


@pytest.mark.parametrize(
    "settings", [{"do_sample": False}, {"do_sample": True, "temperature": 0}, {"do_sample": True, "top_k": 1}], ids=str
)
def test_ways_of_saying_greedy(settings: dict[str, Any]) -> None:
    guard = guard_of("self_debias")
    assert guard.generate(FIVE, max_new_tokens=NEW, **settings).token_ids == guard.generate(FIVE, **GREEDY).token_ids


def test_defaults_of_the_policy_and_of_the_call() -> None:
    policy = {"decoding": {"max_new_tokens": 3, "do_sample": True, "top_k": 5}}
    guard = guard_of("dexperts", **policy)
    own = guard.generate(FIVE, seed=1)
    assert own.token_ids == guard_of("dexperts").generate(FIVE, seed=1, max_new_tokens=3, do_sample=True, top_k=5).token_ids
    assert {len(ids) for ids in own.token_ids} == {3}
    assert {len(ids) for ids in guard.generate(FIVE, seed=1, max_new_tokens=4).token_ids} == {4}


def test_progress_counts_continuations() -> None:
    told: list[tuple[int, int]] = []
    guard_of().generate(FIVE, batch_size=2, num_return_sequences=1, progress=lambda *done: told.append(done), **GREEDY)
    assert told == [(2, 5), (4, 5), (5, 5)]


# --- Text ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("settings", [SAMPLING, GREEDY], ids=["sampling", "greedy"])
def test_stream_joined_is_the_text(settings: dict[str, Any], seed: int) -> None:
    guard, prompt = text_guard(), f"héllo {seed}"
    settings = settings | {"max_new_tokens": 24}
    pieces = list(guard.stream(prompt, seed=seed, **settings))
    whole = guard.generate(prompt, seed=seed, **settings)
    assert "".join(pieces) == whole.texts[0] == byte_tokenizer().decode(whole.token_ids[0])
    assert 1 < len(pieces) <= 24
    assert all(pieces)


def test_stream_never_yields_half_a_character() -> None:
    """The model is made to write é é é: two bytes each, in two tokens."""
    tokenizer, first, second = byte_tokenizer(), *byte_tokenizer()("é")["input_ids"]

    class Spell(Scripted):
        control_name: ClassVar[str] = "spell"

        def delta(self, step: Any) -> torch.Tensor:
            wanted = torch.where(step.generated % 2 == 0, first, second)
            return torch.zeros_like(step.logits).scatter(-1, wanted[:, None], 1000.0)

    guard = mg.Guard(mg.Policy(controls=[Spell()]), (byte_llama(), tokenizer))
    assert list(guard.stream("x", max_new_tokens=7)) == ["é", "é", "é", "\ufffd"]
    assert guard.generate("x", max_new_tokens=7).texts == ["ééé\ufffd"]


def test_async_forms_give_the_same() -> None:
    guard, prompts = text_guard(), ["ab", "hello", "été"]

    async def gather() -> tuple[list[str], list[str]]:
        several = await asyncio.gather(*(guard.agenerate(prompt, seed=5, **SAMPLING) for prompt in prompts))

        async def streamed(prompt: str) -> str:
            return "".join([piece async for piece in guard.astream(prompt, seed=5, **SAMPLING)])

        return [result.texts[0] for result in several], list(await asyncio.gather(*(streamed(prompt) for prompt in prompts)))

    generated, streamed = asyncio.run(gather())
    assert generated == streamed == guard.generate(prompts, seed=5, **SAMPLING).texts


def test_stream_left_in_the_middle_leaves_nothing_behind() -> None:
    guard = text_guard()
    model = guard.lm.model
    pieces = guard.stream("ab", seed=5, **SAMPLING)
    next(pieces)
    assert torch.is_grad_enabled(), "gradient modes don't leak between pieces"
    assert not torch.is_inference_mode_enabled()
    pieces.close()
    assert not any(module._forward_hooks for module in model.modules())
    assert "".join(guard.stream("ab", seed=5, **SAMPLING)) == guard.generate("ab", seed=5, **SAMPLING).texts[0]


def test_without_a_tokenizer_texts_are_empty_and_ids_full() -> None:
    result = guard_of("dexperts").generate(FIVE, **GREEDY)
    assert result.texts == [""] * 5
    assert all(len(ids) == NEW for ids in result.token_ids)


# --- Where a text ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", SETS.values(), ids=SETS)
def test_end_of_text_stops_its_request_only(names: tuple[str, ...]) -> None:
    free = guard_of(*names).generate(FIVE, **GREEDY)
    stop = free.token_ids[0][2]
    model = llama()
    model.generation_config.eos_token_id = [stop, VOCAB - 1]
    stopped = guard_of(*names, model=model).generate(FIVE, **GREEDY)
    for before, after, reason in zip(free.token_ids, stopped.token_ids, stopped.finish_reasons, strict=True):
        ends = [i for i, token in enumerate(before) if token in (stop, VOCAB - 1)]
        assert after == (before[: ends[0] + 1] if ends else before)
        assert reason == ("stop" if ends else "length")
    assert {"stop", "length"} == set(stopped.finish_reasons)


@pytest.mark.parametrize("names", [(), ("self_debias",), ("pplm",)], ids="+".join)
def test_full_context_ends_with_length(names: tuple[str, ...]) -> None:
    """No error, and as much as fits: every position of the context is read at most once."""
    guard = guard_of(*names)
    result = guard.generate([[5] * (POSITIONS - 6)], max_new_tokens=40)
    assert result.finish_reasons == ["length"]
    longest_prefix = 3 if names == ("self_debias",) else 0
    assert len(result.token_ids[0]) == 6 + 1 - longest_prefix


@pytest.mark.parametrize("names", [(), ("self_debias",)], ids=["none", "self_debias"])
def test_full_context_of_one_request_does_not_end_another(names: tuple[str, ...]) -> None:
    guard = guard_of(*names)
    short, long = [3, 17, 5], [5] * (POSITIONS - 6)
    alone = [guard.generate([prompt], max_new_tokens=20).token_ids[0] for prompt in (short, long)]
    together = guard.generate([short, long], max_new_tokens=20)
    assert len(alone[0]) == 20
    assert together.token_ids == alone
    assert together.finish_reasons == ["length", "length"]


# --- Traces ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", SETS.values(), ids=SETS)
def test_trace_where_no_control_acts(names: tuple[str, ...]) -> None:
    """A gate that shuts after two tokens: from there the unguarded model would have drawn the same, and the laws are equal."""
    guard = guard_of(*names, gate=Gate(first_tokens=2))
    result = guard.generate(FIVE, seed=2, trace=True, **SAMPLING)
    assert [[record.token_id for record in records] for records in result.traces] == result.token_ids
    for prompt, records in zip(FIVE, result.traces, strict=True):
        assert [record.position for record in records] == list(range(len(prompt), len(prompt) + NEW))
        for record in records[2:]:
            assert record.counterfactual_id == record.token_id
            assert not record.changed
            assert record.kl == 0
            assert set(record.contributions) == {control.name for control in guard.controls}
            assert all(share == 0 for share in record.contributions.values())
    early = [record for records in result.traces for record in records[:2]]
    assert any(record.kl > 1e-3 for record in early) == bool(names)
    assert any(record.changed for record in early) == bool(names)


def test_no_trace_unless_asked() -> None:
    guard = guard_of("dexperts")
    assert guard.generate(FIVE, seed=2, **SAMPLING).traces is None
    plain = guard.generate(FIVE, seed=2, **SAMPLING).token_ids
    assert guard.generate(FIVE, seed=2, trace=True, **SAMPLING).token_ids == plain


def by_hand(guard: mg.Guard, prompt: list[int], tokens: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Guarded and base logits before each token, this request alone."""
    guarded, base = [], []
    with plain_no_grad():
        session = Session(guard.lm, guard.controls, [prompt], own_base=True)
        for i, token in enumerate(tokens):
            outcome = session.step(temperature=SAMPLING["temperature"])
            guarded.append(outcome.logits[0].double())
            base.append(guard.lm.model(input_ids=torch.tensor([prompt + tokens[:i]])).logits[0, -1].double())
            session.commit(torch.tensor([token]))
            session.advance()
    return guarded, base


def log_odds(logits: torch.Tensor, token: int) -> float:
    p = torch.softmax(logits, -1)
    return float(torch.log(p[token]) - torch.log(p.sum() - p[token]))


@pytest.mark.parametrize("name", CONTROLS)
def test_trace_of_one_control_by_hand(name: str) -> None:
    guard = guard_of(name)
    result = guard.generate(FIVE, seed=2, trace=True, **SAMPLING)
    for prompt, tokens, records in zip(FIVE, result.token_ids, result.traces, strict=True):
        key = torch.tensor([noise_key(2, prompt, 0)])
        for guarded, base, record in zip(*by_hand(guard, prompt, tokens), records, strict=True):
            share = log_odds(guarded, record.token_id) - log_odds(base, record.token_id)
            assert list(record.contributions.values()) == pytest.approx([share], abs=1e-3)
            p, q = torch.softmax(guarded, -1), torch.softmax(base, -1)
            kl = float((p * (p / q).log()).nan_to_num(0).sum())
            assert record.kl == pytest.approx(kl, abs=1e-4)
            warped = ops.warp(base.float()[None], SAMPLING["temperature"], 0, SAMPLING["top_p"], 0.0)
            assert record.counterfactual_id == int(ops.gumbel_argmax(warped, key, torch.tensor([record.position])))
    assert any(abs(share) > 0.1 for records in result.traces for record in records for share in record.contributions.values())


def test_first_counterfactual_is_the_unguarded_models_token() -> None:
    guarded = guard_of("dexperts").generate(FIVE, seed=2, trace=True, **SAMPLING)
    base = guard_of().generate(FIVE, seed=2, **SAMPLING)
    assert [records[0].counterfactual_id for records in guarded.traces] == [ids[0] for ids in base.token_ids]
    assert [ids[0] for ids in guarded.token_ids] != [ids[0] for ids in base.token_ids]


def test_trace_spells_tokens() -> None:
    records = text_guard().generate("ab", seed=2, trace=True, **SAMPLING).traces[0]
    assert [record.token for record in records] == [byte_tokenizer().decode([record.token_id]) for record in records]
    assert records[0].as_dict()["changed"] == records[0].changed
    without = guard_of().generate([[1]], trace=True, **GREEDY).traces[0]
    assert [record.token for record in without] == [f"<{record.token_id}>" for record in without]


# --- Threads and counters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("nullspace",), ("nullspace", "self_debias"), ("pplm",)], ids="+".join)
def test_two_threads_on_one_guard(names: tuple[str, ...]) -> None:
    """Controls that read hidden states do so through hooks: each thread must see its own."""
    guard = guard_of(*names)
    jobs = [([[i, i + 1, i + 2][: 1 + i % 3], [2 * i]], i) for i in range(10)]
    settings = SAMPLING | {"max_new_tokens": 12}

    def run(job: Any) -> list[list[int]]:
        prompts, seed = job
        return guard.generate(prompts, seed=seed, **settings).token_ids

    expected = [run(job) for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, jobs)) == expected
    assert not any(module._forward_hooks for module in guard.lm.model.modules())


def test_two_threads_inside_attach() -> None:
    guard = guard_of("nullspace", "fudge")
    jobs = [left_padded([[i, i + 1, i + 2], [2 * i]]) for i in range(8)]
    with guard.attach() as model:

        def run(inputs: Any) -> list[list[int]]:
            return model.generate(**inputs, max_new_tokens=10).tolist()

        expected = [run(job) for job in jobs]
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(run, jobs)) == expected


def test_two_guards_on_one_model_in_two_threads() -> None:
    model = llama()
    guards = [guard_of("nullspace", model=model), guard_of("dexperts", model=model), guard_of(model=model)]
    jobs = [(guards[i % 3], i) for i in range(12)]

    def run(job: Any) -> list[list[int]]:
        return job[0].generate(FIVE, seed=job[1], **SAMPLING).token_ids

    expected = [run(job) for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, jobs)) == expected


@pytest.mark.parametrize("names", SETS.values(), ids=SETS)
def test_counters_add_up(names: tuple[str, ...]) -> None:
    model = llama()
    model.generation_config.eos_token_id = 130
    guard = guard_of(*names, model=model)
    results = [guard.generate(FIVE, seed=seed, num_return_sequences=2, batch_size=3, **SAMPLING | {"max_new_tokens": 5}) for seed in (1, 2)]
    tokens = sum(len(ids) for result in results for ids in result.token_ids)
    counts = guard.counters.as_dict()
    assert counts["requests"] == 20
    assert counts["tokens_emitted"] == counts["rows_guarded"] == tokens
    assert counts["rows_touched"] <= tokens
    assert (counts["rows_touched"] > 0) == bool(names)
    assert counts["failed_closed"] == counts["failed_open"] == counts["unguarded_tokens"] == 0


# --- A control that fails -------------------------------------------------------------------------------------------------------


def first_tokens(step: Any) -> torch.Tensor:
    """The first unpadded token of every request, i64[R]."""
    return step.history.gather(1, step.mask.argmax(-1, keepdim=True))[:, 0]


class Scripted(Control):
    """Adds ``delta``; raises where and when it is told to: in ``place``, for requests whose prompt begins with token 66."""

    control_name: ClassVar[str] = "scripted"
    at: int | None = None
    place: str = "terms"

    @property
    def active(self) -> bool:
        return True

    def bind(self, lm: Any, values: Any) -> BoundControl[Any]:
        return BoundScripted(self, lm)

    def delta(self, step: Any) -> torch.Tensor:
        return 3 * torch.sin(torch.arange(step.logits.shape[-1]) + step.generated[:, None])


class BoundScripted(BoundControl[Scripted]):
    def _maybe_fail(self, place: str, step: Any) -> None:
        if place != self.settings.place or self.settings.at is None:
            return
        if bool(((first_tokens(step) == 66) & (step.generated == self.settings.at)).any()):
            raise OverflowError("token 66 broke it")

    def columns(self, step: Any) -> dict[str, torch.Tensor]:
        self._maybe_fail("columns", step)
        return {"steps": torch.zeros(step.rows)}

    def terms(self, step: Any) -> Terms:
        self._maybe_fail("terms", step)
        assert torch.equal(step.columns["steps"].long(), step.generated), "state follows its request"
        return Terms((Dense(self.settings.delta(step)),))

    def commit(self, step: Any, carry: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        self._maybe_fail("commit", step)
        return {"steps": step.columns["steps"] + 1}


WITH_BAD = [FIVE[0], [66, 4], FIVE[1], FIVE[2]]
PLACES = {"terms": 3, "columns": 0, "commit": 2}
BESIDE = [None, "dexperts", "nullspace", "pplm"]


def scripted_guard(beside: str | None, **settings: Any) -> mg.Guard:
    policy = {key: settings.pop(key) for key in ("on_error",) if key in settings}
    controls = [Scripted(**settings)] + ([CONTROLS[beside]()] if beside else [])
    return mg.Guard(mg.Policy(controls=controls, **policy), (llama(), None))


@pytest.mark.parametrize("settings", [SAMPLING, GREEDY], ids=["sampling", "greedy"])
@pytest.mark.parametrize("beside", BESIDE, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_failure_ends_its_request_only(place: str, beside: str | None, settings: dict[str, Any]) -> None:
    """The neighbours' texts are whole and the same; the failed request keeps its tokens so far."""
    whole = scripted_guard(beside).generate(WITH_BAD, seed=3, **settings).token_ids
    guard = scripted_guard(beside, at=PLACES[place], place=place)
    with pytest.raises(ControlError, match=r"'scripted' failed after \d tokens.*OverflowError: token 66 broke it.*on_error") as caught:
        guard.generate(WITH_BAD, seed=3, **settings)
    result = caught.value.result
    assert caught.value.control == "scripted"
    assert isinstance(caught.value.__cause__, OverflowError)
    assert [ids for i, ids in enumerate(result.token_ids) if i != 1] == [ids for i, ids in enumerate(whole) if i != 1]
    assert result.token_ids[1] == whole[1][: len(result.token_ids[1])]
    assert PLACES[place] <= len(result.token_ids[1]) <= PLACES[place] + 1
    assert result.finish_reasons == ["length", "guard_error", "length", "length"]
    assert [error is not None for error in result.errors] == [False, True, False, False]
    assert guard.counters.failed_closed == 1
    assert guard.counters.failed_open == 0
    assert guard.counters.tokens_emitted == sum(len(ids) for ids in result.token_ids)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_failure_leaves_other_batches_whole(batch_size: int) -> None:
    whole = scripted_guard(None).generate(WITH_BAD, **GREEDY).token_ids
    with pytest.raises(ControlError) as caught:
        scripted_guard(None, at=3).generate(WITH_BAD, batch_size=batch_size, **GREEDY)
    assert caught.value.result.token_ids == [whole[0], whole[1][:3], whole[2], whole[3]]


@pytest.mark.parametrize("beside", BESIDE, ids=str)
@pytest.mark.parametrize("place", ["terms", "columns", "commit"])
def test_failure_is_passed_over_when_open(place: str, beside: str | None) -> None:
    """From the failure on, the request goes on under the other controls, and it is counted once."""
    whole = scripted_guard(beside).generate(WITH_BAD, **GREEDY).token_ids
    guard = scripted_guard(beside, at=PLACES[place], place=place, on_error="open")
    result = guard.generate(WITH_BAD, **GREEDY)
    assert result.finish_reasons == ["length"] * 4
    assert result.errors == [None] * 4
    assert [ids for i, ids in enumerate(result.token_ids) if i != 1] == [ids for i, ids in enumerate(whole) if i != 1]
    assert len(result.token_ids[1]) == NEW
    assert result.token_ids[1] != whole[1], "without the control the text differs"
    if place == "columns" and beside is None:
        assert result.token_ids[1] == guard_of().generate([WITH_BAD[1]], **GREEDY).token_ids[0]
    assert guard.counters.failed_open == 1
    assert guard.counters.failed_closed == 0


def test_trace_beside_a_failure_passed_over() -> None:
    """Neighbours' contributions are what they are without the failure, for each of two controls, or given as unknown."""
    settings = GREEDY | {"trace": True}
    expected = scripted_guard("dexperts").generate(WITH_BAD, **settings).traces
    found = scripted_guard("dexperts", at=3, on_error="open").generate(WITH_BAD, **settings).traces
    for row in (0, 2, 3):
        for one, other in zip(found[row], expected[row], strict=True):
            for name, share in one.contributions.items():
                assert share is None or share == pytest.approx(other.contributions[name], abs=1e-3), f"{row}, {one.position}, {name}"
            assert one.kl == pytest.approx(other.kl, abs=1e-4)


def test_failure_in_a_stream() -> None:
    class Late(Scripted):
        control_name: ClassVar[str] = "late"

    prompt = byte_tokenizer().decode([66, 67])
    whole = mg.Guard(mg.Policy(controls=[Late()]), (byte_llama(), byte_tokenizer())).generate(prompt, **GREEDY)
    pieces: list[str] = []
    stream = mg.Guard(mg.Policy(controls=[Late(at=3)]), (byte_llama(), byte_tokenizer())).stream(prompt, **GREEDY)

    def consume() -> None:
        pieces.extend(iter(stream))

    with pytest.raises(ControlError, match=r"late.*after 3 tokens"):
        consume()
    assert "".join(pieces) == byte_tokenizer().decode(whole.token_ids[0][:3])


class KeepOne(Control):
    """Keeps nothing but ``token``, at the second step of requests that begin with 66: two such controls leave nothing."""

    control_name: ClassVar[str] = "keep-one"
    token: int

    @property
    def active(self) -> bool:
        return True

    def bind(self, lm: Any, values: Any) -> BoundControl[Any]:
        return BoundKeepOne(self, lm)


class BoundKeepOne(BoundControl[KeepOne]):
    def terms(self, step: Any) -> Terms:
        hit = (first_tokens(step) == 66) & (step.generated == 1)
        ids = torch.full((step.rows, 1), self.settings.token)
        return Terms((Sparse(ids, torch.zeros(step.rows, 1), keep_rest=False),), rows=hit)


@pytest.mark.parametrize("on_error", ["closed", "open"])
def test_controls_that_remove_everything(on_error: str) -> None:
    guard = mg.Guard(mg.Policy(controls=[KeepOne(token=0), KeepOne(token=1)], on_error=on_error), (llama(), None))
    base = guard_of().generate(WITH_BAD, **GREEDY).token_ids
    if on_error == "open":
        assert guard.generate(WITH_BAD, **GREEDY).token_ids == base
        assert guard.counters.failed_open == 1
        return
    with pytest.raises(ControlError, match="removed every token") as caught:
        guard.generate(WITH_BAD, **GREEDY)
    assert caught.value.result.token_ids == [base[0], base[1][:1], base[2], base[3]]
    assert guard.counters.failed_closed == 1


@pytest.mark.parametrize("batch_size", [1, 8])
def test_pass_that_does_not_fit_the_context_is_told_before_anything_runs(batch_size: int) -> None:
    """The prompt fits, the prompt with the prefix doesn't: PromptError says "Nothing was generated"."""
    guard = mg.Guard(mg.Policy(controls=[SelfDebias(prefixes=[[9] * 20])]), (llama(), None))
    with pytest.raises(GuardError, match=r"prefix|context"):
        guard.generate([[1, 2], [5] * (POSITIONS - 10)], batch_size=batch_size, **GREEDY)
    assert guard.counters.tokens_emitted == 0


# --- The gate -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTROLS)
def test_confident_rows_are_the_base_bit_for_bit(name: str) -> None:
    model = llama()
    inputs = left_padded(FIVE)
    settings = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain = model.generate(**inputs, **settings)
    entropies = torch.stack([torch.special.entr(torch.softmax(logits, -1)).sum(-1) for logits in plain.logits])
    limit = float(entropies.median())
    guard = guard_of(name, model=model, gate=Gate(min_entropy=limit))
    with guard.attach():
        out = model.generate(**inputs, **settings)
    confident = uncertain = changed = 0
    for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        entropy = torch.special.entr(torch.softmax(logits, -1)).sum(-1)
        for row in range(len(FIVE)):
            if float(entropy[row]) < limit:
                confident += 1
                assert torch.equal(scores[row], logits[row]), f"step {step}, row {row}"
            else:
                uncertain += 1
                changed += not torch.equal(scores[row], logits[row])
    assert confident > 5
    assert uncertain > 5
    assert changed == uncertain
    assert guard.counters.rows_touched == uncertain


@pytest.mark.parametrize("name", CONTROLS)
def test_gate_in_the_own_loop(name: str) -> None:
    """Shut for good it is the empty policy; always open it is no gate."""
    shut, opened = guard_of(name, gate=Gate(min_entropy=50)), guard_of(name, gate=Gate(min_entropy=0))
    assert shut.generate(FIVE, seed=1, **SAMPLING).token_ids == guard_of().generate(FIVE, seed=1, **SAMPLING).token_ids
    assert opened.generate(FIVE, seed=1, **SAMPLING).token_ids == guard_of(name).generate(FIVE, seed=1, **SAMPLING).token_ids
    assert shut.counters.rows_touched == 0
    partly = guard_of(name, gate=Gate(first_tokens=3))
    limited = partly.generate(FIVE, seed=1, **SAMPLING).token_ids
    assert [ids[:3] for ids in limited] == [ids[:3] for ids in opened.generate(FIVE, seed=1, **SAMPLING).token_ids]


def test_failure_of_a_batch_that_no_row_repeats_is_told(monkeypatch):
    """The law is still right, row by row, but a control that only works on single rows must not go unnoticed."""
    guard = mg.Guard(mg.Policy(controls=[SelfDebias(prefixes=[[3, 4]])]), (llama(), None))
    prompts = [[5, 6, 7], [8, 9]]
    usual = guard.generate(prompts, max_new_tokens=3).token_ids
    bound, whole = guard.controls[0], guard.controls[0].terms

    def single_rows_only(step):
        if step.rows > 1:
            raise ValueError("one row at a time")
        return whole(step)

    monkeypatch.setattr(bound, "terms", single_rows_only)
    with pytest.warns(RuntimeWarning, match="one row at a time"):
        assert guard.generate(prompts, max_new_tokens=3).token_ids == usual
