"""What an edit does to hidden states f[R, ..., d]: addition, ablation, projection, filter. Pure functions with their tensors.

``strength`` is one number, or f[R], one a row; at 0 the states stay bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moralguard.errors import ModelError

Strength = float | Tensor


@dataclass(frozen=True, eq=False)
class Edit(ABC):
    """One edit.

    Attributes:
        strength: how much of it; given by name.
    """

    strength: Strength = field(default=1.0, kw_only=True)

    @property
    @abstractmethod
    def width(self) -> int:
        """d of the states that it fits."""

    @abstractmethod
    def moved(self, states: Tensor, strength: Tensor) -> Tensor:
        """Edited states of f[R, ..., d], strength f[R or 1, 1, ...]."""

    def __call__(self, states: Tensor) -> Tensor:
        """Edited states of f[R, ..., d], of the same dtype.

        Raises:
            ModelError: strengths that aren't one a row.
        """
        strength = torch.as_tensor(self.strength, dtype=states.dtype, device=states.device)
        if strength.ndim > 1 or (strength.ndim == 1 and len(strength) != len(states)):
            raise ModelError(f"strengths have shape {tuple(strength.shape)}; expected one number, or one for each of {len(states)} rows")
        strength = strength.reshape(-1, *[1] * (states.ndim - 1))
        return torch.where(strength == 0, states, self.moved(states, strength))


def _checked(name: str, given: Tensor, dimensions: int) -> Tensor:
    if given.ndim != dimensions or not bool(torch.isfinite(given).all()):
        raise ModelError(f"{name} has shape {tuple(given.shape)}; expected {dimensions} dimensions of finite numbers")
    return given


@dataclass(frozen=True, eq=False)
class Addition(Edit):
    """h' = h + strength v, as it is or scaled back to the length of h (Rimsky et al. 2023, arXiv 2312.06681).

    Attributes:
        vector: v f[d].
        keep_norm: ours: h' gets the length of h, so that what reads it isn't driven out of the range it knows.
    """

    vector: Tensor
    keep_norm: bool = False

    def __post_init__(self) -> None:
        _checked("the vector of an addition", self.vector, 1)

    @property
    def width(self) -> int:
        return len(self.vector)

    def moved(self, states: Tensor, strength: Tensor) -> Tensor:
        new = states + strength * self.vector.to(states)
        return _with_norm_of(states, new) if self.keep_norm else new


@dataclass(frozen=True, eq=False)
class Ablation(Edit):
    """h' = h - strength (h . u) u with u = v / |v|; 1 takes the direction away (Arditi et al. 2024, arXiv 2406.11717).

    Attributes:
        vector: v f[d], not 0.
        keep_norm: as ``Addition``.
    """

    vector: Tensor
    keep_norm: bool = False

    def __post_init__(self) -> None:
        if not bool(_checked("the vector of an ablation", self.vector, 1).any()):
            raise ModelError("the vector of an ablation is 0 and has no direction")

    @property
    def width(self) -> int:
        return len(self.vector)

    def moved(self, states: Tensor, strength: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(self.vector.double(), dim=0).to(states)
        new = states - strength * (states @ unit)[..., None] * unit
        return _with_norm_of(states, new) if self.keep_norm else new


@dataclass(frozen=True, eq=False)
class Projection(Edit):
    """h' = h - strength U_out U_in^T (h - mu): nullspace projection (U_in = U_out), LEACE (arXiv 2004.07667, 2306.03819).

    Attributes:
        u_in: f[d, r]. u_out: f[d, r]. mu: f[d], or None for 0.
    """

    u_in: Tensor
    u_out: Tensor
    mu: Tensor | None = None

    def __post_init__(self) -> None:
        _checked("U_in", self.u_in, 2)
        _checked("U_out", self.u_out, 2)
        if self.u_in.shape != self.u_out.shape or (self.mu is not None and self.mu.shape != self.u_in.shape[:1]):
            shapes = [None if part is None else tuple(part.shape) for part in (self.u_in, self.u_out, self.mu)]
            raise ModelError(f"a projection is U_in [d, r], U_out [d, r], mu [d] or None; got shapes {', '.join(map(str, shapes))}")

    @property
    def width(self) -> int:
        return len(self.u_in)

    def moved(self, states: Tensor, strength: Tensor) -> Tensor:
        centred = states if self.mu is None else states - self.mu.to(states)
        return states - strength * (centred @ self.u_in.to(states)) @ self.u_out.to(states).T


@dataclass(frozen=True, eq=False)
class Filter(Edit):
    """h' = h + strength (f(h) - h) with f a small network, as FairFil filters sentence vectors (Cheng et al. 2021, arXiv 2103.06413).

    Attributes:
        layers: (weight f[out, in], bias f[out]) of linear layers in order, d to d, ReLU between them.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ModelError("a filter has no layers; give (weight [out, in], bias [out]) of one at least")
        width = self.width
        for index, (weight, bias) in enumerate(self.layers):
            _checked(f"weight {index} of a filter", weight, 2)
            if weight.shape[1] != width or _checked(f"bias {index} of a filter", bias, 1).shape != weight.shape[:1]:
                raise ModelError(
                    f"layer {index} of a filter has weight {tuple(weight.shape)}, bias {tuple(bias.shape)}; expected [n, {width}] and [n]"
                )
            width = len(weight)
        if width != self.width:
            raise ModelError(f"a filter maps {self.width} numbers to {width}; expected as many as it reads")

    @property
    def width(self) -> int:
        return int(self.layers[0][0].shape[-1])

    def moved(self, states: Tensor, strength: Tensor) -> Tensor:
        filtered = states
        for index, (weight, bias) in enumerate(self.layers):
            filtered = filtered.relu() if index else filtered
            filtered = filtered @ weight.to(states).T + bias.to(states)
        return states + strength * (filtered - states)


def _with_norm_of(states: Tensor, new: Tensor) -> Tensor:
    """``new`` scaled to the lengths of ``states``; a vector of length 0 stays."""
    return new * (states.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(new.dtype).tiny))
