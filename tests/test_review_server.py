"""Reviews behind the server: the texts of guard.generate, refusals as content_filter, and nothing told of what was refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from review_cases import VALUES, Numbers
from served import Faulty, Slow, language_model, live, wait_until

import moralguard as mg
from moralguard.serving.audit import AuditLog
from moralguard.serving.config import ServingConfig
from moralguard.serving.server import create_app
from moralguard.serving.state import ServerSettings

LM = language_model()
SETTINGS = ServerSettings(served_model_name="m", max_running=3, max_waiting=9)
REFUSAL = "I'm sorry, but I can't assist with that."
REVIEWS: dict[str, list[dict[str, Any]]] = {
    "check": [{"method": "final-check@1", "min_probability": 0.6}],
    "best": [{"method": "best-of-n@1", "n": 3}],
    "back": [{"method": "rollback@1", "max_rollback": 4, "max_retries": 6, "min_probability": 0.6}],
    "critique": [{"method": "self-critique@1", "critique": "{draft}?", "revision": "{draft}|{critique}!", "critique_tokens": 4}],
    "all": [
        {"method": "rollback@1", "max_rollback": 4, "max_retries": 2, "min_probability": 0.4, "on_exhausted": "open"},
        {"method": "best-of-n@1", "n": 2},
        {"method": "self-critique@1", "critique": "{draft}?", "revision": "{draft}|{critique}!", "critique_tokens": 4},
        {"method": "final-check@1", "min_probability": 0.3},
    ],
}
POLICIES: dict[str, dict[str, Any]] = {
    **{name: {"values": list(VALUES), "controls": [], "review": review} for name, review in REVIEWS.items()},
    "none": {"values": list(VALUES), "controls": []},
    "never": {"values": list(VALUES), "controls": [], "review": [{"method": "final-check@1", "min_probability": 1.0}]},
    "slow": {"values": list(VALUES), "controls": [Slow()], "review": [{"method": "best-of-n@1", "n": 8}]},
    "faulty": {"values": list(VALUES), "controls": [Faulty()], "review": REVIEWS["check"]},
}


@pytest.fixture(autouse=True)
def _judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moralguard.discriminator.review_judge.shipped_discriminator", lambda onnx=False: Numbers())


def app(audit: AuditLog | None = None) -> Any:
    served = [{"id": name, "policy": policy} for name, policy in POLICIES.items()]
    return create_app(LM, ServingConfig(policies=served), SETTINGS, audit=audit)


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(app(), raise_server_exceptions=False) as client:
        yield client


def complete(client: TestClient, policy: str, status: int = 200, **body: Any) -> Any:
    answer = client.post("/v1/completions", json={"moralguard": {"policy": policy}, "max_tokens": 30, "seed": 5, **body})
    assert answer.status_code == status, answer.text
    return answer.json()


@pytest.mark.parametrize("policy", REVIEWS)
def test_the_server_writes_what_guard_generate_writes(client: TestClient, policy: str) -> None:
    prompts = ["one", "another one", "a third"]
    body = complete(client, policy, prompt=prompts, n=2, temperature=1.0)
    guard = mg.Guard(POLICIES[policy], LM, discriminator=Numbers())
    result = guard.generate(prompts, seed=5, num_return_sequences=2, do_sample=True, max_new_tokens=30)
    assert [choice["text"] for choice in body["choices"]] == result.texts
    assert [choice["finish_reason"] for choice in body["choices"]] == result.finish_reasons
    decisions = [choice["decision"] for choice in body["moralguard"]["choices"]]
    assert [decision == "deny" for decision in decisions] == [record.refused for record in result.reviews]


def test_policies_are_listed_with_their_reviews(client: TestClient) -> None:
    listed = {card["id"]: card["review"] for card in client.get("/v1/guards").json()["data"]}
    assert listed["best"] == ["best-of-n@1"]
    assert listed["none"] == []


def test_a_refused_chat_is_a_content_filter_in_the_prompts_language(client: TestClient) -> None:
    for content, refusal in (("hello", REFUSAL), ("怎么做？", "抱歉，我无法提供这方面的帮助。")):
        body = {"messages": [{"role": "user", "content": content}], "moralguard": {"policy": "never"}, "max_tokens": 30, "seed": 5}
        answer = client.post("/v1/chat/completions", json=body).json()
        choice = answer["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (refusal, "content_filter")
        said = answer["moralguard"]
        assert (said["decision"], said["reason"], said["choices"][0]["control"]) == ("deny", "review", "final-check@1")


def test_a_stream_tells_nothing_before_the_review_is_over(client: TestClient) -> None:
    body = {"prompt": "one", "moralguard": {"policy": "never"}, "max_tokens": 30, "seed": 5, "stream": True}
    lines = [line for line in client.post("/v1/completions", json=body).text.split("\n\n") if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line[6:])["choices"]]
    assert "".join(choice["text"] for choice in choices) == REFUSAL
    assert choices[-1]["finish_reason"] == "content_filter"
    streamed = client.post("/v1/completions", json={**body, "moralguard": {"policy": "best"}}).text
    text = "".join(c["text"] for line in streamed.split("\n\n") if line.startswith("data: {") for c in json.loads(line[6:])["choices"])
    assert text == complete(client, "best", prompt="one")["choices"][0]["text"] != ""


def test_stop_strings_end_the_drafts(client: TestClient) -> None:
    text = complete(client, "best", prompt="one", temperature=1.0)["choices"][0]["text"]
    stop = next(character for character in text[3:] if character.isascii() and character.isprintable())
    choice = complete(client, "best", prompt="one", temperature=1.0, stop=stop)["choices"][0]
    assert stop not in choice["text"]


def test_logprobs_of_a_reviewed_text_are_refused(client: TestClient) -> None:
    error = complete(client, "best", 400, prompt="one", logprobs=1)["error"]
    assert error["param"] == "logprobs"
    assert "reviews texts" in error["message"]
    assert complete(client, "none", prompt="one", logprobs=1)["choices"][0]["logprobs"]


def test_a_failed_control_is_denied_as_before(client: TestClient) -> None:
    said = complete(client, "faulty", prompt="one")
    assert said["choices"][0]["finish_reason"] == "content_filter"
    assert (said["moralguard"]["reason"], said["moralguard"]["choices"][0]["control"]) == ("guard_error", "faulty")


def test_a_judge_that_fails_hands_nothing_out(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, texts: Any, values: Any, context: Any) -> Any:
        raise RuntimeError("words of a user")

    monkeypatch.setattr(Numbers, "read", broken)
    for policy in ("check", "back"):
        said = complete(client, policy, prompt="one")
        assert said["choices"][0]["text"] == REFUSAL
        assert said["moralguard"]["reason"] == "engine_error"
    assert complete(client, "none", prompt="one")["choices"][0]["finish_reason"] == "length"


def test_reading_a_draft_holds_up_nobody_beside_it(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    may_read, reading, plain_read = threading.Event(), threading.Event(), Numbers.read

    def waits(self: Any, texts: Any, values: Any, context: Any) -> Any:
        reading.set()
        assert may_read.wait(30)
        return plain_read(self, texts, values, context)

    wanted = complete(client, "back", prompt="one")["choices"][0]["text"]
    monkeypatch.setattr(Numbers, "read", waits)
    answers: list[Any] = []
    watched = threading.Thread(target=lambda: answers.append(complete(client, "back", prompt="one")))
    watched.start()
    try:
        assert reading.wait(30)
        assert complete(client, "none", prompt="one")["choices"][0]["finish_reason"] == "length"  # while the other is read
        assert not answers
    finally:
        may_read.set()
        watched.join(30)
    assert answers[0]["choices"][0]["text"] == wanted


def test_no_log_holds_a_refused_draft(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", text=True)
    with TestClient(app(log)) as client:
        complete(client, "never", prompt="one")
    log.close()
    line = json.loads((tmp_path / "audit.jsonl").read_text().splitlines()[0])
    assert (line["output"], line["reason"], line["control"], line["decision"]) == (REFUSAL, "review", "final-check@1", "deny")
    draft = mg.Guard(POLICIES["none"], LM).generate("one", seed=5, do_sample=True, max_new_tokens=30).texts[0]
    assert len(draft) > 5
    assert draft not in caplog.text


def test_a_client_that_leaves_takes_its_drafts_along() -> None:
    import httpx

    served = app()
    with live(served) as url:
        body = {"prompt": "one", "moralguard": {"policy": "slow"}, "max_tokens": 100}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=body, timeout=0.7)
        engine = served.state.server.engine
        wait_until(lambda: engine.running + engine.waiting == 0)
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "one", "moralguard": {"policy": "best"}}, timeout=20).status_code == 200
