"""Nullspace projection of the last hidden state: INLP, A-INLP and LEACE, always as a low-rank term, never a dense edit of E."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, WithJsonSchema, field_validator

import moralguard_kernels as ops
from moralguard.backends.capabilities import Capabilities
from moralguard.backends.hf import LanguageModel
from moralguard.backends.tensor_files import load_tensors
from moralguard.controls.base import BoundControl, Control
from moralguard.decoding.step import Step
from moralguard.decoding.terms import Dense, LowRank, Terms
from moralguard.errors import PolicyError
from moralguard.packs import is_pack, read_pack
from moralguard.values import Value

_ORTHONORMAL_TOLERANCE = 1e-3

# A-INLP's rule (Liang et al. 2021, released code): the nucleus that is looked at, the band in which nothing is done, the least keep.
_BIAS_NUCLEUS = 0.7
_BIAS_BAND = (-0.1, 0.15)
_LEAST_KEEP = 0.6

Basis = Annotated[
    Any,
    WithJsonSchema({"type": "string", "description": "pack folder, pack:NAME or safetensors file: basis [d, r], or U_in, U_out, mu"}),
]
Direction = Annotated[Any, WithJsonSchema({"type": "array", "items": {"type": "number"}})]


class NullspaceProjection(Control):
    """h' = a h + (1 - a) P h with P = I - U U^T, applied to the logits: z' = z - (1 - a) (E U)(U^T h).

    INLP: Ravfogel et al. 2020 (arXiv 2004.07667); a-weighting and A-INLP: Liang et al. 2021 (arXiv 2106.13219). In general (LEACE,
    Belrose et al. 2023, arXiv 2306.03819) z' = z - (1 - a) (E U_out)(U_in^T (h - mu)).

    Args:
        basis: U f[d, r], orthonormal, the removed directions; (U_in, U_out, mu) for LEACE; or a pack (folder or ``pack:NAME``) or
            safetensors file with ``basis``, or with ``U_in``, ``U_out`` and ``mu``, and perhaps ``direction``.
        keep: a, the share of the **original** state that stays; 1 deactivates.
        adaptive: A-INLP: per row and step b = sum over the base's .7-nucleus of p_v (e_v . g) / ||e_v||; a = 1 where
            -.1 <= b <= .15, else max(1 - |b|, .6). ``keep`` isn't used then.
        direction: g f[d], the bias direction of A-INLP; None takes the file's, and a basis of rank 1 is its own direction.
    """

    control_name: ClassVar[str] = "nullspace"

    basis: Basis
    keep: Annotated[float, Field(ge=0, le=1)] = 0.0
    adaptive: bool = False
    direction: Direction | None = None

    @field_validator("basis", mode="before")
    @classmethod
    def _read_basis(cls, basis: Any) -> Any:
        if isinstance(basis, (str, Path)):
            _load(str(basis))  # broken files are told here and not at the first use
            return str(basis)
        return _checked(basis)

    @field_validator("direction", mode="before")
    @classmethod
    def _read_direction(cls, direction: Any) -> Any:
        return None if direction is None else _as_tensor(direction).reshape(-1)

    @classmethod
    def from_classifiers(cls, weights: Sequence[Any], **settings: Any) -> Self:
        """From the weight matrices of INLP's rounds, each [classes, d] (or [d]): P projects on the intersection of their nullspaces.

        R_i = projector on the row space of W_i; P = I - projector on the row space of sum_i R_i (Ravfogel et al., algorithm 1).
        """
        rows = [_as_tensor(w).reshape(-1, _as_tensor(w).shape[-1]).double() for w in weights]
        total = torch.stack([_row_space(w) @ _row_space(w).T for w in rows]).sum(0)
        return cls(basis=_row_space(total).float(), **settings)

    def projection(self) -> torch.Tensor:
        """P f32[d, d], for inspection: symmetric and idempotent. Decoding never builds it."""
        u_in, u_out, _, _ = self.arrays()
        return torch.eye(u_in.shape[0]) - u_out @ u_in.T

    def arrays(self, lm: LanguageModel | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(U_in f32[d, r], U_out f32[d, r], mu f32[d] or None, direction f32[d] or None), read where ``basis`` names a pack or file.

        Raises:
            PolicyError, ModelError: it can't be read any more, or is a pack of another model than ``lm``.
        """
        basis, direction = _load(self.basis, lm) if isinstance(self.basis, str) else (self.basis, None)
        u_in, u_out, mu = basis if isinstance(basis, tuple) else (basis, basis, None)
        return u_in, u_out, mu, direction if self.direction is None else self.direction

    @property
    def active(self) -> bool:
        return self.adaptive or self.keep != 1

    @property
    def needs(self) -> Capabilities:
        return Capabilities(hidden=True)

    @property
    def own_states(self) -> bool:
        return isinstance(self.basis, str)

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundNullspace:
        return BoundNullspace(self, lm)


