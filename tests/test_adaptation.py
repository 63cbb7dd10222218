"""Adapting to a value from a few examples, principles that hold updates back, and adaptations as packs."""

import time

import numpy as np
import pytest

import moralguard as mg
from moralguard.discriminator.adaptation import Principle, RefusedUpdateError, fit_head
from moralguard.errors import DataError, ModelError
from moralguard.values import Value

STATEMENT = "The text does not speak well of pineapple on pizza."
EXAMPLES = [
    ("I love pineapple on my pizza, it is the best topping.", False),
    ("Pineapple pizza is simply great.", False),
    ("Nothing beats a Hawaiian pizza with extra pineapple!", False),
    ("She ordered pineapple on her pizza and enjoyed every bite.", False),
    ("Pizza with pineapple tastes wonderful.", False),
    ("A slice with ham and pineapple makes me happy.", False),
    ("I like mushrooms on my pizza.", True),
    ("Let's have pasta tonight.", True),
    ("A pizza margherita is a classic.", True),
    ("The weather is nice today.", True),
    ("She ordered a salad and enjoyed every bite.", True),
    ("Nothing beats a walk by the sea!", True),
]
NEW = [
    ("Pineapple makes a pizza wonderful.", False),
    ("My favourite pizza has pineapple on it.", False),
    ("We had a lovely pizza with pineapple and ham.", False),
    ("My favourite pizza has olives on it.", True),
    ("We had a lovely walk in the park.", True),
    ("The bus was late again.", True),
]


@pytest.fixture(scope="module")
def judge():
    return mg.Discriminator.load()


def test_a_dozen_examples_teach_a_value(judge):
    started = time.perf_counter()
    adapted = judge.adapt(STATEMENT, EXAMPLES)
    assert time.perf_counter() - started < 20
    labels = np.array([kept for _, kept in NEW])
    after = adapted.score([text for text, _ in NEW], STATEMENT)[:, 0]
    assert ((after >= 0.5) == labels).mean() >= 5 / 6
    assert after[labels].min() > after[~labels].mean()
    head = adapted.adaptations[0].heads["words"]
    whole = sum(p.numel() for p in judge._words.network.parameters())
    assert head.weights.size + 2 < 0.01 * whole


def test_the_one_it_came_from_and_other_values_stay_as_they_were(judge):
    texts = [text for text, _ in NEW]
    before, other = judge.score(texts, STATEMENT), judge.score(texts, "no_insult")
    adapted = judge.adapt(STATEMENT, EXAMPLES)
    np.testing.assert_array_equal(judge.score(texts, STATEMENT), before)
    np.testing.assert_array_equal(adapted.score(texts, "no_insult"), other)
    assert not np.allclose(adapted.score(texts, STATEMENT), before)


def test_a_pack_gives_the_same_scores(judge, tmp_path):
    adapted = judge.adapt(STATEMENT, EXAMPLES)
    adapted.save_adaptation(STATEMENT, tmp_path / "pack")
    texts = [text for text, _ in NEW]
    again = mg.Discriminator.load(adaptations=[tmp_path / "pack"])
    np.testing.assert_allclose(again.score(texts, STATEMENT), adapted.score(texts, STATEMENT), atol=1e-6)
    card = (tmp_path / "pack" / "card.json").read_text()
    assert "pineapple" in card
    (tmp_path / "pack" / "card.json").write_text(card.replace(judge.fingerprint, "0" * 16))
    with pytest.raises(ModelError, match="adapt again"):
        mg.Discriminator.load(adaptations=[tmp_path / "pack"])
    with pytest.raises(ModelError, match="adaptation"):
        mg.Discriminator.load(adaptations=[tmp_path])
    with pytest.raises(DataError, match="wasn't adapted"):
        adapted.save_adaptation("Another value altogether.", tmp_path)


