"""Calibration: the fit is the optimum, keeps the order, and makes .5 the operating point."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moralguard.discriminator.calibration import Calibration, expected_calibration_error, fit_calibration, log_odds
from moralguard.errors import DataError


def _rows(seed, count=600, scale=0.4, shift=1.0):
    """Labels drawn from known log-odds, and probabilities that misstate them by a scale and a shift."""
    generator = np.random.default_rng(seed)
    truth = generator.normal(size=count) * 2
    kept = (generator.uniform(size=count) > 1 / (1 + np.exp(-truth))).astype(float)
    return 1 / (1 + np.exp(-(truth - shift) / scale)), kept


@pytest.mark.parametrize("seed", range(4))
def test_a_known_distortion_is_undone(seed):
    broken, kept = _rows(seed, 20_000)
    found = fit_calibration(broken, kept, np.ones(len(kept)))
    assert found.scale == pytest.approx(0.4, abs=0.05)
    assert found.shift == pytest.approx(1.0, abs=0.1)


@given(seed=st.integers(0, 1000), scale=st.floats(0.2, 3), shift=st.floats(-3, 3))
@settings(max_examples=25, deadline=None)
def test_the_fit_is_a_minimum_and_keeps_the_order(seed, scale, shift):
    broken, kept = _rows(seed, 300, scale, shift)
    found = fit_calibration(broken, kept)
    order = np.argsort(broken, kind="stable")
    assert (np.diff(found.apply(broken)[order]) >= 0).all()
    target = 1 - kept
    weights = np.where(target == 1, 0.5 / target.mean(), 0.5 / (1 - target.mean()))

    def loss(item):
        x = item.scale * log_odds(broken) + item.shift
        return float(np.mean(weights * (np.logaddexp(0, x) - target * x)))

    for change in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        assert loss(found) <= loss(Calibration(scale=found.scale + change[0], shift=found.shift + change[1])) + 1e-9


def test_a_half_is_the_operating_point_of_balanced_labels():
    broken, kept = _rows(0, 5000, scale=1.0, shift=2.0)
    found = fit_calibration(broken, kept).apply(broken)
    target = 1 - kept
    weights = np.where(target == 1, 0.5 / target.mean(), 0.5 / (1 - target.mean()))
    assert np.average(found, weights=weights) == pytest.approx(0.5, abs=1e-6)


def test_certain_probabilities_stay_finite():
    found = Calibration(scale=2.0, shift=0.5).apply(np.array([0.0, 1.0, 0.5]))
    assert np.isfinite(found).all()
    assert found[0] < 1e-9 < 1 - 1e-9 < found[1]


def test_one_label_is_refused():
    with pytest.raises(DataError, match="keep the value and rows that break"):
        fit_calibration(np.array([0.2, 0.4]), np.array([1.0, 1.0]))


def test_calibration_error():
    assert expected_calibration_error(np.array([0.0, 1.0, 1.0]), np.array([0, 1, 1])) == 0.0
    assert expected_calibration_error(np.full(10, 0.9), np.array([1] * 5 + [0] * 5)) == pytest.approx(0.4)
