"""Other people's models as discriminators, against the raw models computed by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from moralguard.backends.hf import LanguageModel
from moralguard.discriminator.adapters import ClassifierDiscriminator, NLIDiscriminator, SelfDiagnosisDiscriminator
from moralguard.discriminator.self_diagnosis import self_diagnose
from moralguard.errors import DataError, ModelError
from moralguard.values import Value

SPOKEN = "you are a fool friend and i like tea the text does not insult anyone is kind polite japan yes no it so good bad very"
WORDS = SPOKEN.split()
KIND = "The text is kind."
INSULT = "The text does not insult anyone."
TEXTS = ["you are a fool", "tea", "i like tea and you are a very very good friend"]
LIMIT = 24


def tokenizer(limit: int = LIMIT, **options: Any) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"} | options
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=limit, model_input_names=inputs, **names)


def bert(labels: list[str], seed: int = 0, **options: Any) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=options.pop("positions", LIMIT),
        initializer_range=0.6,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config).eval()


def raw_logits(model: Any, text: str, pair: str | None = None) -> list[float]:
    """The raw model's logits of one row, ids spelt out by hand."""

    def ids(part: str) -> list[int]:
        words = part.replace(".", " .").split()
        return [WORDS.index(word) + 4 if word in WORDS else 3 for word in words]

    row = [1, *ids(text), 2]
    types = [0] * len(row)
    if pair is not None:
        types += [1] * (len(ids(pair)) + 1)
        row += [*ids(pair), 2]
    arguments = {"token_type_ids": torch.tensor([types])} if isinstance(model, BertForSequenceClassification) else {}
    with torch.no_grad():
        return model(input_ids=torch.tensor([row]), **arguments).logits[0].double().tolist()


def softmax(logits: list[float]) -> list[float]:
    exponentials = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(exponentials) for x in exponentials]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_single_label_classifier_by_hand() -> None:
    model = bert(["neutral", "toxic", "kind"])
    reader = ClassifierDiscriminator(model, tokenizer(), {INSULT: "toxic", "is-kind": ("kind", "keeps"), "third": 0})
    values = [INSULT, Value(id="is-kind", statement=KIND), "third"]
    judged = reader.judge(TEXTS, values, "japan")
    expected = [[1 - p[1], p[2], 1 - p[0]] for p in (softmax(raw_logits(model, text)) for text in TEXTS)]
    np.testing.assert_allclose(judged.probability, expected, atol=1e-5)
    np.testing.assert_array_equal(judged.relevance, 1.0)
    np.testing.assert_allclose(reader.score(TEXTS, values), judged.probability, atol=1e-12)
    assert judged[0, 0].basis.window == (0, len(TEXTS[0]))
    assert "classifier" in judged[0, 0].basis.path
    # a text's score doesn't depend on its neighbours
    np.testing.assert_allclose(np.vstack([reader.score(text, values) for text in TEXTS]), judged.probability, atol=1e-5)


@pytest.mark.parametrize("options", [{"problem_type": "multi_label_classification"}, {}])
def test_sigmoid_of_many_labels_and_of_one(options: dict[str, str]) -> None:
    model = bert(["toxic", "insult"] if options else ["toxic"], **options)
    found = ClassifierDiscriminator(model, tokenizer(), {INSULT: "toxic"}).score(TEXTS, INSULT)
    np.testing.assert_allclose(found[:, 0], [1 - sigmoid(raw_logits(model, text)[0]) for text in TEXTS], atol=1e-5)


def test_the_worst_window_of_a_long_text_decides_wherever_it_is() -> None:
    model = bert(["kind", "toxic"], seed=1)
    reader = ClassifierDiscriminator(model, tokenizer(), {INSULT: "toxic"})
    words = ["tea"] * 60
    decisive = max(WORDS, key=lambda word: softmax(raw_logits(model, " ".join(["tea"] * 21 + [word])))[1])
    assert decisive != "tea"
    long = " ".join([*words, decisive])
    judged = reader.judge(long, INSULT)[0, 0]
    room, step = LIMIT - 2, LIMIT - 2 - (LIMIT - 2) // 4
    starts = [*range(0, 61 - room, step), 61 - room]
    pieces = [" ".join([*words, decisive][start : start + room]) for start in starts]
    risks = [softmax(raw_logits(model, piece))[1] for piece in pieces]
    assert int(np.argmax(risks)) == len(pieces) - 1
    assert float(judged.probability) == pytest.approx(1 - max(risks), abs=1e-5)
    assert judged.basis.window == (4 * starts[-1], len(long))
    assert judged.basis.windows == len(pieces)


