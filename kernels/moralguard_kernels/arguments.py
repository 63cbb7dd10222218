"""Checks of the ops' arguments, the same for the reference and the kernels: what doesn't fit is an error, not a kernel's stray read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_A_ROW = ("slots", "position", "tokens", "candidate_count")
_A_SLOT = (
    "seed", "temperature", "top_k", "top_p", "min_p", "decay_constant", "epsilon", "base_top_k", "base_top_p", "base_min_p",
)  # fmt: skip


def check_arguments(given: Mapping[str, Any]) -> None:
    """Shapes and devices of an op's arguments, by name, as far as they can be known without looking at a number.

    Raises:
        ValueError: names the tensor, says what it is and what was expected.
    """
    logits = given["logits"]
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits of shape {tuple(logits.shape)}, {logits.dtype}; expected floating-point numbers [rows, vocabulary]")
    rows, vocabulary = logits.shape
    for name in ("sources", "biased"):
        for i, source in enumerate(given[name] or ()):
            _expect(f"{name}[{i}]", source, (rows, vocabulary), logits)
    for name in _A_ROW:
        if given.get(name) is not None:
            _expect(name, given[name], (rows,), logits)
    count = _check_slots(given, logits)
    if given["sources"] or given["groups"] or given["weights"] is not None:
        _check_mixes(given, count)
    for one, other, size in (("projection", "coefficients", vocabulary), ("candidate_ids", "candidate_bias", rows)):
        first, second = given[one], given[other]
        if (first is None) != (second is None):
            raise ValueError(f"{one if second is None else other} without {other if second is None else one}; give both or neither")
        if first is not None:
            _expect(one, first, (size, first.shape[-1]), logits)
            _expect(other, second, (rows, first.shape[-1]), logits)
    if given["biased"] and (given["decay_constant"] is None or given["epsilon"] is None):
        raise ValueError("biased sources without decay_constant and epsilon; give all three or none")


def check_noise_arguments(seed: torch.Tensor, position: torch.Tensor, token_ids: torch.Tensor) -> None:
    """``check_arguments`` of ``gumbel_noise``."""
    if token_ids.ndim != 2:
        raise ValueError(f"token_ids of shape {tuple(token_ids.shape)}; expected [rows, tokens]")
    for name, tensor in (("seed", seed), ("position", position)):
        _expect(name, tensor, (token_ids.shape[0],), token_ids, "token_ids")


def _check_slots(given: Mapping[str, Any], logits: torch.Tensor) -> int | None:
    """The number of slots; None where no parameter tells."""
    count = logits.shape[0] if given["slots"] is None else None
    beside, what = logits, "logits"
    for name in _A_SLOT:
        parameter = given.get(name)
        if parameter is None:
            continue
        if count is None:  # the first one tells
            _expect(name, parameter, (parameter.numel(),), logits)
            count, beside, what = parameter.numel(), parameter, name
        _expect(name, parameter, (count,), beside, what)
    return count


def _check_mixes(given: Mapping[str, Any], slots: int | None) -> None:
    sources, groups, weights = given["sources"] or (), given["groups"] or (), given["weights"]
    columns = len(sources) + len(groups)
    fits = weights is not None and weights.ndim == 2 and weights.shape[1] == columns and sum(groups) == len(sources)
    if not fits or slots not in (None, weights.shape[0]):
        raise ValueError(
            f"weights of shape {None if weights is None else tuple(weights.shape)} for {len(sources)} sources in groups {list(groups)} and "
            f"{'any number of' if slots is None else slots} slots; expected [slots, sources + groups], the groups summing to the number of "
            "sources"
        )
    _expect("weights", weights, tuple(weights.shape), given["logits"])


def _expect(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], beside: torch.Tensor, what: str = "logits") -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} beside {what} of shape {tuple(beside.shape)}; expected {shape}")
    if tensor.device != beside.device:
        raise ValueError(f"{name} on {tensor.device}, {what} on {beside.device}; move them to one device")
