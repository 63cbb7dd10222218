"""The audit log: what is written, and every way in which it can be tampered with."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from served import config, language_model
from typer.testing import CliRunner

from moralguard.cli import app as cli
from moralguard.errors import DataError
from moralguard.serving.audit import START, AuditError, AuditLog, verify
from moralguard.serving.server import create_app

LM = language_model()


def written(path: Path, lines: int = 5) -> list[bytes]:
    log = AuditLog(path)
    for i in range(lines):
        log.write({"request": f"r{i}", "decision": "allow", "tokens": i})
    log.close()
    return path.read_bytes().splitlines(keepends=True)


def problem(path: Path, lines: list[bytes]) -> str:
    path.write_bytes(b"".join(lines))
    return verify(path).problem or ""


def test_a_log_is_sound_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    first = written(file)
    assert json.loads(first[0])["previous"] == START
    lines = written(file)
    assert lines[:5] == first
    found = verify(file)
    assert (found.lines, found.problem) == (10, None)
    assert found.head == json.loads(lines[-1])["hash"]


def test_what_was_tampered_with_is_named(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    lines = written(file)
    changed = lines[2].replace(b'"allow"', b'"deny"')
    assert problem(file, [*lines[:2], changed, *lines[3:]]).startswith("line 3: it was changed")
    assert problem(file, [*lines[:1], *lines[2:]]).startswith("line 2: it says that it is line 3")
    assert problem(file, [lines[0], lines[2], lines[1], *lines[3:]]).startswith("line 2: it says that it is line 3")
    assert problem(file, [*lines[:2], lines[2][:20] + b"\n", *lines[3:]]).startswith("line 3: it isn't JSON")
    assert problem(file, [*lines[:4], lines[4][:-1]]).startswith("line 5: it is cut off")
    assert problem(file, [*lines[:2], b"{}\n"]).startswith("line 3: it isn't a line of an audit log")
    assert problem(file, [*lines[:2], b"[" * 100_000 + b"\n"]).startswith("line 3: it isn't JSON")
    # whoever changes a line can hash it anew, but then the next one doesn't follow it
    forged = json.loads(changed)
    own = {key: value for key, value in forged.items() if key != "hash"}
    text = json.dumps(own, sort_keys=True, separators=(",", ":")).encode()
    forged["hash"] = hashlib.sha256(forged["previous"].encode() + text).hexdigest()
    again = json.dumps(forged, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    assert problem(file, [*lines[:2], again, *lines[3:]]).startswith("line 4: it doesn't follow")


def test_a_missing_end_shows_against_a_hash_that_was_kept(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    lines = written(file)
    head = verify(file).head
    assert verify(file, head=head).problem is None
    file.write_bytes(b"".join(lines[:3]))
    assert verify(file).problem is None
    assert (verify(file, head=head).problem or "").startswith("line 4: missing")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_changed_byte_goes_unseen(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    file = tmp_path_factory.getbasetemp() / "bytes.jsonl"
    file.unlink(missing_ok=True)
    whole = b"".join(written(file, 3))
    place = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda b: b != whole[place]))
    file.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
    assert verify(file).problem is not None


def test_logs_that_can_not_be_written(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    log = AuditLog(file)
    with pytest.raises(AuditError, match="another process writes it"):
        AuditLog(file)
    log.close()
    with pytest.raises(AuditError, match="can't be written"):
        log.write({})
    file.write_text("nothing of the kind\n")
    with pytest.raises(AuditError, match=r"line 1: it isn't JSON.*Keep it as evidence"):
        AuditLog(file)
    with pytest.raises(AuditError, match="its folder isn't there"):
        AuditLog(tmp_path / "nowhere" / "audit.jsonl")
    with pytest.raises(DataError, match="can't be read"):
        verify(tmp_path / "none.jsonl")


def test_threads_write_one_chain(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    threads = [threading.Thread(target=lambda: [log.write({"n": i}) for i in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert (verify(log.path).lines, verify(log.path).problem) == (80, None)


def test_hashes_of_ids_and_their_keys(tmp_path: Path) -> None:
    plain, keyed = AuditLog(tmp_path / "a"), AuditLog(tmp_path / "b", key=b"k")
    assert plain.digest([1, 2]) == hashlib.sha256(bytes([1, 0, 0, 0, 2, 0, 0, 0])).hexdigest()
    assert keyed.digest([1, 2]) != plain.digest([1, 2])
    assert keyed.digest([1, 2]) == keyed.digest((1, 2))


@pytest.mark.parametrize("text", [False, True])
def test_a_server_notes_every_continuation(tmp_path: Path, text: bool) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", text=text)
    with TestClient(create_app(LM, config("loose", "faulty", default="loose"), audit=log)) as client:
        client.post("/v1/completions", json={"prompt": "private words", "n": 2, "max_tokens": 3})
        client.post("/v1/completions", json={"prompt": "x" * 9, "max_tokens": 3, "moralguard": {"policy": "faulty"}})
        client.post("/v1/completions", json={"prompt": "score", "max_tokens": 0, "echo": True, "logprobs": 1})
        client.post("/v1/completions", json={"prompt": "bad", "n": 0})
    assert verify(log.path).problem is None
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(line["kind"], line["index"], line["policy"], line["decision"], line["finish_reason"]) for line in lines] == [
        ("generate", 0, "loose", "steer", "length"),
        ("generate", 1, "loose", "steer", "length"),
        ("generate", 0, "faulty", "deny", "content_filter"),
        ("score", 0, "loose", "steer", "length"),
    ]
    assert lines[0]["prompt_hash"] == log.digest(LM.tokenizer("private words")["input_ids"])
    assert lines[0]["request"] == lines[1]["request"] != lines[2]["request"]
    assert ("private words" in log.path.read_text()) == text
    assert lines[2]["reason"] == "guard_error"
    assert "secret" not in log.path.read_text()


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    lines = written(file)
    run = CliRunner()
    sound = run.invoke(cli, ["audit", "verify", str(file)])
    assert (sound.exit_code, "sound: 5 lines" in sound.output) == (0, True)
    assert run.invoke(cli, ["audit", "verify", str(file), "--head", "0" * 63]).exit_code == 1
    file.write_bytes(b"".join(lines[1:]))
    broken = run.invoke(cli, ["audit", "verify", str(file)])
    assert (broken.exit_code, "line 1" in broken.output) == (1, True)
