"""Fused logit rectification: the operations between a model's logits and the drawn token.

``reference`` is the specification in plain PyTorch. This package imports nothing of moralguard and needs torch alone.
"""

from .philox import gumbel_noise, philox4x32
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

__all__ = [
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
    "row_products",
    "row_sums",
    "sanitize_logits",
    "top_k_threshold",
    "top_p_threshold",
    "warp",
]
