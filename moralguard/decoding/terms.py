"""What a control adds to the rectification: declarative terms, so that every backend can execute them.

Shapes: R rows of logits, V vocabulary entries, C candidates, r rank.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from moralguard.backends.arrays import namespace_for

if TYPE_CHECKING:  # or NumPy arrays, on a model without torch
    import torch


@dataclass(frozen=True)
class Mix:
    """delta = sum_i weights_i * sources_i + base_weight * z. Sources f[R, V]; weights f[R] each; base_weight f[R] or None (0)."""

    sources: tuple[torch.Tensor, ...]
    weights: tuple[torch.Tensor, ...]
    base_weight: torch.Tensor | None = None


@dataclass(frozen=True)
class LowRank:
    """delta = coefficients @ projection^T. projection f32[V, r], shared by all rows; coefficients f32[R, r]."""

    projection: torch.Tensor
    coefficients: torch.Tensor


@dataclass(frozen=True)
class Sparse:
    """delta = bias at candidate ids. ids i64[R, C], distinct in a row; bias f[R, C]; keep_rest False removes all other tokens."""

    ids: torch.Tensor
    bias: torch.Tensor
    keep_rest: bool = True


@dataclass(frozen=True)
class Attenuation:
    """delta = max(log epsilon, decay_constant * min(0, p - max_j q_j)). Sources f[R, V] each; the constants f[R]."""

    sources: tuple[torch.Tensor, ...]
    decay_constant: torch.Tensor
    epsilon: torch.Tensor


@dataclass(frozen=True)
class Dense:
    """delta f[R, V] as it is."""

    delta: torch.Tensor


@dataclass(frozen=True)
class Keep:
    """The tokens that stay, judged on the **base** logits: top_k, the nucleus of mass top_p, min_p of the largest probability."""

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


@dataclass(frozen=True)
class Only:
    """The tokens that stay, bool[R, V]: chosen by the control, where no threshold on the base tells them."""

    mask: torch.Tensor


Term = Mix | LowRank | Sparse | Attenuation | Dense | Keep | Only


@dataclass(frozen=True)
class Terms:
    """The terms of one control at one step.

    Attributes:
        terms: in any order; deltas add, keep-sets intersect.
        rows: bool[R], where the control acts; None means every row. Other rows pass through untouched.
        carry: tensors f[R, ...] that ``commit`` needs from this computation (PPLM's perturbed cache); not part of the law.
    """

    terms: tuple[Term, ...] = ()
    rows: torch.Tensor | None = None
    carry: dict[str, torch.Tensor] = field(default_factory=dict)


def taken(terms: tuple[Term, ...], rows: torch.Tensor) -> tuple[Term, ...]:
    """These rows (i64[n]) of terms."""
    return tuple(replace(term, **{field.name: _rows_of(getattr(term, field.name), rows) for field in _by_row(term)}) for term in terms)


def _by_row(term: Term) -> list[Field[Any]]:
    """The parts of a term that have one row a row of logits: all but thresholds and the projection, which is shared."""
    return [] if isinstance(term, Keep) else [field for field in fields(term) if field.name not in ("projection", "keep_rest")]


def _rows_of(value: Any, rows: torch.Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(_rows_of(each, rows) for each in value)
    return None if value is None else namespace_for(value).take_rows(value, rows)
