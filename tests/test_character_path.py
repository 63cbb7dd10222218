"""The Chinese path of the discriminator: reading text, shapes and independence of padding. Needs no data and no weights."""

from collections.abc import Sequence

import pytest
import torch

from moralguard.discriminator.character_path import (
    CharacterConfig,
    CharacterPath,
    character_batch,
    hash_ngrams,
    load_character_path,
    normalise,
    save_character_path,
)
from moralguard.fitting.chinese_training import align_english
from moralguard.fitting.chinese_wordings import WORDINGS

SMALL = CharacterConfig(characters=64, bigrams=128, bag=256, character_width=16, bigram_width=8, width=24, lexical_width=8, blocks=2)


@pytest.fixture(scope="module")
def model() -> CharacterPath:
    torch.manual_seed(0)
    return CharacterPath(SMALL).eval()


@torch.inference_mode()
def judge(model: CharacterPath, texts: list[str], statements: list[str]) -> torch.Tensor:
    batch, values = character_batch(texts), character_batch(statements)
    return model.probability_kept(model.encode_text(batch.ids, batch.mask), model.encode_values(values.ids, values.mask))


def test_default_size_fits_six_megabytes():
    assert 2 * sum(parameter.numel() for parameter in CharacterPath(CharacterConfig()).parameters()) < 6e6


def test_shapes_and_range(model):
    batch, values = character_batch(["你好", "今天天气不错😀", "abc"]), character_batch(["不冒犯他人", "不含脏话"])
    states = model.encode_text(batch.ids, batch.mask)
    vectors = model.encode_values(values.ids, values.mask)
    assert vectors.shape == (2, model.value_width)
    relevance, broken = model.logits(states, vectors)
    assert relevance.shape == broken.shape == (3, 2)
    kept = model.probability_kept(states, vectors)
    torch.testing.assert_close(kept, 1 - torch.sigmoid(relevance) * torch.sigmoid(broken))
    assert ((kept >= 0) & (kept <= 1)).all()
    weights = model.attention(states, vectors)
    assert weights.shape == (3, 2, batch.mask.shape[1])
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2))
    assert not weights[0, :, 3:].any()


def test_values_of_each_text_s_own(model):
    batch = character_batch(["你好", "再见"])
    values = character_batch(["不冒犯他人", "不含脏话"])
    states, vectors = model.encode_text(batch.ids, batch.mask), model.encode_values(values.ids, values.mask)
    shared, own = model.logits(states, vectors), model.logits(states, vectors[None].expand(2, -1, -1))
    torch.testing.assert_close(shared, own)


def test_result_does_not_depend_on_neighbours(model):
    texts, statements = ["", "滚", "他说的话让人很难过", "好" * 200], ["不冒犯他人", "文本不因种族、宗教、性别而攻击或贬损他人。"]
    together = judge(model, texts, statements)
    alone = torch.cat([torch.cat([judge(model, [text], [one]) for one in statements], dim=1) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("text", ["", " ", "\n\t", "\u0301", "\ud800", "😀", "🏳️‍🌈", "ﷺ" * 50, "a" * 3_000_000, "\u0301" * 100_000])
def test_odd_texts_are_judged(model, text):
    assert torch.isfinite(judge(model, [text], ["不冒犯他人"])).all()


def test_empty_batch(model):
    assert judge(model, [], ["不冒犯他人"]).shape == (0, 1)


def test_offsets_point_into_the_original():
    text = " ＡB  ㈱\u3000e\u0301中😀 "
    normal, offsets = normalise(text)
    assert normal == "ab (株) é中😀"
    assert [text[start:end] for start, end in offsets] == ["Ａ", "B", " ", "㈱", "㈱", "㈱", "\u3000", "e\u0301", "中", "😀"]
    batch = character_batch([text, "中"])
    assert batch.offsets == (((0, 0), *offsets), ((0, 0), (0, 1)))
    assert batch.mask.sum(1).tolist() == [1 + len(offsets), 2]


def test_long_text_is_cut():
    batch = character_batch(["好" * 1000], 50)
    assert batch.mask.shape == (1, 51)
    assert batch.offsets[0][-1] == (49, 50)
    assert len(normalise("㈱" * 100, 50)[0]) == 50


def test_forms_of_one_text_hash_alike():
    assert (hash_ngrams(normalise("ＳＢ 你")[0]) == hash_ngrams(normalise("sb   你")[0])).all()
    assert hash_ngrams("你好").shape == (3, 3)
    assert (hash_ngrams("你好")[1:, 0] != hash_ngrams("好你")[1:, 0]).all()
    assert hash_ngrams("你好").tolist()[2][1:] == [0, 0]


def test_hashes_are_fixed():
    # Shipped weights were fitted on these very numbers.
    assert hash_ngrams("你好").tolist()[1] == [3614276938, 3142023779, 0]


def test_english_statement_vectors(model):
    batch = character_batch(["你好", "再见", ""])
    sentences = torch.nn.functional.normalize(torch.randn(4, 384, generator=torch.Generator().manual_seed(0)), dim=-1)
    vectors = model.encode_sentences(sentences)
    assert vectors.shape == (4, model.value_width)
    relevance, broken = model.logits(model.encode_text(batch.ids, batch.mask), vectors)
    assert relevance.shape == broken.shape == (3, 4)
    assert relevance.isfinite().all()


def test_saved_weights_give_the_same_result(model, tmp_path):
    save_character_path(model, tmp_path / "zh.safetensors", tmp_path / "zh.json")
    loaded = load_character_path(tmp_path / "zh.safetensors", tmp_path / "zh.json")
    assert loaded.config == SMALL
    assert not loaded.training
    texts, statements = ["你好", "滚"], ["不冒犯他人"]
    torch.testing.assert_close(judge(loaded, texts, statements), judge(model, texts, statements), atol=2e-3, rtol=0)


def test_english_statements_are_aligned_with_their_chinese_wordings() -> None:
    """A value's English wordings get vectors near those of its Chinese ones; here with sentence vectors that are told apart."""
    torch.manual_seed(0)
    model = CharacterPath(CharacterConfig()).eval()
    vectors: dict[str, torch.Tensor] = {}

    def encoder(statements: Sequence[str]) -> torch.Tensor:
        for statement in statements:
            vectors.setdefault(statement, torch.nn.functional.normalize(torch.randn(384), dim=0))
        return torch.stack([vectors[statement] for statement in statements])

    align_english(model, encoder)
    words = WORDINGS["no_offense"]
    batch = character_batch(list(words.zh))
    with torch.no_grad():
        wanted = model.encode_values(batch.ids, batch.mask).mean(0)
        found = model.encode_sentences(encoder(words.en))
        other = model.encode_values(*(lambda b: (b.ids, b.mask))(character_batch(list(WORDINGS["no_hate"].zh)))).mean(0)
    assert ((found - wanted).norm(dim=1) < (found - other).norm(dim=1)).all()
