"""Steering vectors fitted on states: against naive means and principal directions, from texts to a pack that guards."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_models
import torch
import typer
from typer.testing import CliRunner
from word_tokenizer import WordTokenizer

import moralguard as mg  # at the top: a guard imported while a test has load_model replaced would keep the replacement
from moralguard.backends.hf import LanguageModel
from moralguard.cli import fit_vector
from moralguard.controls import SteeringVectors
from moralguard.errors import DataError
from moralguard.fitting.labelled import checked, read_pairs, read_text_pairs
from moralguard.fitting.vectors import fit_vectors
from moralguard.packs import read_pack

PAIRS = [
    {"good": f"{i % 7} {i // 7} the cat", "bad": f"{i % 7} {i // 7} the dog", "split": "test" if i % 4 == 0 else "train"} for i in range(48)
]


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(tiny_models.llama(0, layers=4), WordTokenizer(), "tiny")


@pytest.fixture(scope="module")
def texts():
    return read_pairs(PAIRS, "good", "bad")


def states_of(lm, texts, layer, pooling="last"):
    """Naive: one text after the other, no padding."""
    found = []
    for text in texts:
        ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            h = lm.model(ids, output_hidden_states=True).hidden_states[layer][0].double()
        found.append(h[-1] if pooling == "last" else h[1:].mean(0))
    return torch.stack(found).numpy()


def training(side):
    return [row[side] for row in PAIRS if row["split"] == "train"]


class TestFit:
    @pytest.mark.parametrize("pooling", ["last", "mean"])
    def test_mean_difference(self, lm, texts, pooling):
        found = fit_vectors(lm, texts, best=None, pooling=pooling)
        assert list(found.vectors) == [1, 2, 3]
        for layer, vector in found.vectors.items():
            expected = states_of(lm, training("good"), layer, pooling).mean(0) - states_of(lm, training("bad"), layer, pooling).mean(0)
            assert np.allclose(vector.numpy(), expected, atol=1e-5)

    def test_principal_direction(self, lm, texts):
        found = fit_vectors(lm, texts, "pca", pairs=read_text_pairs(PAIRS, "good", "bad"), layers=[2])
        d = states_of(lm, training("good"), 2) - states_of(lm, training("bad"), 2)
        values, axes = np.linalg.eigh(d.T @ d)
        axis = axes[:, values.argmax()]
        expected = (d.mean(0) @ axis) * axis  # whatever the sign of the axis: towards the good texts, as long as the mean along it
        assert np.allclose(found.vectors[2].numpy(), expected, atol=1e-5)
        assert found.settings["paired"]

    def test_rows_without_pairs_are_paired_by_chance(self, lm, texts):
        one, same, other = (fit_vectors(lm, texts, "pca", layers=[2], seed=seed) for seed in (0, 0, 1))
        mean = fit_vectors(lm, texts, layers=[2]).vectors[2]
        assert torch.equal(one.vectors[2], same.vectors[2])
        assert not torch.equal(one.vectors[2], other.vectors[2])
        for found in (one, other):
            assert float(torch.cosine_similarity(found.vectors[2], mean, dim=0)) > 0.5

    def test_plus_is_towards_the_kept_class(self, lm, texts):
        for method in ("mean", "pca"):
            towards, away = (fit_vectors(lm, texts, method, layers=[1], kept=name).vectors[1] for name in ("good", "bad"))
            assert float(torch.cosine_similarity(towards, away, dim=0)) < -0.9
            x = states_of(lm, [row["good"] for row in PAIRS], 1) - states_of(lm, [row["bad"] for row in PAIRS], 1)
            assert (x @ towards.numpy() > 0).mean() > 0.9

    def test_the_layer_that_tells_most_is_kept(self, lm, texts):
        found = fit_vectors(lm, texts)
        numbers = found.metrics["layers"]
        best = max(numbers, key=lambda layer: (numbers[layer]["accuracy"], numbers[layer]["separation"]))
        assert list(found.vectors) == [int(best)] == found.settings["layers"]
        assert found.metrics["held_back_rows"] == 24
        vector = fit_vectors(lm, texts, best=None).vectors[int(best)].numpy()
        held = [row for row in PAIRS if row["split"] == "test"]
        own, other = (states_of(lm, [row[side] for row in held], int(best)) @ vector for side in ("good", "bad"))
        middle = np.mean([(states_of(lm, training(side), int(best)) @ vector).mean() for side in ("good", "bad")])
        assert numbers[best]["accuracy"] == pytest.approx(((own > middle).mean() + (other <= middle).mean()) / 2, abs=1e-4)

    def test_labels_that_say_nothing_are_told_by_the_probe(self, lm):
        """Negative control: the labels are drawn, and held-back rows can't be told apart."""
        g = torch.Generator().manual_seed(3)
        draw = torch.randint(0, 2, (160,), generator=g).tolist()
        rows = [(f"{i % 13} {i // 13} word {i}", label, "test" if i % 2 else "train") for i, label in enumerate(draw)]
        found = fit_vectors(lm, checked(rows, ("0", "1")), best=None)
        assert all(abs(numbers["accuracy"] - 0.5) < 0.2 for numbers in found.metrics["layers"].values())

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"layers": [4]}, r"layers are \[4\]; tiny has layers 1 to 3"),
            ({"layers": []}, "layers are"),
            ({"best": 4}, "best is 4; expected 1 to 3"),
            ({"kept": "great"}, "classes bad, good; expected two, and the kept one"),
            ({"pooling": "max"}, "pooling 'max'"),
            ({"method": "pca", "pairs": [("none", "such")]}, "'none', which isn't among the rows"),
            ({"method": "pca", "pairs": [(PAIRS[0]["good"], PAIRS[0]["bad"])]}, "no pair is of the training split"),
        ],
    )
    def test_errors(self, lm, texts, settings, message):
        with pytest.raises(DataError, match=message):
            fit_vectors(lm, texts, **settings)

    def test_rows_that_do_not_do(self, lm):
        with pytest.raises(DataError, match="held-back rows aren't of both classes"):
            fit_vectors(lm, checked([("a b", 0, "train"), ("c d", 1, "train"), ("e f", 1, "test")], ("0", "1")))
        # the words differ, but not the last token's state of the first layer's input: one text read in two spellings
        same = [("ab c", 0, "train"), ("ba c", 1, "train"), ("ab d", 0, "test"), ("ba d", 1, "test")]
        with pytest.raises(DataError, match="don't differ at layer 1"):
            fit_vectors(lm, checked(same, ("0", "1")))


