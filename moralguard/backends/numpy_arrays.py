"""The functions of ``torch_arrays`` for NumPy arrays; importing this imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moralguard_kernels import numpy_form as ops
from moralguard_kernels.levels import kth_largest
from moralguard_kernels.numpy_rows import quiet

__all__ = ["bool_", "float32", "int32", "int64", "maximum", "minimum", "ops", "where"]

Array = NDArray[Any]

bool_, int32, int64, float32 = np.bool_, np.int32, np.int64, np.float32
where, minimum, maximum = np.where, np.minimum, np.maximum


def integers(values: Any, lm: Any = None) -> Array:
    """i64 of integers in any form."""
    return np.array(values, dtype=np.int64)


def full(shape: tuple[int, ...], value: float, dtype: Any, like: Array | None = None) -> Array:
    """An array of one value."""
    return np.full(shape, value, dtype=dtype)


def float_array(value: Any, lm: Any = None) -> Array:
    """f32 of numbers in any form; a torch tensor's, too, where somebody has one.

    Raises:
        TypeError, ValueError: they are no numbers.
    """
    if hasattr(value, "detach"):
        value = value.detach().to("cpu").float().numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"a {type(value).__name__} isn't an array of numbers")
    return array.astype(np.float32, copy=False)


def copy_of(value: Array) -> Array:
    """The same numbers in memory of their own."""
    return value.copy()


def left_padded(rows: Sequence[Sequence[int]], lm: Any) -> tuple[Array, Array]:
    """Token ids and their mask, i64[R, W] both, 0 at padding."""
    width = max(len(row) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return ids, mask


def take_rows(value: Array, rows: Array) -> Array:
    """These rows (i64[n]) of an array."""
    return value[rows]


def beside(value: Any, like: Array) -> Array:
    """The same numbers as an array."""
    return value if isinstance(value, np.ndarray) else float_array(value)


def on_host(value: Array) -> Array:
    return value


def on_gpu(value: Array) -> bool:
    return False


def cat(parts: Sequence[Array], axis: int = 0) -> Array:
    return np.concatenate(list(parts), axis=axis)


def stack(parts: Sequence[Array], axis: int = 0) -> Array:
    return np.stack(list(parts), axis=axis)


def pad_left(values: Array, width: int, value: float) -> Array:
    """[R, width] of [R, W], with ``value`` in front."""
    return np.pad(values, ((0, 0), (width - values.shape[1], 0)), constant_values=value)


def repeat_rows(value: Array, times: int) -> Array:
    """All rows, ``times`` times one behind the other."""
    return np.tile(value, (times, *(1,) * (value.ndim - 1)))


def masked_fill(values: Array, mask: Array, value: float) -> Array:
    """The values, but ``value`` where the mask is True."""
    return np.where(mask, values.dtype.type(value), values)


def as_float(values: Array) -> Array:
    """f32."""
    return np.asarray(values, dtype=np.float32)


def as_double(values: Array) -> Array:
    """f64."""
    return np.asarray(values, dtype=np.float64)


def cast(values: Array, dtype: Any) -> Array:
    return values.astype(dtype)


def scatter(values: Array, ids: Array, new: Any) -> Array:
    """A copy of [R, V] with ``new`` (a number or [R, C]) at ids i64[R, C]."""
    changed = values.copy()
    np.put_along_axis(changed, ids, new, -1)
    return changed


def gather(values: Array, ids: Array) -> Array:
    """[R, C] of [R, V] at ids i64[R, C]."""
    return np.take_along_axis(values, ids, -1)


@quiet
def top_k(values: Array, k: int) -> tuple[Array, Array]:
    """(values, ids i64), each [R, k], the largest first, the lowest id first of equals; NaN counts as the largest."""
    if values.dtype.kind != "f":
        values = values.astype(np.float32)
    ids = np.empty((len(values), k), dtype=np.int64)
    for row, own in enumerate(np.where(np.isnan(values), np.inf, values)):
        least = own.dtype.type(kth_largest(own, k))
        above = np.flatnonzero(own > least)
        found = np.sort(np.concatenate([above, np.flatnonzero(own == least)[: k - len(above)]]))
        ids[row] = found[np.argsort(-own[found], kind="stable")]
    return gather(values, ids), ids


def softmax(logits: Array) -> Array:
    return ops.softmax(logits)


@quiet
def log_sigmoid(values: Array) -> Array:
    return np.minimum(values, 0) - np.log1p(np.exp(-np.abs(values)))


def clamp(values: Array, least: float | None = None, most: float | None = None) -> Array:
    return np.clip(values, least, most)


def largest(values: Array, axis: int) -> Array:
    """The largest along an axis."""
    return values.max(axis)


@quiet
def mean_known(values: Array) -> Array:
    """[R]: mean over the last axis of what isn't NaN."""
    known = ~np.isnan(values)
    return np.where(known, values, values.dtype.type(0)).sum(-1) / known.sum(-1).astype(values.dtype)


def norms(values: Array) -> Array:
    """Euclidean length over the last axis."""
    return np.sqrt((values * values).sum(-1))


def isfinite(values: Array) -> Array:
    return np.isfinite(values)


def isnan(values: Array) -> Array:
    return np.isnan(values)


def isneginf(values: Array) -> Array:
    return np.isneginf(values)


def tanh(values: Array) -> Array:
    return np.tanh(values)


@quiet
def log(values: Array) -> Array:
    return np.log(values)


def flat_nonzero(mask: Array) -> Array:
    """Places i64[n] at which a mask [R] is True."""
    return np.flatnonzero(mask)


def transposed(matrix: Array) -> Array:
    """[m, n] of [n, m]."""
    return matrix.T


def svd(matrix: Array) -> tuple[Array, Array, Array]:
    """(U [n, k], S [k], Vt [k, m]) of [n, m]."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u, s, vt


def eye(size: int) -> Array:
    return np.eye(size, dtype=np.float32)
