"""Subspaces from differences: between counterparts, between class means, and the words whose log-odds must not move."""

from __future__ import annotations

import torch
from torch import Tensor

from moralguard.backends.head import Head
from moralguard.errors import DataError
from moralguard.fitting.subspace import Subspace, checked_rows

_SMALL = 1e-6  # relative, for singular values
_ROWS = 128  # states whose laws are held at once


def fit_directions(differences: Tensor, rank: int) -> Subspace:
    """Principal directions of paired differences f[n, d], an orthogonal projection (Bolukbasi et al. 2016, arXiv 1607.06520).

    Each pair is centred on its own middle, so that the principal directions are those of the differences about zero. The first is
    the bias direction g, turned the way most differences point.

    Raises:
        DataError: differences that can't be used, or hold fewer than one direction.
    """
    d = _checked(differences, rank)
    _, singular, rows = torch.linalg.svd(d, full_matrices=False)
    basis = rows[: min(rank, int((singular > singular[0] * _SMALL).sum()))].T
    first = basis[:, 0]
    return Subspace.orthogonal(basis, first * (torch.sign((d @ first).sum()) or 1.0))


def fit_class_means(states: Tensor, labels: Tensor, rank: int | None = None) -> Subspace:
    """The span of the class means' differences, at most k - 1 directions, an orthogonal projection: states f[n, d], labels i64[n].

    Raises:
        DataError: as ``fit_leace``.
    """
    x, y, _ = checked_rows(states, labels)
    means = torch.stack([x[y == label].mean(0) for label in y.unique()])
    found = fit_directions(means - means.mean(0), len(means) - 1 if rank is None else min(rank, len(means) - 1))
    apart = means[-1] - means[0]
    # centred means point nowhere in sum: the last class against the first gives the sign
    return Subspace.orthogonal(found.u_in, found.u_in[:, 0] * (torch.sign(apart @ found.u_in[:, 0]) or 1.0))


def law_metric(head: Head, states: Tensor) -> tuple[Tensor, Tensor]:
    """(F f64[d, d], mean probabilities f64[V]) over states f[n, d].

    F = mean over the states of Cov_p(e_v), the Fisher information of the law in h: a small move delta of a state changes its law by
    about delta^T F delta / 2 nats (Kullback-Leibler). The slope of a soft cap and a head's bias are left out, which makes F
    approximate for such heads.
    """
    rows = head.weight.float()
    mean = torch.zeros(len(rows), dtype=torch.float64)
    squares = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in states.to(rows).split(_ROWS):
        logits = head.scale * (part @ rows.T)
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        p = torch.softmax(logits, -1)
        centre = (p @ rows).double().cpu()
        mean += p.sum(0).double().cpu()
        squares += centre.T @ centre
    mean /= len(states)
    weighted = rows * mean.to(rows)[:, None]
    metric = head.scale**2 * ((rows.T @ weighted).double().cpu() - squares / len(states))
    return (metric + metric.T) / 2, mean  # symmetric but for the rounding of float32 products


def fit_word_odds(differences: Tensor, metric: Tensor, *, ridge: float = 0.1) -> Subspace:
    """Takes every word pair's log-odds to zero while the rest of the law moves least: an oblique projection.

    For D f[n, d] of rows e_w - e_w' the edited state has D h' = 0, so that z_w = z_w' whatever the state was. Of all linear edits
    that do this, h' = h - F^-1 D^T (D F^-1 D^T)^-1 D h is the one with the least delta^T F delta for every h. With F the identity
    it is the orthogonal projection off the rows' span, which also removes the part that frequent words share with them.

    Args:
        differences: rows of the unembedding, one minus another. metric: F f64[d, d] of ``law_metric``.
        ridge: share of F's mean eigenvalue that is added to it: states move outside F's few large directions at no cost otherwise.

    Raises:
        DataError: differences that can't be used.
    """
    d = _checked(differences, differences.shape[0])
    _, singular, rows = torch.linalg.svd(d, full_matrices=False)
    u_in = rows[singular > singular[0] * _SMALL].T
    moved = torch.linalg.solve(metric + ridge * metric.trace() / len(metric) * torch.eye(len(metric), dtype=torch.float64), u_in)
    u_out = torch.linalg.solve(u_in.T @ moved, moved, left=False)
    return Subspace(u_in, u_out, None, fit_directions(d, 1).direction)


def _checked(differences: Tensor, rank: int) -> Tensor:
    d = torch.as_tensor(differences).detach().cpu().double()
    if d.ndim != 2 or not len(d) or not bool(torch.isfinite(d).all()) or not bool(d.any()):
        raise DataError(f"differences have shape {tuple(d.shape)}; expected [n, d] of finite numbers that aren't all 0")
    if rank < 1:
        raise DataError(f"rank is {rank}; expected at least 1")
    return d
