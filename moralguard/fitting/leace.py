"""LEACE, least-squares concept erasure in closed form: Belrose et al. 2023 (arXiv 2306.03819), theorem 4.3, from streamed moments."""

from __future__ import annotations

import torch
from torch import Tensor

from moralguard.errors import DataError
from moralguard.fitting.subspace import Subspace, checked_rows


class LeaceFitter:
    """Collects the moments of states and one-hot labels, batch by batch, and gives the eraser.

    Moments are kept about the running mean in float64 (Chan, Golub & LeVeque 1979), so that many batches give what one gives.

    Args:
        width: d. classes: k.
        tolerance: relative, for singular values: directions in which the states spread less than ``tolerance`` of the widest
            hold no data, and concept directions weaker than ``tolerance`` of the strongest are rounding. An absolute bound would
            silently keep weak concepts.
    """

    def __init__(self, width: int, classes: int, *, tolerance: float = 1e-6):
        if classes < 2:
            raise DataError(f"a concept has at least two classes, not {classes}")
        self._classes = classes
        self._tolerance = tolerance
        self._count = 0
        self._seen = torch.zeros(classes, dtype=torch.float64)
        self._mean_x = torch.zeros(width, dtype=torch.float64)
        self._mean_z = torch.zeros(classes, dtype=torch.float64)
        self._xx = torch.zeros(width, width, dtype=torch.float64)
        self._xz = torch.zeros(width, classes, dtype=torch.float64)

    def update(self, states: Tensor, labels: Tensor) -> LeaceFitter:
        """Add rows: states f[n, d], labels i64[n]. Gives itself.

        Raises:
            DataError: shapes that don't fit, values that aren't finite, a label out of range.
        """
        x, y, _ = checked_rows(states, labels, self._classes)
        if x.shape[1] != len(self._mean_x):
            raise DataError(f"states have width {x.shape[1]}; this fitter was made for {len(self._mean_x)}")
        z = torch.nn.functional.one_hot(y, self._classes).double()
        count = self._count + len(x)
        mean_x, mean_z = x.mean(0), z.mean(0)
        centred = x - mean_x
        apart_x, apart_z = mean_x - self._mean_x, mean_z - self._mean_z
        between = self._count * len(x) / count
        self._xx += centred.T @ centred + between * torch.outer(apart_x, apart_x)
        self._xz += centred.T @ (z - mean_z) + between * torch.outer(apart_x, apart_z)
        self._mean_x += apart_x * (len(x) / count)
        self._mean_z += apart_z * (len(x) / count)
        self._seen += z.sum(0)
        self._count = count
        return self

    def eraser(self, rank: int | None = None, *, shrinkage: float = 0.0) -> Subspace:
        """x' = x - W^+ U U^T W (x - mu), with W = S_xx^(-1/2) and U the left singular vectors of W S_xz.

        Args:
            rank: leave all but the strongest concept directions in; None erases all, at most k - 1.
            shrinkage: share in which S_xx is pulled to the multiple of I with its trace (Ledoit & Wolf 2004). Any invertible W
                erases as much: S_xx makes the change least on the rows at hand, which too few of them can't tell for others. Then
                narrow axes are read with huge weights, and states of other texts are thrown far off.

        Raises:
            DataError: rows of one class alone, or states that hold nothing of the labels.
        """
        if int((self._seen > 0).sum()) < 2:
            raise DataError(f"the rows hold {int((self._seen > 0).sum())} class; give rows of at least two classes")
        spread, axes = torch.linalg.eigh(self._xx / self._count)
        spread = (1 - shrinkage) * spread + shrinkage * spread.mean()
        # the spread is a variance: its root is the singular value that the tolerance is about
        holds = spread > spread[-1].clamp_min(0) * self._tolerance**2
        axes, deviation = axes[:, holds], spread[holds].sqrt()
        # in the axes' own coordinates W is diagonal, and W^+ its inverse
        left, strength, _ = torch.linalg.svd((axes.T @ (self._xz / self._count)) / deviation[:, None], full_matrices=False)
        # strengths are correlations, at most 1: what rounding alone leaves lies far below the tolerance
        if not len(strength) or strength[0] <= self._tolerance**2:
            raise DataError("the states hold nothing of the labels, so there is nothing to erase; check that the rows' labels are right")
        left = left[:, strength > strength[0] * self._tolerance][:, :rank]
        u_in, u_out = axes @ (left / deviation[:, None]), axes @ (left * deviation[:, None])
        return Subspace(u_in, u_out, self._mean_x.clone())


def fit_leace(states: Tensor, labels: Tensor, *, rank: int | None = None, shrinkage: float = 0.0) -> Subspace:
    """The eraser of one batch: states f[n, d], labels i64[n]; settings and errors as ``LeaceFitter``."""
    x, y, classes = checked_rows(states, labels)
    return LeaceFitter(x.shape[1], classes).update(x, y).eraser(rank, shrinkage=shrinkage)
