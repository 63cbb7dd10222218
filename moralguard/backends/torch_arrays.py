"""The functions of ``numpy_arrays`` for torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import moralguard_kernels as ops

__all__ = ["bool_", "float32", "int32", "int64", "maximum", "minimum", "ops", "where"]

bool_, int32, int64, float32 = torch.bool, torch.int32, torch.int64, torch.float32
where, minimum, maximum = torch.where, torch.minimum, torch.maximum


def integers(values: Any, lm: Any = None) -> Tensor:
    """i64 of integers in any form, on the model's device where one is given."""
    return torch.tensor(values, dtype=torch.int64, device=None if lm is None else lm.device)


def full(shape: tuple[int, ...], value: float, dtype: torch.dtype, like: Tensor | None = None) -> Tensor:
    """An array of one value, where ``like`` is."""
    return torch.full(shape, value, dtype=dtype, device=None if like is None else like.device)


def float_array(value: Any, lm: Any = None) -> Tensor:
    """f32 of numbers in any form, on the model's device where one is given, on the CPU without one; never part of a graph."""
    tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
    return tensor.to(device="cpu" if lm is None else lm.device, dtype=torch.float32)


def copy_of(value: Tensor) -> Tensor:
    """The same numbers in memory of their own."""
    return value.clone()


def left_padded(rows: Sequence[Sequence[int]], lm: Any) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, i64[R, W] both, 0 at padding."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.as_tensor(row)
        mask[i, width - len(row) :] = 1
    return ids.to(lm.device), mask.to(lm.device)


def take_rows(value: Tensor, rows: Tensor) -> Tensor:
    """These rows (i64[n]) of an array, wherever it is."""
    return value[rows.to(value.device)]


def beside(value: Tensor, like: Tensor) -> Tensor:
    """The same numbers where ``like`` is."""
    return value.to(like.device)


def on_host(value: Tensor) -> Tensor:
    """The same numbers in main memory."""
    return value.cpu()


def on_gpu(value: Tensor) -> bool:
    return value.is_cuda


def cat(parts: Sequence[Tensor], axis: int = 0) -> Tensor:
    return torch.cat(list(parts), dim=axis)


def stack(parts: Sequence[Tensor], axis: int = 0) -> Tensor:
    return torch.stack(list(parts), dim=axis)


def pad_left(values: Tensor, width: int, value: float) -> Tensor:
    """[R, width] of [R, W], with ``value`` in front."""
    return torch.nn.functional.pad(values, (width - values.shape[1], 0), value=value)


def repeat_rows(value: Tensor, times: int) -> Tensor:
    """All rows, ``times`` times one behind the other."""
    return value.repeat(times, *(1,) * (value.ndim - 1))


def masked_fill(values: Tensor, mask: Tensor, value: float) -> Tensor:
    """The values, but ``value`` where the mask is True."""
    return values.masked_fill(mask, value)


def as_float(values: Tensor) -> Tensor:
    """f32."""
    return values.float()


def as_double(values: Tensor) -> Tensor:
    """f64."""
    return values.double()


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype)


def scatter(values: Tensor, ids: Tensor, new: Any) -> Tensor:
    """A copy of [R, V] with ``new`` (a number or [R, C]) at ids i64[R, C]."""
    return values.scatter(-1, ids, new)


def gather(values: Tensor, ids: Tensor) -> Tensor:
    """[R, C] of [R, V] at ids i64[R, C]."""
    return values.gather(-1, ids)


def top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, ids i64), each [R, k], the largest first."""
    return torch.topk(values, k, dim=-1)


def softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, -1)


def log_sigmoid(values: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid(values)


def clamp(values: Tensor, least: float | None = None, most: float | None = None) -> Tensor:
    return values.clamp(least, most)


def largest(values: Tensor, axis: int) -> Tensor:
    """The largest along an axis."""
    return values.amax(axis)


def mean_known(values: Tensor) -> Tensor:
    """[R]: mean over the last axis of what isn't NaN."""
    return values.nanmean(-1)


def norms(values: Tensor) -> Tensor:
    """Euclidean length over the last axis."""
    return values.norm(dim=-1)


def isfinite(values: Tensor) -> Tensor:
    return torch.isfinite(values)


def isnan(values: Tensor) -> Tensor:
    return torch.isnan(values)


def isneginf(values: Tensor) -> Tensor:
    return torch.isneginf(values)


def tanh(values: Tensor) -> Tensor:
    return torch.tanh(values)


def log(values: Tensor) -> Tensor:
    return torch.log(values)


def flat_nonzero(mask: Tensor) -> Tensor:
    """Places i64[n] at which a mask [R] is True."""
    return mask.nonzero().squeeze(-1)


def transposed(matrix: Tensor) -> Tensor:
    """[m, n] of [n, m], laid out so that a product with it is fast."""
    return matrix.T


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U [n, k], S [k], Vt [k, m]) of [n, m]."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vt


def eye(size: int) -> Tensor:
    return torch.eye(size)