class TestCommand:
    @pytest.fixture
    def run(self, monkeypatch, lm):
        monkeypatch.setattr("moralguard.models.load_model", lambda *_, **__: lm)
        app = typer.Typer(pretty_exceptions_enable=False)
        app.command()(fit_vector.vector)
        return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])

    @pytest.fixture
    def pairs_file(self, tmp_path):
        file = tmp_path / "animals.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
        return file

    @pytest.mark.parametrize("method", ["mean", "pca"])
    def test_writes_a_pack_that_steers(self, run, lm, pairs_file, tmp_path, method):
        result = run(
            *("--rows", pairs_file, "--pairs", "good,bad", "--method", method, "--layers", "1,2", "--best", 2, "--licence", "CC0-1.0"),
            *("--value", "The text is about cats.", "--out", tmp_path / "pack"),
        )
        assert result.exit_code == 0, result.output
        assert "* layer   1: right in" in result.output
        pack = read_pack(tmp_path / "pack", "steering-vectors")
        pack.check(lm)
        assert pack.card.values == ("The text is about cats.",)
        assert pack.card.settings["layers"] == [1, 2]
        assert pack.card.data[0].licence == "CC0-1.0"
        control = SteeringVectors(vectors=str(tmp_path / "pack"))
        expected = fit_vectors(
            lm, read_pairs(PAIRS, "good", "bad"), method, pairs=read_text_pairs(PAIRS, "good", "bad"), layers=[1, 2], best=None
        ).vectors
        assert all(np.array_equal(control.arrays()[layer], expected[layer].float().numpy()) for layer in (1, 2))
        towards, away = (
            mg.Guard(mg.Policy(controls=[control.replaced(strength=s)]), lm).log_probabilities([[5, 9, 20]], [[7]])[0][1][0]
            for s in (1.0, -1.0)
        )
        assert abs(towards - away) > 1e-2

    def test_labelled_rows(self, run, tmp_path):
        file = tmp_path / "rows.csv"
        rows = [f'"{row[side]}",{side},{row["split"]}' for row in PAIRS for side in ("good", "bad")]
        file.write_text("\n".join(["text,label,split", *rows]))
        result = run("--rows", file, "--kept", "good", "--best", 0, "--out", tmp_path / "pack")
        assert result.exit_code == 0, result.output
        assert read_pack(tmp_path / "pack").card.settings["layers"] == [1, 2, 3]

    def test_errors(self, run, pairs_file, tmp_path):
        labelled = tmp_path / "rows.jsonl"
        labelled.write_text("".join(json.dumps({"text": row[s], "label": s}) + "\n" for row in PAIRS for s in ("good", "bad")))
        for arguments, message in (
            (["--rows", labelled], "name the one that keeps the value with --kept"),
            (["--rows", pairs_file, "--pairs", "good,bad", "--kept", "good"], "leave --kept out"),
            (["--rows", pairs_file, "--pairs", "good"], "KEPT,BROKEN"),
            (["--rows", pairs_file, "--pairs", "good,bad", "--layers", "1-3"], "numbers with commas"),
            (["--rows", tmp_path / "none.jsonl"], "none.jsonl"),
        ):
            result = run("--out", tmp_path / "new", *arguments)
            assert isinstance(result.exception, DataError)
            assert message in str(result.exception)
            assert not (tmp_path / "new").exists()
        result = run("--out", tmp_path, "--rows", pairs_file, "--pairs", "good,bad")
        assert "not an empty folder" in str(result.exception)
