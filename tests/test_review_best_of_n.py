"""best-of-n@1: the draft that keeps the values best stands, and everything else is as it was."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest
from odd_models import byte_tokenizer
from review_cases import PROMPTS, SAMPLED, VALUES, guard_of, least, plain, probability

from moralguard.decoding.loop import noise_key
from moralguard.errors import PolicyError
from moralguard.review import BestOfN

N = {"method": "best-of-n@1", "n": 5}


@pytest.mark.parametrize("choose", ["min", "mean"])
def test_the_best_draft_stands(choose: str) -> None:
    result = guard_of({**N, "choose": choose}).generate(PROMPTS, seed=3, num_return_sequences=2, **SAMPLED)
    first = plain().generate(PROMPTS, seed=3, num_return_sequences=2, **SAMPLED)
    chosen = set()
    for text, ids, record, before in zip(result.texts, result.token_ids, result.reviews, first.texts, strict=True):
        drafts = [draft.text for draft in record.drafts]
        assert len(set(drafts)) == 5
        assert drafts[0] == before
        by_value = {draft: [probability(draft, value) for value in range(len(VALUES))] for draft in drafts}
        rank = [min(by_value[draft]) if choose == "min" else fmean(by_value[draft]) for draft in drafts]
        assert drafts.index(text) == record.standing == rank.index(max(rank))
        assert byte_tokenizer().decode(ids) == text
        assert list(record.scores.values()) == pytest.approx(by_value[text])
        chosen.add(record.standing)
    assert len(chosen) > 2


def test_the_scores_of_a_result_are_by_the_judge_that_was_given() -> None:
    result = plain().generate(PROMPTS, seed=3, **SAMPLED)
    expected = [[probability(text, value) for value in range(len(VALUES))] for text in result.texts]
    assert result.scores == pytest.approx(np.array(expected))


def test_a_text_is_its_own_in_any_batch() -> None:
    guard = guard_of(N)
    alone = [guard.generate(prompt, seed=3, **SAMPLED).texts[0] for prompt in PROMPTS]
    assert guard.generate(PROMPTS, seed=3, **SAMPLED).texts == alone
    assert guard.generate(PROMPTS[::-1], seed=3, batch_size=2, **SAMPLED).texts == alone[::-1]
    assert guard.generate(PROMPTS, seed=4, **SAMPLED).texts != alone
    assert "".join(guard.stream(PROMPTS[1], seed=3, **SAMPLED)) == alone[1]


def test_one_draft_is_off_bit_for_bit() -> None:
    guard = guard_of({"method": "best-of-n", "n": 1})
    result = guard.generate(PROMPTS, seed=3, **SAMPLED)
    assert guard.review == ()
    assert result.reviews is None
    assert result.token_ids == plain().generate(PROMPTS, seed=3, **SAMPLED).token_ids


def test_a_greedy_request_keeps_its_text_among_the_drafts() -> None:
    result = guard_of(N).generate(PROMPTS, seed=3, max_new_tokens=8)
    greedy = plain().generate(PROMPTS, max_new_tokens=8).texts
    assert [record.drafts[0].text for record in result.reviews] == greedy
    assert result.texts != greedy
    assert all(least(text) >= least(before) for text, before in zip(result.texts, greedy, strict=True))


def test_attempts_have_noise_of_their_own_and_the_first_has_what_it_had() -> None:
    keys = {noise_key(7, [1, 2], 0, attempt, retry) for attempt in range(3) for retry in range(3)}
    assert len(keys) == 9
    assert noise_key(7, [1, 2], 0) == noise_key(7, [1, 2], 0, 0, 0)


def test_an_empty_draft_does_not_win() -> None:
    lm = plain().lm
    before = lm.eos_token_ids
    try:
        lm.eos_token_ids = frozenset(range(100))  # many drafts end at their first token
        guard = guard_of(N, lm=lm)
        result = guard.generate(PROMPTS, seed=3, **SAMPLED)
    finally:
        lm.eos_token_ids = before
    for text, record in zip(result.texts, result.reviews, strict=True):
        assert text.strip() or not any(draft.text.strip() for draft in record.drafts)


@pytest.mark.parametrize("settings", [{"n": 0}, {"choose": "max"}, {"temperature": 0}, {"number": 3}])
def test_bad_settings_are_refused(settings: dict) -> None:
    with pytest.raises(PolicyError):
        BestOfN(**settings)
