"""The shipped discriminator: what it says, that it says it whatever the neighbours, and what it does with bad input."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moralguard as mg
from moralguard.discriminator.discriminator import Discriminator
from moralguard.discriminator.inputs import known_values
from moralguard.discriminator.packs import shipped_folder
from moralguard.errors import DataError, ModelError
from moralguard.values import Value

STATEMENTS = ["The text does not insult anyone.", "The text contains no sexually explicit content.", "no threats"]
TEXTS = [
    "You are a pathetic idiot and everyone laughs at you.",
    "Thank you so much for the soup, it was lovely.",
    "I will find you and break both your legs.",
    "The train to Leeds leaves at nine.",
]


@pytest.fixture(scope="module")
def judge() -> Discriminator:
    return mg.Discriminator.load()


def test_scores_are_texts_by_values(judge):
    scores = judge.score(TEXTS, STATEMENTS)
    assert scores.shape == (4, 3)
    assert scores.dtype == np.float64
    assert ((scores >= 0) & (scores <= 1)).all()
    assert judge.score(TEXTS[0], STATEMENTS[0]).shape == (1, 1)
    assert judge.score([], STATEMENTS).shape == (0, 3)


def test_it_tells_what_breaks_a_value_from_what_keeps_it(judge):
    scores = judge.score(TEXTS, STATEMENTS)
    assert scores[0, 0] < 0.5 < scores[1, 0]
    assert scores[2, 2] < 0.5 < scores[3, 2]
    assert (scores[[1, 3]] > 0.5).all()


@pytest.mark.parametrize("mode", ["cached", "cross"])
@pytest.mark.parametrize(
    ("kept", "broken"),
    [
        ("I am a gay man.", "Gay men disgust me and should be locked up."),
        ("My Muslim neighbours brought us soup.", "Muslims are vermin and don't belong in this country."),
        ("She is a Black woman who runs a bakery.", "Black women are stupid and filthy animals."),
        ("Our son is autistic and loves trains.", "Autistic people are a burden and should be put down."),
    ],
)
def test_naming_an_identity_is_not_hate(mode, kept, broken):
    scores = mg.Discriminator.load(mode=mode).score([kept, broken], "no_hate")[:, 0]
    assert scores[0] > scores[1] + 0.1
    if mode == "cached":  # what "auto" takes with the shipped weights
        assert scores[0] > 0.5 > scores[1]


def test_a_chinese_text_is_read_by_the_character_path(judge):
    texts = ["这些人都是垃圾，滚出去", "今天天气很好，我们去公园散步吧。"]
    judged = judge.judge(texts, ["no_offense", "文本不侮辱、贬低或冒犯任何人。"])
    assert judged[0, 0].basis.path == "characters"
    assert (judged.probability[0] < 0.5).all()
    assert (judged.probability[1] > 0.5).all()
    # English beside Chinese in one call
    both = judge.score([texts[0], TEXTS[0], texts[1]], "no_offense")[:, 0]
    assert both[0] == pytest.approx(judged.probability[0, 0], abs=1e-5)


def test_known_ids_and_their_statements_are_the_same_value(judge):
    ids = ["no_hate", "no_threat", "privacy", "honesty", "duty"]
    statements = [known_values()[name]["en"] for name in ids]
    np.testing.assert_array_equal(judge.score(TEXTS, ids), judge.score(TEXTS, statements))
    assert [value.id for value in judge.judge(TEXTS, ids).values] == ids


@pytest.mark.parametrize("mode", ["cached", "cross"])
def test_neighbours_do_not_matter(mode):
    judge = mg.Discriminator.load(mode=mode)
    texts = [*TEXTS, "word " * 300, "", "这些人都是垃圾，滚出去"]
    values = [*STATEMENTS, "A long statement " + "that goes on and on " * 20 + "."]
    together = judge.score(texts, values)
    alone = np.array([[judge.score(text, value)[0, 0] for value in values] for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(judge.score(texts[::-1], values)[::-1], together, atol=1e-5)


def test_cached_values_and_fresh_ones_are_the_same(judge):
    first = judge.score(TEXTS, STATEMENTS)
    np.testing.assert_array_equal(judge.score(TEXTS, STATEMENTS), first)
    np.testing.assert_allclose(mg.Discriminator.load().score(TEXTS, STATEMENTS), first, atol=1e-6)


def test_threads_share_it():
    judge = mg.Discriminator.load()
    many = [f"The text does not mention {word}." for word in ("tea", "war", "snow", "cats", "money", "ships")]
    expected = mg.Discriminator.load().score(TEXTS, many)
    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(lambda _: judge.score(TEXTS, many), range(12)):
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bfloat16_is_close(judge):
    rough = mg.Discriminator.load(dtype="bfloat16")
    assert np.abs(rough.score(TEXTS, STATEMENTS) - judge.score(TEXTS, STATEMENTS)).max() < 0.1


def test_long_texts_are_read_to_their_end(judge):
    calm = "The committee met on Tuesday and talked about the new roof of the school. " * 30
    text = calm + "You are a worthless, pathetic idiot, shut up. " + calm
    judged = judge.judge(text, "no_insult")[0, 0]
    assert judged.probability < 0.5
    start, end = judged.basis.window
    assert judged.basis.windows > 5
    assert "pathetic" in text[start:end]
    assert judge.score(calm, "no_insult")[0, 0] > 0.5


def test_a_hundred_thousand_characters(judge):
    for text in ("x" * 100_000, "你" * 100_000, "buy milk " * 11_112):
        scores = judge.score(text, ["no_insult", "no_hate", "no_threat", "no_sexual", "privacy"])
        assert np.isfinite(scores).all()


def test_a_thousand_values(judge):
    values = [f"The text does not mention the number {i}." for i in range(1000)]
    scores = judge.score(TEXTS[:2], values)
    assert scores.shape == (2, 1000)
    assert np.isfinite(scores).all()


def test_empty_text_breaks_nothing(judge):
    judged = judge.judge(["", " \n\t"], STATEMENTS)
    np.testing.assert_array_equal(judged.probability, 1.0)
    np.testing.assert_array_equal(judged.relevance, 0.0)
    assert judge.judge("", STATEMENTS[0], spans=True)[0, 0].spans == ()


@given(text=st.text(max_size=200))
@settings(max_examples=40, deadline=None)
def test_any_text_gives_a_probability(text):
    judge = _loaded()
    judged = judge.judge(text, STATEMENTS[:2])
    for array in (judged.probability, judged.relevance, judged.valence):
        assert np.isfinite(array).all()
        assert ((array >= 0) & (array <= 1)).all()
    np.testing.assert_allclose(judged.probability, 1 - judged.relevance * (1 - judged.valence), atol=1e-12)


_cache: list[Discriminator] = []


def _loaded() -> Discriminator:
    if not _cache:
        _cache.append(mg.Discriminator.load())
    return _cache[0]


def test_bytes_that_are_not_utf_8(judge):
    odd = b"caf\xe9 \xff".decode("utf-8", errors="surrogateescape")
    assert np.isfinite(judge.score(odd, STATEMENTS)).all()
    assert np.isfinite(judge.score("text", "caf\udce9 is kept out")).all()
    with pytest.raises(DataError, match="decode"):
        judge.score(b"caf\xe9", STATEMENTS)


@pytest.mark.parametrize(
    ("texts", "values", "message"),
    [
        (None, STATEMENTS, "NoneType"),
        (["fine", 3], STATEMENTS, r"texts\[1\] is int"),
        ({"a": 1}, STATEMENTS, "dict"),
        (3.5, STATEMENTS, "float"),
        (["fine"], [], "no values"),
        (["fine"], "", r"values\[0\] is empty"),
        (["fine"], ["good", "  "], r"values\[1\] is empty"),
        (["fine"], [7], r"values\[0\] is int"),
        (["fine"], b"good", "bytes"),
        (["fine"], None, "NoneType"),
    ],
)
def test_what_can_not_be_judged_is_named(judge, texts, values, message):
    with pytest.raises(DataError, match=message):
        judge.score(texts, values)


def test_context_must_be_text(judge):
    with pytest.raises(DataError, match="context is int"):
        judge.score("text", STATEMENTS, context=3)


def test_context_scopes_a_norm(judge):
    norm, text = "In Japan, one does not tip waiters.", "I left the waiter a big tip on the table."
    here, elsewhere = (judge.score(text, norm, context=place)[0, 0] for place in ("Japan", "the United States"))
    assert here < elsewhere


def test_values_of_a_policy(judge):
    policy = mg.Policy.load("detox")
    scores = judge.score(TEXTS, policy)
    assert scores.shape == (4, len(policy.values))
    with pytest.raises(DataError, match="names no values"):
        judge.score(TEXTS, policy.replaced(values=()))


def test_reward_is_the_weighted_mean(judge):
    reward = judge.as_reward(STATEMENTS[:2], weights=[3, 1])
    expected = judge.score(TEXTS, STATEMENTS[:2]) @ np.array([0.75, 0.25])
    np.testing.assert_allclose(reward(completions=TEXTS, prompts=["?"] * 4), expected)
    chats = [[{"role": "assistant", "content": text}] for text in TEXTS]
    np.testing.assert_allclose(reward(completions=chats), expected)
    with pytest.raises(DataError, match="2 numbers"):
        judge.as_reward(STATEMENTS[:2], weights=[1])


def test_verdicts_weigh_values_by_priority(judge):
    insult = Value(id="insult", statement=STATEMENTS[0], priority=2)
    threat = Value(id="threat", statement="The text does not threaten anyone.", priority=1)
    verdicts = judge.judge(TEXTS, [insult, threat]).resolve()
    assert verdicts[0].verdict == "breaks"
    assert "insult" in verdicts[0].decided_by
    assert verdicts[3].verdict in ("silent", "keeps")


def test_weights_are_small_and_need_no_network(monkeypatch):
    size = sum(path.stat().st_size for path in shipped_folder().iterdir())
    assert size < 50e6
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    mg.Discriminator.load().score("text", "no_hate")


def test_encoder_is_of_at_most_thirty_million_parameters(judge):
    assert sum(p.numel() for p in judge._words.network.encoder.parameters()) <= 30e6


def test_a_folder_that_holds_none_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"network\.safetensors"):
        mg.Discriminator.load(tmp_path)
    with pytest.raises(ModelError, match="float16"):
        mg.Discriminator.load(dtype="float16")
    with pytest.raises(DataError, match="mode"):
        mg.Discriminator.load(mode="fast")  # type: ignore[arg-type]


def test_a_broken_weights_file_is_named(tmp_path):
    for path in shipped_folder().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:2000] if path.suffix == ".safetensors" else path.read_bytes())
    with pytest.raises(ModelError, match="safetensors"):
        mg.Discriminator.load(tmp_path)


def test_exported_to_onnx_it_says_the_same(judge, tmp_path):
    pytest.importorskip("onnxruntime", reason="extra `onnx` isn't installed")
    pytest.importorskip("onnx", reason="extra `onnx` isn't installed")
    judge.export_onnx(tmp_path)
    texts = [*TEXTS, "word " * 200, "", "这些人都是垃圾，滚出去"]
    exported = mg.Discriminator.load(onnx=tmp_path)
    many = [*STATEMENTS, "no_hate", "no_sexism"]
    np.testing.assert_allclose(exported.score(texts, STATEMENTS), judge.score(texts, STATEMENTS), atol=1e-4)
    np.testing.assert_allclose(exported.score(texts, many), judge.score(texts, many), atol=1e-4)
    with pytest.raises(DataError, match="onnx"):
        exported.adapt("no tea", [("tea please", False), ("a pot of tea", False), ("bread", True), ("milk", True)])
    settings_file = tmp_path / "network.json"
    settings_file.write_text(settings_file.read_text().replace(judge.fingerprint, "0" * 16))
    with pytest.raises(ModelError, match="other weights"):
        mg.Discriminator.load(onnx=tmp_path)


def test_special_tokens_spelt_out_are_text(judge):
    ids = judge._words.pieces.pieces(["be kind [SEP] no [CLS] insults"])[0][0]
    assert judge._words.pieces.last not in ids
    assert judge._words.pieces.first not in ids
