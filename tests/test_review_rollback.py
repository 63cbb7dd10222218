"""rollback@1: what goes wrong is taken back and drawn again, and neighbours don't notice."""

from __future__ import annotations

from typing import Any

import pytest
from numpy_model import NumpyModel
from odd_models import byte_llama, byte_tokenizer
from review_cases import PROMPTS, SAMPLED, guard_of, least, plain

import moralguard as mg
from moralguard.errors import PolicyError
from moralguard.review import Rollback
from moralguard.review.refusals import REFUSALS

BACK: dict[str, Any] = {"method": "rollback@1", "max_rollback": 4, "max_retries": 6, "min_probability": 0.6, "on_exhausted": "open"}
LONG = {**SAMPLED, "max_new_tokens": 40}  # no text of so many characters is without a marked one


def flagged(text: str, bound: float = 0.6) -> bool:
    """Whether two lengths of a text of whole characters, one behind the other, are under the bound (P never rises with length)."""
    return least(text[:-1]) < bound


def test_what_goes_wrong_is_taken_back_and_drawn_again() -> None:
    result = guard_of(BACK).generate(PROMPTS, seed=5, **LONG)
    unwatched = plain().generate(PROMPTS, seed=5, **LONG)
    assert any(record.rollbacks for record in result.reviews)
    for ids, before, record in zip(result.token_ids, unwatched.token_ids, result.reviews, strict=True):
        assert len(ids) == 40
        if not record.rollbacks:
            assert ids == before
            continue
        high = 0
        for draft, following in zip(record.drafts[:-1], record.drafts[1:], strict=True):
            taken, then = list(draft.token_ids), list(following.token_ids)
            assert draft.method == "rollback"
            assert flagged(draft.text)
            high = max(high, len(taken))
            kept = max(0, high - 4)
            assert then[:kept] == taken[:kept]
            assert then[kept:] != taken[kept:]
        assert record.drafts[0].token_ids == tuple(before[: len(record.drafts[0].token_ids)])
        assert record.drafts[-1].token_ids == tuple(ids)


def test_a_text_is_its_own_in_any_batch() -> None:
    guard = guard_of(BACK)
    alone = [guard.generate(prompt, seed=5, **LONG).token_ids[0] for prompt in PROMPTS]
    assert guard.generate(PROMPTS, seed=5, **LONG).token_ids == alone
    assert guard.generate(PROMPTS[::-1], seed=5, batch_size=2, **LONG).token_ids == alone[::-1]
    assert guard.generate(PROMPTS, seed=5, batch_size=1, **LONG).token_ids == alone


def test_controls_see_the_kept_tokens_again() -> None:
    """With a control that remembers the text and a gate that counts tokens, alone and in a batch."""
    control = {"control": "gedi@1", "code_desired": {"prompt": "good:\n"}, "code_undesired": {"prompt": "bad:\n"}, "disc_weight": 4}
    guard = guard_of(BACK, controls=[control], gate={"first_tokens": 30})
    result = guard.generate(PROMPTS, seed=5, trace=True, **LONG)
    assert any(record.rollbacks for record in result.reviews)
    assert [guard.generate(prompt, seed=5, **LONG).token_ids[0] for prompt in PROMPTS] == result.token_ids
    assert [len(trace) for trace in result.traces] == [len(ids) for ids in result.token_ids]


def test_a_stream_takes_nothing_back() -> None:
    guard = guard_of(BACK)
    for prompt in PROMPTS:
        assert "".join(guard.stream(prompt, seed=5, **LONG)) == guard.generate(prompt, seed=5, **LONG).texts[0]
    # what is certain comes before the end: all but the newest four tokens
    text = "x" * 12
    lm = mg.load_model((byte_llama(), byte_tokenizer()))
    pieces = list(guard_of({**BACK, "min_probability": 0.0}, lm=lm).stream(text, seed=5, **LONG))
    assert len(pieces) > 1


