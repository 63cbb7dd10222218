"""Which arrays a model computes with: torch tensors, or NumPy arrays where there is no torch.

What is the same on both (controls, sessions, terms) is written once against a namespace: ``torch_arrays`` or ``numpy_arrays``, two
modules of the same functions. torch is imported only with the first.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

Array = Any
"""A torch tensor, or a NumPy array on a model without torch."""


@cache
def namespace(kind: str) -> Any:
    """The functions for arrays of a kind, "torch" or "numpy"."""
    return import_module(f"moralguard.backends.{kind}_arrays")


def kind_of(lm: Any) -> str:
    """The kind of a model's arrays."""
    return getattr(lm, "arrays", "torch")


def namespace_of(lm: Any) -> Any:
    """The functions for a model's arrays."""
    return namespace(kind_of(lm))


def namespace_for(array: Array) -> Any:
    """The functions for this array."""
    return namespace("numpy" if isinstance(array, np.ndarray) else "torch")


def is_language_model(value: Any) -> bool:
    """Whether it is a model as the guard sees it: ``hf.LanguageModel`` or ``onnx.model.OnnxLanguageModel``."""
    return getattr(value, "arrays", None) in ("torch", "numpy") and hasattr(value, "new_cache")


def is_tensor(value: Any) -> bool:
    """Whether it is a torch tensor; without importing torch, as without torch there is none."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def weights_of(lm: Any) -> object:
    """What two models share that are the same weights."""
    return getattr(lm, "model", lm)