def test_a_text_that_just_fits_is_one_window() -> None:
    reader = ClassifierDiscriminator(bert(["kind", "toxic"]), tokenizer(), {INSULT: 1})
    texts = [" ".join(["tea"] * n) for n in (LIMIT - 2, LIMIT - 1)]
    assert [item[0].basis.windows for item in reader.judge(texts, INSULT)] == [1, 2]


def test_a_tokenizer_without_offsets_cuts_by_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ClassifierDiscriminator(bert(["kind", "toxic"]), tokenizer(), {INSULT: 1})
    text = " ".join(["tea"] * 40)
    whole = reader.judge(TEXTS, INSULT)
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    np.testing.assert_array_equal(reader.judge(TEXTS, INSULT).probability, whole.probability)
    assert reader.judge(text, INSULT)[0, 0].basis.windows > 2


def test_positions_that_roberta_keeps_for_padding_are_not_used() -> None:
    config = RobertaConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=18,
        type_vocab_size=1,
        initializer_range=0.6,
        pad_token_id=0,
    )
    model = RobertaForSequenceClassification(config).eval()
    reader = ClassifierDiscriminator(model, tokenizer(10**30), {INSULT: "LABEL_1"})
    text = " ".join(["tea"] * 16)  # with its two special tokens one more than the 17 that can be used
    assert reader.judge(text, INSULT)[0, 0].basis.windows == 2
    np.testing.assert_allclose(reader.score(TEXTS, INSULT)[:, 0], [softmax(raw_logits(model, text))[0] for text in TEXTS], atol=1e-5)


@pytest.mark.parametrize("pad", [0, None])
def test_a_decoder_classifier_with_and_without_padding(pad: int | None) -> None:
    config = GPT2Config(vocab_size=len(WORDS) + 4, n_positions=32, n_embd=16, n_layer=1, n_head=2, initializer_range=0.6, pad_token_id=pad)
    model = GPT2ForSequenceClassification(config).eval()
    plain = tokenizer()
    plain.model_input_names = ["input_ids", "attention_mask"]
    found = ClassifierDiscriminator(model, plain, {INSULT: 1}).score(TEXTS, INSULT)[:, 0]
    np.testing.assert_allclose(found, [softmax(raw_logits(model, text))[0] for text in TEXTS], atol=1e-5)


@pytest.mark.parametrize("names", [["CONTRADICTION", "neutral", "Entailment"], ["LABEL_0", "LABEL_1", "LABEL_2"]])
def test_nli_by_hand(names: list[str]) -> None:
    model = bert(names)
    given = {"contradiction": 0, "neutral": "LABEL_1", "entailment": 2} if names[0] == "LABEL_0" else None
    judged = NLIDiscriminator(model, tokenizer(), labels=given).judge(TEXTS, [KIND, INSULT], "japan")
    for i, text in enumerate(TEXTS):
        for j, statement in enumerate((KIND, INSULT)):
            against, neutral, entailed = softmax(raw_logits(model, f"japan {text}", statement))
            assert judged.relevance[i, j] == pytest.approx(1 - neutral, abs=1e-5)
            assert judged.valence[i, j] == pytest.approx(entailed / (entailed + against), abs=1e-5)
    np.testing.assert_allclose(judged.probability, 1 - judged.relevance * (1 - judged.valence))


def test_nli_of_two_labels_knows_no_neutral() -> None:
    model = bert(["entailment", "not_entailment"])
    judged = NLIDiscriminator(model, tokenizer()).judge(TEXTS, KIND)
    np.testing.assert_array_equal(judged.relevance, 1.0)
    np.testing.assert_allclose(judged.valence[:, 0], [softmax(raw_logits(model, text, KIND))[0] for text in TEXTS], atol=1e-5)


def test_nli_windows_keep_context_and_statement_whole() -> None:
    model = bert(["entailment", "neutral", "contradiction"], seed=2)
    words = ["tea"] * 30 + ["fool"]
    judged = NLIDiscriminator(model, tokenizer()).judge(" ".join(words), [INSULT, KIND], "japan")
    room = LIMIT - 3 - 1 - 7  # special tokens, the context, the longer statement
    step = room - room // 4
    pieces = [" ".join(words[s : s + room]) for s in [*range(0, 31 - room, step), 31 - room]]
    for j, statement in enumerate((INSULT, KIND)):
        kept = []
        for piece in pieces:
            entailed, neutral, against = softmax(raw_logits(model, f"japan {piece}", statement))
            kept.append(1 - (1 - neutral) * against / (entailed + against))
        assert judged.probability[0, j] == pytest.approx(min(kept), abs=1e-5)
    assert judged[0, 0].basis.windows == len(pieces)
    with pytest.raises(DataError, match=r"texts\[1\].*leave \d for the text"):
        NLIDiscriminator(model, tokenizer()).score(["tea", "tea " * 40], KIND, context="japan " * 12)


