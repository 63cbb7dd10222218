"""Fused logit rectification: the operations between a model's logits and the drawn token.

``rectify_logits``, ``sample_logits``, ``score_tokens`` and ``gumbel_noise`` are torch ops (``torch.ops.moralguard``): Triton kernels
for CUDA tensors, the specification in plain PyTorch for all others. What they are made of (``reference``) runs on any device.
``numpy_form`` is the same in NumPy and needs no torch. This package imports nothing of moralguard; torch is imported with the first
name that needs it (at once where it is loaded already, so that the ops are registered), Triton with the first CUDA tensor.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .library import gumbel_noise, rectify_logits, sample_logits, score_tokens
    from .philox import philox4x32
    from .reference import (
        attenuation_delta,
        entropy,
        finite_or_zero,
        gumbel_argmax,
        kl_divergence,
        low_rank_delta,
        min_p_threshold,
        mix_delta,
        rectify,
        row_products,
        row_sums,
        sanitize_logits,
        top_k_threshold,
        top_p_threshold,
        warp,
    )
    from .reference_ops import EMPTY, NAN_LOGITS, SPLIT

__all__ = [
    "EMPTY",
    "NAN_LOGITS",
    "SPLIT",
    "attenuation_delta",
    "entropy",
    "finite_or_zero",
    "gumbel_argmax",
    "gumbel_noise",
    "kl_divergence",
    "low_rank_delta",
    "min_p_threshold",
    "mix_delta",
    "philox4x32",
    "rectify",
    "rectify_logits",
    "row_products",
    "row_sums",
    "sample_logits",
    "sanitize_logits",
    "score_tokens",
    "top_k_threshold",
    "top_p_threshold",
    "warp",
]

_HOMES = {
    "library": ("gumbel_noise", "rectify_logits", "sample_logits", "score_tokens"),
    "philox": ("philox4x32",),
    "reference_ops": ("EMPTY", "NAN_LOGITS", "SPLIT"),
}


def _load() -> None:
    """Every name of the package, with torch."""
    homes = {name: home for home, names in _HOMES.items() for name in names}
    for name in __all__:
        globals()[name] = getattr(import_module(f"{__name__}.{homes.get(name, 'reference')}"), name)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load()
    return globals()[name]


if "torch" in sys.modules:
    _load()
