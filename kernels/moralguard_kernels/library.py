"""Registration of the ops with torch, under ``torch.ops.moralguard``: CUDA tensors take the kernels, all others the reference.

The reference also runs on CUDA tensors where Triton isn't installed, on AMD's GPUs, for which the kernels were never compiled, and where
``MORALGUARD_KERNELS=reference`` asks for it: the same tokens, several times slower, not in CUDA graphs.

``Library.define`` and ``impl`` rather than ``custom_op``, which costs several times as much a call; fake implementations let
``torch.compile(fullgraph=True)`` and CUDA graphs go through.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch

from . import philox, reference_ops

_ROWS = "Tensor logits, "
_TERMS = (
    "Tensor[]? sources=None, int[]? groups=None, Tensor? weights=None, Tensor? projection=None, Tensor? coefficients=None, "
    "Tensor[]? biased=None, Tensor? decay_constant=None, Tensor? epsilon=None, Tensor? candidate_ids=None, Tensor? candidate_bias=None, "
    "Tensor? candidate_count=None, bool keep_rest=True, Tensor? base_top_k=None, Tensor? base_top_p=None, Tensor? base_min_p=None"
)
_SCHEMAS = {
    "rectify_logits": f"({_ROWS}Tensor? slots=None, {_TERMS}) -> Tensor",
    "sample_logits": (
        f"({_ROWS}Tensor seed, Tensor position, Tensor? slots=None, Tensor? temperature=None, Tensor? top_k=None, Tensor? top_p=None, "
        f"Tensor? min_p=None, {_TERMS}, bool counterfactual=False, bool summary=True) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "score_tokens": f"({_ROWS}Tensor tokens, Tensor? slots=None, {_TERMS}) -> (Tensor, Tensor, Tensor)",
    "gumbel_noise": "(Tensor seed, Tensor position, Tensor token_ids) -> Tensor",
}


@cache
def _launch() -> ModuleType | None:
    """The kernels' entry points, imported with Triton when the first CUDA tensor comes; None where the reference is to run instead."""
    chosen = os.environ.get("MORALGUARD_KERNELS", "triton")
    if chosen not in ("triton", "reference"):
        raise ValueError(f"MORALGUARD_KERNELS is {chosen!r}; expected 'triton' or 'reference'")
    if chosen == "reference":
        return None
    if torch.version.hip is not None:
        missing = "the kernels are for NVIDIA's GPUs"
    else:
        try:
            from .fused import launch
        except ImportError as error:
            missing = f"{error.name or 'triton'} isn't installed"
        else:
            return launch
    warnings.warn(
        f"{missing}, so the guard's arithmetic runs in plain PyTorch on this GPU, several times slower. The tokens are the same; "
        "MORALGUARD_KERNELS=reference says that this is meant",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def _fused(name: str) -> Callable[..., Any]:
    """An op on CUDA tensors."""

    def call(first: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        launch = _launch()
        if launch is None:
            return _REFERENCES[name](first, *args, **keywords)
        with torch.cuda.device(first.device):  # Triton launches on the current device, wherever its arguments are
            return getattr(launch, name)(first, *args, **keywords)

    return call


def _fake_rectify_logits(logits: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(logits.shape, dtype=dtype)


def _fake_sample_logits(
    logits: torch.Tensor, seed: torch.Tensor, position: torch.Tensor, *args: Any, **keywords: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    names = [argument.name for argument in torch.ops.moralguard.sample_logits.default._schema.arguments]
    given = dict(zip(names[3:], args, strict=False)) | keywords
    rows = logits.shape[0]
    summary = rows if given.get("summary", True) else 0
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(summary, dtype=torch.float32),
        logits.new_empty(summary, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.int32),
        logits.new_empty(rows if given.get("counterfactual", False) else 0, dtype=torch.int64),
    )


def _fake_score_tokens(logits: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=dtype), logits.new_empty(rows, dtype=dtype), logits.new_empty(rows, dtype=dtype)


def _fake_gumbel_noise(seed: torch.Tensor, position: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return token_ids.new_empty(token_ids.shape, dtype=torch.float32)


_REFERENCES: dict[str, Callable[..., Any]] = {
    "rectify_logits": reference_ops.rectify_logits,
    "sample_logits": reference_ops.sample_logits,
    "score_tokens": reference_ops.score_tokens,
    "gumbel_noise": philox.gumbel_noise,
}
_FAKES: dict[str, Callable[..., Any]] = {
    "rectify_logits": _fake_rectify_logits,
    "sample_logits": _fake_sample_logits,
    "score_tokens": _fake_score_tokens,
    "gumbel_noise": _fake_gumbel_noise,
}

_library = torch.library.Library("moralguard", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _REFERENCES[_name], "CPU")
    _library.impl(_name, _REFERENCES[_name], "CompositeExplicitAutograd")  # every other device
    _library.impl(_name, _fused(_name), "CUDA")
    torch.library.register_fake(f"moralguard::{_name}", _FAKES[_name], lib=_library)


def rectify_logits(
    logits: torch.Tensor,
    slots: torch.Tensor | None = None,
    sources: Sequence[torch.Tensor] | None = None,
    groups: Sequence[int] | None = None,
    weights: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    coefficients: torch.Tensor | None = None,
    biased: Sequence[torch.Tensor] | None = None,
    decay_constant: torch.Tensor | None = None,
    epsilon: torch.Tensor | None = None,
    candidate_ids: torch.Tensor | None = None,
    candidate_bias: torch.Tensor | None = None,
    candidate_count: torch.Tensor | None = None,
    keep_rest: bool = True,
    base_top_k: torch.Tensor | None = None,
    base_top_p: torch.Tensor | None = None,
    base_min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """``reference_ops.rectify_logits`` on whatever device the logits are."""
    return torch.ops.moralguard.rectify_logits(
        logits, slots, sources, groups, weights, projection, coefficients, biased, decay_constant, epsilon,
        candidate_ids, candidate_bias, candidate_count, keep_rest, base_top_k, base_top_p, base_min_p,
    )  # fmt: skip


def sample_logits(
    logits: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    slots: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    sources: Sequence[torch.Tensor] | None = None,
    groups: Sequence[int] | None = None,
    weights: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    coefficients: torch.Tensor | None = None,
    biased: Sequence[torch.Tensor] | None = None,
    decay_constant: torch.Tensor | None = None,
    epsilon: torch.Tensor | None = None,
    candidate_ids: torch.Tensor | None = None,
    candidate_bias: torch.Tensor | None = None,
    candidate_count: torch.Tensor | None = None,
    keep_rest: bool = True,
    base_top_k: torch.Tensor | None = None,
    base_top_p: torch.Tensor | None = None,
    base_min_p: torch.Tensor | None = None,
    counterfactual: bool = False,
    summary: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``reference_ops.sample_logits`` on whatever device the logits are."""
    return torch.ops.moralguard.sample_logits(
        logits, seed, position, slots, temperature, top_k, top_p, min_p, sources, groups, weights, projection, coefficients, biased,
        decay_constant, epsilon, candidate_ids, candidate_bias, candidate_count, keep_rest, base_top_k, base_top_p, base_min_p,
        counterfactual, summary,
    )  # fmt: skip


def score_tokens(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    slots: torch.Tensor | None = None,
    sources: Sequence[torch.Tensor] | None = None,
    groups: Sequence[int] | None = None,
    weights: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    coefficients: torch.Tensor | None = None,
    biased: Sequence[torch.Tensor] | None = None,
    decay_constant: torch.Tensor | None = None,
    epsilon: torch.Tensor | None = None,
    candidate_ids: torch.Tensor | None = None,
    candidate_bias: torch.Tensor | None = None,
    candidate_count: torch.Tensor | None = None,
    keep_rest: bool = True,
    base_top_k: torch.Tensor | None = None,
    base_top_p: torch.Tensor | None = None,
    base_min_p: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``reference_ops.score_tokens`` on whatever device the logits are."""
    return torch.ops.moralguard.score_tokens(
        logits, tokens, slots, sources, groups, weights, projection, coefficients, biased, decay_constant, epsilon,
        candidate_ids, candidate_bias, candidate_count, keep_rest, base_top_k, base_top_p, base_min_p,
    )  # fmt: skip


def gumbel_noise(seed: torch.Tensor, position: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """``philox.gumbel_noise`` on whatever device the ids are."""
    return torch.ops.moralguard.gumbel_noise(seed, position, token_ids)