def test_a_text_cannot_bring_special_tokens_of_its_own() -> None:
    model = bert(["entailment", "neutral", "contradiction"])
    found = NLIDiscriminator(model, tokenizer()).judge("tea [SEP] no", KIND).relevance[0, 0]
    # the brackets and the word between them are words like any others (unknown here)
    assert found == pytest.approx(1 - softmax(raw_logits(model, "tea [ SEP ] no", KIND))[1], abs=1e-5)


def causal(seed: int = 0) -> LanguageModel:
    return LanguageModel(tiny_models.gpt2(seed, vocab=len(WORDS) + 4), tokenizer(10**30), "tiny")


def test_self_diagnosis_is_the_model_s_own_answer() -> None:
    lm = causal()
    reader = SelfDiagnosisDiscriminator(lm)
    values = [Value.from_statement(KIND), Value.from_statement(INSULT)]
    judged = reader.judge(TEXTS, values)
    np.testing.assert_allclose(judged.probability, self_diagnose(lm, TEXTS, values), atol=1e-5)
    yes, no = (4 + WORDS.index(word) for word in ("yes", "no"))
    for context in ("", "japan"):
        stated = f"(Context: japan) {KIND}" if context else KIND
        question = f'"tea"\n\nQuestion: Is the following statement about the text above true? {stated}\nAnswer:'
        ids = lm.tokenizer(question, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            law = torch.softmax(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].double(), -1)
        found = reader.score("tea", KIND, context=context)[0, 0]
        assert found == pytest.approx(float(law[yes] / (law[yes] + law[no])), abs=1e-5)


def test_self_diagnosis_of_a_long_text_and_of_a_pair() -> None:
    lm = causal()
    judged = SelfDiagnosisDiscriminator((lm.model, lm.tokenizer)).judge("tea " * 300, KIND)
    assert judged[0, 0].basis.windows > 3
    assert 0 < judged.probability[0, 0] < 1
    with pytest.raises(ModelError, match="without a tokenizer"):
        SelfDiagnosisDiscriminator(lm.model)
    without = tokenizer()
    without.backend_tokenizer.model = models.WordLevel({"[UNK]": 3, "[CLS]": 1, "[SEP]": 2, "[PAD]": 0}, unk_token="[UNK]")
    with pytest.raises(ModelError, match="can't be told apart"):
        SelfDiagnosisDiscriminator((lm.model, without))


def readers() -> list[tuple[Any, Any]]:
    lm = causal()
    toxic, nli = bert(["kind", "toxic"]), bert(["entailment", "neutral", "contradiction"])
    return [
        (toxic, ClassifierDiscriminator(toxic, tokenizer(), {INSULT: "toxic"})),
        (nli, NLIDiscriminator(nli, tokenizer())),
        (lm.model, SelfDiagnosisDiscriminator(lm)),
    ]


@pytest.mark.parametrize("kind", range(3))
def test_what_holds_for_all(kind: int) -> None:
    model, reader = readers()[kind]
    calls: list[Any] = []
    handle = model.register_forward_pre_hook(lambda *given: calls.append(torch.is_inference_mode_enabled() and not model.training))
    judged = reader.judge(["", " \n"], INSULT)
    assert not calls
    np.testing.assert_array_equal(judged.relevance, 0.0)
    np.testing.assert_array_equal(judged.probability, 1.0)
    assert reader.read([], [Value.from_statement(INSULT)], "").probability.shape == (0, 1)

    alone = reader.score(["you are a fool"], INSULT)
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.Dropout))
    frozen.training = False
    found = reader.score(["", "you are a fool", "tea " * 15], INSULT)
    assert calls
    assert all(calls)
    assert model.training
    assert not frozen.training
    np.testing.assert_allclose(found[1], alone[0], atol=1e-5)
    model.eval()
    handle.remove()

    for verdict in reader.judge(["you are a fool", ""], Value(id="v", statement=INSULT, threshold=0.0)).resolve():
        assert verdict.verdict in ("keeps", "silent")
    reward = reader.as_reward(INSULT)
    turns = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you are a fool"}]]
    assert reward(completions=turns, prompts=["x"]) == pytest.approx(reward(["you are a fool"]), abs=1e-5)
    assert reward(["you are a fool", ""]) == pytest.approx([alone[0, 0], 1.0], abs=1e-5)

    with torch.no_grad():
        model.get_input_embeddings().weight[4 + WORDS.index("friend")] = float("nan")
    with pytest.raises(ModelError, match=r"finite for texts\[2\]"):
        reader.score(["tea", "", "you are a friend"], INSULT)


