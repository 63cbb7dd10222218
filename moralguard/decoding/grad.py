"""Gradient modes of the guard's own work, whatever mode the caller is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def plain_no_grad() -> Iterator[None]:
    """No gradients, and no inference tensors either, even inside a caller's ``torch.inference_mode()``: autograd can use what is
    made here."""
    with torch.inference_mode(False), torch.no_grad():
        yield
