"""Calibration: a scale and a shift of the log-odds that a value is broken, fitted on development rows.

Guo et al. 2017 (arXiv 1706.04599), section 4.2, with the bias of Platt 1999 beside the temperature.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from moralguard.errors import DataError

_LIMIT = 30.0


class Calibration(BaseModel):
    """log-odds of broken -> scale * log-odds + shift."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    scale: float = Field(1.0, gt=0)
    shift: float = 0.0

    def apply(self, broken: np.ndarray) -> np.ndarray:
        """Calibrated probabilities, of probabilities in [0, 1] of any shape."""
        return sigmoid(self.scale * log_odds(broken) + self.shift)


def log_odds(probability: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)), held within +-30, where float64 still tells p from 0 and 1."""
    with np.errstate(divide="ignore"):
        return np.clip(np.log(probability) - np.log1p(-probability), -_LIMIT, _LIMIT)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-np.clip(x, -_LIMIT, _LIMIT)))


def fit_calibration(broken: np.ndarray, kept: np.ndarray, weights: np.ndarray | None = None) -> Calibration:
    """The scale and shift of least negative log-likelihood.

    Args:
        broken: uncalibrated probabilities that the value is broken, float64 [n].
        kept: labels, 1 kept and 0 broken, [n].
        weights: weight of each row; where None, both labels weigh the same, so that .5 is the operating point.

    Raises:
        DataError: only one of the labels is there.
    """
    target = 1.0 - np.asarray(kept, dtype=np.float64)
    if target.min() == target.max():
        raise DataError("calibration needs rows that keep the value and rows that break it")
    if weights is None:
        weights = np.where(target == 1, 0.5 / target.mean(), 0.5 / (1 - target.mean()))
    x = np.stack([log_odds(np.asarray(broken, dtype=np.float64)), np.ones(len(target))], 1)

    def loss(candidate: np.ndarray) -> float:
        z = x @ candidate
        return float(np.mean(weights * (np.logaddexp(0.0, z) - target * z)))

    found = np.array([1.0, 0.0])
    for _ in range(100):
        p = sigmoid(x @ found)
        gradient = x.T @ (weights * (p - target)) / len(target)
        curvature = (x * (weights * p * (1 - p))[:, None]).T @ x / len(target) + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        # where most probabilities are near 0 or 1 the curvature is nearly flat and a whole step goes too far
        share = 1.0
        while loss(found - share * step) > loss(found) and share > 1e-9:
            share /= 2
        found = found - share * step
        if np.abs(share * step).max() < 1e-9:
            break
    return Calibration(scale=max(1e-3, float(found[0])), shift=float(found[1]))


def expected_calibration_error(probability: np.ndarray, label: np.ndarray, bins: int = 15) -> float:
    """ECE: the mean over equally wide bins of |mean probability - share of ones|, weighted by the bins' rows."""
    places = np.minimum((np.asarray(probability) * bins).astype(int), bins - 1)
    total = 0.0
    for place in np.unique(places):
        rows = places == place
        total += rows.mean() * abs(float(np.mean(np.asarray(probability)[rows])) - float(np.mean(np.asarray(label)[rows])))
    return total
