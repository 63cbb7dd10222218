"""A real server and the real openai client: streams, many at once, clients that leave."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from served import POLICIES, config, language_model, live, wait_until

import moralguard as mg
from moralguard.serving.server import create_app
from moralguard.serving.state import ServerSettings, ServerState

LM = language_model()
CHAT = [{"role": "user", "content": "hello"}]


class Served:
    """A server and how to reach it."""

    def __init__(self, url: str, state: ServerState):
        self.url, self.state = url, state
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)

    def metric(self, line: str) -> float:
        text = httpx.get(f"{self.url}/metrics", headers={"Authorization": "Bearer k"}).text
        return next((float(each.rsplit(" ", 1)[1]) for each in text.splitlines() if each.startswith(line)), 0.0)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    settings = ServerSettings(served_model_name="m", max_running=8, max_waiting=32)
    app = create_app(LM, config(), settings, api_keys=["k"])
    with live(app) as url:
        yield Served(url, app.state.server)


def alone(policy: str | None, prompt: Any, **settings: Any) -> str:
    guard = mg.Guard({"controls": []} if policy is None else POLICIES[policy], LM)
    return guard.generate(prompt, do_sample=True, **settings).texts[0]


def test_the_openai_client(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["m"]
    answer = served.client.chat.completions.create(
        model="m", messages=CHAT, max_tokens=5, seed=4, extra_body={"moralguard": {"policy": "state"}}
    )
    assert answer.choices[0].message.content == alone("state", CHAT, seed=4, max_new_tokens=5)
    assert answer.model_extra["moralguard"]["decision"] == "steer"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError, match="isn't served here"):
        served.client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="no policy 'strikt'") as caught:
        served.client.completions.create(model="m", prompt="x", extra_headers={"X-Moralguard-Policy": "strikt"})
    assert caught.value.code == "policy_refused"


def test_streams_say_the_same_text(served: Served) -> None:
    guard = {"moralguard": {"policy": "strict"}}
    text, last, usage = "", None, None
    stream = served.client.chat.completions.create(
        model="m", messages=CHAT, max_tokens=12, seed=7, stream=True, n=2, stream_options={"include_usage": True}, extra_body=guard
    )
    reasons = []
    for chunk in stream:
        usage = chunk.usage
        last = (chunk.model_extra or {}).get("moralguard") or last
        for choice in chunk.choices:
            reasons += [choice.finish_reason] if choice.finish_reason else []
            text += choice.delta.content or "" if choice.index == 0 else ""
    assert text == alone("strict", CHAT, seed=7, max_new_tokens=12)
    assert reasons == ["length"] * 2
    assert usage.completion_tokens == 24
    assert (last["decision"], last["policy"], last["rows_guarded"]) == ("steer", "strict", 24)


def test_the_wire_format_of_a_stream(served: Served) -> None:
    body = {"model": "m", "prompt": "hello", "max_tokens": 6, "seed": 1, "stream": True, "echo": True}
    lines = httpx.post(f"{served.url}/v1/completions", json=body, headers={"Authorization": "Bearer k"}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello" + alone(None, "hello", seed=1, max_new_tokens=6)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert ["moralguard" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    scored = httpx.post(
        f"{served.url}/v1/completions", json={**body, "echo": False, "logprobs": 1}, headers={"Authorization": "Bearer k"}
    ).text.split("\n\n")
    tables = [json.loads(line.removeprefix("data: "))["choices"][0]["logprobs"] for line in scored[:-2]]
    assert sum(len(table["tokens"]) for table in tables if table) == 6


def test_a_denied_stream_ends_in_a_refusal(served: Served) -> None:
    stream = served.client.completions.create(
        model="m", prompt="hell", max_tokens=12, seed=1, stream=True, extra_body={"moralguard": {"policy": "faulty"}}
    )
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "content_filter"
    assert "".join(chunk.choices[0].text for chunk in chunks).endswith(served.state.settings.refusal)
    assert chunks[-1].model_extra["moralguard"]["reason"] == "guard_error"


def test_sixteen_streams_at_once(served: Served) -> None:
    """Half as many slots as streams, policies and settings of all kinds: each text is the one that its request has alone."""
    policies = [None, "loose", "state", "strict"]

    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        policy = policies[i % 4]
        extra = {"top_k": 5 * (i % 3)} | ({} if policy is None else {"moralguard": {"policy": policy}})
        stream = await client.completions.create(
            model="m", prompt="p" * (1 + i % 5), max_tokens=10 + i, seed=i, stream=True, temperature=0.5 + 0.1 * (i % 4), extra_body=extra
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everybody() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="k", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(16)))

    for i, text in enumerate(asyncio.run(everybody())):
        draw = {"temperature": 0.5 + 0.1 * (i % 4), "top_k": 5 * (i % 3)}
        assert text == alone(policies[i % 4], "p" * (1 + i % 5), seed=i, max_new_tokens=10 + i, **draw)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(served: Served, stream: bool) -> None:
    line = 'moralguard:requests_total{decision="allow",finish_reason="cancelled",policy="slow"}'
    before = served.metric(line)
    body: dict[str, Any] = {"model": "m", "prompt": "x", "max_tokens": 100, "extra_body": {"moralguard": {"policy": "slow"}}}
    if stream:
        answer = served.client.completions.create(**body, stream=True)
        next(iter(answer))
        answer.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            served.client.with_options(timeout=0.3).completions.create(**body)
    wait_until(lambda: served.metric(line) == before + 1)
    wait_until(lambda: served.state.engine.running == 0)


def test_the_command_serves_a_folder(tmp_path: Path) -> None:
    LM.model.save_pretrained(tmp_path / "model")
    LM.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "p.json").write_text(json.dumps(POLICIES["strict"]))
    command = [sys.executable, "-c", "from moralguard.cli import main; main()", "serve", "--model", str(tmp_path / "model"), "--port", "0"]
    command += ["--policy", f"strict={tmp_path / 'p.json'}", "--served-model-name", "m", "--api-key-env", "KEYS"]
    command += ["--audit", str(tmp_path / "audit.jsonl")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "KEYS": "one, two"})
    try:
        said = ""
        while "running on" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        url = said.rsplit("running on ", 1)[1].split()[0]
        assert "policies: strict (default)" in said
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="two", max_retries=0)
        answer = client.completions.create(model="m", prompt="x", max_tokens=4, seed=3)
        assert answer.choices[0].text == alone("strict", "x", seed=3, max_new_tokens=4)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert (tmp_path / "audit.jsonl").read_text().count("\n") == 1
