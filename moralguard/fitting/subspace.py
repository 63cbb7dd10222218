"""A fitted subspace: what is read from the last hidden state, and what is taken away for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moralguard.errors import DataError


@dataclass(frozen=True)
class Subspace:
    """x' = x - U_out U_in^T (x - mu), as ``NullspaceProjection`` applies it with ``keep`` 0.

    Attributes:
        u_in: f64[d, r], what is read. u_out: f64[d, r], what is taken away; the same tensor for an orthogonal projection.
        mu: f64[d], the point that stays where it is; None for the origin.
        direction: f64[d], unit length: the bias direction g of A-INLP (Liang et al. 2021, arXiv 2106.13219), or None.
    """

    u_in: Tensor
    u_out: Tensor
    mu: Tensor | None = None
    direction: Tensor | None = None

    @classmethod
    def orthogonal(cls, basis: Tensor, direction: Tensor | None = None) -> Subspace:
        """P = I - U U^T for an orthonormal U f[d, r]."""
        basis = basis.double()
        return cls(basis, basis, None, direction)

    @property
    def rank(self) -> int:
        return self.u_in.shape[1]

    @property
    def is_orthogonal(self) -> bool:
        return self.u_in is self.u_out and self.mu is None

    def apply(self, states: Tensor) -> Tensor:
        """Edited states f64[n, d] of f[n, d]."""
        states = states.double()
        centred = states if self.mu is None else states - self.mu
        return states - (centred @ self.u_in) @ self.u_out.T

    def tensors(self) -> dict[str, Tensor]:
        """What ``basis.safetensors`` of a pack holds, f32: ``basis``, or ``U_in``, ``U_out``, ``mu``; ``direction`` where there is one."""
        if self.is_orthogonal:
            found = {"basis": self.u_in}
        else:
            found = {"U_in": self.u_in, "U_out": self.u_out, "mu": torch.zeros(self.u_in.shape[0]) if self.mu is None else self.mu}
        if self.direction is not None:
            found["direction"] = self.direction
        # a copy of each: safetensors refuses tensors that share memory
        return {name: tensor.float().contiguous().clone() for name, tensor in found.items()}


def checked_rows(states: Tensor, labels: Tensor, classes: int | None = None) -> tuple[Tensor, Tensor, int]:
    """(states f64[n, d], labels i64[n], number of classes).

    Raises:
        DataError: shapes that don't fit, values that aren't finite, labels out of range, or fewer than two classes.
    """
    x, y = torch.as_tensor(states).detach().cpu().double(), torch.as_tensor(labels).detach().cpu().long()
    if x.ndim != 2 or y.shape != x.shape[:1] or not len(x):
        raise DataError(f"states of shape {tuple(x.shape)} and labels of shape {tuple(y.shape)} don't fit; expected [n, d] and [n]")
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x).all(1)).nonzero()[0])
        raise DataError(f"the state of row {bad + 1} isn't finite; drop the row, or read the states in float32")
    k = int(y.max()) + 1 if classes is None else classes
    if int(y.min()) < 0 or int(y.max()) >= k:
        raise DataError(f"labels run from {int(y.min())} to {int(y.max())}; expected 0 to {k - 1}")
    if classes is None and len(y.unique()) < 2:
        raise DataError(f"all {len(y)} rows are of class {int(y[0])}; give rows of at least two classes")
    return x, y, k
