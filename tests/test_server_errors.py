"""Whatever is sent, the answer is an error in OpenAI's form and never a server error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import config, language_model

from moralguard.decoding.settings import DecodingSettings
from moralguard.serving.generation import Generation
from moralguard.serving.server import create_app
from moralguard.serving.state import ServerSettings

LM = language_model()
SETTINGS = ServerSettings(max_running=2, max_waiting=2, max_body_bytes=2**17, default_max_tokens=3)
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(LM, config(), SETTINGS), raise_server_exceptions=False) as client:
        yield client


def post(client: TestClient, path: str, body: Any) -> Any:
    text = body if isinstance(body, (str, bytes)) else json.dumps(body)
    return client.post(path, content=text, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ("[", None, "isn't JSON"),
        ("[" * 50_000, None, ""),
        (b"\xff\xfe", None, ""),
        ("null", None, ""),
        ('{"prompt": [' + "9" * 5000 + "]}", None, ""),
        ("[1]", None, "dictionary or object"),
        ({}, "prompt", "required"),
        ({"prompt": None}, "prompt", ""),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty list"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": ["x", ""]}, "prompt", "prompt 1 is empty"),
        ({"prompt": [1, "x"]}, "prompt", ""),
        ({"prompt": [True]}, "prompt", ""),
        ({"prompt": [-1]}, "prompt", "outside the vocabulary"),
        ({"prompt": [10**30]}, "prompt", "outside the vocabulary"),
        ('{"prompt": "\\ud800"}', "prompt", "surrogate"),
        ('{"prompt": "x", "stop": "\\udfff"}', "stop", "surrogate"),
        ('{"prompt": "x", "temperature": NaN}', "temperature", "finite"),
        ('{"prompt": "x", "top_p": Infinity}', "top_p", ""),
        ('{"prompt": "x", "temperature": 1e400}', "temperature", ""),
        ({"prompt": "x", "temperature": "warm"}, "temperature", "number"),
        ({"prompt": "x", "temperature": -1}, "temperature", "greater"),
        ({"prompt": "x", "top_p": 0}, "top_p", "greater"),
        ({"prompt": "x", "n": 0}, "n", "greater"),
        ({"prompt": "x", "n": 10**12}, "n", "less"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens", "greater"),
        ({"prompt": "x", "seed": 2**64}, "seed", "less"),
        ({"prompt": "x", "logprobs": 21}, "logprobs", "less"),
        ({"prompt": "x", "stop": ["a"] * 33}, "stop", ""),
        ({"prompt": "x", "best_of": 3}, "best_of", "doesn't support"),
        ({"prompt": "x", "suffix": "y"}, "suffix", "doesn't support"),
        ({"prompt": "x", "frequency_penalty": 0.5}, "frequency_penalty", "doesn't support"),
        ({"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias", "doesn't support"),
        ({"prompt": "x", "stream": True, "echo": True, "logprobs": 1}, "stream", "isn't supported"),
        ({"prompt": "x", "moralguard": "strict"}, "moralguard", ""),
        ('{"prompt": "x", "moralguard": {"strength": NaN}}', "moralguard", "finite"),
        ('{"prompt": "x", "moralguard": {"policy": "\\ud800"}}', "moralguard", "surrogate"),
    ],
)
def test_malformed_completions(client: TestClient, body: Any, param: str | None, says: str) -> None:
    answer = post(client, "/v1/completions", body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert says in error["message"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"messages": []}, "invalid_request"),
        ({"messages": "hi"}, "invalid_request"),
        ({"messages": [{"role": "martian", "content": "hi"}]}, "invalid_request"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "invalid_request"),
        ({"messages": [{"role": "user", "content": "refuse me"}]}, "invalid_prompt"),
        ({"messages": CHAT, "max_tokens": 0}, "invalid_request"),
        ({"messages": CHAT, "tools": [{"type": "function"}]}, "unsupported_parameter"),
        ({"messages": CHAT, "response_format": {"type": "json_object"}}, "unsupported_parameter"),
        ({"messages": CHAT, "max_tokens": 200}, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * 95}], "max_tokens": 1}, None),
        ({"messages": CHAT, "n": 5}, "too_many_continuations"),
    ],
)
def test_malformed_chats(client: TestClient, body: Any, code: str | None) -> None:
    answer = post(client, "/v1/chat/completions", body)
    assert answer.status_code == (200 if code is None else 400)
    assert answer.json().get("error", {}).get("code") == code


def test_prompts_that_do_not_fit(client: TestClient) -> None:
    for body in (
        {"prompt": [1] * 100, "max_tokens": 29},
        {"prompt": [1] * 129, "max_tokens": 1},
        {"prompt": [1] * 20_000},
        {"prompt": [1] * 126, "max_tokens": 1, "moralguard": {"policy": "loose"}},  # its pass has a prefix
        {"prompt": [1] * 126, "max_tokens": 0, "echo": True, "logprobs": 1, "moralguard": {"policy": "loose"}},
    ):
        answer = post(client, "/v1/completions", body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert post(client, "/v1/completions", {"prompt": [1] * 100, "max_tokens": 28}).status_code == 200


def test_paths_methods_and_models_that_are_not_there(client: TestClient) -> None:
    assert client.get("/v1/").json()["error"]["code"] == "not_found"
    assert client.get("/v1/completions").status_code == 405
    answer = post(client, "/v1/completions", {"model": "gpt", "prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_large_bodies_are_refused_whether_announced_or_not(client: TestClient) -> None:
    body = json.dumps({"prompt": "x" * 2**17}).encode()
    assert post(client, "/v1/completions", body).status_code == 413

    def chunks() -> Iterator[bytes]:
        yield body[: 2**16]
        yield body[2**16 :]

    answer = client.post("/v1/completions", content=chunks(), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_a_fault_of_the_server_tells_nobodys_text(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(LM, config("loose"))

    @app.get("/fault")
    def fault() -> None:
        raise RuntimeError("secret words of a user")

    with TestClient(app) as client:
        answer = client.get("/fault")
        assert 'moralguard:rejected_total{status="500"} 1.0' in client.get("/metrics").text
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "RuntimeError" in caplog.text
    assert "secret" not in caplog.text + answer.text


def test_keys() -> None:
    with TestClient(create_app(LM, config("loose"), api_keys=["first", "sécond"])) as client:
        assert client.get("/health").status_code == 200
        for key in ("", "Bearer", "Bearer wrong", "first", "Basic first", "Bearer firs"):
            answer = client.get("/v1/models", headers={"Authorization": key})
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        for key in (b"Bearer first", b"bearer first", "Bearer sécond".encode()):
            assert client.get("/v1/models", headers={"Authorization": key}).status_code == 200
        assert client.get("/metrics").status_code == 401


def test_a_busy_server_says_when_to_come_back(client: TestClient) -> None:
    state = client.app.state.server  # type: ignore[attr-defined]
    running = [Generation([1], DecodingSettings(max_new_tokens=120, do_sample=True), seed=i) for i in range(4)]
    state.engine.submit(running)
    answer = post(client, "/v1/completions", {"prompt": ["x", "y"], "max_tokens": 1})
    state.engine.cancel(running)
    assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(answer.headers["Retry-After"]) >= 1
    assert 'moralguard:rejected_total{status="429"} 1.0' in client.get("/metrics").text


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.text(st.characters(codec=None), max_size=8),  # with halves of surrogate pairs
    st.sampled_from(["strict", "faulty", "loose", "user", 10**400, -0.0, 1e-320]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=8
)
names = [
    "prompt",
    "messages",
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "n",
    "stream",
    "stream_options",
    "echo",
    "logprobs",
    "top_logprobs",
    "best_of",
    "suffix",
    "logit_bias",
    "moralguard",
    "tools",
    "response_format",
    "texts",
    "values",
    "context",
    "tokens",
    "presence_penalty",
    "add_special_tokens",
]
likely = {
    "prompt": st.sampled_from(["x", ["x", "y"], [1, 2, 3], [[1], [2, 3]]]),
    "messages": st.sampled_from([CHAT, [{"role": "user", "content": ""}]]),
    "moralguard": st.fixed_dictionaries({}, optional={"policy": values, "strength": values, "trace": st.booleans()}),
}
fields = {name: st.one_of(likely[name], values) if name in likely else values for name in names}
bodies = st.one_of(
    values,
    st.lists(st.sampled_from(names), max_size=5, unique=True).flatmap(
        lambda chosen: st.fixed_dictionaries({**likely, **{name: fields[name] for name in chosen}})
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/guards/score"]), body=bodies)
def test_no_body_makes_a_server_error(client: TestClient, path: str, body: Any) -> None:
    answer = post(client, path, body)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert client.app.state.server.engine.alive  # type: ignore[attr-defined]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60), header=st.binary(max_size=20))
def test_no_bytes_make_a_server_error(client: TestClient, data: bytes, header: bytes) -> None:
    name = bytes(byte for byte in header if byte not in b"\r\n\0")
    headers = {"Content-Type": "application/json", "X-Moralguard-Policy": name}
    assert client.post("/v1/chat/completions", content=data, headers=headers).status_code < 500
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    assert client.post("/v1/completions", content=body, headers=headers).status_code < 500
