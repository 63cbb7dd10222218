"""Triggers: the loss and HotFlip's first order against the model's own forward, the search, what can be written, and the pack."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from odd_models import byte_llama, byte_tokenizer, gemma2
from oracles import Reference
from safetensors.torch import load_file
from typer.testing import CliRunner
from word_model import rows, texts, word_model

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.cli import app
from moralguard.controls import Prefix
from moralguard.errors import DataError
from moralguard.fitting.hidden_states import encode_texts
from moralguard.fitting.trigger import TriggerSettings, find_trigger, first_order, loss_of, writable_tokens
from moralguard.fitting.trigger_pack import fit_trigger_pack
from moralguard.packs import PackData, read_pack

SETTINGS = TriggerSettings(length=2, first="w3", num_candidates=8, rounds=3, batch_size=12)
WHOLE = SETTINGS.replaced(batch_size=40)
KEPT, VIOLATING = [[5, 9, 20], [7, 8]], [[90, 91, 92, 93], [100, 3]]


@pytest.fixture
def lm() -> LanguageModel:
    return word_model()


def classes(lm: LanguageModel, count: int = 40) -> tuple[list[list[int]], list[list[int]]]:
    kept, violating = (encode_texts(lm, texts(label, count), 32) for label in (1, 0))
    return kept, violating


def nats_a_token(reference: Reference, front: list[int], found: list[list[int]]) -> float:
    """Of all tokens behind each text's first one, in float64; the trigger stands in front."""
    nats, count = 0.0, 0
    for text in found:
        laws = torch.log_softmax(reference.model(input_ids=torch.tensor([[*front, *text]]), use_cache=False).logits[0], -1)
        nats -= sum(float(laws[len(front) + i, token]) for i, token in enumerate(text[1:]))
        count += len(text) - 1
    return nats / count


@pytest.mark.parametrize("front", [[], [60, 61, 9]])
def test_the_loss_is_the_models_own(lm: LanguageModel, front: list[int]) -> None:
    reference = Reference(lm.model)
    found = loss_of(lm, front, KEPT, VIOLATING)
    for mine, group in zip(found, (KEPT, VIOLATING), strict=True):
        assert mine == pytest.approx(nats_a_token(reference, front, group), rel=1e-5)


