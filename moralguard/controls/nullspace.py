"""Nullspace projection of the last hidden state: INLP, A-INLP and LEACE, always as a low-rank term, never a dense edit of E."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, WithJsonSchema, field_validator

from moralguard.backends.arrays import Array, is_tensor, namespace, namespace_for, namespace_of
from moralguard.backends.capabilities import Capabilities
from moralguard.backends.tensor_files import load_arrays
from moralguard.controls.base import BoundControl, Control
from moralguard.decoding.step import Step
from moralguard.decoding.terms import Dense, LowRank, Terms
from moralguard.errors import PolicyError
from moralguard.packs import is_pack, read_pack
from moralguard.values import Value

if TYPE_CHECKING:
    import torch

    from moralguard.backends.hf import LanguageModel

_ORTHONORMAL_TOLERANCE = 1e-3

LAST = -1
"""The layer that the head reads, in a pack's card."""

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
    any_arrays: ClassVar[bool] = True

    basis: Basis
    keep: Annotated[float, Field(ge=0, le=1)] = 0.0
    adaptive: bool = False
    direction: Direction | None = None

    @field_validator("basis", mode="before")
    @classmethod
    def _read_basis(cls, basis: Any) -> Any:
        if isinstance(basis, (str, Path)):
            load_basis(str(basis))  # broken files are told here and not at the first use
            layer = layer_of_pack(str(basis))
            if layer not in (None, LAST):
                raise PolicyError(
                    f"pack {str(basis)!r} was fitted on the states of layer {layer}, and nullspace edits those that the head reads; use "
                    "layer-projection, or fit one without --layer"
                )
            return str(basis)
        return checked_basis(basis)

    @field_validator("direction", mode="before")
    @classmethod
    def _read_direction(cls, direction: Any) -> Any:
        return None if direction is None else _as_array(direction).reshape(-1)

    @classmethod
    def from_classifiers(cls, weights: Sequence[Any], **settings: Any) -> Self:
        """From the weight matrices of INLP's rounds, each [classes, d] (or [d]): P projects on the intersection of their nullspaces.

        R_i = projector on the row space of W_i; P = I - projector on the row space of sum_i R_i (Ravfogel et al., algorithm 1).
        """
        arrays = namespace("torch" if any(is_tensor(w) for w in weights) else "numpy")
        rows = [arrays.float_array(_as_array(w)) for w in weights]
        spaces = [_row_space(arrays.as_double(w.reshape(-1, w.shape[-1]))) for w in rows]
        total = arrays.stack([space @ space.T for space in spaces]).sum(0)
        return cls(basis=arrays.as_float(_row_space(total)), **settings)

    def projection(self) -> torch.Tensor:
        """P f32[d, d] as a torch tensor, for inspection: symmetric and idempotent. Decoding never builds it."""
        arrays = namespace("torch")
        u_in, u_out = (arrays.float_array(part) for part in self.arrays()[:2])
        found: torch.Tensor = arrays.eye(u_in.shape[0]) - u_out @ u_in.T
        return found

    def arrays(self, lm: LanguageModel | None = None) -> tuple[Array, Array, Array | None, Array | None]:
        """(U_in f32[d, r], U_out f32[d, r], mu f32[d] or None, direction f32[d] or None), read where ``basis`` names a pack or file.

        As the model's kind of arrays, on its device; without a model as they were given, those of a file as NumPy arrays.

        Raises:
            PolicyError, ModelError: it can't be read any more, or is a pack of another model than ``lm``.
        """
        basis, direction = load_basis(self.basis, lm) if isinstance(self.basis, str) else (self.basis, None)
        u_in, u_out, mu = basis if isinstance(basis, tuple) else (basis, basis, None)
        found = (u_in, u_out, mu, direction if self.direction is None else self.direction)
        if lm is None:
            return found
        arrays = namespace_of(lm)
        return tuple(None if part is None else arrays.float_array(part, lm) for part in found)  # type: ignore[return-value]

    @property
    def active(self) -> bool:
        return self.adaptive or self.keep != 1

    def scaled(self, factor: float) -> Self:
        if self.adaptive:
            if factor in (0, 1):
                return self if factor else self.replaced(adaptive=False, keep=1.0)
            raise PolicyError(
                f"an adaptive projection chooses its share at every step, so strength {factor:g} means nothing; give 0 or 1, or set "
                "adaptive: false"
            )
        return self.replaced(keep=max(0.0, 1 - (1 - self.keep) * factor))  # beyond the whole subspace there is nothing to remove

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
        self.u_in, u_out, self.mu, direction = settings.arrays(lm)
        width = self.head.weight.shape[1]
        if self.u_in.shape[0] != width:
            raise PolicyError(
                f"nullspace basis has shape {tuple(self.u_in.shape)}, but {lm.name} has hidden states of {width}: expected [{width}, r]"
            )
        self.projected = self.head.project(u_out)  # E U_out, f32[V, r]
        self.cosines = self._cosines(direction) if settings.adaptive else None

    def _cosines(self, direction: Array | None) -> Array:
        """(e_v . g) / ||e_v|| for every token, f32[V]."""
        if direction is None and self.u_in.shape[1] == 1:
            direction = self.u_in[:, 0]
        width = self.head.weight.shape[1]
        if direction is None or direction.shape != (width,):
            shape = None if direction is None else tuple(direction.shape)
            raise PolicyError(f"adaptive nullspace needs the bias direction g, f[{width}], for {self.lm.name}; got {shape}")
        arrays = namespace_of(self.lm)
        return self.head.project(direction[:, None])[:, 0] / arrays.clamp(arrays.norms(arrays.as_float(self.head.weight)), 1e-12)

    def keep(self, step: Step) -> torch.Tensor:
        """a f32[R]: the fixed share, or A-INLP's."""
        if self.cosines is None:
            return step.weight(self.settings.keep)
        arrays = step.arrays
        nucleus = step.logits >= arrays.ops.top_p_threshold(step.logits, _BIAS_NUCLEUS)
        bias = arrays.ops.row_products(self.cosines[None], step.probabilities * nucleus)[:, 0]
        low, high = _BIAS_BAND
        keep: torch.Tensor = arrays.where((bias >= low) & (bias <= high), step.weight(1.0), arrays.clamp(1 - abs(bias), _LEAST_KEEP))
        return keep

    def terms(self, step: Step) -> Terms:
        if step.hidden is None or (step.head_logits is None and self.head.softcap is not None):
            raise RuntimeError("nullspace needs hidden states")
        arrays, keep = step.arrays, self.keep(step)
        hidden = arrays.as_float(step.hidden)
        centred = hidden if self.mu is None else hidden - self.mu
        coefficients = arrays.ops.row_products(self.u_in.T, centred) * (keep - 1)[:, None]
        rows = None if self.cosines is None else keep != 1
        if self.head.softcap is None:
            return Terms((LowRank(self.projected, coefficients * self.head.scale),), rows)
        shift = arrays.ops.low_rank_delta(self.projected, coefficients)
        return Terms((Dense(self.head.delta(arrays.as_float(step.head_logits), shift)),), rows)


