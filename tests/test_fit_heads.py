"""Heads on hidden states: they learn what can be learned and nothing else, and what is written is what was fitted."""

import json
import random
import sys

import numpy as np
import pytest
import torch
import typer
from tiny_models import FAMILIES, HIDDEN, gpt2, llama
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import moralguard as mg
from moralguard.backends.factored_head import FactoredHead
from moralguard.backends.hf import LanguageModel
from moralguard.cli.fit_head import head as head_command
from moralguard.controls import PPLM, Fudge
from moralguard.discriminator.prefix import PrefixScorer
from moralguard.errors import DataError, ModelError, PolicyError
from moralguard.fitting import prefix_head
from moralguard.fitting.attribute_head import FittedHead, _Trainer, fit_attribute_head
from moralguard.fitting.head_metrics import measure
from moralguard.fitting.hidden_states import LAST, POOLINGS, encode_texts, pooled_states, token_states
from moralguard.fitting.labelled import checked
from moralguard.fitting.prefix_head import PrefixHeadSettings, fit_prefix_head, train_prefix_head

sklearn_linear = pytest.importorskip("sklearn.linear_model")

WORDS = 60


def _tokenizer(bos=False):
    words = ["<unk>", "<s>", *(f"w{i}" for i in range(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(llama(), _tokenizer(), "tiny")


def _text(label, chooser, classes=2, signal=0.9):
    """Words of which most are of the label's own range."""
    size = WORDS // classes
    ranges = [label if chooser.random() < signal else chooser.randrange(classes) for _ in range(chooser.randint(5, 12))]
    return " ".join(f"w{size * part + chooser.randrange(size)}" for part in ranges)


def _texts(train=400, dev=60, test=100, classes=2, share=None, shuffled=False, seed=0):
    chooser = random.Random(seed)
    rows = []
    for split, count in (("train", train), ("dev", dev), ("test", test)):
        for i in range(count):
            label = i % classes if share is None else int(chooser.random() < share)
            rows.append((_text(label, chooser, classes), chooser.randrange(classes) if shuffled else label, split))
    first = {}  # by chance a text comes twice
    return checked([row for row in rows if first.setdefault(row[0], row) is row], [f"class {i}" for i in range(classes)])


# hidden states


@pytest.mark.parametrize("family", FAMILIES)
def test_states_do_not_depend_on_the_batch(family):
    lm = LanguageModel(FAMILIES[family](), name=family)
    chooser = random.Random(0)
    rows = [[chooser.randrange(100) for _ in range(length)] for length in (3, 17, 1, 9, 9, 30)]
    layers, poolings = (LAST, 0, 1), POOLINGS
    together = pooled_states(lm, rows, layers=layers, poolings=poolings)
    assert set(together) == {(layer, pooling) for layer in layers for pooling in poolings}
    for i, row in enumerate(rows):
        with torch.no_grad():
            output = lm.model.base_model(input_ids=torch.tensor([row]), output_hidden_states=True)
        for layer in layers:
            states = (output.last_hidden_state if layer == LAST else output.hidden_states[layer])[0]
            torch.testing.assert_close(together[layer, "mean"][i], states.mean(0), atol=1e-5, rtol=1e-5)
            rest = states[1:] if len(row) > 1 else states
            torch.testing.assert_close(together[layer, "rest"][i], rest.mean(0), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(together[layer, "last"][i], states[-1], atol=1e-5, rtol=1e-5)


def test_batches_hold_every_row_once_within_the_limit_and_can_be_trained_on(lm):
    rows = [[1] * length for length in (5, 30, 2, 2, 7, 12)]
    seen, told = [], []
    for chosen, states, mask in token_states(lm, rows, batch_tokens=20, progress=lambda done, total: told.append((done, total))):
        assert len(chosen) == 1 or mask.numel() <= 20
        assert mask.sum(1).tolist() == [len(rows[i]) for i in chosen]
        assert states[LAST].shape == (*mask.shape, HIDDEN)
        weight = torch.zeros(HIDDEN, requires_grad=True)
        (states[LAST] @ weight).sum().backward()
        seen += chosen
    assert sorted(seen) == list(range(6))
    assert told[-1] == (6, 6)


def test_texts_are_read_behind_the_beginning_of_text_token_as_prompts_are():
    texts = ["w1 w2 w3", "w4"]
    assert encode_texts(LanguageModel(llama(), _tokenizer()), texts, 64) == [[3, 4, 5], [6]]
    lm = LanguageModel(llama(), _tokenizer(bos=True))
    assert encode_texts(lm, texts, 64) == [lm.tokenizer(text)["input_ids"] for text in texts] == [[1, 3, 4, 5], [1, 6]]
    assert encode_texts(lm, texts, 2) == [[1, 3], [1, 6]]
    long = encode_texts(lm, ["w1 " * 500], 1000)
    assert len(long[0]) == lm.context_length
    pooled_states(LanguageModel(gpt2(), _tokenizer()), long)  # learned positions end there


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda lm: encode_texts(lm, ["w1", " "], 8), DataError, r"text 2 \(' '\) has no token"),
        (lambda lm: encode_texts(lm, ["w1"], 0), DataError, "max_tokens is 0"),
        (lambda lm: encode_texts(LanguageModel(lm.model), ["w1"], 8), ModelError, "without a tokenizer"),
        (lambda lm: pooled_states(lm, [[1]], layers=(7,)), ModelError, "layers 0 to 2 and -1, not 7"),
        (lambda lm: pooled_states(lm, [[1]], poolings=("max",)), DataError, "pooling max is unknown; expected mean, rest or last"),
        (lambda lm: pooled_states(lm, []), DataError, "got 0 rows"),
    ],
)
def test_states_that_cannot_be_had(lm, call, error, told):
    with pytest.raises(error, match=told):
        call(lm)


# attribute heads


def test_a_linear_head_learns_and_shuffled_labels_teach_nothing(lm):
    fitted = fit_attribute_head(lm, _texts())
    assert fitted.weight.shape == (2, HIDDEN)
    assert fitted.bias.shape == (2,)
    assert fitted.weight.dtype == fitted.bias.dtype == torch.float32
    assert fitted.drives_pplm
    assert fitted.metrics["test"]["accuracy"] > 0.7
    assert fitted.metrics["test"]["auroc"] > 0.8
    assert fitted.metrics["search"] == []
    assert set(fitted.metrics) == {"train", "dev", "test", "search"}
    control = fit_attribute_head(lm, _texts(shuffled=True))
    assert abs(control.metrics["test"]["auroc"] - 0.5) < 0.15


def test_three_classes_and_rare_ones(lm):
    three = fit_attribute_head(lm, _texts(train=300, classes=3))
    assert three.weight.shape == (3, HIDDEN)
    assert three.metrics["test"]["balanced_accuracy"] > 0.6
    assert "auroc" not in three.metrics["test"]
    rare = fit_attribute_head(lm, _texts(train=400, test=300, share=0.08))
    assert rare.metrics["test"]["balanced_accuracy"] > 0.75


def test_the_folded_head_is_the_unfolded_one(lm):
    texts = _texts()
    fitted = fit_attribute_head(lm, texts, l2=0.02)
    rows = {split: encode_texts(lm, [row.text for row in texts.of(split)], 64) for split in ("train", "test")}
    states = {split: pooled_states(lm, ids)[LAST, "mean"] for split, ids in rows.items()}
    centre, spread = states["train"].mean(0), states["train"].std(0, correction=0)
    labels = [row.label for row in texts.of("train")]
    plain = sklearn_linear.LogisticRegression(C=1 / (0.02 * len(labels)), class_weight="balanced", max_iter=1000)
    plain.fit(((states["train"] - centre) / spread).numpy(), labels)
    expected = plain.predict_proba(((states["test"] - centre) / spread).numpy())
    np.testing.assert_allclose(fitted.predict(states["test"]).numpy(), expected, atol=2e-3)
    assert np.ptp(expected[:, 1]) > 0.5


def test_the_search_takes_the_layer_that_tells_the_classes_apart():
    model = llama()
    model.model.norm.weight.data.zero_()  # nothing is left behind the last layer
    lm = LanguageModel(model, _tokenizer())
    fitted = fit_attribute_head(lm, _texts(), layers=(LAST, 1), poolings=("last", "mean"))
    assert (fitted.layer, fitted.pooling) == (1, "mean")  # one word says less than all
    assert not fitted.drives_pplm
    tried = {(found["layer"], found["pooling"]): found for found in fitted.metrics["search"]}
    assert len(tried) == 4
    assert {found["by"] for found in tried.values()} == {"dev"}
    assert tried[LAST, "mean"]["auroc"] == 0.5
    assert tried[1, "mean"]["auroc"] > max(0.9, tried[1, "last"]["auroc"])
    assert fitted.metrics["dev"]["auroc"] == tried[1, "mean"]["auroc"]


def test_without_dev_rows_the_search_cross_validates(lm):
    fitted = fit_attribute_head(lm, _texts(dev=4), layers=(LAST, 1))
    assert {found["by"] for found in fitted.metrics["search"]} == {"5-fold cross-validation"}
    assert all(found["rows"] == 400 for found in fitted.metrics["search"])
    assert fitted.metrics["train"]["auroc"] > max(found["auroc"] for found in fitted.metrics["search"]) > 0.8
    few = checked([("w1 w2", 0, "train"), ("w40 w41", 1, "train"), ("w42 w41", 1, "train")], ("no", "yes"))
    with pytest.raises(DataError, match="class no has one training row"):
        fit_attribute_head(lm, few, layers=(LAST, 1))
    assert fit_attribute_head(lm, few).metrics["train"]["accuracy"] == 1.0


def test_a_hidden_layer_learns_what_no_line_parts():
    generator = torch.Generator().manual_seed(0)
    states = torch.rand(600, 2, generator=generator) * 2 - 1 + torch.tensor([5.0, -3.0])
    labels = ((states[:, 0] > 5) ^ (states[:, 1] > -3)).long().tolist()

    def accuracy(hidden):
        parts = _Trainer(2, hidden, 1e-2, 60, 1e-2, 0).fit(states[:400], labels[:400])
        return measure(FittedHead(parts, ("no", "yes"), LAST, "mean", {}).logits(states[400:]), labels[400:])["accuracy"]

    assert accuracy(None) < 0.7
    assert accuracy(16) > 0.9


@pytest.mark.parametrize("hidden", [None, 12])
def test_same_seed_same_head_and_a_saved_one_is_the_same(lm, tmp_path, hidden):
    texts = _texts()
    fitted, again = (fit_attribute_head(lm, texts, hidden=hidden, seed=3) for _ in range(2))
    for one, other in zip(fitted.parts, again.parts, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert fitted.metrics == again.metrics
    assert fitted.metrics["test"]["accuracy"] > 0.7
    fitted.save(tmp_path)
    loaded = FittedHead.load(tmp_path)
    states = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.predict(states), fitted.predict(states))
    torch.testing.assert_close(fitted.predict(states).sum(1), torch.ones(5))
    assert (loaded.classes, loaded.layer, loaded.pooling, loaded.metrics) == (texts.classes, LAST, "mean", fitted.metrics)
    if hidden is not None:
        assert not fitted.drives_pplm
        assert [weight.shape for weight, _ in fitted.parts] == [(12, HIDDEN), (2, 12)]
        assert not torch.equal(fitted.parts[0][0], fit_attribute_head(lm, texts, hidden=hidden, seed=4).parts[0][0])
        with pytest.raises(ModelError, match="a hidden layer of 12"):
            _ = fitted.weight


def test_attribute_heads_that_cannot_be_had(lm, tmp_path, monkeypatch):
    texts = _texts(train=20, dev=0, test=0)
    with pytest.raises(DataError, match="hidden 0"):
        fit_attribute_head(lm, texts, hidden=0)
    with pytest.raises(DataError, match="l2 -1"):
        fit_attribute_head(lm, texts, l2=-1)
    with pytest.raises(ModelError, match=r"reads \[n, 32\]"):
        fit_attribute_head(lm, texts).predict(torch.zeros(2, 7))
    with pytest.raises(ModelError, match="can't be read"):
        FittedHead.load(tmp_path)
    FactoredHead(torch.zeros(1, 4), torch.zeros(1, 4)).save(tmp_path)
    with pytest.raises(ModelError, match="lacks 'weight_1'"):
        FittedHead.load(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ModelError, match=r"needs scikit-learn: pip install 'moralguard\[fit\]'"):
        fit_attribute_head(lm, texts)


# prefix heads


def test_a_prefix_head_judges_held_back_texts_and_shuffled_labels_teach_nothing(lm):
    fitted = train_prefix_head(lm, _texts(), PrefixHeadSettings(rank=4))
    test = fitted.metrics["test"]
    assert set(test) == {"25%", "50%", "75%", "100%", "loss"}
    assert test["100%"]["auroc"] > 0.85
    assert test["100%"]["accuracy"] > 0.7
    assert test["25%"]["auroc"] > 0.6
    assert test["100%"]["rows"] == 100
    assert 1 <= fitted.metrics["epochs"] <= 20
    control = train_prefix_head(lm, _texts(shuffled=True), PrefixHeadSettings(rank=4))
    assert abs(control.metrics["test"]["100%"]["auroc"] - 0.5) < 0.15


def test_the_metrics_are_those_of_the_head_in_use(lm):
    texts = _texts()
    fitted = train_prefix_head(lm, texts)
    scorer = PrefixScorer(lm, fitted.head)
    scores = [scorer.score_prefixes(ids) for ids in encode_texts(lm, [row.text for row in texts.of("test")], 64)]
    labels = [row.label for row in texts.of("test")]
    for share, name in ((0.25, "25%"), (0.5, "50%"), (1.0, "100%")):
        chances = torch.tensor([found[int(np.ceil(share * len(found))) - 1] for found in scores])
        found = measure(torch.stack([-chances.logit(), chances.logit()], -1), labels)
        assert found["auroc"] == pytest.approx(fitted.metrics["test"][name]["auroc"], abs=2e-3)
        assert found["accuracy"] == pytest.approx(fitted.metrics["test"][name]["accuracy"], abs=0.011)


def test_the_folded_prefix_head_is_the_unfolded_one(lm):
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    states = (3 * noise(40, HIDDEN) + 5).half()
    following, text = torch.randint(0, WORDS, (40,), generator=generator), torch.arange(40)
    prefixes = prefix_head._Prefixes(states, following, text, (text % 2).float())
    inputs = prefix_head._Standardised(prefixes, text[:30], lm.head.weight + 0.7)
    form = prefix_head._Form(noise(3, HIDDEN), noise(3, HIDDEN), noise(HIDDEN), noise(HIDDEN), noise(()))
    normal, _ = inputs.of(text[:30])
    torch.testing.assert_close(normal.mean(0), torch.zeros(HIDDEN), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.std(0, correction=0), torch.ones(HIDDEN), atol=1e-3, rtol=0)
    head = prefix_head._folded(form, inputs)
    h, e = states.double(), (lm.head.weight.double() + 0.7)[following]
    raw = ((h @ head.query.double().T) * (e @ head.key.double().T)).sum(-1)
    raw = raw + e @ head.linear.double() + h @ head.state.double() + head.bias
    torch.testing.assert_close(form.logits(*inputs.of(text)).double(), raw, atol=2e-3, rtol=1e-3)


def test_which_prefixes_are_read(lm):
    texts = checked([("w1 w2 w3 w4 w5", 0, "train"), ("w40 w41 w42", 1, "train"), ("w1 w2 w3 w4 w5 w6 w7 w8 w9", 0, "dev")], ("no", "yes"))
    ids = encode_texts(lm, [row.text for row in texts.rows], 64)
    generator = torch.Generator().manual_seed(0)
    places = prefix_head._places(ids, texts.rows, 100, generator)
    assert places == [[0, 1, 2, 3], [0, 1], [1, 3, 5, 7]]
    found = prefix_head._read(lm, ids, texts.rows, places, False, lambda done, total: None)
    assert found.following.tolist() == [ids[i][t + 1] for i, place in enumerate(places) for t in place]
    assert found.text.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
    with torch.no_grad():
        states = lm.model.base_model(input_ids=torch.tensor([ids[2]])).last_hidden_state[0]
    torch.testing.assert_close(found.states[6:].float(), states[places[2]], atol=2e-3, rtol=2e-3)
    weights = found.weights(torch.arange(6))
    torch.testing.assert_close(weights, torch.tensor([0.75] * 4 + [1.5] * 2))  # either text weighs 3
    sampled = [prefix_head._places(ids, texts.rows, 3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1, 2, 3)]
    assert all(sum(map(len, place[:2])) == 3 and place[2] == places[2] for place in sampled)
    assert sampled[0] == sampled[1]
    assert len({str(place) for place in sampled}) > 1


def test_same_seed_same_prefix_head_another_seed_another(lm):
    texts = _texts(train=80)
    one, same, other = (fit_prefix_head(lm, texts, seed=seed, epochs=3) for seed in (1, 1, 2))
    assert torch.equal(one.query, same.query)
    assert torch.equal(one.key, same.key)
    assert one.bias == same.bias
    assert not torch.equal(one.query, other.query)


def test_the_sought_class_can_be_any(lm):
    texts = _texts(train=60, dev=40)
    yes, no = (train_prefix_head(lm, texts, PrefixHeadSettings(epochs=4), target=target) for target in (1, 0))
    assert yes.metrics["test"]["100%"]["auroc"] > 0.7
    assert no.metrics["test"]["100%"]["auroc"] > 0.7
    states = pooled_states(lm, encode_texts(lm, [row.text for row in texts.of("test")], 64), poolings=("last",))[LAST, "last"]
    sought, shunned = (PrefixScorer(lm, found.head).next_token_logits(states).flatten() for found in (yes, no))
    assert torch.corrcoef(torch.stack([sought, shunned]))[0, 1] < -0.5


def test_training_ends_when_dev_texts_stop_getting_better(lm, monkeypatch):
    plain, planned = prefix_head.linear_rate, []

    def counted(step, warm, steps):
        planned.append(steps)
        return plain(step, warm, steps)

    monkeypatch.setattr(prefix_head, "linear_rate", counted)
    settings = PrefixHeadSettings(epochs=200, learning_rate=0.03, patience=2)
    fitted = train_prefix_head(lm, _texts(train=60, shuffled=True), settings)
    assert fitted.metrics["epochs"] < 20
    assert len(planned) == (fitted.metrics["epochs"] + 2) * planned[0] // 200  # patience: two more passes and no third
    without = train_prefix_head(lm, _texts(train=60, dev=0), PrefixHeadSettings(epochs=7))
    assert without.metrics["epochs"] == 7
    assert "dev" not in without.metrics


def test_prefix_heads_that_cannot_be_had(lm):
    texts = _texts(train=20, dev=0, test=0)
    with pytest.raises(DataError, match="both labels"):
        fit_prefix_head(lm, ["w1 w2", "w3 w4"], [True, True])
    with pytest.raises(DataError, match=r"2 texts, 1 labels"):
        fit_prefix_head(lm, ["w1 w2", "w3 w4"], [True])
    with pytest.raises(DataError, match="leave kept out"):
        fit_prefix_head(lm, texts, [True])
    with pytest.raises(DataError, match="two tokens or more"):
        fit_prefix_head(lm, ["w1", "w2 w3"], [True, False])
    with pytest.raises(DataError, match=r"max_prefixes \(1\)"):
        train_prefix_head(lm, texts, PrefixHeadSettings(max_prefixes=1))
    with pytest.raises(DataError, match=r"target is 2, but the classes are 0 to 1 \(class 0, class 1\)"):
        train_prefix_head(lm, texts, target=2)
    with pytest.raises(PolicyError, match="rank"):
        fit_prefix_head(lm, texts, rank=0)


# the command


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model's folder, rows with labels, and rows with pairs."""
    folder = tmp_path_factory.mktemp("head")
    llama().save_pretrained(folder / "model")
    _tokenizer().save_pretrained(folder / "model")
    texts = _texts()
    rows = [{"text": row.text, "kept": row.label, "split": row.split} for row in texts.rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chooser = random.Random(1)
    pairs = [{"rude": f"w{i % 30} {_text(0, chooser)}", "kind": f"w{30 + i % 30} {_text(1, chooser)}"} for i in range(120)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


def _run(places, out, *arguments, rows="rows.jsonl"):
    app = typer.Typer()
    app.command("head")(head_command)
    fixed = ("--model", str(places / "model"), "--rows", str(places / rows), "--out", str(out))
    return CliRunner().invoke(app, [*fixed, "--value", "The text is kind.", "--licence", "CC0-1.0", *arguments])


def _prompts():
    return [[5, 9, 11], [40, 41]]


def test_the_command_writes_a_prefix_head_that_guides_fudge(places, tmp_path):
    done = _run(places, tmp_path / "pack", "--kind", "prefix", "--rank", "4", "--seed", "2")
    assert done.exit_code == 0, done.output
    assert "test, 100% read" in done.stdout
    assert "AUROC" in done.stdout
    assert "written to" in done.stderr
    card = json.loads((tmp_path / "pack" / "card.json").read_text())
    assert (card["kind"], card["name"], card["values"]) == ("prefix-head", "pack", ["The text is kind."])
    assert card["data"] == [{"name": "rows.jsonl", "licence": "CC0-1.0", "rows": len(_texts().rows), "url": ""}]
    assert card["settings"]["target"] == 1
    assert card["settings"]["rank"] == 4
    assert card["metrics"]["test"]["100%"]["auroc"] > 0.8
    lm = mg.load_model(str(places / "model"))
    assert FactoredHead.load(tmp_path / "pack").query.shape == (4, HIDDEN)
    rate = {}
    for strength in (0.0, 8.0):
        guard = mg.Guard(mg.Policy(controls=[Fudge(discriminator=str(tmp_path / "pack"), strength=strength, top_k=60)]), lm)
        ids = [i for seed in range(8) for row in guard.generate(_prompts(), max_new_tokens=10, seed=seed).token_ids for i in row]
        words = [i - 2 for i in ids if 2 <= i < 2 + WORDS]
        rate[strength] = np.mean([word >= WORDS // 2 for word in words])
    assert rate[8.0] > rate[0.0] + 0.1


def test_the_command_writes_an_attribute_head_that_drives_pplm(places, tmp_path):
    done = _run(places, tmp_path / "pack", "--kind", "attribute", "--pairs", "kind,rude", "--name", "kind words", rows="pairs.jsonl")
    assert done.exit_code == 0, done.output
    assert "train" in done.stdout
    assert "PPLM can't" not in done.stderr
    card = json.loads((tmp_path / "pack" / "card.json").read_text())
    assert (card["kind"], card["name"]) == ("attribute-head", "kind words")
    assert card["settings"]["classes"] == ["rude", "kind"]
    assert (card["settings"]["layer"], card["settings"]["pooling"], card["settings"]["target"]) == (LAST, "mean", 1)
    lm = mg.load_model(str(places / "model"))
    control = PPLM(head=str(tmp_path / "pack"), stepsize=0.05)
    weight, bias, target = control.attribute(lm)
    fitted = FittedHead.load(tmp_path / "pack")
    assert torch.equal(weight, fitted.weight)
    assert torch.equal(bias, fitted.bias)
    assert target == 1
    found = mg.Guard(mg.Policy(controls=[control]), lm).generate(_prompts(), max_new_tokens=3, seed=0)
    assert [len(row) for row in found.token_ids] == [3, 3]
    other = LanguageModel(llama(seed=9), _tokenizer(), "another")
    with pytest.raises(ModelError, match="fingerprint"):
        mg.Guard(mg.Policy(controls=[control]), other).generate(_prompts(), max_new_tokens=1)


def test_the_command_searches_layers_and_says_what_pplm_cannot_take(places, tmp_path):
    arguments = ("--kind", "attribute", "--layers", "all", "--pooling", "mean,last", "--hidden", "8", "--target", "0")
    done = _run(places, tmp_path / "pack", *arguments)
    assert done.exit_code == 0, done.output
    assert "layer 1, mean, dev" in done.stdout
    assert "layer -1, last, dev" in done.stdout
    assert "PPLM can't take this head" in done.stderr
    card = json.loads((tmp_path / "pack" / "card.json").read_text())
    assert card["settings"]["hidden"] == 8
    assert card["settings"]["target"] == 0
    assert len(card["metrics"]["search"]) == 4
    with pytest.raises((PolicyError, ModelError)):
        PPLM(head=str(tmp_path / "pack"))
    inner = _run(places, tmp_path / "inner", "--kind", "attribute", "--layers", "1")
    assert "PPLM can't take this head" in inner.stderr
    with pytest.raises(PolicyError, match="layer 1"):
        PPLM(head=str(tmp_path / "inner"))
    again = _run(places, tmp_path / "pack", "--kind", "attribute")  # over an earlier head
    assert again.exit_code == 0, again.output
    assert PPLM(head=str(tmp_path / "pack")).attribute()[2] == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--kind", "prefix", "--layers", "1"), "--layers isn't an option of --kind prefix"),
        (("--kind", "attribute", "--rank", "4"), "--rank isn't an option of --kind attribute"),
        (("--kind", "attribute", "--layers", "top"), "expected numbers such as -1,4,8, or all"),
        (("--kind", "attribute", "--layers", "-1,99"), "layers 0 to 2 and -1, not 99"),
        (("--kind", "attribute", "--target", "cruel"), "--target 'cruel' is none of 0, 1"),
        (("--kind", "attribute", "--pairs", "kind"), "expected two fields, KEPT,BROKEN"),
        (("--kind", "attribute", "--text-field", "words"), "field 'words' must hold a text"),
        (("--kind", "attribute", "--value", "x"), "statement"),
    ],
)
def test_what_the_command_refuses(places, tmp_path, arguments, told):
    done = _run(places, tmp_path / "pack", *arguments)
    assert done.exit_code == 1
    assert told in str(done.exception)
    assert not (tmp_path / "pack").exists()


def test_the_command_says_when_nothing_was_held_back(places, tmp_path):
    rows = [{"text": row.text, "kept": row.label, "split": "train"} for row in _texts(train=40, dev=0, test=0).rows]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = _run(tmp_path, tmp_path / "pack", "--kind", "prefix", "--model", str(places / "model"), rows="train.jsonl")
    assert done.exit_code == 0, done.output
    assert "training texts" in done.stdout
    assert "nothing says what the head is worth" in done.stderr


def test_the_command_leaves_a_folder_of_other_things_alone(places, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    done = _run(places, tmp_path, "--kind", "attribute")
    assert "holds letter.txt" in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
