"""Supports that controls choose themselves: they remove, intersect, stay in their rows, and never bring a vetoed token back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moralguard.backends.arrays import namespace
from moralguard.controls import Dense, Keep, Only, Terms
from moralguard.decoding.rectification import rectify
from moralguard.decoding.settings import DecodingSettings

ROWS, VOCAB = 3, 40
RANDOM = np.random.default_rng(0)
BASE = RANDOM.normal(size=(ROWS, VOCAB)).astype(np.float32)
BASE[:, 7] = -np.inf
DELTA = RANDOM.normal(size=(ROWS, VOCAB)).astype(np.float32)
ONE, TWO = (RANDOM.random((ROWS, VOCAB)) < 0.6 for _ in range(2))
SOME = np.array([True, False, True])


@pytest.fixture(params=["torch", "numpy"])
def give(request):
    """An array of this runtime."""
    return torch.from_numpy if request.param == "torch" else np.array


def test_a_support_removes_what_is_outside_it(give):
    law = rectify(give(BASE), [Terms((Dense(give(DELTA)), Only(give(ONE))))])
    expected = np.where(ONE, BASE + DELTA, -np.inf)
    assert np.array_equal(np.array(law.logits), expected)
    assert np.array(law.touched).all()


def test_supports_intersect_and_act_in_their_rows_alone(give):
    terms = [
        Terms((Only(give(ONE)),), rows=give(SOME)),
        Terms((Only(give(TWO)), Dense(give(DELTA))), rows=give(np.array([True, False, False]))),
    ]
    found = np.array(rectify(give(BASE), terms).logits)
    assert np.array_equal(found[0], np.where(ONE[0] & TWO[0], BASE[0] + DELTA[0], -np.inf))
    assert found[1].tobytes() == BASE[1].tobytes()
    assert np.array_equal(found[2], np.where(ONE[2], BASE[2], -np.inf))


def test_filters_of_other_controls_are_judged_on_the_whole_base(give):
    found = np.array(rectify(give(BASE), [Terms((Only(give(ONE)),)), Terms((Keep(top_k=10),))]).logits)
    largest = np.sort(BASE, -1)[:, -10:-9] <= BASE
    assert np.array_equal(np.isfinite(found), ONE & largest & np.isfinite(BASE))


def test_draws_come_from_the_support(give):
    law = rectify(give(BASE), [Terms((Only(give(ONE)),))])
    arrays = namespace("torch" if isinstance(law.logits, torch.Tensor) else "numpy")
    settings = DecodingSettings(do_sample=True, temperature=2.0)
    seen = [set() for _ in range(ROWS)]
    for seed in range(200):
        drawn = law.draw(settings, arrays.integers([seed] * ROWS), arrays.integers([5] * ROWS), counterfactual=True)
        assert not np.array(drawn.emptied).any()
        for row in range(ROWS):
            seen[row].add(int(drawn.tokens[row]))
    for row in range(ROWS):
        assert len(seen[row]) > 5
        assert seen[row] <= set(np.flatnonzero(ONE[row] & np.isfinite(BASE[row])).tolist())


def test_an_empty_support_empties_the_row(give):
    nothing = np.where(np.array([[True], [False], [True]]), ONE, False)
    logits = np.array(rectify(give(BASE), [Terms((Only(give(nothing)),))]).logits)
    assert np.isneginf(logits).all(-1).tolist() == [False, True, False]


def test_a_mask_of_another_shape_is_an_error(give):
    with pytest.raises(ValueError, match=r"mask of the tokens that stay has shape \(3, 39\); expected \(3, 40\)"):
        rectify(give(BASE), [Terms((Only(give(ONE[:, :-1])),))])
