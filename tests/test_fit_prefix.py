"""Fitting prefixes: the losses against their formulas, texts learned, resuming to the same bits, the model left alone, packs that steer."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import Reference
from prefix_packs import logits_behind
from safetensors.torch import load_file
from typer.testing import CliRunner
from word_model import rows, texts, word_model

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.cli import app
from moralguard.controls import DExperts, Prefix
from moralguard.errors import DataError, PolicyError
from moralguard.fitting.hidden_states import encode_texts
from moralguard.fitting.prefix import PrefixSettings, _first, fit_prefixes, loss_of, nats_behind
from moralguard.fitting.prefix_packs import fit_prefix_packs
from moralguard.fitting.training_loop import padded
from moralguard.packs import PackData, read_pack

SETTINGS = PrefixSettings(length=4, steps=40, batch_size=8, learning_rate=0.2, bfloat16=False, checkpoint_every=15)
LONGER = SETTINGS.replaced(length=6, steps=100, batch_size=16)
METHODS = ("prompt-tuning", "prefix-tuning", "contrastive")


@pytest.fixture
def lm() -> LanguageModel:
    return word_model()


def encoded(lm: LanguageModel, label: int, count: int) -> list[list[int]]:
    return encode_texts(lm, texts(label, count), 48)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_is_the_formula(lm: LanguageModel, method: str) -> None:
    settings = SETTINGS.replaced(method=method, omega_1=0.7, omega_2=0.3)
    classes = [encoded(lm, 1, 5), encoded(lm, 0, 5)] if method == "contrastive" else [encoded(lm, 1, 5)]
    prefixes = [_first(lm, found, settings.replaced(seed=seed)) for seed, found in enumerate(classes)]
    batch, labels = [[1, 5, 9, 70], [3, 4], [90, 91, 92, 93, 7, 8]], [0, len(classes) - 1, 0]
    ids, mask = padded(batch, lm.device)
    with torch.no_grad():
        found = loss_of(nats_behind(lm, prefixes, ids, mask), mask, torch.tensor(labels), settings)
    readers = [logits_behind(Reference(lm.model), {name: p.detach() for name, p in prefix.items()}) for prefix in prefixes]
    scores = np.zeros((len(classes), len(batch)))
    for c, read in enumerate(readers):
        for i, text in enumerate(batch):
            laws = torch.log_softmax(read(text), -1)
            scores[c, i] = sum(float(laws[t, token]) for t, token in enumerate(text[1:]))
    language = -sum(scores[label, i] for i, label in enumerate(labels)) / sum(len(text) - 1 for text in batch)
    expected = language
    if method == "contrastive":
        posterior = scores - np.log(np.exp(scores).sum(0))
        expected = 0.7 * language - 0.3 * np.mean([posterior[label, i] for i, label in enumerate(labels)])
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_prefix_learns_its_texts_and_the_model_stays_as_it_was(lm: LanguageModel, method: str, tmp_path: Path) -> None:
    before = copy.deepcopy(lm.model.state_dict())
    trainable = [p.requires_grad for p in lm.model.parameters()]
    classes = [encoded(lm, 1, 300), encoded(lm, 0, 300)] if method == "contrastive" else [encoded(lm, 1, 300)]
    settings = LONGER.replaced(method=method, omega_2=0.0)
    first = [_first(lm, found, settings) for found in classes]
    found = fit_prefixes(lm, classes, settings, tmp_path / "c.safetensors")
    for place, label in enumerate((1, 0)[: len(classes)]):
        ids, mask = padded(encoded(lm, label, 330)[300:], lm.device)
        with torch.no_grad():
            before_it, after_it = (nats_behind(lm, [prefixes[place]], ids, mask).sum() / mask[:, 1:].sum() for prefixes in (first, found))
        assert after_it < before_it - 0.2, "texts of the class that it didn't see are likelier"
    assert [p.requires_grad for p in lm.model.parameters()] == trainable
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    assert list(tmp_path.iterdir()) == []
    assert len(found) == len(classes)
    assert all(torch.isfinite(tensor).all() for prefix in found for tensor in prefix.values())


def test_the_discriminative_loss_sets_the_prefixes_apart(lm: LanguageModel, tmp_path: Path) -> None:
    """With omega_2 the classes' own prefixes part further than when each is trained by itself."""
    classes = [encoded(lm, 1, 60), encoded(lm, 0, 60)]
    ids, mask = padded(encoded(lm, 1, 80)[60:], lm.device)
    gaps = {}
    for omega in (0.0, 0.5):
        settings = SETTINGS.replaced(omega_1=1 - omega, omega_2=omega)
        prefixes = fit_prefixes(lm, classes, settings, tmp_path / "c.safetensors")
        with torch.no_grad():
            kept, broken = nats_behind(lm, prefixes, ids, mask).sum(-1)
        gaps[omega] = float((broken - kept).mean())
    assert gaps[0.5] > gaps[0.0] + 0.5


