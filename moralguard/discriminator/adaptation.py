"""Adapting to a value from a few examples: a small head of its own on the frozen network, fitted in closed steps.

The head corrects the network's log-odds z of a window: ``a z + w . phi + c``, where phi are the window's features (sentence vector
and tuned first state, each of length 1). It is logistic regression with Gaussian priors around the unadapted network (a = 1, w = 0,
c = 0), solved in the space of the examples; the prior's width is chosen by leaving each example out in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moralguard.discriminator.calibration import log_odds, sigmoid
from moralguard.errors import DataError, GuardError
from moralguard.values import Value

FEWEST = 4
_WIDTHS = (2.0, 8.0, 32.0, 128.0)  # prior variance of w, times the features' squared length
_SCALE_VARIANCE = 0.25
_SHIFT_VARIANCE = 4.0
_LIMIT = 6.0  # log-odds of the network are held within this, so that examples can overrule what it is sure of


@dataclass(frozen=True)
class Head:
    """The correction on one path: scale of the network's log-odds, weights [f] of the features, and a shift."""

    scale: float
    weights: np.ndarray
    shift: float

    def apply(self, broken: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Corrected probabilities that the value is broken, [n], of the network's [n] and the features [n, f]."""
        return sigmoid(self.scale * np.clip(log_odds(broken), -_LIMIT, _LIMIT) + features @ self.weights + self.shift)


@dataclass(frozen=True)
class Adaptation:
    """What was learned of one value.

    Attributes:
        value: the value as it is now stated.
        context: the context that the examples were given in.
        heads: head by path name; a path without examples reads the value unadapted.
        examples: number of examples; ``left_out_accuracy`` their accuracy when each was left out of the fit.
    """

    value: Value
    context: str
    heads: dict[str, Head]
    examples: int
    left_out_accuracy: float


@dataclass(frozen=True)
class Principle:
    """A value of higher priority that an update must not break.

    Attributes:
        value: the principle.
        anchors: (text, kept) judgements that must stand: the principle's own, which the adapted value may not contradict either.
    """

    value: Value
    anchors: Sequence[tuple[str, bool]] = field(default_factory=tuple)


class RefusedUpdateError(GuardError):
    """An update was refused because it breaks a principle of higher priority on its anchors.

    Attributes:
        principle: the principle that would be broken.
        examples: the anchors, each (text, what the principle says, P(v|y) before, P(v|y) after).
    """

    def __init__(self, message: str, principle: Value, examples: Sequence[tuple[str, bool, float, float]]):
        super().__init__(message)
        self.principle = principle
        self.examples = tuple(examples)


def fit_head(broken: np.ndarray, features: np.ndarray, kept: np.ndarray) -> tuple[Head, np.ndarray]:
    """A head for examples, and the left-out predictions (probability of broken, [n]).

    Args:
        broken: the unadapted network's probabilities [n].
        features: [n, f]. kept: labels [n], both of them present.
    """
    target = 1.0 - kept
    z = np.clip(log_odds(broken), -_LIMIT, _LIMIT)
    balance = np.where(target == 1, 0.5 / target.mean(), 0.5 / max(1e-9, 1 - target.mean()))
    best: tuple[float, float, np.ndarray] | None = None
    for width in _WIDTHS:
        kernel = width * features @ features.T + _SCALE_VARIANCE * np.outer(z, z) + _SHIFT_VARIANCE
        left_out = _left_out(kernel, z, target, balance)
        loss = -float(np.mean(balance * np.log(np.where(target == 1, left_out, 1 - left_out))))
        if best is None or loss < best[0]:
            best = (loss, width, left_out)
    assert best is not None
    _, width, left_out = best
    kernel = width * features @ features.T + _SCALE_VARIANCE * np.outer(z, z) + _SHIFT_VARIANCE
    dual = _solve(kernel, z, target, balance)
    return Head(1.0 + _SCALE_VARIANCE * float(dual @ z), width * features.T @ dual, _SHIFT_VARIANCE * float(dual.sum())), left_out


def _solve(kernel: np.ndarray, offset: np.ndarray, target: np.ndarray, balance: np.ndarray) -> np.ndarray:
    """Dual weights of logistic regression with a Gaussian prior, by damped Newton steps on f = offset + kernel @ dual."""

    def cost(dual: np.ndarray) -> float:
        pull = kernel @ dual
        return float((balance * (np.logaddexp(0.0, offset + pull) - target * (offset + pull))).sum() + 0.5 * dual @ pull)

    dual = np.zeros(len(target))
    for _ in range(100):
        p = sigmoid(offset + kernel @ dual)
        curvature = np.maximum(balance * p * (1 - p), 1e-10)
        # Newton on the stationarity dual = balance * (target - p)
        residual = balance * (target - p) - dual
        step = np.linalg.solve(np.eye(len(target)) + curvature[:, None] * kernel, residual)
        share, before = 1.0, cost(dual)
        while cost(dual + share * step) > before and share > 1e-9:
            share /= 2
        dual = dual + share * step
        if np.abs(step).max() < 1e-10:
            break
    return dual


def _left_out(kernel: np.ndarray, offset: np.ndarray, target: np.ndarray, balance: np.ndarray) -> np.ndarray:
    found = np.empty(len(target))
    for i in range(len(target)):
        rest = np.arange(len(target)) != i
        dual = _solve(kernel[np.ix_(rest, rest)], offset[rest], target[rest], balance[rest])
        found[i] = sigmoid(offset[i] + kernel[i, rest] @ dual)
    return found


def checked_examples(examples: Sequence[tuple[str, bool]]) -> tuple[list[str], np.ndarray]:
    """Texts and labels of examples.

    Raises:
        DataError: too few, of one label only, or not (text, bool) pairs.
    """
    texts, labels = [], []
    for i, item in enumerate(examples):
        if not (isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], str) and item[0].strip()):
            raise DataError(f"examples[{i}] must be (text, kept), a text and whether it keeps the value; got {type(item).__name__}")
        if item[1] not in (True, False):
            raise DataError(f"examples[{i}]: kept must be True or False (got {item[1]!r})")
        texts.append(item[0])
        labels.append(float(item[1]))
    if len(texts) < FEWEST or len(set(labels)) < 2:
        raise DataError(
            f"adapting takes at least {FEWEST} examples, some that keep the value and some that break it (8 to 32 work well); "
            f"got {labels.count(1.0)} that keep it and {labels.count(0.0)} that break it"
        )
    return texts, np.array(labels)
