"""The word list on models: no text holds a listed word, other words stay, a penalty is a penalty, and every path agrees."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from numpy_model import NumpyModel
from odd_models import BYTES, byte_llama, byte_tokenizer
from word_oracle import decoded, holds

import moralguard as mg
from moralguard.controls import WordList
from moralguard.controls.registry import read_control, write_control
from moralguard.errors import ControlError, PolicyError
from moralguard.testing import check_control

LISTED = tuple("abcdefghijklmnopqrstuvwxyz0123456789")
"""A random model writes random bytes: a letter that stands alone is what it writes of words."""
PROMPTS = ["x", "the quick", "Ж. ", "no one:"]


@pytest.fixture(autouse=True)
def _one_thread():
    with oracles.one_thread():
        yield


def guard_of(*controls: Any, numpy: bool = False) -> mg.Guard:
    model: Any = NumpyModel(byte_llama(), byte_tokenizer()) if numpy else (byte_llama(), byte_tokenizer())
    return mg.Guard(mg.Policy(controls=list(controls)), model)


def raw(ids: list[int]) -> bytes:
    """The bytes of tokens, by GPT-2's table, written down here once more."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in printable)}
    return b"".join(b" " + b"ab"[i - 256 : i - 255] if i >= 256 else bytes([table[BYTES[i]]]) for i in ids)


SAMPLED = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 40, "num_return_sequences": 6, "seed": 1}
GREEDY = {"do_sample": False, "max_new_tokens": 40}


