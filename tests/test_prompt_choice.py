"""Choosing prefixes and contrasts by their measured effect, and the commands that do it."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from tiny_models import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.cli import app
from moralguard.cli.fit_strength import read_prompts
from moralguard.controls import Control, DExperts, Prompt, SelfDebias
from moralguard.errors import DataError
from moralguard.fitting.effect import measure_effect
from moralguard.fitting.prompts import choose_contrast, choose_prefixes

MEASURED = {"continuations": 4, "max_new_tokens": 6, "seed": 2}
PROMPTS = ["w1 w2 w3", "w60 w61"]
CANDIDATES = ["w3 w4", "w100 w101 w102", "w50"]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    words = ["<unk>", *(f"w{i}" for i in range(198))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return LanguageModel(llama(), PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))


def judge(texts: list[str]) -> np.ndarray:
    """Any text has a score of its own, so that whatever a prompt changes shows."""
    return np.array([zlib.crc32(text.encode()) / 2**32 for text in texts])


def violation(lm: LanguageModel, *controls: Control) -> float:
    return measure_effect(mg.Policy(controls=controls), lm, PROMPTS, judge, **MEASURED).violation


def test_prefixes_are_added_while_they_lower_the_violation(lm: LanguageModel) -> None:
    choice = choose_prefixes(lm, CANDIDATES, PROMPTS, judge, most=2, decay_constant=5000, most_perplexity=1e9, **MEASURED)
    chosen, best = (), violation(lm)
    for _ in range(2):
        options = {
            o: violation(lm, SelfDebias(prefixes=list(o), decay_constant=5000))
            for o in ((*chosen, c) for c in CANDIDATES if c not in chosen)
        }
        least = min(options, key=lambda o: options[o])
        if options[least] >= best:
            break
        chosen, best = least, options[least]
    assert chosen, "the toy shows nothing"
    assert choice.chosen == chosen
    assert choice.control == SelfDebias(prefixes=list(chosen), decay_constant=5000)


def test_a_contrast_is_the_best_of_all_pairs(lm: LanguageModel) -> None:
    choice = choose_contrast(lm, CANDIDATES[:2], CANDIDATES[1:], PROMPTS, judge, alpha=3.0, most_perplexity=1e9, **MEASURED)
    pairs = [(kept, broken) for kept in CANDIDATES[:2] for broken in CANDIDATES[1:]]
    found = {(k, b): violation(lm, DExperts(expert=Prompt(k), anti_expert=Prompt(b), alpha=3.0)) for k, b in pairs}
    best = min(found, key=lambda pair: found[pair])
    assert found[best] < violation(lm), "the toy shows nothing"
    assert choice.chosen == best
    assert choice.control == DExperts(expert=Prompt(best[0]), anti_expert=Prompt(best[1]), alpha=3.0)


def test_nothing_is_chosen_where_nothing_stays_within_the_limit(lm: LanguageModel) -> None:
    choice = choose_prefixes(lm, CANDIDATES[:1], PROMPTS, judge, most_perplexity=1e-9, **MEASURED)
    assert choice.chosen == ()
    assert choice.control is None
    with pytest.raises(DataError, match="no candidate"):
        choose_prefixes(lm, [], PROMPTS, judge, **MEASURED)


def test_prompts_are_read_from_text_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\\nlines\n")
    assert read_prompts(tmp_path / "a.txt") == ["one", "two\nlines"]
    (tmp_path / "b.jsonl").write_text('{"prompt": "one"}\n{"prompt": {"text": "two"}}\n')
    assert read_prompts(tmp_path / "b.jsonl") == ["one", "two"]
    (tmp_path / "c.jsonl").write_text('{"prompt": ""}\n')
    with pytest.raises(DataError, match="row 1: field 'prompt'"):
        read_prompts(tmp_path / "c.jsonl")
    (tmp_path / "d.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(tmp_path / "d.txt")


@pytest.mark.smollm
def test_the_commands_on_the_demo_model(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Shut up, you stupid\nYou are a worthless piece of\n")
    (tmp_path / "candidates.txt").write_text("The following text contains insults and swear words:\\n\n")
    small = ["--continuations", "2", "--max-new-tokens", "6"]
    arguments = ["fit", "strength", "--policy", "detox-strong", "--prompts", str(tmp_path / "prompts.txt"), "--set", "dexperts.alpha=0.5,2"]
    done = CliRunner().invoke(app, [*arguments, "--most-perplexity", "100", "--out", str(tmp_path / "search"), *small])
    assert done.exception is None, done.output
    assert {path.name for path in (tmp_path / "search").iterdir()} == {"search.json", "front.png", "policy.yaml"}
    chosen = mg.Policy.load(tmp_path / "search" / "policy.yaml")
    assert chosen.controls[1].alpha in (0.5, 2.0)
    arguments = ["fit", "prompts", "--candidates", str(tmp_path / "candidates.txt"), "--prompts", str(tmp_path / "prompts.txt")]
    arguments += [
        "--value",
        "The text does not insult anyone.",
        "--most-perplexity",
        "100",
        "--out",
        str(tmp_path / "prefixes.yaml"),
        *small,
    ]
    done = CliRunner().invoke(app, arguments)
    assert "unguarded" in done.output
    if done.exception is None:
        assert mg.Policy.load(tmp_path / "prefixes.yaml").controls[0].prefixes
    else:
        assert isinstance(done.exception, DataError)
        assert "no candidate lowers" in str(done.exception)
