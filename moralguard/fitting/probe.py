"""Probes: how well a concept can be read from states. One must be able to before an edit, and no better than guessing after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moralguard.errors import DataError
from moralguard.fitting.subspace import checked_rows


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies on held-back rows.

    Attributes:
        majority: of always naming the training rows' commonest class.
        before, after: of a linear probe fitted on the states, and of another fitted on the edited ones; after is None without an edit.
        mlp_before, mlp_after: of a network with one hidden layer, where asked for: it may find what no linear probe can.
    """

    majority: float
    before: float
    after: float | None = None
    mlp_before: float | None = None
    mlp_after: float | None = None


def probe(
    states: Tensor,
    labels: Tensor,
    edit: Callable[[Tensor], Tensor] | None = None,
    *,
    held: Tensor | None = None,
    share: float = 0.25,
    mlp: bool = False,
    seed: int = 0,
) -> ProbeResult:
    """Fit probes on some rows and score them on the others.

    Args:
        states: f[n, d]. labels: i64[n].
        edit: states f[n, d] -> edited states, such as ``Subspace.apply``.
        held: bool[n], the rows that are scored; without it a ``share`` of each class, drawn with ``seed``.
        mlp: fit a network too (64 hidden units).

    Raises:
        DataError: states or labels that can't be used, or a split without rows of two classes to train on or any to score.
    """
    x, y, _ = checked_rows(states, labels)
    out = stratified(y, share, seed) if held is None else held.bool()
    if out.shape != y.shape or not bool(out.any()) or len(y[~out].unique()) < 2:
        raise DataError(
            f"{int(out.sum())} of {len(y)} rows are held back for the probe; expected a bool for each row, some True, and rows of at "
            "least two classes among the others"
        )
    majority = float((y[out] == y[~out].mode().values).double().mean())
    edited = None if edit is None else edit(x)
    linear = [None if s is None else _accuracy(s, y, out, False, seed) for s in (x, edited)]
    network = [None if s is None or not mlp else _accuracy(s, y, out, True, seed) for s in (x, edited)]
    assert linear[0] is not None
    return ProbeResult(majority, linear[0], linear[1], *network)


def stratified(labels: Tensor, share: float, seed: int) -> Tensor:
    """bool[n], True for about ``share`` of each class, at least one where the class has two rows."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        out[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return out


def require_sklearn() -> None:
    """Raises:
    DataError: scikit-learn isn't installed.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise DataError("fitting subspaces and probes needs scikit-learn; install it with: pip install 'moralguard[fit]'") from error


def _accuracy(states: Tensor, labels: Tensor, held: Tensor, mlp: bool, seed: int) -> float:
    require_sklearn()
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    # Scaled by the training rows. What doesn't vary among them is left as it is, not blown up: an edit leaves rounding in what it removed.
    mean, deviation = states[~held].mean(0), states[~held].std(0, correction=0)
    deviation = torch.where(deviation > 1e-6 * deviation.max(), deviation, torch.ones_like(deviation))
    scaled = ((states - mean) / deviation).numpy()
    out = held.numpy()
    model = MLPClassifier((64,), max_iter=300, random_state=seed) if mlp else LogisticRegression(max_iter=500, C=0.1)
    model.fit(scaled[~out], labels[~held].numpy())
    return float(model.score(scaled[out], labels[held].numpy()))
