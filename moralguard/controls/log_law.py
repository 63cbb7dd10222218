"""The law of a row of logits as log-probabilities, for methods whose formula needs its normalising constant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # or NumPy arrays, on a model without torch
    import torch


def log_law(arrays: Any, logits: torch.Tensor) -> torch.Tensor:
    """log softmax over the last axis, f64 of f[..., V]; ``arrays`` is ``step.arrays``.

    A softmax in f64 has the same bits for a row alone and in any batch, and its logarithm is exact down to 745 nats under the most
    probable token, where it becomes -inf.
    """
    law: torch.Tensor = arrays.log(arrays.softmax(arrays.as_double(logits)))
    return law