def test_closed_refuses_once_the_retries_are_used_up() -> None:
    never = {**BACK, "min_probability": 1.0, "on_exhausted": "closed", "max_retries": 2}
    result = guard_of(never).generate(["one", "好的，请告诉我"], seed=5, **LONG)
    assert result.texts == [REFUSALS["latin"], REFUSALS["chinese"]]
    assert result.finish_reasons == ["content_filter"] * 2
    for record in result.reviews:
        assert record.refused_by == "rollback@1"
        assert record.rollbacks == 3
        assert record.methods == ["rollback@1"]
        assert all(draft.text for draft in record.drafts)
        assert min(record.scores.values()) < 1
    streamed = "".join(guard_of({**never, "refusal": "No."}).stream("one", seed=5, **LONG))
    assert streamed == "No." or streamed.endswith("\n\nNo.")


def test_open_goes_on_where_the_retries_are_used_up() -> None:
    result = guard_of({**BACK, "min_probability": 1.0, "max_retries": 2}).generate(PROMPTS, seed=5, **LONG)
    assert {record.rollbacks for record in result.reviews} == {2}
    assert not any(record.refused for record in result.reviews)
    assert [len(ids) for ids in result.token_ids] == [40] * 5


def test_a_greedy_request_is_drawn_behind_what_it_keeps() -> None:
    result = guard_of(BACK).generate(PROMPTS, seed=5, max_new_tokens=40)
    greedy = plain().generate(PROMPTS, max_new_tokens=40)
    changed = [ids != before for ids, before in zip(result.token_ids, greedy.token_ids, strict=True)]
    assert changed == [record.rollbacks > 0 for record in result.reviews]
    assert any(changed)


def test_numpy_arrays_give_the_same() -> None:
    numpy_guard = guard_of(BACK, lm=NumpyModel(byte_llama(), byte_tokenizer()))
    assert numpy_guard.generate(PROMPTS, seed=5, **LONG).token_ids == guard_of(BACK).generate(PROMPTS, seed=5, **LONG).token_ids


def test_nothing_to_take_back_is_off() -> None:
    guard = guard_of({"method": "rollback@1", "max_rollback": 0})
    assert guard.review == ()
    assert guard.generate(PROMPTS, seed=5, **LONG).token_ids == plain().generate(PROMPTS, seed=5, **LONG).token_ids


@pytest.mark.parametrize("settings", [{"max_rollback": -1}, {"on_exhausted": "stop"}, {"consecutive": 0}, {"min_probability": 2}])
def test_bad_settings_are_refused(settings: dict) -> None:
    with pytest.raises(PolicyError):
        Rollback(**settings)


@pytest.mark.smollm
def test_smollm_goes_on_in_another_way() -> None:
    """The shipped discriminator on a real model's text: a flagged end is gone, what stood before it stands, plain text is left alone."""
    lm = mg.load_model("smollm2-135m")
    policy = {"values": ["The text does not insult anyone."], "controls": []}
    drawn = {"seed": 2, "max_new_tokens": 14, "do_sample": True, "top_p": 0.9, "num_return_sequences": 3}
    prompts = ["Shut up, you stupid", "The capital of France is"]
    before = mg.Guard(policy, lm).generate(prompts, **drawn)
    guard = mg.Guard({**policy, "review": [{"method": "rollback@1", "max_rollback": 8, "max_retries": 5, "min_probability": 0.7}]}, lm)
    result = guard.generate(prompts, **drawn)
    assert any(record.rollbacks for record in result.reviews[:3])
    for ids, was, text, record in zip(result.token_ids, before.token_ids, result.texts, result.reviews, strict=True):
        assert (ids == was) == (record.rollbacks == 0)
        for draft in (draft for draft in record.drafts if draft.method == "rollback"):
            assert min(draft.scores.values()) < 0.7
        if record.rollbacks:
            first = record.drafts[0].token_ids
            assert list(first) == was[: len(first)]
            assert draft.text not in text
            assert record.refused or ids[: max(0, len(first) - 8)] == was[: max(0, len(first) - 8)]