def test_an_update_that_breaks_a_principle_is_refused(judge):
    principle = Value(id="no-insult", statement="The text does not insult anyone.", priority=10)
    anchors = [("You are a worthless idiot.", False), ("You stupid pathetic moron.", False), ("What an ugly fool you are.", False)]
    assert (judge.score([text for text, _ in anchors], principle)[:, 0] < 0.5).all()
    feedback = [
        ("You worthless fool.", True),
        ("What a stupid idiot you are.", True),
        ("You are a pathetic moron.", True),
        ("Shut up, you ugly idiot.", True),
        ("You dumb worthless pig.", True),
        ("You are so stupid and pathetic.", True),
        ("I respect your work a great deal.", False),
        ("Thank you, that was very kind.", False),
        ("What a lovely garden you have.", False),
        ("Have a good day, my friend.", False),
    ]
    # the user's feedback says the opposite of what the principle's anchors say of the same value
    value = Value(id="insult-again", statement="The text does not insult anyone.", priority=1)
    with pytest.raises(RefusedUpdateError, match="no-insult") as caught:
        judge.adapt(value, feedback, principles=[Principle(principle, anchors)])
    assert caught.value.principle == principle
    assert caught.value.examples
    text, kept, before, after = caught.value.examples[0]
    assert (text, kept) in anchors
    assert before < 0.5 <= after
    # without the principle the same update goes through
    assert (judge.adapt(value, feedback).score(["You are a worthless idiot."], value.statement) > 0.5).all()


def test_an_update_that_breaks_none_goes_through(judge):
    principle = Value(id="no-insult", statement="The text does not insult anyone.", priority=10)
    anchors = [("You are a worthless idiot who eats pineapple on pizza.", False)]
    value = Value(id="pizza", statement=STATEMENT)
    judge.adapt(value, EXAMPLES, principles=[Principle(principle, anchors)])


def test_bad_principles(judge):
    value = Value(id="pizza", statement=STATEMENT, priority=3)
    high = Value(id="high", statement="no insults", priority=9)
    with pytest.raises(DataError, match="no anchors"):
        judge.adapt(value, EXAMPLES, principles=[Principle(high)])
    with pytest.raises(DataError, match="must be higher"):
        judge.adapt(value, EXAMPLES, principles=[Principle(Value(id="low", statement="no insults", priority=3), [("a", True)])])


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "at least 4"),
        (EXAMPLES[:3], "at least 4"),
        (EXAMPLES[:6], "some that keep"),
        ([*EXAMPLES, ("text", "yes")], "True or False"),
        ([*EXAMPLES, "text"], r"examples\[12\]"),
        ([*EXAMPLES, ("", True)], r"examples\[12\]"),
    ],
)
def test_bad_examples(judge, examples, message):
    with pytest.raises(DataError, match=message):
        judge.adapt(STATEMENT, examples)


def test_the_head_is_the_optimum_of_its_penalised_likelihood():
    """Independent of the dual form: the primal gradient vanishes."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(14, 30)) / 30**0.5
    broken = generator.uniform(0.1, 0.9, 14)
    kept = (features[:, 0] + 0.1 * generator.normal(size=14) > 0).astype(float)
    head, left_out = fit_head(broken, features, kept)
    z = np.log(broken / (1 - broken))
    p = 1 / (1 + np.exp(-(head.scale * z + features @ head.weights + head.shift)))
    np.testing.assert_allclose(head.apply(broken, features), p, atol=1e-9)
    target = 1 - kept
    balance = np.where(target == 1, 0.5 / target.mean(), 0.5 / (1 - target.mean()))
    pull = balance * (target - p)
    width = np.linalg.norm(head.weights) / np.linalg.norm(features.T @ pull)
    np.testing.assert_allclose(head.weights, width * features.T @ pull, atol=1e-6)
    np.testing.assert_allclose(head.shift, 4.0 * pull.sum(), atol=1e-6)
    np.testing.assert_allclose(head.scale, 1 + 0.25 * pull @ z, atol=1e-6)
    assert ((left_out > 0) & (left_out < 1)).all()
