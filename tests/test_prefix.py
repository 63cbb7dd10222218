"""Prefix scores: the factored form is its formula, a fitted head learns, and text alone is judged with bounded work."""

import numpy as np
import pytest
import torch
from tiny_models import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import moralguard as mg
from moralguard.backends.factored_head import FactoredHead
from moralguard.backends.hf import LanguageModel
from moralguard.controls import Fudge
from moralguard.discriminator.base import BaseDiscriminator, Reading
from moralguard.discriminator.prefix import PrefixScorer, TextPrefixScorer
from moralguard.errors import DataError, ModelError
from moralguard.fitting.prefix_head import fit_prefix_head

WIDTH = 32


@pytest.fixture(scope="module")
def lm():
    words = ["<unk>", "<s>", *(f"w{i}" for i in range(60))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return LanguageModel(llama(), PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>"))


def _head(lm, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = lm.head.weight.shape[1]

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    return FactoredHead(noise(3, width), noise(3, width), noise(width), 0.3, noise(width))


def test_every_next_token_is_the_formula(lm):
    head = _head(lm)
    scorer = PrefixScorer(lm, head)
    ids = [1, 5, 9, 2, 7]
    with torch.no_grad():
        states = lm.model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0].double()
    embedding = lm.model.get_output_embeddings().weight.detach().double()
    expected = torch.stack(
        [
            torch.stack(
                [
                    (head.query.double() @ h) @ (head.key.double() @ e) + head.linear.double() @ e + head.state.double() @ h + head.bias
                    for e in embedding
                ]
            )
            for h in states
        ]
    )
    torch.testing.assert_close(scorer.next_token_logits(states.float()).double(), expected, atol=1e-3, rtol=1e-3)
    picked = expected[torch.arange(4), torch.tensor(ids[1:])]
    np.testing.assert_allclose(scorer.score_prefixes(ids), torch.sigmoid(picked).numpy(), atol=1e-4)


def test_a_saved_head_is_the_same_head_and_guides_fudge(lm, tmp_path):
    head = _head(lm)
    head.save(tmp_path)
    again = FactoredHead.load(tmp_path)
    ids = [1, 5, 9, 2]
    np.testing.assert_array_equal(PrefixScorer(lm, head).score_prefixes(ids), PrefixScorer(lm, again).score_prefixes(ids))
    guard = mg.Guard(mg.Policy(controls=[Fudge(discriminator=str(tmp_path), strength=2.0, top_k=10)]), lm)
    assert len(guard.generate([[1, 5, 9]], max_new_tokens=4, seed=0).token_ids[0]) == 4


def test_a_fitted_head_tells_prefixes_apart(lm):
    generator = np.random.default_rng(0)

    def text(kept):
        words = generator.integers(0, 30, 8) + (0 if kept else 30)
        return " ".join(f"w{w}" for w in words)

    labels = [bool(i % 2) for i in range(200)]
    head = fit_prefix_head(lm, [text(kept) for kept in labels], labels, rank=4, epochs=60)
    scorer = PrefixScorer(lm, head)
    found = {kept: [scorer.score_prefixes(lm.tokenizer(text(kept))["input_ids"]) for _ in range(20)] for kept in (True, False)}
    assert np.mean(found[True]) - np.mean(found[False]) > 0.4


def test_a_head_that_does_not_fit(lm):
    with pytest.raises(ModelError, match="fit a head for it"):
        PrefixScorer(lm, FactoredHead(torch.zeros(2, 7), torch.zeros(2, 7)))
    with pytest.raises(DataError, match="two tokens"):
        PrefixScorer(lm, _head(lm)).score_prefixes([1])
    with pytest.raises(DataError, match="both labels"):
        fit_prefix_head(lm, ["w1 w2"], [True])


class _Counting(BaseDiscriminator):
    """Judges a text broken while it holds "bad" and not "bad luck"; remembers how much it was given to read."""

    def __init__(self):
        self.read_lengths = []

    def read(self, texts, values, context):
        self.read_lengths += [len(text) for text in texts]
        valence = np.array([[0.1 if "bad" in text.replace("bad luck", "") else 0.9] * len(values) for text in texts])
        shape = valence.shape
        return Reading(np.ones(shape), valence, np.zeros((*shape, 2), dtype=int), np.ones(shape[0], dtype=int), ["test"] * shape[0])


def test_two_positions_must_agree():
    scorer = TextPrefixScorer(_Counting(), ["a rule"])
    state = scorer.start()
    flags = []
    for piece in ("we had ", "bad", " luck", " and ", "bad", " wine", " too"):
        state = scorer.extend(state, piece)
        flags.append(bool(state.flagged[0]))
    # "bad" alone was taken back by " luck"; the second time two positions agreed
    assert flags == [False, False, False, False, False, True, True]
    eager = TextPrefixScorer(_Counting(), ["a rule"], consecutive=1)
    assert bool(eager.extend(eager.extend(eager.start(), "we had "), "bad").flagged[0])


def test_work_stays_bounded_and_what_is_done_is_remembered():
    judge = _Counting()
    scorer = TextPrefixScorer(judge, ["a rule"], window=100, overlap=30)
    state = scorer.start()
    for piece in ["bad "] + ["quiet words "] * 100:
        state = scorer.extend(state, piece)
    assert max(judge.read_lengths) <= 100 + len("quiet words ")
    assert state.probability[0] == pytest.approx(0.1)
    assert bool(state.flagged[0])


def test_states_are_values():
    scorer = TextPrefixScorer(_Counting(), ["a rule"])
    start = scorer.start()
    bad = scorer.extend(start, "bad")
    good = scorer.extend(start, "good")
    assert bad.probability[0] < 0.5 < good.probability[0]
    both = scorer.extend_all([start, start], ["bad", "good"])
    assert [s.probability[0] for s in both] == [bad.probability[0], good.probability[0]]
    with pytest.raises(DataError, match="one piece a state"):
        scorer.extend_all([start], [])


@pytest.mark.parametrize("changes", [{"consecutive": 0}, {"window": 10, "overlap": 10}])
def test_bad_settings(changes):
    with pytest.raises(DataError):
        TextPrefixScorer(_Counting(), ["a rule"], **changes)


def test_the_shipped_discriminator_flags_a_text_as_it_turns():
    scorer = TextPrefixScorer(mg.Discriminator.load(), ["no_insult"])
    state, flagged_at = scorer.start(), None
    words = ["Thank", "you", "for", "coming", "today", ".", "You", "are", "a", "worthless", "pathetic", "idiot", "and", "a", "moron"]
    for i, word in enumerate(words):
        state = scorer.extend(state, " " + word if i else word)
        if flagged_at is None and state.flagged[0]:
            flagged_at = i
    assert flagged_at is not None
    assert flagged_at >= 7
