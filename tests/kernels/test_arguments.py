"""Arguments that don't fit: the reference and the kernels' entry points refuse the same, by name, before anything is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from problems import Problem, problem

from moralguard_kernels import philox, reference_ops

MODULES = [reference_ops]
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from moralguard_kernels.fused import launch

    MODULES.append(launch)

A_ROW = ("slots", "position", "coefficients", "candidate_ids", "candidate_bias", "candidate_count")
A_SLOT = (
    "seed",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "weights",
    "decay_constant",
    "epsilon",
    "base_top_k",
    "base_top_p",
    "base_min_p",
)


def whole() -> dict[str, Any]:
    """Every argument of ``sample_logits`` at once."""
    p: Problem = problem("normal", ("two mixes", "low rank", "attenuation", "candidates"), filters=True, warp="mixed", slots=True, seed=1)
    return {"logits": p.logits, "seed": p.seed, "position": p.position, **p.warp, **p.terms}


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    arguments = whole()
    value = arguments[name]
    arguments[name] = [*value[:-1], change(value[-1])] if isinstance(value, list) else change(value)
    return arguments


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", [*A_ROW, *A_SLOT, "sources", "biased", "projection"])
def test_a_tensor_of_another_size_is_named(module: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}(\[\d\])? of shape \(.*expected"):
        module.sample_logits(**changed(name, lambda tensor: tensor[:-1]))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", [*A_ROW, *A_SLOT, "sources", "biased", "projection"])
def test_a_tensor_on_another_device_is_named(module: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}(\[\d\])? on meta, \w+ on cpu; move them to one device"):
        module.sample_logits(**changed(name, lambda tensor: tensor.to("meta")))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    "missing", ["coefficients", "projection", "candidate_ids", "candidate_bias", "decay_constant", "epsilon", "weights"]
)
def test_half_a_term_is_refused(module: Any, missing: str) -> None:
    arguments = whole()
    del arguments[missing]
    with pytest.raises(ValueError, match=f"without.*{missing}|{missing} of shape None"):
        module.sample_logits(**arguments)


@pytest.mark.parametrize("module", MODULES)
def test_scores_and_dense_logits_are_checked_alike(module: Any) -> None:
    p = problem("normal", ("mix",))
    with pytest.raises(ValueError, match=r"sources\[1\] of shape \(3, 999\) beside logits of shape \(3, 1000\)"):
        module.rectify_logits(p.logits, **dict(p.terms, sources=[p.terms["sources"][0], p.terms["sources"][1][:, 1:]]))
    with pytest.raises(ValueError, match=r"tokens of shape \(2,\)"):
        module.score_tokens(p.logits, torch.tensor([1, 2]), **p.terms)
    with pytest.raises(ValueError, match=r"logits of shape \(3, 1000\), torch.int64; expected floating-point"):
        module.rectify_logits(p.logits.long())


@pytest.mark.parametrize("function", [philox.gumbel_noise, *(module.gumbel_noise for module in MODULES[1:])])
def test_noise_of_other_rows_is_refused(function: Any) -> None:
    with pytest.raises(ValueError, match=r"position of shape \(2,\) beside token_ids of shape \(3, 5\)"):
        function(torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.int64))


@pytest.mark.parametrize("module", MODULES[1:])
def test_the_kernels_say_what_only_the_reference_takes(module: Any) -> None:
    p = problem("normal", warp="mixed")
    with pytest.raises(ValueError, match="float64 logits"):
        module.sample_logits(p.logits.double(), p.seed, p.position, **p.warp)
    many = torch.zeros(40_000, 4)
    with pytest.raises(ValueError, match="80000 rows in one call, the unguarded token's counted; at most 65535"):
        module.sample_logits(many, torch.zeros(40_000, dtype=torch.int64), torch.zeros(40_000, dtype=torch.int64), counterfactual=True)


@pytest.mark.parametrize("module", MODULES[1:])
def test_a_tensor_in_another_precision_changes_no_bit(module: Any) -> None:
    """Settings that come as float64, of NumPy or of Python's numbers, act as their float32 values."""
    arguments = whole()
    wide = arguments | {name: arguments[name].double() for name in A_SLOT if arguments[name].dtype == torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(module.sample_logits(**arguments), module.sample_logits(**wide), strict=True))
