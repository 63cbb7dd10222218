"""The NumPy form against the PyTorch specification: the same tokens for the same seeds, the same laws up to the last bits."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import KINDS, TERMS, Problem, problem

from moralguard_kernels import numpy_form, reference, reference_ops

few = settings(deadline=None, max_examples=60, derandomize=True, database=None)
WARPS = ("free", "greedy", "k", "p", "min-p", "all", "mixed")


def as_numpy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    return [as_numpy(item) for item in value] if isinstance(value, list) else value


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    return problem(
        draw(st.sampled_from(KINDS)),
        tuple(draw(st.lists(st.sampled_from(TERMS), unique=True, max_size=4))),
        filters=draw(st.booleans()),
        warp=draw(st.sampled_from(WARPS)),
        rows=draw(st.integers(1, 4)),
        vocabulary=draw(st.sampled_from([300, 1000, 1501])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])),
        slots=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )


def law(logits: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        p = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
        return p / p.sum(-1, keepdims=True)


def same_law(ours: np.ndarray, wanted: torch.Tensor) -> None:
    expected = wanted.numpy()
    assert ours.dtype == expected.dtype
    assert np.array_equal(np.isneginf(ours), np.isneginf(expected))
    assert np.allclose(law(ours), law(expected), atol=1e-5, equal_nan=True)


@few
@given(problems())
def test_rectified_laws_agree(item: Problem) -> None:
    ours = numpy_form.rectify_logits(as_numpy(item.logits), **{k: as_numpy(v) for k, v in item.terms.items()})
    same_law(ours, reference_ops.rectify_logits(item.logits, **item.terms))


@few
@given(problems())
def test_the_same_tokens_are_drawn(item: Problem) -> None:
    arguments = {k: as_numpy(v) for k, v in (item.warp | item.terms).items()}
    token, log_p, kl, flags, other = numpy_form.sample_logits(
        as_numpy(item.logits), item.seed.numpy(), item.position.numpy(), **arguments, counterfactual=True
    )
    wanted = reference_ops.sample_logits(item.logits, item.seed, item.position, **item.warp, **item.terms, counterfactual=True)
    assert token.tolist() == wanted[0].tolist()
    assert other.tolist() == wanted[4].tolist()
    assert flags.tolist() == wanted[3].tolist()
    assert np.allclose(log_p, wanted[1].numpy(), rtol=1e-4, atol=1e-4)
    assert np.allclose(kl, wanted[2].numpy(), rtol=1e-4, atol=1e-4)


@few
@given(problems())
def test_scores_of_given_tokens_agree(item: Problem) -> None:
    tokens = torch.randint(item.logits.shape[1], (item.logits.shape[0],), generator=torch.Generator().manual_seed(1))
    ours = numpy_form.score_tokens(as_numpy(item.logits), tokens.numpy(), **{k: as_numpy(v) for k, v in item.terms.items()})
    for mine, wanted in zip(ours, reference_ops.score_tokens(item.logits, tokens, **item.terms), strict=True):
        assert mine.dtype == wanted.numpy().dtype
        assert np.allclose(mine, wanted.numpy(), rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_agree(kind: str) -> None:
    z, other = (problem(kind, seed=seed, rows=4).logits for seed in (3, 4))
    n, o = z.numpy(), other.numpy()
    pairs = {
        "sanitize_logits": ((n,), (z,)),
        "entropy": ((n,), (z,)),
        "kl_divergence": ((n, o), (z, other)),
        "row_sums": ((np.abs(np.nan_to_num(n)),), (z.nan_to_num().abs(),)),
        "finite_or_zero": ((n,), (z,)),
        "row_products": ((o[:, :3].T.copy(), n[:, :4]), (other[:, :3].T.contiguous(), z[:, :4])),
    }
    for name, (ours, theirs) in pairs.items():
        found, wanted = getattr(numpy_form, name)(*ours), getattr(reference, name)(*theirs).numpy()
        assert found.dtype == wanted.dtype, name
        assert np.allclose(found, wanted, rtol=2e-5, atol=1e-5, equal_nan=True), name
    clean, ours = reference.sanitize_logits(z), numpy_form.sanitize_logits(n)
    for k in (1, 7, 999, 1000, 5000):
        assert np.array_equal(numpy_form.top_k_threshold(ours, k), reference.top_k_threshold(clean, k).numpy())
    for p in (1e-9, 0.3, 0.9, 1.0):
        assert np.array_equal(numpy_form.top_p_threshold(ours, p), reference.top_p_threshold(clean, p).numpy())
        assert np.allclose(numpy_form.min_p_threshold(ours, p), reference.min_p_threshold(clean, p).numpy(), atol=1e-6)


def test_noise_is_bit_for_bit_the_same() -> None:
    from moralguard_kernels.philox import gumbel_noise

    g = torch.Generator().manual_seed(0)
    seed, position = torch.randint(-(2**62), 2**62, (5,), generator=g), torch.randint(0, 9999, (5,), generator=g)
    ids = torch.randint(0, 200_000, (5, 64), generator=g)
    ours = numpy_form.gumbel_noise(seed.numpy(), position.numpy(), ids.numpy())
    assert np.array_equal(ours, gumbel_noise(seed, position, ids).numpy())


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    item = problem("normal", ("two mixes", "low rank", "attenuation"), rows=3, filters=True)
    logits = item.logits.numpy()
    terms = {k: as_numpy(v) for k, v in item.terms.items()}
    together = numpy_form.rectify_logits(logits, **terms)
    shared = ("projection", "groups", "keep_rest")
    for row in range(3):
        one = slice(row, row + 1)
        mine = {k: v if k in shared else [s[one] for s in v] if isinstance(v, list) else v[one] for k, v in terms.items()}
        assert np.array_equal(numpy_form.rectify_logits(logits[one], **mine), together[one])


def test_groups_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match="the groups summing to the number of sources"):
        numpy_form.rectify_logits(np.zeros((1, 4), np.float32), sources=[np.zeros((1, 4), np.float32)], groups=[2], weights=np.ones((1, 3)))


def test_nothing_of_it_imports_torch() -> None:
    code = "import sys, moralguard_kernels.numpy_form; assert 'torch' not in sys.modules; import moralguard_kernels as k; k.rectify"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
