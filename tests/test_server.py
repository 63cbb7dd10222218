"""The HTTP surface: what it answers, as OpenAI's does, and what the guard says of itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from odd_models import byte_llama, byte_tokenizer
from openapi_spec_validator import validate
from opentelemetry._logs import NoOpLogger
from served import POLICIES, config, language_model

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.errors import ModelError
from moralguard.serving.server import create_app
from moralguard.serving.state import ServerSettings

LM = language_model()
SETTINGS = ServerSettings(served_model_name="m", max_running=4, max_waiting=8, max_body_bytes=2**16, default_max_tokens=20)
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(LM, config(), SETTINGS), raise_server_exceptions=False) as client:
        yield client


def complete(client: TestClient, status: int = 200, path: str = "completions", **body: Any) -> Any:
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def alone(policy: str | None, prompt: Any, **settings: Any) -> list[str]:
    return mg.Guard({"controls": []} if policy is None else POLICIES[policy], LM).generate(prompt, **settings).texts


@pytest.mark.parametrize("policy", [None, "loose", "strict", "state"])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_completions_are_the_guards_own(client: TestClient, policy: str | None, temperature: float) -> None:
    prompts = ["one", "another one"]
    guard = {} if policy is None else {"moralguard": {"policy": policy}}
    body = complete(client, prompt=prompts, n=2, max_tokens=6, seed=5, temperature=temperature, top_p=0.9, **guard)
    draw = {"do_sample": temperature > 0, "temperature": temperature, "top_p": 0.9, "num_return_sequences": 2}
    assert [choice["text"] for choice in body["choices"]] == alone(policy, prompts, seed=5, max_new_tokens=6, **draw)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert {choice["finish_reason"] for choice in body["choices"]} == {"length"}
    assert body["usage"] == {"prompt_tokens": 14, "completion_tokens": 24, "total_tokens": 38}
    said = body["moralguard"]
    assert (said["policy"], said["decision"]) == (policy, "allow" if policy is None else "steer")
    assert said["rows_guarded"] == (0 if policy is None else 24)
    assert len(said["choices"]) == 4


@pytest.mark.parametrize("prompt", ["hello", [72, 69], ["a", "b"], [[3, 4], [5]]])
def test_prompts_may_be_texts_or_ids(client: TestClient, prompt: Any) -> None:
    body = complete(client, prompt=prompt, max_tokens=2, temperature=0)
    assert [choice["text"] for choice in body["choices"]] == alone(None, prompt, max_new_tokens=2)


def test_chat_answers_are_the_guards_own(client: TestClient) -> None:
    parts = [{"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]}, *CHAT]
    plain = [{"role": "system", "content": "be brief"}, *CHAT]
    body = complete(client, path="chat/completions", model="m", messages=parts, max_completion_tokens=7, seed=2, temperature=1)
    assert body["choices"][0]["message"]["content"] == alone(None, plain, seed=2, max_new_tokens=7, do_sample=True)[0]
    assert body["object"] == "chat.completion"
    for empty in ("", None):
        complete(client, path="chat/completions", messages=[{"role": "user", "content": empty}], max_tokens=2)
    assert complete(client, path="chat/completions", messages=CHAT, temperature=0)["usage"]["completion_tokens"] == 20


def test_a_policys_own_decoding_defaults_hold_where_a_request_says_nothing() -> None:
    greedy = {**POLICIES["strict"], "decoding": {"do_sample": False}}
    served = config("strict").replaced(policies=[{"id": "greedy", "policy": greedy}], default="greedy")
    with TestClient(create_app(LM, served)) as client:
        assert complete(client, prompt="x", max_tokens=5)["choices"][0]["text"] == alone("strict", "x", max_new_tokens=5)[0]
        sampled = complete(client, prompt="x", max_tokens=5, temperature=1, seed=1)["choices"][0]["text"]
    assert sampled == alone("strict", "x", max_new_tokens=5, do_sample=True, seed=1)[0]


def test_given_tokens_are_scored_as_lm_eval_asks(client: TestClient) -> None:
    """The body that lm-eval sends, and its reading of the answer; a token is greedy where floats are equal."""
    guard = {"moralguard": {"policy": "state"}}
    greedy = complete(client, prompt=[[40, 41, 42]], max_tokens=4, temperature=0, logprobs=1, **guard)["choices"][0]["logprobs"]
    for tokens, tops in zip(greedy["token_logprobs"], greedy["top_logprobs"], strict=True):
        assert tokens == max(tops.values())
    ids = [40, 41, 42, 43, 200, 201]
    body = complete(client, model="m", prompt=[ids], temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True, **guard)
    told = body["choices"][0]["logprobs"]
    assert len(told["token_logprobs"]) == len(told["top_logprobs"]) == len(told["tokens"]) == len(told["text_offset"]) == len(ids) + 1
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    assert told["token_logprobs"][-1] == max(told["top_logprobs"][-1].values())
    assert all(value <= max(top.values()) for value, top in zip(told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True))
    only = complete(client, prompt=ids, max_tokens=0, logprobs=2, echo=True, **guard)["choices"][0]
    assert only["logprobs"]["token_logprobs"] == told["token_logprobs"][:-1]
    assert only["text"] == LM.tokenizer.decode(ids)
    assert complete(client, prompt=[40], max_tokens=0, logprobs=1, echo=True)["choices"][0]["logprobs"]["token_logprobs"] == [None]
    unguarded = complete(client, prompt=ids, max_tokens=0, logprobs=1, echo=True)["choices"][0]["logprobs"]["token_logprobs"]
    assert not np.allclose(unguarded[1:], told["token_logprobs"][1:-1], atol=1e-3)


def test_every_token_has_a_string_of_its_own(client: TestClient) -> None:
    strings = client.app.state.server.strings  # type: ignore[attr-defined]
    spelled = [strings.spell(i) for i in range(LM.vocab_size + 1)]
    assert len(set(spelled)) == len(spelled)
    assert spelled[-1] == f"token_id:{LM.vocab_size}"
    assert sum(each.startswith("bytes:\\x") for each in spelled) == 128
    assert strings.spell(256) == " a"
    text = "Aé aß"
    body = complete(client, prompt=text, max_tokens=0, logprobs=0, echo=True)["choices"][0]
    ids = LM.tokenizer(text)["input_ids"]
    assert body["logprobs"]["tokens"] == [strings.spell(i) for i in ids]
    assert body["logprobs"]["text_offset"] == [0, 1, 1, 2, 4, 4]


def test_chat_log_probabilities(client: TestClient) -> None:
    body = complete(client, path="chat/completions", messages=CHAT, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3)
    content = body["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    for entry in content:
        assert len(entry["top_logprobs"]) == 3
        assert entry["logprob"] == max(top["logprob"] for top in entry["top_logprobs"])
        assert entry["bytes"]


def test_the_trace_says_what_the_guard_did(client: TestClient) -> None:
    body = complete(client, prompt="x", max_tokens=5, seed=1, moralguard={"policy": "strict", "trace": True})
    trace = body["moralguard"]["choices"][0]["trace"]
    expected = mg.Guard(POLICIES["strict"], LM).generate("x", max_new_tokens=5, seed=1, do_sample=True, trace=True).traces[0]
    assert [(t["token_id"], t["counterfactual_id"], t["changed"]) for t in trace] == [
        (t.token_id, t.counterfactual_id, t.changed) for t in expected
    ]


@pytest.mark.parametrize("policy", ["faulty", "empties"])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_failure_is_a_refusal_and_no_server_error(client: TestClient, policy: str, path: str) -> None:
    given = {"prompt": "hello"} if path == "completions" else {"messages": CHAT}
    body = complete(client, path=path, max_tokens=9, moralguard={"policy": policy}, logprobs=True if path != "completions" else 1, **given)
    choice = body["choices"][0]
    text = choice["text"] if path == "completions" else choice["message"]["content"]
    assert (text, choice["finish_reason"]) == (SETTINGS.refusal, "content_filter")
    assert (body["moralguard"]["decision"], body["moralguard"]["reason"]) == ("deny", "guard_error")
    assert "secret" not in json.dumps(body)
    scored = complete(client, prompt=list(range(20)), echo=True, logprobs=1, max_tokens=0, moralguard={"policy": "faulty"})
    assert scored["choices"][0]["finish_reason"] == "content_filter"


def test_policies_may_be_tightened_only() -> None:
    with TestClient(create_app(LM, config("loose", "strict", default="strict"), SETTINGS)) as client:
        assert complete(client, prompt="x", max_tokens=1)["moralguard"]["policy"] == "strict"
        stronger = complete(client, prompt="x", max_tokens=1, moralguard={"strength": 1.5})["moralguard"]
        assert stronger["strength"] == 1.5
        assert stronger["policy_digest"] == mg.Policy.load(POLICIES["strict"]).scaled(1.5).digest
        for asked, message in (
            ({"policy": "loose"}, "looser than this server's default"),
            ({"policy": "strikt"}, "did you mean 'strict'"),
            ({"strength": 0.5}, "may ask for 1 to 2"),
            ({"polcy": "strict"}, "Extra inputs"),
        ):
            assert message in complete(client, 400, prompt="x", moralguard=asked)["error"]["message"]
        header = {"X-Moralguard-Policy": "loose"}
        assert client.post("/v1/completions", json={"prompt": "x"}, headers=header).json()["error"]["code"] == "policy_refused"
        both = client.post("/v1/completions", json={"prompt": "x", "moralguard": {"policy": "strict"}}, headers=header)
        assert both.json()["error"]["code"] == "policy_conflict"
        guards = client.get("/v1/guards").json()
    assert (guards["default"], guards["max_strength"]) == ("strict", 2.0)
    assert [(guard["id"], guard["selectable"], guard["default"]) for guard in guards["data"]] == [
        ("loose", False, False),
        ("strict", True, True),
    ]


def test_p_v_given_y(client: TestClient) -> None:
    texts, values = ["I will kill you.", "The sky is blue."], ["The text does not threaten anyone."]
    answer = client.post("/v1/guards/score", json={"texts": texts, "values": values})
    np.testing.assert_allclose(answer.json()["scores"], mg.Discriminator.load().score(texts, values), atol=1e-6)
    assert answer.json()["values"][0]["statement"] == values[0]
    assert client.post("/v1/guards/score", json={"texts": [], "values": values}).status_code == 400
    assert client.post("/v1/guards/score", json={"texts": texts, "values": [""]}).status_code == 400


def test_tokenizer_endpoints(client: TestClient) -> None:
    tokens = client.post("/tokenize", json={"prompt": "héllo a", "add_special_tokens": False}).json()
    assert tokens == {"tokens": LM.tokenizer("héllo a")["input_ids"], "count": 7, "max_model_len": 128}
    assert client.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "héllo a"}
    assert client.get("/tokenizer_info").json().keys() >= {"eos_token", "bos_token", "pad_token", "chat_template"}
    assert client.post("/tokenize", json={"messages": CHAT}).json()["count"] > 5
    assert client.post("/detokenize", json={"tokens": [9999]}).status_code == 400
    assert client.post("/tokenize", json={}).status_code == 400


def test_what_operators_watch(client: TestClient) -> None:
    assert client.get("/v1/models").json()["data"][0]["id"] == "m"
    assert client.get("/v1/models/m").json()["id"] == "m"
    assert client.get("/v1/models/org/other").json()["error"]["code"] == "model_not_found"
    assert client.get("/health").json()["status"] == "ok"
    complete(client, prompt="x", max_tokens=3, moralguard={"policy": "strict"})
    complete(client, 400, prompt="x" * 500)
    text = client.get("/metrics").text
    for line in (
        'moralguard:requests_total{decision="steer",finish_reason="length",policy="strict"}',
        'moralguard:tokens_total{policy="strict"}',
        'moralguard:intervened_tokens_total{policy="strict"}',
        'moralguard:rejected_total{status="400"}',
        "moralguard:step_seconds_bucket",
        "moralguard:requests_running 0.0",
        "moralguard:requests_waiting 0.0",
    ):
        assert line in text
    validate(client.get("/openapi.json").json())


def test_a_server_needs_a_tokenizer_and_a_chat_needs_a_template() -> None:
    with pytest.raises(ModelError, match="without a tokenizer"):
        create_app(LanguageModel(byte_llama(), None), config("loose"))
    with TestClient(create_app(LanguageModel(byte_llama(), byte_tokenizer()), config("loose"))) as client:
        assert complete(client, 400, path="chat/completions", messages=CHAT)["error"]["code"] == "no_chat_template"


def test_every_guarded_continuation_is_an_evaluation_event(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[dict[str, Any]] = []

    class Recorder(NoOpLogger):
        def emit(self, record: Any = None, **fields: Any) -> None:
            events.append(fields)

    monkeypatch.setattr("opentelemetry._logs.get_logger", lambda name: Recorder(name))
    body = complete(client, prompt="private", n=2, max_tokens=3, moralguard={"policy": "strict"})
    complete(client, prompt="private", max_tokens=3)
    assert [event["event_name"] for event in events] == ["gen_ai.evaluation.result"] * 2
    said = events[0]["attributes"]
    assert said["gen_ai.response.id"] == body["id"]
    assert (said["gen_ai.evaluation.name"], said["gen_ai.evaluation.score.label"]) == ("moralguard.strict", "steer")
    assert said["gen_ai.evaluation.score.value"] == 1.0
    assert "private" not in str(events)
