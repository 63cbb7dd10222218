"""The ops as torch knows them, and their law: float64, draws by chi-squared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import KINDS, TERMS, Problem, problem
from scipy import stats

import moralguard_kernels as ops


def naive_law(p: Problem) -> np.ndarray:
    """exp of float64 log-probabilities of the rectified law, by loops over rows and the formulas of the module's docstring."""
    z = p.logits.double().numpy()
    t = p.terms
    out = np.full_like(z, -np.inf)
    slots = t["slots"].tolist() if "slots" in t else list(range(len(z)))
    biggest = float(torch.finfo(torch.float32).max)
    for r, row in enumerate(z):
        s = slots[r]
        base = np.where(np.isnan(row), -np.inf, np.minimum(row, biggest))
        if np.all(np.isneginf(base)):
            continue
        total = base.copy()
        column = source = 0
        for size in t.get("groups", []):
            delta = base * float(t["weights"][s, column])
            for i in range(size):
                delta = delta + t["sources"][source + i][r].double().numpy() * float(t["weights"][s, column + 1 + i])
            total += np.where(np.abs(delta) <= biggest, delta, 0.0)
            column, source = column + 1 + size, source + size
        if "projection" in t:
            total += t["projection"].double().numpy() @ t["coefficients"][r].double().numpy()
        p_base = np.exp(base - base.max())
        p_base /= p_base.sum()
        if "biased" in t:
            q = np.max([softmax(b[r].double().numpy()) for b in t["biased"]], axis=0)
            if not np.isnan(q).any() and not any(np.isnan(b[r].double().numpy()).any() for b in t["biased"]):
                total += np.maximum(np.log(float(t["epsilon"][s])), float(t["decay_constant"][s]) * np.minimum(0, p_base - q))
        keep = ~np.isneginf(base)
        if "base_top_p" in t:
            above = np.array([p_base[base > value].sum() for value in base])
            count = np.array([(base > value).sum() for value in base])
            k, top_p, min_p = int(t["base_top_k"][s]), float(t["base_top_p"][s]), float(t["base_min_p"][s])
            keep &= (count < k) if k else True
            keep &= (above < top_p) if top_p < 1 else True
            keep &= p_base >= min_p * p_base.max()
        if "candidate_ids" in t:
            count = int(t["candidate_count"][r]) if "candidate_count" in t else t["candidate_ids"].shape[1]
            ids = t["candidate_ids"][r, : max(count, 0)].numpy()
            total[ids] += t["candidate_bias"][r, : max(count, 0)].double().numpy()
            if not t["keep_rest"] and count >= 0:
                keep &= np.isin(np.arange(len(base)), ids)
        out[r] = np.where(keep, total, -np.inf)
    return np.stack([softmax(row) for row in out])


def softmax(row: np.ndarray) -> np.ndarray:
    if np.all(np.isneginf(row)):
        return np.zeros_like(row)
    e = np.exp(row - row.max())
    return e / e.sum()


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([kind for kind in KINDS if kind != "holes"]),
    terms=st.lists(st.sampled_from(TERMS), unique=True, max_size=4),
    filters=st.booleans(),
    slots=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_probabilities_are_within_1e_5_of_float64(kind: str, terms: list[str], filters: bool, slots: bool, seed: int) -> None:
    if "mix" in terms and "two mixes" in terms:
        terms.remove("mix")
    p = problem(kind, tuple(terms), filters=filters, slots=slots, seed=seed, vocabulary=400)
    found = torch.softmax(ops.rectify_logits(p.logits, **p.terms).double(), -1).nan_to_num(0.0).numpy()
    wanted = naive_law(p)
    # where float32 puts a token on the other side of a filter's edge, its whole probability differs: that is no error of arithmetic
    same = (found > 0) == (wanted > 0)
    if filters and not same.all():
        assert (~same).sum(-1).max() <= 1
        return
    assert np.abs(found - wanted).max() < 1e-5


@pytest.mark.parametrize("terms", [(), ("mix",), ("mix", "candidates")])
def test_log_probability_and_kl_are_those_of_the_rectified_law(terms: tuple[str, ...]) -> None:
    p = problem("normal", terms, filters="candidates" not in terms, warp="mixed", seed=6)
    token, log_probability, kl, flags, other = ops.sample_logits(p.logits, p.seed, p.position, **p.warp, **p.terms, counterfactual=True)
    guarded, base = naive_law(p), np.stack([softmax(row) for row in p.logits.double().numpy()])
    rows = np.arange(3)
    assert np.allclose(log_probability.numpy(), np.log(guarded[rows, token.numpy()]), atol=1e-5)
    wanted = [sum(g * np.log(g / b) for g, b in zip(guarded[r], base[r], strict=True) if g > 0) for r in rows]
    assert np.allclose(kl.numpy(), wanted, atol=1e-4)
    assert flags.tolist() == [0, 0, 0]
    assert torch.equal(other, ops.sample_logits(p.logits, p.seed, p.position, **p.warp)[0])


def test_draws_follow_the_law_at_every_temperature() -> None:
    """A million draws each, chi-squared, Holm's correction over the temperatures at .001."""
    vocabulary, draws, chunk = 16, 1_000_000, 250_000
    z = torch.linspace(-2.0, 2.5, vocabulary)[torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))]
    values = []
    for temperature in (0.5, 1.0, 1.7):
        counts = torch.zeros(vocabulary, dtype=torch.int64)
        for first in range(0, draws, chunk):
            rows = z.expand(chunk, vocabulary)
            drawn = ops.gumbel_argmax(rows / temperature, torch.arange(first, first + chunk), torch.full((chunk,), 17))
            counts += torch.bincount(drawn, minlength=vocabulary)
        expected = torch.softmax(z.double() / temperature, -1).numpy() * draws
        values.append(stats.chisquare(counts.numpy(), expected).pvalue)
    for rank, value in enumerate(sorted(values)):
        assert value > 0.001 / (len(values) - rank), values


def opcheck_arguments() -> dict[str, tuple[tuple[torch.Tensor, ...], dict[str, object]]]:
    p = problem("normal", ("mix", "candidates"), filters=True, warp="mixed", seed=1)
    return {
        "rectify_logits": ((p.logits,), p.terms),
        "sample_logits": ((p.logits, p.seed, p.position), {**p.warp, **p.terms, "counterfactual": True}),
        "gumbel_noise": ((p.seed, p.position, torch.arange(21).reshape(3, 7)), {}),
    }


@pytest.mark.parametrize("name", ["rectify_logits", "sample_logits", "gumbel_noise"])
def test_opcheck(name: str) -> None:
    arguments, keywords = opcheck_arguments()[name]
    found = torch.library.opcheck(getattr(torch.ops.moralguard, name).default, arguments, keywords)
    assert set(found.values()) == {"SUCCESS"}


def test_ops_go_through_torch_compile() -> None:
    p = problem("normal", ("mix",), filters=True, warp="mixed", seed=1)

    def step(logits: torch.Tensor) -> torch.Tensor:
        return ops.sample_logits(logits * 2.0, p.seed, p.position, **p.warp, **p.terms)[0] + 1

    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(p.logits), step(p.logits))


def test_weights_that_do_not_fit_are_refused() -> None:
    p = problem("normal", ("mix",))
    with pytest.raises(ValueError, match=r"weights of shape \(3, 2\).*\[slots, sources \+ groups\]"):
        ops.rectify_logits(p.logits, **dict(p.terms, weights=p.terms["weights"][:, :2]))