def test_labels_are_checked_when_built() -> None:
    model = bert(["kind", "toxic"])
    for labels, message in (
        ({INSULT: "toxik"}, r"'toxik'.*'kind', 'toxic'.*did you mean 'toxic'"),
        ({INSULT: 2}, "index from 0 to 1"),
        ({INSULT: True}, "isn't a label"),
        ({INSULT: ("toxic", "holds")}, "keeps"),
        ({1: "toxic"}, "id or the statement"),
        ({}, "'kind', 'toxic'"),
        (["toxic"], "'kind', 'toxic'"),
    ):
        with pytest.raises(DataError, match=message):
            ClassifierDiscriminator(model, tokenizer(), labels)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="regression"):
        ClassifierDiscriminator(bert(["x"], problem_type="regression"), tokenizer(), {INSULT: 0})
    with pytest.raises(DataError, match=r"values\[1\].*nearest: 'The text does not insult anyone.'"):
        ClassifierDiscriminator(model, tokenizer(), {INSULT: 1}).score("tea", [INSULT, "The text does not insult people."])


def test_roles_are_checked_when_built() -> None:
    for names in (["LABEL_0", "LABEL_1", "LABEL_2"], ["entailment", "neutral"], ["entailment", "neutral", "contradiction", "other"]):
        with pytest.raises(ModelError, match=f"{names[0]}.*doesn't tell"):
            NLIDiscriminator(bert(names), tokenizer())
    model = bert(["a", "b", "c"])
    for labels in ({"entailment": 0, "contradiction": 1}, {"entailment": 0, "contradiction": 0, "neutral": 2}, {"yes": 0}, ["a"]):
        with pytest.raises(DataError, match="'a', 'b', 'c'"):
            NLIDiscriminator(model, tokenizer(), labels=labels)  # type: ignore[arg-type]


def test_models_that_are_no_classifiers() -> None:
    with pytest.raises(ModelError, match="isn't a transformers sequence classifier"):
        NLIDiscriminator("facebook/bart-large-mnli", tokenizer())
    with pytest.raises(ModelError, match="tokenizer"):
        NLIDiscriminator(bert(["entailment", "not_entailment"]), None)
    encoder = BertModel(bert(["kind", "toxic"]).config).eval()
    with pytest.raises(ModelError, match="AutoModelForSequenceClassification"):
        ClassifierDiscriminator(encoder, tokenizer(), {INSULT: 1}).score("tea", INSULT)


def test_from_pretrained(tmp_path: Path) -> None:
    model = bert(["entailment", "not_entailment"])
    model.save_pretrained(tmp_path / "whole")
    tokenizer().save_pretrained(tmp_path / "whole")
    read = NLIDiscriminator.from_pretrained(tmp_path / "whole", device="cpu").score(TEXTS, KIND)
    np.testing.assert_allclose(read, NLIDiscriminator(model, tokenizer()).score(TEXTS, KIND), atol=1e-6)
    read = ClassifierDiscriminator.from_pretrained(tmp_path / "whole", {INSULT: "not_entailment"}, device="cpu").score(TEXTS, INSULT)
    np.testing.assert_allclose(read, ClassifierDiscriminator(model, tokenizer(), {INSULT: 1}).score(TEXTS, INSULT), atol=1e-6)

    model.bert.save_pretrained(tmp_path / "headless")
    tokenizer().save_pretrained(tmp_path / "headless")
    with pytest.raises(ModelError, match=r"lacks weights.*classifier"):
        NLIDiscriminator.from_pretrained(tmp_path / "headless", labels={"entailment": 0, "not_entailment": 1})
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        NLIDiscriminator.from_pretrained(tmp_path / "pickled")
    with pytest.raises(ModelError, match="can't be loaded"):
        NLIDiscriminator.from_pretrained(tmp_path / "absent")
