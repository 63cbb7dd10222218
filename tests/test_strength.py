"""Choosing strengths by what they do: the front, the limits, the checkpoint and the errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import llama

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.controls import DExperts, Prompt
from moralguard.decoding.gate import Gate
from moralguard.errors import DataError, PolicyError
from moralguard.fitting.effect import Effect, distinct_ngrams, measure_effect
from moralguard.fitting.strength import pareto_front, plot_search, search_strengths

MEASURED = {"continuations": 3, "max_new_tokens": 5, "seed": 1}
PROMPTS = [[1, 2, 3], [9, 8]]
POLICY = mg.Policy(controls=(DExperts(expert=Prompt([5, 6]), anti_expert=Prompt([7]), filter_p=1.0),))


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    class Spelled:
        """Spells token i as "ti", so that a judge has texts to read."""

        eos_token_id = bos_token_id = pad_token_id = None

        def decode(self, ids, **_):
            return " ".join(f"t{int(i)}" for i in ids)

        def get_vocab(self):
            return {f"t{i}": i for i in range(199)}

    return LanguageModel(llama(), Spelled())


def large_ids(texts: list[str]) -> np.ndarray:
    """A judge: the share of tokens over 99."""
    return np.array([np.mean([int(word[1:]) > 99 for word in text.split()] or [0.0]) for text in texts])


def test_the_front_is_what_nothing_beats() -> None:
    effects = [Effect(v, 0.0, p, 1.0) for v, p in ((0.5, 10), (0.3, 12), (0.3, 13), (0.6, 9), (0.2, 30), (0.5, 10))]
    assert pareto_front(effects) == {0, 1, 3, 4, 5}


def test_a_search_measures_every_strength_and_chooses_within_the_limits(lm: LanguageModel, tmp_path: Path) -> None:
    grid = {"dexperts.alpha": [0.5, 3.0]}
    search = search_strengths(POLICY, lm, PROMPTS, large_ids, grid, most_perplexity=1e9, least_distinct=0.0, **MEASURED)
    assert [item.settings for item in search.tried] == [{"dexperts.alpha": 0.5}, {"dexperts.alpha": 3.0}]
    for item in search.tried:
        policy = mg.Policy(controls=(POLICY.controls[0].replaced(alpha=item.settings["dexperts.alpha"]),))
        assert item.effect == measure_effect(policy, lm, PROMPTS, large_ids, **MEASURED)
    least = min(search.tried, key=lambda item: item.effect.violation)
    assert search.chosen.effect.violation == least.effect.violation
    assert search.policy.controls[0].alpha == search.chosen.settings["dexperts.alpha"]
    assert search.unguarded == measure_effect(mg.Policy(controls=()), lm, PROMPTS, large_ids, **MEASURED)
    none = search_strengths(POLICY, lm, PROMPTS, large_ids, grid, most_perplexity=1e-9, **MEASURED)
    assert none.chosen is None
    assert none.policy is None
    plot_search(search, tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"


def test_a_search_goes_on_from_what_it_measured(lm: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "search.json"
    seen: list[dict[str, float]] = []

    def stop(settings: dict[str, float], effect: Effect) -> None:
        seen.append(settings)
        if len(seen) == 2:
            raise KeyboardInterrupt

    grid = {"dexperts.alpha": [0.5, 3.0]}
    with pytest.raises(KeyboardInterrupt):
        search_strengths(POLICY, lm, PROMPTS, large_ids, grid, checkpoint=file, report=stop, **MEASURED)
    later: list[dict[str, float]] = []
    found = search_strengths(POLICY, lm, PROMPTS, large_ids, grid, checkpoint=file, report=lambda s, e: later.append(s), **MEASURED)
    assert seen == [{}, {"dexperts.alpha": 0.5}]
    assert later == [{"dexperts.alpha": 3.0}]
    assert found == search_strengths(POLICY, lm, PROMPTS, large_ids, grid, **MEASURED)
    with pytest.raises(DataError, match="another search"):
        search_strengths(POLICY, lm, PROMPTS[:1], large_ids, grid, checkpoint=file, **MEASURED)


def test_what_a_grid_names_must_be_there(lm: LanguageModel) -> None:
    def search(grid: dict[str, list[float]], policy: mg.Policy = POLICY) -> None:
        search_strengths(policy, lm, PROMPTS, large_ids, grid, **MEASURED)

    with pytest.raises(PolicyError, match="did you mean 'dexperts'"):
        search({"dexpert.alpha": [1.0]})
    with pytest.raises(PolicyError, match="did you mean 'alpha'"):
        search({"dexperts.alpa": [1.0]})
    with pytest.raises(PolicyError, match=r"several controls 'dexperts'; name one by its place, such as 0\.alpha"):
        search({"dexperts.alpha": [1.0]}, mg.Policy(controls=(POLICY.controls[0], POLICY.controls[0].replaced(alpha=1.0))))
    with pytest.raises(PolicyError, match="has no gate"):
        search({"gate.first_tokens": [1.0]})
    with pytest.raises(PolicyError, match="did you mean 'first_tokens'"):
        search({"gate.first_token": [1.0]}, POLICY.replaced(gate=Gate(first_tokens=2)))
    with pytest.raises(DataError, match="grid is empty"):
        search({})


def test_a_gate_is_searched_too_and_one_that_never_opens_is_told(lm: LanguageModel) -> None:
    shut = POLICY.replaced(gate=Gate(min_entropy=1e6))
    found = search_strengths(shut, lm, PROMPTS, large_ids, {"dexperts.alpha": [0.5, 3.0]}, **MEASURED)
    assert found.without_effect
    found = search_strengths(shut, lm, PROMPTS, large_ids, {"gate.min_entropy": [1e6, 0.0]}, **MEASURED)
    assert not found.without_effect
    assert [t.effect == found.unguarded for t in found.tried] == [True, False]


def test_controls_fitted_on_the_model_are_what_is_searched(lm: LanguageModel) -> None:
    entry = {"model": "tiny", "fingerprint": lm.fingerprint, "controls": POLICY.controls}
    policy = mg.Policy(controls=(), fitted=(entry,))
    grid = {"dexperts.alpha": [3.0]}
    found = search_strengths(policy, lm, PROMPTS, large_ids, grid, **MEASURED)
    assert [t.effect for t in found.tried] == [t.effect for t in search_strengths(POLICY, lm, PROMPTS, large_ids, grid, **MEASURED).tried]


def test_a_judge_must_fit_the_texts(lm: LanguageModel) -> None:
    for judge in (lambda texts: np.zeros(1), lambda texts: np.full(len(texts), np.nan)):
        with pytest.raises(DataError, match="finite number a text"):
            measure_effect(POLICY, lm, PROMPTS, judge, **MEASURED)
    with pytest.raises(DataError, match="no prompt"):
        measure_effect(POLICY, lm, [], large_ids)


def test_distinct_ngrams() -> None:
    assert distinct_ngrams(["a b a b", "a b"], 2) == pytest.approx(2 / 6)
    assert distinct_ngrams([""], 2) == 0.0