def test_a_trigger_goes_behind_the_beginning_of_text(lm: LanguageModel) -> None:
    start = lm.tokenizer.bos_token_id
    found = loss_of(lm, [60, 61], [[start, 5, 9]], [[start, 90]])
    laws = torch.log_softmax(Reference(lm.model).model(input_ids=torch.tensor([[start, 60, 61, 5, 9]]), use_cache=False).logits[0], -1)
    assert found[0] == pytest.approx(-float(laws[2, 5] + laws[3, 9]) / 2, rel=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_first_order_is_the_slope_towards_each_token(lm: LanguageModel, scaled: bool) -> None:
    """Against finite differences in float64 along the way from one token's vector to another's; Gemma scales its vectors."""
    lm = LanguageModel(gemma2(), None) if scaled else lm
    trigger, batch = [60, 61], [*KEPT, *VIOLATING]
    slopes = first_order(lm, trigger, batch, torch.tensor([1.0, 1.0, -1.0, -1.0]))
    model = Reference(lm.model).model
    look_up = model.get_input_embeddings()

    def loss(place: int, token: int, share: float) -> float:
        sides = []
        for group in (KEPT, VIOLATING):
            nats, count = 0.0, 0
            for text in group:
                ids = torch.tensor([*trigger, *text])
                vectors = look_up(ids).clone()
                vectors[place] += share * (look_up(torch.tensor(token)) - vectors[place])
                laws = torch.log_softmax(model(inputs_embeds=vectors[None], use_cache=False).logits[0], -1)
                nats -= sum(float(laws[len(trigger) + i, t]) for i, t in enumerate(text[1:]))
                count += len(text) - 1
            sides.append(nats / count)
        return sides[0] - sides[1]

    for place, token in ((0, 7), (0, 100), (1, 33)):
        expected = (loss(place, token, 1e-3) - loss(place, token, -1e-3)) / 2e-3
        assert float(slopes[place, token]) == pytest.approx(expected, rel=5e-3, abs=2e-4)
    assert slopes[0, 60] == slopes[1, 61] == 0


def test_the_search_finds_more_than_a_hundred_random_triggers(lm: LanguageModel) -> None:
    before = copy.deepcopy(lm.model.state_dict())
    kept, violating = classes(lm)
    seen: list[float] = []
    found = find_trigger(lm, kept, violating, WHOLE, report=lambda step, steps, loss, text: seen.append(loss))
    assert found.loss < found.start
    assert seen == sorted(seen, reverse=True), "no place makes it worse"
    assert found.loss == seen[-1]
    assert len(found.tokens) == 2
    assert lm.tokenizer(found.text, add_special_tokens=False)["input_ids"] == list(found.tokens)
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    random = np.random.default_rng(0).integers(2, 122, (100, 2)).tolist()
    assert found.loss < min(np.subtract(*loss_of(lm, trigger, kept, violating)) for trigger in random)
    unseen = classes(lm, 80)[0][40:], classes(lm, 80)[1][40:]
    assert np.subtract(*loss_of(lm, found.tokens, *unseen)) < np.subtract(*loss_of(lm, [], *unseen))
    assert find_trigger(lm, kept, violating, WHOLE) == found
    assert find_trigger(lm, kept, violating, WHOLE.replaced(beam_size=3, rounds=1)).loss <= found.start


def test_only_what_can_be_written_is_tried() -> None:
    lm = LanguageModel(byte_llama(), byte_tokenizer())
    allowed = writable_tokens(lm)
    written = [lm.tokenizer.decode([token]) for token in allowed]
    assert all(text.isprintable() and text.strip() for text in written)
    assert " a" in written
    assert "\n" not in written
    assert len(allowed) < 130, "half of the bytes are no character by themselves"
    texts_of = [[list(text.encode()) for text in group] for group in (("kind words", "thank you"), ("you fool", "shut up"))]
    kept, violating = ([[allowed[i % len(allowed)] for i in row] for row in group] for group in texts_of)
    found = find_trigger(lm, kept, violating, SETTINGS.replaced(first="a", length=3, rounds=1))
    assert lm.tokenizer(found.text, add_special_tokens=False)["input_ids"] == list(found.tokens), "' ' and 'a' would become ' a'"


def test_the_pack_says_what_the_trigger_does(lm: LanguageModel, tmp_path: Path) -> None:
    source = PackData(name="words", licence="CC0-1.0", rows=200)
    folder, found = fit_trigger_pack(lm, rows(100), tmp_path / "pack", SETTINGS, value="Early words.", sources=(source,))
    card = read_pack(folder, "prefix").card
    metrics = card.metrics
    assert load_file(folder / "prefix.safetensors")["tokens"].tolist() == list(found.tokens)
    assert card.settings["text"] == found.text
    data = rows(100)
    held = [encode_texts(lm, [r.text for s in ("test", "dev") for r in data.of(s) if r.label == label], 32) for label in (1, 0)]
    for name, tokens in (("without a trigger", ()), ("behind the trigger", found.tokens)):
        kept, violating = loss_of(lm, tokens, *held)
        assert metrics[f"difference {name}"] == pytest.approx(kept - violating, abs=1e-3)
    assert metrics["difference behind the trigger"] < metrics["difference without a trigger"]
    guard = mg.Guard(mg.Policy(controls=[Prefix(prefix=str(folder))]), lm)
    prompt = [lm.tokenizer.bos_token_id, 5, 6]
    drawn = guard.generate([prompt], max_new_tokens=1, do_sample=False).token_ids[0][0]
    law = Reference(lm.model).logits([prompt[0], *found.tokens, 5, 6])
    assert drawn == int(law.argmax())


def test_the_command(lm: LanguageModel, tmp_path: Path) -> None:
    model = tmp_path / "model"
    lm.model.save_pretrained(model)
    lm.tokenizer.save_pretrained(model)
    lines = [f'{{"text": "{text}", "label": {label}}}' for label in (0, 1) for text in texts(label, 60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["fit", "trigger", "--rows", str(tmp_path / "rows.jsonl"), "--licence", "MIT", "--model", str(model)]
    options = ["--out", str(tmp_path / "out"), "--first", "w5", "--length", "1", "--candidates", "3", "--rounds", "1"]
    result = CliRunner().invoke(app, [*arguments, *options], catch_exceptions=False)
    assert result.exit_code == 0
    metrics = read_pack(tmp_path / "out", "prefix").card.metrics
    worse = metrics["difference behind the trigger"] >= metrics["difference without a trigger"]
    assert ("it isn't lower" in result.stderr) == worse


def test_bad_input(lm: LanguageModel) -> None:
    kept, violating = classes(lm, 5)
    with pytest.raises(DataError, match="a class has no text"):
        find_trigger(lm, kept, [], SETTINGS)
    with pytest.raises(DataError, match="give another first"):
        find_trigger(lm, kept, violating, SETTINGS.replaced(first=""))


@pytest.mark.smollm
def test_a_trigger_of_smollm_lowers_the_difference() -> None:
    lm = mg.load_model("smollm2-135m")
    kind = encode_texts(lm, ["Thank you, that was kind.", "What a lovely day.", "You did well, my friend."], 8)
    rude = encode_texts(lm, ["Shut up, you idiot.", "What a dumb thing.", "You are a stupid fool."], 8)
    found = find_trigger(lm, kind, rude, TriggerSettings(length=2, num_candidates=3, rounds=1, batch_size=3))
    assert found.loss < found.start - 0.1
    assert found.text.isprintable()
    assert lm.tokenizer(found.text, add_special_tokens=False)["input_ids"] == list(found.tokens)
