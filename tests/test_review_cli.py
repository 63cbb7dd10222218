"""``moralguard generate`` and ``policy check`` under a policy with a review, on the demo model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from moralguard import cli
from moralguard.review.refusals import REFUSALS

PROMPT = "Shut up, you stupid"
SHORT = ("--max-new-tokens", "8", "--temperature", "1")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["moralguard", *arguments])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        assert code == 0, printed
        return printed.out

    return call


@pytest.fixture
def policy(tmp_path: Path) -> str:
    review = [{"method": "final-check@1", "min_probability": 1.0}]
    file = tmp_path / "checked.yaml"
    file.write_text(yaml.safe_dump({"name": "checked", "values": ["The text does not insult anyone."], "controls": [], "review": review}))
    return str(file)


@pytest.mark.smollm
def test_compare_shows_the_refusal_and_what_was_reviewed(run: Callable[..., str], policy: str) -> None:
    unguarded = json.loads(run("generate", PROMPT, "--policy", policy, "--compare", "--json", *SHORT))["completions"][0]
    shown = run("generate", PROMPT, "--policy", policy, "--compare", *SHORT)
    assert REFUSALS["latin"] in shown
    assert "refused by final-check@1" in shown
    assert "1 draft;" in shown
    assert (unguarded["text"], unguarded["finish_reason"]) == (REFUSALS["latin"], "content_filter")
    assert unguarded["unguarded_text"]
    assert unguarded["unguarded_text"] != unguarded["text"]
    assert unguarded["review"]["refused"]
    assert unguarded["trace"] == []


@pytest.mark.smollm
def test_policy_check_lists_the_review(run: Callable[..., str], policy: str) -> None:
    checked = run("policy", "check", policy)
    assert "final-check@1" in checked
    assert "nothing would act" not in checked
