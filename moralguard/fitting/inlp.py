"""INLP, iterative nullspace projection: Ravfogel et al. 2020 (arXiv 2004.07667), algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moralguard.errors import DataError
from moralguard.fitting.probe import require_sklearn, stratified
from moralguard.fitting.subspace import Subspace, checked_rows

_SMALL = 1e-6  # relative, for singular values


@dataclass(frozen=True)
class InlpFit:
    """What the rounds gave.

    Attributes:
        subspace: orthonormal, with the first classifier's direction as g.
        accuracies: of each kept round's classifier on rows held back from it.
    """

    subspace: Subspace
    accuracies: tuple[float, ...]


def fit_inlp(
    states: Tensor,
    labels: Tensor,
    *,
    rounds: int = 8,
    min_accuracy: float = 0.0,
    seed: int = 0,
    cost: float = 0.1,
    held: float = 0.2,
) -> InlpFit:
    """Fit a linear classifier on P X again and again; P removes the row spaces of all classifiers so far from the **original** X.

    With R_i the projector on the row space of the i-th classifier's weights, P = I - projector on the row space of sum_i R_i. The
    classifier is a linear support vector machine without intercept, as in Liang et al. 2021 (arXiv 2106.13219).

    Args:
        states: f[n, d]. labels: i64[n], k >= 2 classes. Two classes give one direction a round, k classes up to k - 1 or k.
        rounds: at most so many; fewer where nothing is left.
        min_accuracy: rounds whose classifier is right less often, on held-back rows, are skipped.
        seed: of the choice of rows held back.
        cost: C of the support vector machine, on states scaled to unit mean square.
        held: share of the rows held back.

    Raises:
        DataError: states or labels that can't be used, or no round that counts.
    """
    require_sklearn()
    from sklearn.svm import LinearSVC

    x, y, _ = checked_rows(states, labels)
    out = stratified(y, held, seed)
    train, dev, truth = (~out).numpy(), out.numpy(), y.numpy()
    original = (x / x.square().mean().sqrt().clamp_min(1e-30)).numpy()
    projectors = np.zeros((x.shape[1], x.shape[1]))
    basis = np.zeros((x.shape[1], 0))
    direction: Tensor | None = None
    accuracies: list[float] = []
    for _ in range(rounds):
        projected = original - (original @ basis) @ basis.T
        # the primal solver needs no random numbers
        classifier = LinearSVC(C=cost, dual=False, fit_intercept=False, tol=1e-3).fit(projected[train], truth[train])
        accuracy = float(classifier.score(projected[dev], truth[dev]))
        rows = _row_space(classifier.coef_)
        if accuracy < min_accuracy or not rows.shape[1]:
            # The next round would see the same rows and give the same classifier: all later ones are skipped too.
            break
        accuracies.append(accuracy)
        if direction is None:
            direction = torch.from_numpy(rows[:, 0] * np.sign(rows[:, 0] @ classifier.coef_[-1]))
        projectors += rows @ rows.T
        basis = _row_space(projectors)
        if basis.shape[1] >= x.shape[1]:
            break
    if not accuracies:
        raise DataError(
            f"no classifier reached min_accuracy {min_accuracy} (the first: {accuracy:.3f} on held-back rows), so nothing is removed; "
            "lower it, or give states that hold the concept"
        )
    return InlpFit(Subspace.orthogonal(torch.from_numpy(basis), direction), tuple(accuracies))


def _row_space(matrix: np.ndarray) -> np.ndarray:
    """Orthonormal basis [d, r] of the row space of [n, d]."""
    _, singular, rows = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray(rows[singular > max(singular[0] * _SMALL, 1e-12)].T)