def test_an_interrupted_run_ends_where_an_unbroken_one_does(lm: LanguageModel, tmp_path: Path) -> None:
    classes, checkpoint = [encoded(lm, 1, 40), encoded(lm, 0, 40)], tmp_path / "run" / "checkpoint.safetensors"
    settings = SETTINGS.replaced(steps=25)
    whole = fit_prefixes(lm, classes, settings, checkpoint)

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_prefixes(lm, classes, settings, checkpoint, report=stop)
    assert checkpoint.is_file()
    with pytest.raises(DataError, match="other settings"):
        fit_prefixes(lm, classes, settings.replaced(seed=1), checkpoint)
    steps: list[int] = []
    resumed = fit_prefixes(lm, classes, settings, checkpoint, report=lambda step, total, loss: steps.append(step))
    assert steps[0] == 16
    assert all(torch.equal(mine[name], theirs[name]) for mine, theirs in zip(whole, resumed, strict=True) for name in mine)
    other = fit_prefixes(lm, classes, settings.replaced(seed=1), checkpoint)
    assert any(not torch.equal(mine[name], theirs[name]) for mine, theirs in zip(whole, other, strict=True) for name in mine)


def early(lm: LanguageModel, control: mg.controls.Control | None) -> float:
    """The share of words of class 1 in sampled continuations."""
    policy = mg.Policy(controls=() if control is None else (control,))
    result = mg.Guard(policy, lm).generate([[1, 2], [1, 70]], max_new_tokens=12, do_sample=True, seed=3, num_return_sequences=12)
    return float(np.mean([i < 62 for tokens in result.token_ids for i in tokens if 2 <= i < 122]))


def test_contrastive_packs_steer_towards_their_class(lm: LanguageModel, tmp_path: Path) -> None:
    source = PackData(name="words", licence="CC0-1.0", rows=1000)
    kept, broken = fit_prefix_packs(
        lm, rows(), tmp_path, LONGER.replaced(learning_rate=0.5), value="The text uses early words.", sources=(source,)
    )
    card = read_pack(kept, "prefix").card
    assert card.values == ("The text uses early words.",)
    assert card.data == (source,)
    metrics = card.metrics
    assert metrics["perplexity of kept texts behind 'kept'"] < 0.8 * metrics["perplexity of kept texts without a prefix"]
    assert metrics["perplexity of broken texts behind 'broken'"] < 0.8 * metrics["perplexity of broken texts without a prefix"]
    assert metrics["share of texts likelier behind their own class's prefix"] > 0.7
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["broken", "kept"]
    assert early(lm, Prefix(prefix=str(broken))) < early(lm, None) - 0.1
    assert early(lm, Prefix(prefix=str(broken))) < early(lm, Prefix(prefix=str(kept))) - 0.1
    against = {"alpha": 2.0, "filter_p": 1.0}
    assert early(lm, DExperts(expert=str(kept), anti_expert=str(broken), **against)) > 0.9
    assert early(lm, DExperts(expert=str(broken), anti_expert=str(kept), **against)) < 0.1


def test_the_command_writes_vectors_that_a_policy_uses(lm: LanguageModel, tmp_path: Path) -> None:
    model = tmp_path / "model"
    lm.model.save_pretrained(model)
    lm.tokenizer.save_pretrained(model)
    lines = [f'{{"text": "{text}", "label": {label}}}' for label in (0, 1) for text in texts(label, 60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["fit", "prefix", "--rows", str(tmp_path / "rows.jsonl"), "--licence", "MIT", "--model", str(model)]
    options = ["--method", "prompt-tuning", "--steps", "30", "--length", "3", "--learning-rate", "0.05", "--float32"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out"), *options], catch_exceptions=False)
    assert result.exit_code == 0
    pack = tmp_path / "out" / "kept"
    assert load_file(pack / "prefix.safetensors")["embeddings"].shape == (3, 32)
    guard = mg.Guard(mg.Policy.load({"controls": [{"control": "prefix@1", "prefix": str(pack)}]}), mg.load_model(str(model)))
    assert len(guard.generate([[1, 2]], max_new_tokens=3, do_sample=False).token_ids[0]) == 3
    wrong = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "no"), "--method", "prefix"])
    assert isinstance(wrong.exception, PolicyError)
    assert "contrastive" in str(wrong.exception)


@pytest.mark.smollm
def test_contrastive_prefixes_of_smollm_learn_within_a_minute(tmp_path: Path) -> None:
    lm = mg.load_model("smollm2-135m")
    kind = ["Thank you, that was kind.", "You did well, my friend.", "What a lovely day we had.", "I am glad you came."]
    rude = ["Shut up, you idiot.", "You are a stupid fool.", "What a dumb thing to say.", "I hate you, you moron."]
    classes = [encode_texts(lm, found * 4, 10) for found in (kind, rude)]
    settings = PrefixSettings(steps=12, batch_size=4, length=4, bfloat16=False, omega_2=0.5, omega_1=0.5)
    ids, mask = padded([*classes[0][:4], *classes[1][:4]], lm.device)
    labels = torch.tensor([0] * 4 + [1] * 4)
    losses = []
    for prefixes in ([_first(lm, found, settings) for found in classes], fit_prefixes(lm, classes, settings, tmp_path / "c.safetensors")):
        with torch.no_grad():
            losses.append(float(loss_of(nats_behind(lm, prefixes, ids, mask), mask, labels, settings)))
    assert losses[1] < losses[0] - 0.5


def test_a_class_without_texts_is_told_before_training(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two tokens or more"):
        fit_prefixes(lm, [encoded(lm, 1, 5), []], SETTINGS, tmp_path / "c.safetensors")