def _as_array(value: Any) -> Array:
    """f32 on the CPU: a tensor stays a tensor, everything else becomes a NumPy array; a model is given its own kind."""
    try:
        array = namespace("torch" if is_tensor(value) else "numpy").float_array(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PolicyError(f"a nullspace array is a {type(value).__name__}; expected a tensor or an array: U [d, r]") from error
    if not bool(namespace_for(array).isfinite(array).all()):
        raise PolicyError(f"a nullspace array of shape {tuple(array.shape)} holds values that aren't finite")
    return array


def checked_basis(basis: Any) -> Any:
    """U f32[d, r], or (U_in, U_out, mu), once it is known to be one."""
    if isinstance(basis, (tuple, list)) and len(basis) == 3 and not isinstance(basis[0], (int, float)):
        u_in, u_out, mu = (_as_array(part) for part in basis)
        if u_in.ndim != 2 or u_in.shape != u_out.shape or mu.shape != u_in.shape[:1]:
            raise PolicyError(
                "a LEACE basis is (U_in [d, r], U_out [d, r], mu [d]); got shapes "
                f"{tuple(u_in.shape)}, {tuple(u_out.shape)}, {tuple(mu.shape)}"
            )
        return (u_in, u_out, mu)
    u = _as_array(basis)
    if u.ndim == 1:
        u = u[:, None]
    if u.ndim != 2:
        raise PolicyError(f"basis has {u.ndim} dimensions; expected U [d, r] with orthonormal columns")
    error = abs(u.T @ u - namespace_for(u).eye(u.shape[1])).max()
    if not error <= _ORTHONORMAL_TOLERANCE:
        raise PolicyError(
            f"basis isn't orthonormal: U^T U differs from the identity by up to {float(error):.3g} (shape {tuple(u.shape)}); "
            "use torch.linalg.qr(U).Q, with one column a removed direction"
        )
    return u


def load_basis(source: str, lm: LanguageModel | None = None) -> tuple[Any, Array | None]:
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
    tensors = load_arrays(path)
    direction = _as_array(tensors["direction"]).reshape(-1) if "direction" in tensors else None
    if "basis" in tensors:
        return checked_basis(tensors["basis"]), direction
    if {"U_in", "U_out", "mu"} <= tensors.keys():
        return checked_basis((tensors["U_in"], tensors["U_out"], tensors["mu"])), direction
    raise PolicyError(f"{path} holds {', '.join(sorted(tensors))}; expected basis, or U_in, U_out and mu")


def layer_of_pack(source: str) -> int | None:
    """The layer whose states a pack was fitted on, -1 for those that the head reads; None for a bare file."""
    return int(read_pack(source, "subspace").card.settings.get("layer", LAST)) if is_pack(source) else None


def _row_space(matrix: Array) -> Array:
    """Orthonormal basis [d, r] of the row space of [n, d], small singular values left out relative to the largest."""
    _, singular, vt = namespace_for(matrix).svd(matrix)
    return vt[singular > singular.max() * 1e-6].T