@pytest.mark.parametrize("settings", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_no_text_holds_a_listed_word_at_any_length(settings):
    plain, guarded = (guard_of(*controls).generate(PROMPTS, **settings) for controls in ((), (WordList(words=LISTED),)))
    assert any(holds(decoded(raw(ids)), LISTED) for ids in plain.token_ids)
    times = settings.get("num_return_sequences", 1)
    for row, ids in enumerate(guarded.token_ids):
        prompt = PROMPTS[row // times].encode()
        for length in range(1, len(ids) + 1):
            text = decoded(prompt + raw(ids[:length]))
            assert not holds(text, LISTED, behind=len(decoded(prompt))), text


@pytest.mark.parametrize("unfinished", [False, True])
def test_adversarial_logits(unfinished):
    """The base wants nothing but to write the words, and says so with huge logits."""
    words = ("stop it", "no", "傻逼", "Ärger")
    guard = guard_of(WordList(words=words, unfinished=unfinished))
    processor, generator = guard.logits_processor(), torch.Generator().manual_seed(3)
    tokenizer = guard.lm.tokenizer
    wanted = [tokenizer(text)["input_ids"] for text in (*words, "STOP\nIT", " No", "nothing", "ärger")]
    ids = torch.tensor([tokenizer("I say ")["input_ids"]] * 8)
    given = ids.shape[1]
    for _ in range(60):
        scores = torch.randn(8, len(BYTES) + 2, generator=generator)
        for row in range(8):
            for target in wanted:
                for n in range(len(target)):
                    if n == 0 or ids[row, -n:].tolist() == target[:n]:
                        scores[row, target[n]] += 1e4 * float(torch.rand((), generator=generator)) * (n + 1)
        guarded = processor(ids, scores)
        ids = torch.cat([ids, guarded.argmax(-1, keepdim=True)], -1)
    texts = [raw(row[given:].tolist()) for row in ids]
    for text in texts:
        assert not holds(decoded(text), words, ended=not unfinished), text
    assert any(re.search(r"(?<!\w)no(?=\w)", decoded(text)) for text in texts) == unfinished  # "nothing", letter by letter


def test_a_penalty_takes_that_much_from_the_log_odds_of_finishing_a_word():
    guard = guard_of(WordList(words=("ab", "ac d"), penalty=2.5))
    ids = torch.tensor([guard.lm.tokenizer(text)["input_ids"] for text in ("x-a", "xya", "ac ")])
    base = torch.randn(3, len(BYTES) + 2, generator=torch.Generator().manual_seed(0))
    guarded = guard.logits_processor()(ids, base.clone())
    for row, letters in ((0, "bB"), (2, "dD")):
        z = base[row].double().numpy()
        z[[BYTES.index(letter) for letter in letters]] -= 2.5
        expected = z - np.log(np.exp(z).sum())
        found = torch.log_softmax(guarded[row].double(), -1).numpy()
        assert np.abs(found - expected).max() < 1e-6
    assert torch.equal(guarded[1], base[1])  # "xyab" is another word


def test_a_removed_token_has_no_probability_and_an_absent_one_stays_absent():
    base = torch.zeros(1, len(BYTES) + 2)
    b, c = BYTES.index("b"), BYTES.index("c")
    base[0, b], base[0, c] = 300.0, -np.inf
    guard = guard_of(WordList(words=("ab", "ac")))
    law = torch.softmax(guard.logits_processor()(torch.tensor([guard.lm.tokenizer("a")["input_ids"]]), base), -1)
    assert law[0, b] == 0
    assert law[0, c] == 0
    assert np.isclose(float(law[0, BYTES.index("d")]), 1 / (len(BYTES) + 2 - 4))  # nor have B and C any


def test_the_traced_share_of_a_penalty():
    control = WordList(words=LISTED, penalty=1.0)
    result = guard_of(control).generate(PROMPTS, trace=True, **SAMPLED)
    shares = [record.contributions["word-list"] for trace in result.traces for record in trace]
    assert min(shares) >= -1.0 - 1e-4  # at most what it costs
    assert min(shares) < -0.5
    assert max(shares) > 0  # what others lose, the rest gains


@pytest.mark.parametrize(
    "control", [WordList(words=LISTED), WordList(words=LISTED, penalty=2.0), WordList(words=("x", "y"), unfinished=True)]
)
class TestEverywhere:
    def test_invariants(self, control):
        check_control(control, model=(byte_llama(), byte_tokenizer()), prompts=["a x", "b", "the cat sat"])

    def test_on_numpy_arrays(self, control):
        ours, theirs = (guard_of(control, numpy=numpy).generate(PROMPTS, trace=True, **SAMPLED) for numpy in (True, False))
        assert ours.token_ids == theirs.token_ids
        assert theirs.token_ids != guard_of().generate(PROMPTS, **SAMPLED).token_ids

    def test_rows_alone_are_rows_in_a_batch(self, control):
        guard = guard_of(control)
        together = guard.generate(PROMPTS, **GREEDY).token_ids
        assert together == [guard.generate(prompt, **GREEDY).token_ids[0] for prompt in PROMPTS]


def test_rows_in_which_nothing_is_listed_pass_through_bit_for_bit():
    guard = guard_of(WordList(words=("ab",)))
    ids = torch.tensor([guard.lm.tokenizer(text)["input_ids"] for text in ("xa", "-a", "ab")])
    base = torch.randn(3, len(BYTES) + 2)
    guarded = guard.logits_processor()(ids, base.clone())
    assert [bool(torch.equal(guarded[row], base[row])) for row in range(3)] == [True, False, True]


def test_strength():
    hard, soft = WordList(words=("x",)), WordList(words=("x",), penalty=2.0)
    assert hard.scaled(1.5) == hard
    assert not hard.scaled(0).active
    assert soft.scaled(1.5).penalty == 3.0
    assert not soft.scaled(0).active
    plain, zero = (guard_of(*controls).generate(PROMPTS, **SAMPLED).token_ids for controls in ((), (hard.scaled(0),)))
    assert plain == zero


def test_policy_data_and_files(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("# a comment\nStop\n\n#tag\n  kill   yourself\n", encoding="utf-8")
    data = {"control": "word-list@1", "words": ["stop", "傻逼"], "file": str(path)}
    control = read_control(data)
    assert control.entries() == ("stop", "傻逼", "#tag", "kill yourself")
    assert write_control(control) == data
    assert WordList(file=path).entries() == ("stop", "#tag", "kill yourself")


BAD = {
    "nothing listed": ({}, "has no words; list some"),
    "an empty word": ({"words": ["a", " "]}, "word 1 of `words` is empty"),
    "no such file": ({"file": "no/such/file.txt"}, "can't be read as UTF-8 text"),
    "a negative penalty": ({"words": ["a"], "penalty": -1}, "greater than or equal to 0"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_bad_settings_are_told(settings, message):
    with pytest.raises(PolicyError, match=message):
        WordList(**settings)


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(PolicyError, match="given without a tokenizer"):
        mg.Guard(mg.Policy(controls=[WordList(words=("a",))]), (byte_llama(), None))


def test_a_tokenizer_that_loses_spaces_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["[UNK]", "a", "x", "##y"]
    tokenizer = Tokenizer(models.WordPiece(vocab={piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(PolicyError, match="spells 'a x a' as 'axa'"):
        mg.Guard(mg.Policy(controls=[WordList(words=("x",))]), (byte_llama(), PreTrainedTokenizerFast(tokenizer_object=tokenizer)))


@pytest.mark.smollm
def test_the_demo_model_without_the_words_it_would_write():
    lm = mg.load_model("smollm2-135m")
    words = ("the", "of the", "a", "傻")
    prompts = ["The capital of France is", "Once upon a time there was", "中文：他真是个"]
    settings = {"max_new_tokens": 24, "do_sample": True, "seed": 0, "num_return_sequences": 3}
    plain, guarded = (mg.Guard(mg.Policy(controls=c), lm).generate(prompts, **settings).texts for c in ((), (WordList(words=words),)))
    pattern = re.compile(r"\b(the|a)\b|傻", re.IGNORECASE)
    assert sum(bool(pattern.search(text)) for text in plain) >= 3
    assert not any(pattern.search(text) for text in guarded)
    assert any(re.search(r"\b(th\w+|a\w+)", text, re.IGNORECASE) for text in guarded)


def test_what_other_filters_leave_is_removed_too():
    """A nucleus that holds a listed word alone leaves nothing: told, not written."""
    from moralguard.controls import DExperts, Fudge, Prompt

    for other in (DExperts(anti_expert=Prompt([1]), alpha=0.01, filter_p=1e-6), Fudge(discriminator=lambda t, c, **m: 0.0 * c, top_k=1)):
        guard = guard_of(WordList(words=LISTED), other)
        b = BYTES.index("b")
        base = torch.zeros(1, len(BYTES) + 2)
        base[0, b] = 50.0
        with pytest.raises(ControlError, match="removed every token"):
            guard.logits_processor()(torch.tensor([[BYTES.index("-")]]), base)
