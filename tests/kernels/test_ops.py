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
from moralguard_kernels import reference_ops


def naive_logits(p: Problem) -> np.ndarray:
    """Rectified logits in float64, by loops over rows and the formulas of the module's docstring; -inf where removed."""
    z = p.logits.double().numpy()
    t = p.terms
    out = np.full_like(z, -np.inf)
    slots = t["slots"].tolist() if "slots" in t else list(range(len(z)))
    biggest = float(torch.finfo(torch.float64 if p.logits.dtype == torch.float64 else torch.float32).max)
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
        out[r] = np.where(keep, np.minimum(total, biggest), -np.inf)
    return out


def naive_law(p: Problem) -> np.ndarray:
    return np.stack([softmax(row) for row in naive_logits(p)])


def naive_score(guarded: np.ndarray, base: np.ndarray, token: int) -> tuple[float, float, float]:
    """(log p, log p / (1 - p), KL) of one row from its logits in float64, the other tokens summed by themselves."""
    log_odds = -np.inf if np.isneginf(guarded[token]) else guarded[token] - log_sum(np.delete(guarded, token))
    if np.all(np.isneginf(guarded)):
        return -np.inf, log_odds, 0.0
    inside = softmax(guarded) > 0
    log_p, log_q = (z - log_sum(z) for z in (guarded, base))
    kl = (np.exp(log_p[inside]) * (log_p[inside] - log_q[inside])).sum()
    return (-np.inf if np.isneginf(log_odds) else -np.logaddexp(0.0, -log_odds)), log_odds, max(kl, 0.0)


def log_sum(z: np.ndarray) -> float:
    top = z.max(initial=-np.inf)
    return -np.inf if np.isneginf(top) else top + np.log(np.exp(z - top).sum())


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


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    terms=st.lists(st.sampled_from(TERMS), unique=True, max_size=4),
    filters=st.booleans(),
    slots=st.booleans(),
    single=st.booleans(),
    seed=st.integers(0, 1000),
    data=st.data(),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on the infinite products that count nothing
def test_scores_of_tokens_are_those_of_naive_float64(
    kind: str, terms: list[str], filters: bool, slots: bool, single: bool, seed: int, data: st.DataObject
) -> None:
    """Rows with NaN, +inf and without any token among them; float64 logits give float64 scores."""
    if "mix" in terms and "two mixes" in terms:
        terms.remove("mix")
    p = problem(kind, tuple(terms), filters=filters, slots=slots, seed=seed, vocabulary=400)
    if not single:
        p.logits = p.logits.double()
        if "projection" in p.terms:  # whose product is taken in its own precision
            p.terms["projection"] = p.terms["projection"].double()
    tokens = data.draw(st.lists(st.integers(0, 399), min_size=3, max_size=3))
    if data.draw(st.booleans()):  # the most probable ones
        tokens = naive_logits(p).argmax(-1).tolist()
    found = ops.score_tokens(p.logits, torch.tensor(tokens), **p.terms)
    assert {item.dtype for item in found} == {p.logits.dtype}
    guarded = naive_logits(p)
    kept = torch.isneginf(reference_ops.rectify_logits(p.logits, **p.terms)).numpy() == np.isneginf(guarded)
    base = reference_ops.rows.sanitize_logits(p.logits).double().numpy()
    biggest = float(torch.finfo(p.logits.dtype).max)
    close = {"rtol": 1e-4, "atol": 1e-4} if single else {"rtol": 1e-9, "atol": 1e-9}
    for row, token in enumerate(tokens):
        if kept[row].all():  # else rounding puts a token on the other side of a filter's edge
            log_probability, log_odds, kl = naive_score(guarded[row], base[row], token)
            own = [item[row].item() for item in found]
            assert np.allclose(own[:2], [log_probability, log_odds], **close), (row, token)
            # beside a base's +inf, which counts as the largest number, every other token's distance is about as large
            assert np.isclose(min(own[2], biggest), min(kl, biggest), **close), (row, token)


def test_log_odds_of_a_nearly_certain_token_are_not_a_difference() -> None:
    """1 - p is 1e-30 here: log p / (1 - p) by p alone would be infinite, and log p zero."""
    z = torch.tensor([[69.0, 0.0, float("-inf")], [0.0, float("-inf"), float("-inf")], [float("nan")] * 3])
    log_probability, log_odds, kl = ops.score_tokens(z, torch.tensor([0, 0, 0]))
    assert log_odds.tolist() == [69.0, float("inf"), float("-inf")]
    assert log_probability.tolist() == pytest.approx([-np.exp(-69.0), 0.0, float("-inf")], rel=1e-5)
    assert kl.tolist() == [0.0, 0.0, 0.0]
    assert ops.score_tokens(z, torch.tensor([2, 1, 1]))[1].tolist() == [float("-inf")] * 3


def test_a_row_is_scored_alone_as_in_a_batch() -> None:
    p = problem("normal", ("two mixes", "low rank"), seed=5, rows=5, vocabulary=3000)
    tokens = torch.arange(5)
    together = ops.score_tokens(p.logits, tokens, **p.terms)
    for row in range(5):
        one = slice(row, row + 1)
        own = dict(p.terms, sources=[s[one] for s in p.terms["sources"]])
        own |= {name: p.terms[name][one] for name in ("weights", "coefficients")}
        alone = ops.score_tokens(p.logits[one], tokens[one], **own)
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, together, strict=True))


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
        "score_tokens": ((p.logits, torch.tensor([1, 2, 3])), p.terms),
        "gumbel_noise": ((p.seed, p.position, torch.arange(21).reshape(3, 7)), {}),
    }


@pytest.mark.parametrize("name", ["rectify_logits", "sample_logits", "score_tokens", "gumbel_noise"])
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
