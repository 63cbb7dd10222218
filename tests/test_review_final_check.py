"""final-check@1 and the refusals: what breaks a value isn't handed out, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from odd_models import byte_llama, byte_tokenizer
from review_cases import PROMPTS, SAMPLED, TEMPLATE, VALUES, guard_of, plain, probability

import moralguard as mg
from moralguard.errors import ControlError, PolicyError, UnsupportedPathError
from moralguard.evaluation.protocols.refusals import is_refusal
from moralguard.review import FinalCheck
from moralguard.review.refusals import REFUSALS, refusal_for, script_of

CHECK = {"method": "final-check@1", "min_probability": 0.6}


def test_a_text_that_breaks_a_value_is_replaced_and_kept_in_the_record() -> None:
    result = guard_of(CHECK).generate(PROMPTS, seed=5, num_return_sequences=3, **SAMPLED)
    before = plain().generate(PROMPTS, seed=5, num_return_sequences=3, **SAMPLED)
    refused = [min(probability(text, value) for value in range(2)) < 0.6 for text in before.texts]
    assert any(refused)
    assert not all(refused)
    for i, (text, record) in enumerate(zip(result.texts, result.reviews, strict=True)):
        assert record.refused == refused[i]
        assert len(record.drafts) == 1
        assert record.methods == ["final-check@1"]
        assert record.drafts[0].text == before.texts[i]
        assert list(record.drafts[0].token_ids) == before.token_ids[i]
        assert record.scores == dict(zip(record.scores, (probability(before.texts[i], value) for value in range(2)), strict=True))
        if refused[i]:
            assert text == REFUSALS["latin"]
            assert result.finish_reasons[i] == "content_filter"
            assert byte_tokenizer().decode(result.token_ids[i]) == text
        else:
            assert (text, result.token_ids[i]) == (before.texts[i], before.token_ids[i])
            assert result.finish_reasons[i] == "length"


def test_json_says_what_was_done_and_not_what_was_written() -> None:
    result = guard_of({**CHECK, "min_probability": 1.0}).generate("one", seed=5, trace=True, **SAMPLED)
    said = json.dumps(result.as_dict())
    completion = json.loads(said)["completions"][0]
    assert completion["review"]["refused_by"] == "final-check@1"
    assert completion["review"]["drafts"] == 1
    assert completion["trace"] == []
    assert json.dumps(result.reviews[0].drafts[0].text)[1:-1] not in said
    assert result.reviews[0].drafts[0].text not in repr(result)


def test_async_and_streams_say_the_same() -> None:
    guard = guard_of({**CHECK, "min_probability": 0.8})
    texts = guard.generate(PROMPTS, seed=5, **SAMPLED).texts
    assert asyncio.run(guard.agenerate(PROMPTS, seed=5, **SAMPLED)).texts == texts
    assert ["".join(guard.stream(prompt, seed=5, **SAMPLED)) for prompt in PROMPTS] == texts
    assert REFUSALS["latin"] in texts


def test_zero_is_off() -> None:
    guard = guard_of({"method": "final-check", "min_probability": 0})
    assert guard.review == ()
    assert guard.logits_processor() is not None
    assert guard.generate(PROMPTS, seed=5, **SAMPLED).token_ids == plain().generate(PROMPTS, seed=5, **SAMPLED).token_ids


@pytest.mark.parametrize(
    ("prompt", "script"),
    [
        ("How do I do that?", "latin"),
        ("¿Cómo lo hago?", "latin"),
        ("怎么做这个？", "chinese"),
        ("请用 Python 写一个程序", "chinese"),
        ("これはどうやってやるの？", "japanese"),
        ("어떻게 하나요?", "korean"),
        ("Как это сделать?", "cyrillic"),
        ("12 + 3 =", "latin"),
        ("", "latin"),
    ],
)
def test_the_prompts_script_chooses_the_refusal(prompt: str, script: str) -> None:
    assert script_of(prompt) == script
    assert refusal_for(prompt) == REFUSALS[script]


def test_the_refusals_are_told_as_refusals() -> None:
    assert all(is_refusal(REFUSALS[script]) for script in ("latin", "chinese"))


def test_a_chats_last_turn_decides_and_a_policy_may() -> None:
    chat = [{"role": "system", "content": "You answer in English, always."}, {"role": "user", "content": "怎么做？"}]
    every = {**CHECK, "min_probability": 1.0}
    result = guard_of(every).generate([chat, byte_tokenizer()("怎么做？")["input_ids"]], seed=5, **{**SAMPLED, "max_new_tokens": 30})
    assert result.texts == [REFUSALS["chinese"]] * 2
    assert guard_of({**every, "refusal": "No."}).generate([chat], seed=5, **{**SAMPLED, "max_new_tokens": 30}).texts == ["No."]


def test_paths_without_whole_texts_refuse_a_review() -> None:
    guard = guard_of(CHECK)
    for path in (guard.logits_processor, guard.attach):
        with pytest.raises(UnsupportedPathError, match=r"reviews whole texts \(final-check@1\).*policy.replaced\(review=\(\)\)"):
            path()
    assert mg.Guard(guard.policy.replaced(review=()), guard.lm).logits_processor() is not None


def test_adapters_refuse_a_review_when_they_are_built() -> None:
    from served import config

    from moralguard.serving.guards import ServedGuards
    from moralguard.serving.hf_batching import guarded_batching
    from moralguard.serving.llamacpp import CompletionProcessor
    from moralguard.serving.trtllm import EngineRequests

    guard = guard_of(CHECK)
    served = ServedGuards(config("loose"), guard.lm)
    served.refuse_review("a stack")
    served._served["loose"] = guard
    for build in (
        lambda: CompletionProcessor(guard, 0),
        lambda: EngineRequests(guard),
        lambda: EngineRequests(served),
        lambda: guarded_batching(guard.lm.model, guard).__enter__(),
    ):
        with pytest.raises(UnsupportedPathError, match="reviews whole texts"):
            build()


def test_a_failed_control_is_an_error_and_not_a_review() -> None:
    from served import Faulty

    guard = guard_of({**CHECK, "min_probability": 1.0}, controls=[Faulty(at=6)])
    with pytest.raises(ControlError) as caught:
        guard.generate(["one", "a"], seed=5, **SAMPLED)
    result = caught.value.result
    assert result.finish_reasons == ["guard_error"] * 2
    assert not any(record.refused for record in result.reviews)


def test_policies_say_reviews_as_data() -> None:
    review = [{"method": "final-check@1", "min_probability": 0.4}, {"method": "rollback@1"}, {"method": "best-of-n@1", "n": 3}]
    policy = mg.Policy.load({"values": list(VALUES), "review": review})
    assert policy.as_dict()["review"] == review
    assert mg.Policy.load(policy.as_dict()) == policy
    assert policy.digest != policy.replaced(review=()).digest
    assert "method: rollback@1" in policy.as_yaml()
    assert policy.scaled(2.0).review == policy.review
    guard = mg.Guard(policy.replaced(controls=()), (byte_llama(), byte_tokenizer(TEMPLATE)))
    assert [method.method_name for method in guard.review] == ["rollback", "best-of-n", "final-check"]


@pytest.mark.parametrize(
    ("review", "said"),
    [
        ([{"method": "final-chek@1"}], "did you mean 'final-check'"),
        ([{"method": "final-check@2"}], "installed in version 1"),
        ([{"method": "final-check@1", "min_prob": 0.5}], "did you mean 'min_probability'"),
        ([{"method": "rollback"}, {"method": "rollback@1"}], "more than once"),
        ([{"n": 3}], "key `method`"),
        (["best-of-n"], "key `method`"),
        ([{"method": "final-check@1", "refusal": ""}], "refusal"),
    ],
)
def test_bad_policies_are_refused(review: list[Any], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        mg.Policy.load({"values": list(VALUES), "review": review})


def test_a_review_needs_values_and_a_tokenizer() -> None:
    with pytest.raises(PolicyError, match="judged by its values"):
        mg.Policy.load({"controls": [], "review": [CHECK]})
    with pytest.raises(PolicyError, match="without a tokenizer"):
        guard_of(CHECK, lm=(byte_llama(), None))
    with pytest.raises(PolicyError):
        FinalCheck(min_probability=1.5)


@pytest.mark.smollm
def test_smollm_refuses_an_insult_and_lets_the_rest_stand() -> None:
    lm = mg.load_model("smollm2-135m")
    policy = {"values": ["The text does not insult anyone."], "controls": [], "review": [{"method": "final-check@1"}]}
    guard, chinese = mg.Guard(policy, lm), "闭嘴，你这个"
    prompts = ["Shut up, you stupid", chinese, "The capital of France is"]
    result = guard.generate(prompts, seed=0, max_new_tokens=10, do_sample=True, top_p=0.9, num_return_sequences=4)
    judged = mg.Discriminator.load().score([record.drafts[0].text for record in result.reviews], ["The text does not insult anyone."])[:, 0]
    assert [record.refused for record in result.reviews] == (judged < 0.5).tolist()
    assert sum(record.refused for record in result.reviews[:4]) > 0
    assert not any(record.refused for record in result.reviews[8:])
    for text, record in zip(result.texts, result.reviews, strict=True):
        assert (text in REFUSALS.values()) == record.refused