class BoundNullspace(BoundControl[NullspaceProjection]):
    def __init__(self, settings: NullspaceProjection, lm: LanguageModel):
        super().__init__(settings, lm)
        if lm.head is None:
            raise PolicyError(f"nullspace needs the unembedding of {lm.name}, which has no head of a known form")
        self.head = lm.head
        u_in, u_out, mu, direction = settings.arrays(lm)
        width = self.head.weight.shape[1]
        if u_in.shape[0] != width:
            raise PolicyError(
                f"nullspace basis has shape {tuple(u_in.shape)}, but {lm.name} has hidden states of {width}: expected [{width}, r]"
            )
        self.u_in = u_in.to(lm.device, torch.float32)
        self.mu = None if mu is None else mu.to(lm.device, torch.float32)
        self.projected = self.head.project(u_out)  # E U_out, f32[V, r]
        self.cosines = self._cosines(direction) if settings.adaptive else None

    def _cosines(self, direction: torch.Tensor | None) -> torch.Tensor:
        """(e_v . g) / ||e_v|| for every token, f32[V]."""
        if direction is None and self.u_in.shape[1] == 1:
            direction = self.u_in[:, 0]
        width = self.head.weight.shape[1]
        if direction is None or direction.shape != (width,):
            shape = None if direction is None else tuple(direction.shape)
            raise PolicyError(f"adaptive nullspace needs the bias direction g, f[{width}], for {self.lm.name}; got {shape}")
        return self.head.project(direction[:, None])[:, 0] / self.head.weight.float().norm(dim=-1).clamp_min(1e-12)

    def keep(self, step: Step) -> torch.Tensor:
        """a f32[R]: the fixed share, or A-INLP's."""
        if self.cosines is None:
            return step.weight(self.settings.keep)
        nucleus = step.logits >= ops.top_p_threshold(step.logits, _BIAS_NUCLEUS)
        bias = ops.row_products(self.cosines[None], step.probabilities * nucleus)[:, 0]
        low, high = _BIAS_BAND
        return torch.where((bias >= low) & (bias <= high), torch.ones_like(bias), (1 - bias.abs()).clamp_min(_LEAST_KEEP))

    def terms(self, step: Step) -> Terms:
        if step.hidden is None or step.head_logits is None:
            raise RuntimeError("nullspace needs hidden states")
        keep = self.keep(step)
        centred = step.hidden.float() if self.mu is None else step.hidden.float() - self.mu
        coefficients = ops.row_products(self.u_in.T, centred) * (keep - 1)[:, None]
        rows = None if self.cosines is None else keep != 1
        if self.head.softcap is None:
            return Terms((LowRank(self.projected, coefficients * self.head.scale),), rows)
        shift = ops.low_rank_delta(self.projected, coefficients)
        return Terms((Dense(self.head.delta(step.head_logits.float(), shift)),), rows)


def _as_tensor(value: Any) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(value).detach().to(device="cpu", dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PolicyError(f"a nullspace array is a {type(value).__name__}; expected a tensor or an array: U [d, r]") from error
    if not bool(torch.isfinite(tensor).all()):
        raise PolicyError(f"a nullspace array of shape {tuple(tensor.shape)} holds values that aren't finite")
    return tensor


def _checked(basis: Any) -> Any:
    """U f32[d, r], or (U_in, U_out, mu), once it is known to be one."""
    if isinstance(basis, (tuple, list)) and len(basis) == 3 and not isinstance(basis[0], (int, float)):
        u_in, u_out, mu = (_as_tensor(part) for part in basis)
        if u_in.ndim != 2 or u_in.shape != u_out.shape or mu.shape != u_in.shape[:1]:
            raise PolicyError(
                "a LEACE basis is (U_in [d, r], U_out [d, r], mu [d]); got shapes "
                f"{tuple(u_in.shape)}, {tuple(u_out.shape)}, {tuple(mu.shape)}"
            )
        return (u_in, u_out, mu)
    u = _as_tensor(basis)
    if u.ndim == 1:
        u = u[:, None]
    if u.ndim != 2:
        raise PolicyError(f"basis has {u.ndim} dimensions; expected U [d, r] with orthonormal columns")
    error = (u.T @ u - torch.eye(u.shape[1], dtype=u.dtype)).abs().max()
    if not error <= _ORTHONORMAL_TOLERANCE:
        raise PolicyError(
            f"basis isn't orthonormal: U^T U differs from the identity by up to {float(error):.3g} (shape {tuple(u.shape)}); "
            "use torch.linalg.qr(U).Q, with one column a removed direction"
        )
    return u


def _load(source: str, lm: LanguageModel | None = None) -> tuple[Any, torch.Tensor | None]:
    """(basis, direction) of a pack, checked against the model where one is given; or of a bare file."""
    if is_pack(source):
        pack = read_pack(source, "subspace")
        if lm is not None:
            pack.check(lm)
        path = pack.folder / "basis.safetensors"
    else:
        path = Path(source)
        if not path.is_file():
            raise PolicyError(
                f"basis file {source!r} isn't there; expected a pack, or a safetensors file with basis, or with U_in, U_out and mu"
            )
    tensors = load_tensors(path)
    direction = _as_tensor(tensors["direction"]).reshape(-1) if "direction" in tensors else None
    if "basis" in tensors:
        return _checked(tensors["basis"]), direction
    if {"U_in", "U_out", "mu"} <= tensors.keys():
        return _checked((tensors["U_in"], tensors["U_out"], tensors["mu"])), direction
    raise PolicyError(f"{path} holds {', '.join(sorted(tensors))}; expected basis, or U_in, U_out and mu")


def _row_space(matrix: torch.Tensor) -> torch.Tensor:
    """Orthonormal basis [d, r] of the row space of [n, d], small singular values left out relative to the largest."""
    _, singular, vt = torch.linalg.svd(matrix, full_matrices=False)
    return vt[singular > singular.max() * 1e-6].T
