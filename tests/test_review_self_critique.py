"""self-critique@1: what the model is asked, and that a revision stands only where it is no worse."""

from __future__ import annotations

from typing import Any

import pytest
from review_cases import PROMPTS, SAMPLED, guard_of, least, plain

from moralguard.errors import PolicyError
from moralguard.review import SelfCritique

SHORT: dict[str, Any] = {
    "method": "self-critique@1",
    "critique": "{draft}|{value}?",
    "revision": "{draft}|{value}|{critique}!",
    "critique_tokens": 5,
    "stop": [],
}
STATEMENTS = ("The text is kind.", "The text is calm.")


def guard(**settings: Any) -> Any:
    return guard_of({**SHORT, **settings}, values=list(STATEMENTS))


def worked_out(prompt: str, rounds: int) -> tuple[str, list[str]]:
    """The loop written out with a guard that has no review: (what stands, revisions)."""
    bare = plain()
    text = bare.generate(prompt, seed=5, **SAMPLED).texts[0]
    revisions = []
    for _ in range(rounds):
        for value in STATEMENTS:
            critique = bare.generate(f"{text.strip()}|{value}?", seed=5, **{**SAMPLED, "max_new_tokens": 5}).texts[0].strip()
            revision = bare.generate(f"{text.strip()}|{value}|{critique}!", seed=5, **SAMPLED).texts[0].strip()
            if revision:
                revision = text[: len(text) - len(text.lstrip())] + revision
                revisions.append(revision)
                text = revision if least(revision) >= least(text) else text
    return text, revisions


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_loop_is_the_one_written_out(rounds: int) -> None:
    result = guard(rounds=rounds).generate(PROMPTS, seed=5, **SAMPLED)
    kept = []
    for prompt, text, record in zip(PROMPTS, result.texts, result.reviews, strict=True):
        expected, revisions = worked_out(prompt, rounds)
        assert text == expected
        assert [draft.text for draft in record.drafts[1:]] == revisions
        assert record.drafts[record.standing].text == text
        assert record.notes == []
        kept.append(record.revised)
    assert any(kept)
    assert not all(kept)


def test_a_text_is_its_own_in_any_batch() -> None:
    several = guard().generate(PROMPTS, seed=5, batch_size=3, **SAMPLED).texts
    assert [guard().generate(prompt, seed=5, **SAMPLED).texts[0] for prompt in PROMPTS] == several


def test_only_values_that_look_broken_are_worked_on() -> None:
    result = guard(below=0.0).generate(PROMPTS, seed=5, **SAMPLED)
    assert all(len(record.drafts) == 1 for record in result.reviews)
    assert result.texts == plain().generate(PROMPTS, seed=5, **SAMPLED).texts


def test_no_round_is_off() -> None:
    off = guard(rounds=0)
    assert off.review == ()
    assert off.generate(PROMPTS, seed=5, **SAMPLED).texts == plain().generate(PROMPTS, seed=5, **SAMPLED).texts


def test_what_does_not_fit_leaves_the_draft_and_says_so() -> None:
    result = guard(critique="{draft}" + "x" * 200).generate(PROMPTS[:2], seed=5, **SAMPLED)
    assert result.texts == plain().generate(PROMPTS[:2], seed=5, **SAMPLED).texts
    assert all("self-critique@1: the draft stands" in note for record in result.reviews for note in record.notes)
    assert [len(record.notes) for record in result.reviews] == [2, 2]


def test_a_stop_ends_a_revision() -> None:
    free = guard().generate(PROMPTS, seed=5, **SAMPLED)
    i = next(i for i, record in enumerate(free.reviews) if len(record.drafts[1].text) > 4)
    revision = free.reviews[i].drafts[1].text
    stopped = guard(stop=[revision[3:5]]).generate(PROMPTS[i], seed=5, **SAMPLED)
    assert stopped.reviews[0].drafts[1].text.strip() == revision[: revision.find(revision[3:5])].strip()


def test_a_chat_is_asked_as_a_chat() -> None:
    chat = [{"role": "user", "content": "one"}]
    result = guard().generate([chat], seed=5, **SAMPLED)
    first = plain().generate([chat], seed=5, **SAMPLED).texts[0]
    assert result.reviews[0].drafts[0].text == first
    asked = [{"role": "user", "content": f"{first.strip()}|{STATEMENTS[0]}?"}]
    critique = plain().generate([asked], seed=5, **{**SAMPLED, "max_new_tokens": 5}).texts[0].strip()
    again = [{"role": "user", "content": f"{first.strip()}|{STATEMENTS[0]}|{critique}!"}]
    assert result.reviews[0].drafts[1].text.strip() == plain().generate([again], seed=5, **SAMPLED).texts[0].strip()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"critique": "{draft} {critique}"}, "names {critique}"),
        ({"revision": "write it again"}, "doesn't hold {draft}"),
        ({"critique": "{draft} {text}"}, "names {text}"),
        ({"rounds": -1}, "rounds"),
        ({"critique_tokens": 0}, "critique_tokens"),
    ],
)
def test_bad_settings_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        SelfCritique(**settings)


def test_braces_in_texts_are_left_alone() -> None:
    """A prompt that spells a field of the template is no field."""
    prompt = "a {draft} {"
    result = guard(critique="{prompt}|{draft}?", below=1.0).generate(prompt, seed=5, **SAMPLED)
    draft = plain().generate(prompt, seed=5, **SAMPLED).texts[0]
    critique = plain().generate(f"{prompt}|{draft.strip()}?", seed=5, **{**SAMPLED, "max_new_tokens": 5}).texts[0].strip()
    revision = plain().generate(f"{draft.strip()}|{STATEMENTS[0]}|{critique}!", seed=5, **SAMPLED).texts[0].strip()
    assert result.reviews[0].drafts[1].text.strip() == revision
