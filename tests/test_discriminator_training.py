"""The training program: rows, sampling, resuming, and that it learns; on a tiny encoder of its own."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel

import moralguard as mg
from moralguard.discriminator.packs import shipped_folder
from moralguard.discriminator.tokens import WordPieces
from moralguard.discriminator.weights import load_network, save_network, unpack
from moralguard.errors import DataError, ModelError
from moralguard.fitting.discriminator_fit import CHECKPOINT, fit_discriminator
from moralguard.fitting.discriminator_training import TrainingSettings, train_network
from moralguard.fitting.open_rows import open_rows
from moralguard.fitting.row_files import clean, read_user_rows, split_of
from moralguard.fitting.rows import Row
from moralguard.fitting.sampling import Sampler, known_wordings
from moralguard.fitting.starting_weights import starting_network

NOUNS = ["cats", "dogs", "tea", "war", "snow"]
FILLERS = ["one", "two", "red", "blue"]
WORDS = ["the", "text", "does", "not", "mention", "no", "then", "it", "was", "we", "saw", *NOUNS, *FILLERS]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A BERT of two layers in a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("encoder")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def _rows(count=300, seed=0):
    chooser = random.Random(seed)
    rows = []
    for i in range(count):
        said, asked = chooser.choice([*NOUNS, "war", "war"]), "war"
        kept = float(said != asked)
        split = "dev" if i % 5 == 0 else "train"
        text = f"{chooser.choice(['then', 'it was'])} we saw {said} {chooser.choice(FILLERS)}"
        rows.append(Row(text, "mention", kept, f"the text does not mention {asked}", 1 - kept, source="nouns", split=split))
    return rows


def _settings(**changes):
    base = {"steps": 20, "batch_size": 16, "bfloat16": False, "checkpoint_every": 8, "head_learning_rate": 3e-3, "learning_rate": 1e-3}
    return TrainingSettings(**base | changes)


def _trained(start, settings, checkpoint=None, stop=None):
    network = starting_network(start, 0, shared_layers=1)
    sampler = Sampler([row for row in _rows() if row.split == "train"], {}, {}, settings.seed)

    def report(progress):
        if progress.step == stop:
            raise KeyboardInterrupt

    return train_network(network, WordPieces(start / "tokenizer.json"), sampler, settings, checkpoint=checkpoint, report=report)


def test_the_starting_network_is_the_encoder_it_was_made_of(start):
    network = starting_network(start, 0, shared_layers=1).eval()
    tokens = WordPieces(start / "tokenizer.json").statements(["the text does not mention tea", "no war"], ["", "then"]).to("cpu")
    bert = BertModel.from_pretrained(start).eval()
    with torch.no_grad():
        encoded = network.encode(tokens.ids, tokens.mask, side=0)
        states = bert(input_ids=tokens.ids, attention_mask=tokens.mask.long()).last_hidden_state
        weights = tokens.mask[..., None].float()
        expected = torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)
    # int8 rows: close, and no closer
    assert torch.nn.functional.cosine_similarity(encoded.sentence, expected).min() > 0.999


def test_an_interrupted_run_ends_where_an_unbroken_one_does(start, tmp_path):
    whole = _trained(start, _settings())
    with pytest.raises(KeyboardInterrupt):
        _trained(start, _settings(), tmp_path / "c.safetensors", stop=11)
    resumed = _trained(start, _settings(), tmp_path / "c.safetensors")
    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(DataError, match="other settings"):
        _trained(start, _settings(seed=1), tmp_path / "c.safetensors")


def test_frozen_weights_stay_and_the_rest_learns(start):
    before = starting_network(start, 0, shared_layers=1).state_dict()
    after = _trained(start, _settings()).state_dict()
    for name, tensor in after.items():
        frozen = name.startswith(("encoder.words", "encoder.positions", "encoder.shared", "encoder.frozen", "encoder.embedding_norm"))
        assert torch.equal(tensor, before[name]) == frozen, name


def test_stored_weights_come_back(start, tmp_path):
    network = _trained(start, _settings(steps=3))
    save_network(network, tmp_path / "network.safetensors")
    loaded = load_network(tmp_path / "network.safetensors")
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=2e-3, rtol=2e-3, msg=name)
    (tmp_path / "other.safetensors").write_bytes((tmp_path / "network.safetensors").read_bytes()[:100])
    with pytest.raises(ModelError, match="safetensors"):
        load_network(tmp_path / "other.safetensors")


def test_rows_of_a_user_s_own_train_a_discriminator_that_learned_them(start, tmp_path):
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for row in _rows(600):
            file.write(json.dumps({"text": row.text, "statement": row.statement, "kept": row.kept, "split": row.split}) + "\n")
    out = tmp_path / "fitted"
    fit_discriminator(out, rows=[rows], start=start, settings=_settings(steps=150, batch_size=32, cross_every=1))
    assert not (out / CHECKPOINT).exists()
    dev = [row for row in _rows(600) if row.split == "dev"]
    for mode in ("cached", "cross"):
        judge = mg.Discriminator.load(out, mode=mode)
        scores = np.array([judge.score(row.text, row.statement)[0, 0] for row in dev])
        kept = np.array([row.kept for row in dev])
        assert scores[kept == 1].mean() - scores[kept == 0].mean() > 0.3, mode
    recorded = json.loads((out / "settings.json").read_text())
    assert recorded["rows"] == {"rows": sum(row.split == "train" for row in _rows(600))}
    assert set(recorded["calibrations"]) == {"cached", "cross"}


def test_the_sampler_evens_out_labels_and_repeats_itself():
    rows = [Row("t", "v", 1.0, "s", source="a")] * 95 + [Row("t", "v", 0.0, "s", source="a")] * 5
    sampler = Sampler(rows, {}, {}, seed=3)
    drawn = sampler.draw(7, 400)
    assert 0.4 < np.mean([row.kept for (row,) in drawn]) < 0.6
    assert drawn == Sampler(rows, {}, {}, seed=3).draw(7, 400)
    assert drawn != sampler.draw(8, 400)


def test_an_affirmative_wording_turns_the_label():
    wordings = known_wordings()
    rows = [Row("I will hurt you", "no_threat", 0.0), Row("hello", "no_threat", 1.0)]
    drawn = Sampler(rows, {}, wordings, 0).draw(0, 300)
    for (row,) in drawn:
        plain = {w.rstrip(".") for w in wordings["no_threat"].breaks}
        breaking = row.statement.rstrip(".") in plain
        assert row.kept == float((row.text != "hello" and "hurt" in row.text) == breaking) or row.text not in ("hello", "I will hurt you")
        assert not breaking or row.relevance == 1.0


def test_rows_without_a_wording_are_refused():
    with pytest.raises(DataError, match="no known wording"):
        Sampler([Row("t", "a_new_one", 1.0)], {}, known_wordings(), 0)
    with pytest.raises(DataError, match="no training rows"):
        Sampler([], {}, {}, 0)


def test_open_rows_say_what_is_in_the_text():
    for row in open_rows(["we walked along the river bank", "the kettle whistled loudly"], 200, seed=1):
        word = next(w for w in row.statement.rstrip(".").split()[::-1] if len(w) >= 5 and w not in ("mentioned", "about"))
        forbidden = any(part in row.statement for part in ("not ", "no ", "never", "avoids"))
        assert row.kept == float((word in row.text) != forbidden)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"statement": "s", "kept": 1}', "'text'"),
        ('{"text": "t", "kept": 1}', "'statement'"),
        ('{"text": "t", "statement": "s"}', "'kept'"),
        ('{"text": "t", "statement": "s", "kept": 2}', "'kept'"),
        ('{"text": "t", "statement": "s", "kept": 1, "relevance": "much"}', "'relevance'"),
        ("[1]", "line 2: expected a JSON object"),
        ("{", "line 2"),
    ],
)
def test_bad_rows_are_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "t", "statement": "s", "kept": 0}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read_user_rows(path)


def test_csv_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,statement,kept,context\n"a, b",no tea,true,at home\nc,no_hate,0,\n')
    first, second = read_user_rows(path)
    assert (first.text, first.statement, first.kept, first.context) == ("a, b", "no tea", 1.0, "at home")
    assert second.kept == 0.0
    with pytest.raises(DataError, match="doesn't exist"):
        read_user_rows(tmp_path / "none.csv")


def test_texts_are_cleaned_and_split_for_good():
    assert clean("RT @some_one: it&amp;s  [URL] https://t.co/x1") == "RT @user it&s http http"
    assert split_of("a text") == split_of("a text")
    shares = [split_of(f"text {i}") for i in range(4000)]
    assert 0.03 < shares.count("test") / 4000 < 0.07
    assert 0.03 < shares.count("dev") / 4000 < 0.07


def test_nothing_to_fit_on(tmp_path, start):
    with pytest.raises(DataError, match="labelled rows"):
        fit_discriminator(tmp_path / "out", start=start)
    with pytest.raises(ModelError, match="BERT"):
        starting_network(tmp_path, 0)


def test_shipped_weights_are_rounded_as_stored():
    """What training saw is what is loaded: the stored numbers survive a second round trip."""
    from safetensors.torch import load_file

    stored = load_file(shipped_folder() / "network.safetensors")
    once = unpack(stored)
    network = load_network(shipped_folder() / "network.safetensors")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, once[name]), name
    assert replace(Row("a", "b", 1.0), split="dev").split == "dev"


def test_the_command_line_fits_and_says_where(start, tmp_path):
    from typer.testing import CliRunner

    from moralguard.cli import app

    rows = tmp_path / "mine.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": r.text, "statement": r.statement, "kept": r.kept, "split": r.split}) + "\n" for r in _rows(80))
    )
    arguments = ["fit", "discriminator", "--out", str(tmp_path / "out"), "--rows", str(rows), "--start", str(start), "--float32"]
    done = CliRunner().invoke(app, [*arguments, "--steps", "3", "--batch-size", "8"])
    assert done.exit_code == 0, done.output
    assert "64 training rows" in done.output
    scores = mg.Discriminator.load(tmp_path / "out").score("we saw tea", "the text does not mention tea")
    assert np.isfinite(scores).all()
    assert CliRunner().invoke(app, ["fit", "discriminator", "--out", str(tmp_path / "none")]).exit_code != 0
