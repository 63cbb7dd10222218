"""Fused logit rectification: the operations between a model's logits and the drawn token.

``rectify_logits``, ``sample_logits`` and ``gumbel_noise`` are torch ops (``torch.ops.moralguard``): Triton kernels for CUDA tensors,
the specification in plain PyTorch for all others. What they are made of (``reference``) runs on any device. This package imports
nothing of moralguard and needs torch alone; Triton is imported with the first CUDA tensor.
"""

from .library import gumbel_noise, rectify_logits, sample_logits
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
    "top_k_threshold",
    "top_p_threshold",
    "warp",
]
