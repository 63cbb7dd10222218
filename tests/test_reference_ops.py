"""The reference operations against naive float64 formulas, sorted or looped over one row at a time."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import moralguard_kernels as ops
from moralguard_kernels import levels

NEG = float("-inf")
POS = float("inf")
NAN = float("nan")

few = settings(deadline=None, max_examples=60, database=None)

KINDS = ("normal", "wide", "ties", "uniform", "spike", "masked", "some -inf", "shifted")
# 513 and more leave the nucleus' first look of 512, 4097 its second, and can reach the full sort.
SIZES = (1, 2, 7, 50, 512, 513, 700, 1500, 4500)


def make_row(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """One row of logits, values exact in float32."""
    z = rng.normal(size=size)
    if kind == "wide":
        z = z * 8
    elif kind == "ties":
        z = np.round(z * 2)
    elif kind == "uniform":
        z = np.full(size, 1.25)
    elif kind == "spike":
        z = z * 0.1
        z[rng.integers(size)] = 40.0
    elif kind == "masked":
        z = np.full(size, NEG)
    elif kind == "some -inf":
        z = np.where(rng.random(size) < 0.4, NEG, z * 3)
    elif kind == "shifted":
        z = np.round(z * 64) / 64 + 300.0
    return z.astype(np.float32).astype(np.float64)


@st.composite
def logits(draw: st.DrawFn, sizes: tuple[int, ...] = SIZES) -> torch.Tensor:
    """f64[R, V] with rows of different kinds."""
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
    size = draw(st.sampled_from(sizes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return torch.from_numpy(np.stack([make_row(kind, size, rng) for kind in kinds]))


def auxiliary_like(z: torch.Tensor, seed: int, holes: bool = True) -> torch.Tensor:
    """Logits of another pass: f64, exact in float32, with NaN and both infinities where ``holes``."""
    rng = np.random.default_rng(seed)
    y = (rng.normal(size=z.shape) * 3).astype(np.float32).astype(np.float64)
    if holes:
        for value in (NAN, POS, NEG):
            y = np.where(rng.random(z.shape) < 0.1, value, y)
    return torch.from_numpy(y)


def softmax_of(row: np.ndarray) -> np.ndarray:
    """Softmax in float64; zeros where every entry is -inf."""
    if np.all(np.isneginf(row)):
        return np.zeros_like(row)
    e = np.exp(row - row.max())
    return e / e.sum()


def mass_above(row: np.ndarray) -> np.ndarray:
    """Probability of the strictly larger logits, for every token, by one sort."""
    p = softmax_of(row)
    order = np.argsort(-row, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(p[order])])
    first = np.searchsorted(-row[order], -row[order], side="left")
    above = np.empty_like(row)
    above[order] = before[first]
    return above


def kept(z: torch.Tensor, threshold: torch.Tensor) -> np.ndarray:
    return (z >= threshold).numpy()


def same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, any NaN equal to any NaN."""
    return a.dtype == b.dtype and torch.equal(torch.nan_to_num(a, nan=123.0), torch.nan_to_num(b, nan=123.0))


# --- sanitising ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sanitize_maps_nan_and_infinities(dtype: torch.dtype) -> None:
    z = torch.tensor([[1.5, NAN, POS, NEG, -2.0]], dtype=dtype)
    out = ops.sanitize_logits(z)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.dtype == working
    assert out.tolist() == [[1.5, NEG, torch.finfo(working).max, NEG, -2.0]]


def test_finite_or_zero() -> None:
    assert ops.finite_or_zero(torch.tensor([1.0, NAN, POS, NEG, -3.0])).tolist() == [1.0, 0.0, 0.0, 0.0, -3.0]


# --- filters ------------------------------------------------------------------------------------------------------------------


@few
@given(z=logits(), k=st.one_of(st.integers(1, 12), st.sampled_from([512, 513, 699, 700, 1500, 5000])))
def test_top_k_keeps_ties_at_the_boundary(z: torch.Tensor, k: int) -> None:
    for source in (z, z.float()):
        found = kept(source, ops.top_k_threshold(source, k))
        for row, keep in zip(z.numpy(), found, strict=True):
            larger = len(row) - np.searchsorted(np.sort(row), row, side="right")  # count of strictly larger logits
            assert np.array_equal(keep, larger < k)


def test_top_k_of_the_whole_vocabulary_keeps_everything() -> None:
    z = torch.tensor([[3.0, 1.0, NEG]])
    assert ops.top_k_threshold(z, 3).item() == NEG
    assert ops.top_k_threshold(z, 2).item() == 1.0
    row = np.full(2000, NEG, dtype=np.float32)
    row[::100] = np.arange(20) * 3.0  # some of them far under the largest
    for k in (1, 2, 19, 20, 21, 50, 2000):
        assert levels.kth_largest(row, k) == np.sort(row)[-k]


@few
@given(z=logits(), p=st.one_of(st.floats(0.01, 0.9999), st.sampled_from([0.5, 0.9, 1.0])))
def test_top_p_against_a_float64_sort(z: torch.Tensor, p: float) -> None:
    for source, slack in ((z, 1e-11), (z.float(), 1e-4)):
        found = kept(source, ops.top_p_threshold(source, p))
        for row, keep in zip(z.numpy(), found, strict=True):
            if p >= 1:
                assert keep.all()
                continue
            if np.all(np.isneginf(row)):
                continue  # nothing to keep
            above = mass_above(row)
            assert keep[above < p - slack].all()
            assert not keep[above > p + slack].any()


def test_top_p_keeps_a_whole_group_of_ties() -> None:
    z = torch.tensor([[0.0, 0.0, 0.0, 0.0, -50.0]])
    assert kept(z, ops.top_p_threshold(z, 0.3)).tolist() == [[True] * 4 + [False]]


def test_top_p_keeps_the_token_that_crosses_the_mass() -> None:
    z = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    assert kept(z, ops.top_p_threshold(z, 0.6)).tolist() == [[True, True, False]]
    assert kept(z, ops.top_p_threshold(z, 0.45)).tolist() == [[True, False, False]]


def test_top_p_of_one_is_decided_before_any_sum() -> None:
    """The spike's float32 probability rounds to 1, so a comparison of sums would drop the others."""
    z = torch.tensor([[60.0, 0.0, -5.0]])
    assert kept(z, ops.top_p_threshold(z, 1.0)).all()
    assert kept(z, ops.top_p_threshold(z, 0.999999)).tolist() == [[True, False, False]]


def test_top_p_per_row() -> None:
    z = torch.tensor([[0.5, 0.3, 0.2]] * 3, dtype=torch.float64).log()
    found = kept(z, ops.top_p_threshold(z, torch.tensor([0.4, 0.7, 1.0])))
    assert found.sum(-1).tolist() == [1, 2, 3]


def test_top_p_of_many_kinds_of_rows() -> None:
    rng = np.random.default_rng(5)
    rows = torch.from_numpy(np.stack([make_row(kind, 6000, rng) for kind in ("uniform", "spike", "normal", "wide", "masked")]))
    found = kept(rows, ops.top_p_threshold(rows, 0.9))
    for row, keep in zip(rows.numpy()[:4], found, strict=False):
        assert np.array_equal(keep, mass_above(row) < 0.9)
    assert found.sum(-1)[0] == 6000
    assert found.sum(-1)[1] == 1
    assert 512 < found.sum(-1)[2] < 4096
    assert ops.top_p_threshold(rows, 0.9)[-1].item() == NEG


@few
@given(
    z=logits((1, 50, 700, 5000)),
    p=st.floats(0.05, 1.0),
    k=st.integers(1, 5000),
    down=st.sampled_from([(), (0.0,), (0.1, 2.0), (30.0,), (1e9,)]),
)
def test_thresholds_are_the_same_however_far_down_they_look_first(z: torch.Tensor, p: float, k: int, down: tuple[float, ...]) -> None:
    usual = ops.top_p_threshold(z.float(), p), ops.top_k_threshold(z, k)
    with mock.patch.object(levels, "_LEVELS", down):
        assert torch.equal(ops.top_p_threshold(z.float(), p), usual[0])
        assert torch.equal(ops.top_k_threshold(z, k), usual[1])


@few
@given(z=logits((3, 50, 700)), seed=st.integers(-(2**63), 2**63 - 1), position=st.integers(0, 2**20))
def test_noise_that_cannot_win_is_left_out_of_a_draw_unseen(z: torch.Tensor, seed: int, position: int) -> None:
    keys, places = torch.tensor([seed] * len(z)), torch.tensor([position] * len(z))
    noise = ops.gumbel_noise(keys, places, torch.arange(z.shape[1]).expand(z.shape))
    for dtype in (torch.float32, torch.float64):
        row = z.to(dtype)
        wanted = (row + noise.to(dtype)).argmax(-1)
        assert torch.equal(ops.gumbel_argmax(row, keys, places), wanted)


def test_an_impossible_k_is_an_error() -> None:
    with pytest.raises(ValueError, match="k is 9, of 4 logits"):
        levels.kth_largest(np.zeros(4), 9)


@few
@given(z=logits(), ratio=st.one_of(st.floats(1e-4, 1.0), st.sampled_from([0.0, 1.0])))
def test_min_p_against_probabilities(z: torch.Tensor, ratio: float) -> None:
    for source, slack in ((z, 1e-9), (z.float(), 1e-4)):
        found = kept(source, ops.min_p_threshold(source, ratio))
        for row, keep in zip(z.numpy(), found, strict=True):
            p = softmax_of(row)
            assert keep[p > ratio * p.max() * (1 + slack)].all()
            assert not keep[p < ratio * p.max() * (1 - slack)].any()
            assert keep[row == row.max()].all()


# --- deltas -------------------------------------------------------------------------------------------------------------------


@few
@given(z=logits(), seed=st.integers(0, 2**31), count=st.integers(0, 3), with_base=st.booleans())
def test_mix_against_a_loop(z: torch.Tensor, seed: int, count: int, with_base: bool) -> None:
    rng = np.random.default_rng(seed)
    sources = [auxiliary_like(z, seed + i) for i in range(count)]
    weights = [torch.from_numpy(rng.normal(size=z.shape[0]).astype(np.float32)) for _ in range(count)]
    base_weight = torch.from_numpy(rng.normal(size=z.shape[0]).astype(np.float32)) if with_base else None
    with np.errstate(invalid="ignore"):
        wanted = np.zeros(z.shape)
        if base_weight is not None:
            wanted = base_weight.double().numpy()[:, None] * z.numpy()
        for source, weight in zip(sources, weights, strict=True):
            wanted = wanted + weight.double().numpy()[:, None] * source.numpy()
    wanted = np.where(np.isfinite(wanted), wanted, 0.0)
    assert np.allclose(ops.mix_delta(z, sources, weights, base_weight).numpy(), wanted, rtol=1e-12, atol=1e-12)
    single = ops.mix_delta(z.float(), [s.float() for s in sources], weights, base_weight)
    assert single.dtype == torch.float32
    assert np.allclose(single.numpy(), wanted, rtol=1e-5, atol=5e-4)


def test_mix_refuses_a_weight_too_few() -> None:
    with pytest.raises(ValueError, match="zip"):
        ops.mix_delta(torch.zeros(1, 3), [torch.zeros(1, 3), torch.zeros(1, 3)], [torch.ones(1)], None)


@few
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 4), size=st.sampled_from(SIZES), rank=st.integers(1, 9))
def test_low_rank_against_loops(seed: int, rows: int, size: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    projection, coefficients = rng.normal(size=(size, rank)), rng.normal(size=(rows, rank))
    wanted = np.array([[sum(c[j] * e[j] for j in range(rank)) for e in projection] for c in coefficients])
    found = ops.low_rank_delta(torch.from_numpy(projection), torch.from_numpy(coefficients))
    assert np.allclose(found.numpy(), wanted, rtol=1e-12, atol=1e-12)
    single = ops.low_rank_delta(torch.from_numpy(projection).float(), torch.from_numpy(coefficients))
    assert single.dtype == torch.float32
    assert np.allclose(single.numpy(), wanted, atol=1e-4)


@few
@given(
    z=logits(),
    seed=st.integers(0, 2**31),
    prefixes=st.integers(1, 3),
    decay=st.sampled_from([0.0, 1.0, 50.0, 1000.0]),
    epsilon=st.sampled_from([1e-3, 0.01, 1.0]),
)
def test_attenuation_against_the_papers_formula(z: torch.Tensor, seed: int, prefixes: int, decay: float, epsilon: float) -> None:
    biased = [auxiliary_like(z, seed + i, holes=False) for i in range(prefixes)]
    biased[0][:, seed % z.shape[1]] = NEG
    decays, epsilons = torch.full((z.shape[0],), decay), torch.full((z.shape[0],), epsilon)
    found = ops.attenuation_delta(z, biased, decays.double(), epsilons.double())
    single = ops.attenuation_delta(z.float(), [b.float() for b in biased], decays, epsilons)
    for i, row in enumerate(z.numpy()):
        if np.all(np.isneginf(row)) or any(np.all(np.isneginf(b[i].numpy())) for b in biased):
            assert bool((found[i] == 0).all()), "a law that doesn't exist contributes nothing"
            continue
        q = np.max([softmax_of(b[i].numpy()) for b in biased], axis=0)
        factor = np.maximum(np.exp(-decay * np.maximum(q - softmax_of(row), 0.0)), float(epsilons[i]))
        assert np.allclose(np.exp(found[i].numpy()), factor, rtol=1e-9)
        assert np.allclose(np.exp(single[i].numpy()), factor, rtol=1e-2 if decay > 100 else 1e-3)


@pytest.mark.parametrize("hole", [NAN, POS])
def test_attenuation_by_a_broken_pass_contributes_nothing(hole: float) -> None:
    z = torch.tensor([[0.0, 1.0, 2.0]])
    biased = torch.tensor([[5.0, hole, 0.0]])
    assert ops.attenuation_delta(z, [biased], torch.tensor([50.0]), torch.tensor([0.01])).tolist() == [[0.0, 0.0, 0.0]]


# --- the rectification --------------------------------------------------------------------------------------------------------


def naive_rectify(
    z: np.ndarray,
    deltas: list[np.ndarray],
    thresholds: list[np.ndarray],
    candidates: list[tuple[np.ndarray, np.ndarray, bool]],
) -> np.ndarray:
    out = np.full_like(z, NEG)
    for r in range(z.shape[0]):
        for v in range(z.shape[1]):
            if np.isneginf(z[r, v]) or any(z[r, v] < t[r, 0] for t in thresholds):
                continue
            total, removed = z[r, v], False
            for delta in deltas:
                total += delta[r, v]
            for ids, bias, keep_rest in candidates:
                place = [c for c in range(ids.shape[1]) if ids[r, c] == v]
                if place:
                    total += bias[r, place[0]] if np.isfinite(bias[r, place[0]]) else 0.0
                elif not keep_rest:
                    removed = True
            if not removed:
                out[r, v] = total
    return out


@few
@given(
    z=logits((1, 2, 7, 50)),
    seed=st.integers(0, 2**31),
    deltas=st.integers(0, 3),
    thresholds=st.integers(0, 2),
    keeps=st.lists(st.booleans(), max_size=3),
)
def test_rectify_against_loops(z: torch.Tensor, seed: int, deltas: int, thresholds: int, keeps: list[bool]) -> None:
    rng = np.random.default_rng(seed)
    rows, size = z.shape
    added = [ops.finite_or_zero(auxiliary_like(z, seed + i)) for i in range(deltas)]
    floors = [torch.from_numpy(rng.normal(size=(rows, 1))) for _ in range(thresholds)]
    candidates = []
    for keep_rest in keeps:
        count = int(rng.integers(1, size + 1))
        ids = torch.from_numpy(np.stack([rng.permutation(size)[:count] for _ in range(rows)]))
        candidates.append((ids, auxiliary_like(ids.double(), seed + 17), keep_rest))
    wanted = naive_rectify(
        z.numpy(),
        [d.numpy() for d in added],
        [f.numpy() for f in floors],
        [(ids.numpy(), bias.numpy(), keep_rest) for ids, bias, keep_rest in candidates],
    )
    before = z.clone()
    found = ops.rectify(z, added, floors, candidates)
    assert np.array_equal(np.isneginf(found.numpy()), np.isneginf(wanted))
    finite = np.isfinite(wanted)
    assert np.allclose(found.numpy()[finite], wanted[finite], rtol=1e-12, atol=1e-12)
    assert torch.equal(z, before), "the base is read, never written to"


@few
@given(z=logits(), seed=st.integers(0, 2**31))
def test_nothing_resurrects_a_base_minus_infinity(z: torch.Tensor, seed: int) -> None:
    z = ops.sanitize_logits(torch.where(auxiliary_like(z, seed).isnan(), NAN, z))  # NaN vetoes too
    vetoed = torch.isneginf(z)
    sources = [auxiliary_like(z, seed + 1), auxiliary_like(z, seed + 2)]
    weights = [torch.full((z.shape[0],), 100.0), torch.full((z.shape[0],), -100.0)]
    ids = torch.arange(z.shape[1]).expand(z.shape)
    bias = torch.full(z.shape, 1e6, dtype=z.dtype)
    bias[:, ::2] = POS
    delta = ops.mix_delta(z, sources, weights, torch.full((z.shape[0],), -3.0))
    for keep_rest in (True, False):
        out = ops.rectify(z, [delta, torch.full_like(z, 1e6)], [], [(ids, bias, keep_rest)])
        assert torch.isneginf(out[vetoed]).all()
        assert torch.isfinite(out[~vetoed]).all(), "auxiliary terms re-weigh, they never mask"
        assert torch.isneginf(ops.warp(out, 0.7, top_k=5, top_p=0.9, min_p=0.01)[vetoed]).all()


def test_rectify_with_nothing_is_the_base() -> None:
    z = torch.tensor([[1.0, NEG, -3.0]])
    assert torch.equal(ops.rectify(z, []), z)


def test_positive_infinity_in_the_base_stays_a_number() -> None:
    """+inf counts as the largest float; sums with it must not overflow into a law of NaN."""
    z = ops.sanitize_logits(torch.tensor([[POS, 0.0, 1.0]]))
    delta = ops.mix_delta(z, [], [], torch.tensor([0.5]))
    assert torch.softmax(ops.rectify(z, [delta]), -1).tolist() == [[1.0, 0.0, 0.0]]


def test_positive_infinity_survives_a_low_temperature() -> None:
    z = ops.sanitize_logits(torch.tensor([[POS, 0.0, 1.0]]))
    assert torch.softmax(ops.warp(z, temperature=0.5), -1).tolist() == [[1.0, 0.0, 0.0]]


# --- warping ------------------------------------------------------------------------------------------------------------------


def naive_warp(row: np.ndarray, temperature: float, k: int, p: float, min_p: float) -> tuple[np.ndarray, np.ndarray]:
    """(warped, doubtful): the filters one after the other, each on what the former left; doubtful says that a boundary was so
    close that rounding decides."""
    z = row / temperature
    doubtful = np.zeros(len(row), dtype=bool)
    if k:
        z = np.where(np.array([np.sum(z > x) for x in z]) < k, z, NEG)
    if p < 1:
        above = mass_above(z)
        doubtful |= np.abs(above - p) < 1e-9
        z = np.where(above < p, z, NEG)
    if min_p > 0:
        law = softmax_of(z)
        doubtful |= np.abs(law - min_p * law.max()) < 1e-9
        z = np.where(law >= min_p * law.max(), z, NEG)
    return z, doubtful


@few
@given(
    z=logits((1, 2, 7, 50, 700)),
    temperature=st.sampled_from([1.0, 0.5, 0.7, 1.3, 2.0]),
    k=st.sampled_from([0, 1, 5, 40, 600, 5000]),
    p=st.one_of(st.just(1.0), st.floats(0.05, 0.999)),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
@example(z=torch.zeros(1, 700, dtype=torch.float64), temperature=1.0, k=0, p=0.5, min_p=0.0)
def test_warp_against_the_filters_in_order(z: torch.Tensor, temperature: float, k: int, p: float, min_p: float) -> None:
    found = ops.warp(z, temperature, k, p, min_p).numpy()
    for row, out in zip(z.numpy(), found, strict=True):
        wanted, doubtful = naive_warp(row, temperature, k, p, min_p)
        if doubtful.any() and not np.array_equal(np.isneginf(out), np.isneginf(wanted)):
            continue  # rounding decided an early boundary; the rest follows from it
        assert np.array_equal(np.isneginf(out), np.isneginf(wanted))
        assert np.allclose(out[np.isfinite(wanted)], wanted[np.isfinite(wanted)], rtol=1e-12)


def test_warp_leaves_the_logits_alone_by_default() -> None:
    z = torch.tensor([[0.1, NEG, 2.0, 2.0]])
    assert torch.equal(ops.warp(z), z)


def test_top_p_counts_the_mass_that_top_k_left() -> None:
    z = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    # alone, .65 needs two tokens of mass .4 and .3; of the two that top-k left, .4 / .7 = .57 isn't enough either
    assert torch.isfinite(ops.warp(z, top_k=2, top_p=0.65)).tolist() == [[True, True, False, False]]
    # .5 needs two of all, but only one of the two that top-k left
    assert torch.isfinite(ops.warp(z, top_p=0.5)).tolist() == [[True, True, False, False]]
    assert torch.isfinite(ops.warp(z, top_k=2, top_p=0.5)).tolist() == [[True, False, False, False]]


def test_warp_agrees_with_transformers() -> None:
    from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    z = torch.from_numpy(np.random.default_rng(3).normal(size=(16, 900)) * 3)
    theirs = LogitsProcessorList([TemperatureLogitsWarper(0.8), TopKLogitsWarper(60), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)])
    wanted = theirs(torch.zeros(16, 1, dtype=torch.int64), z.clone())
    found = ops.warp(z, 0.8, 60, 0.9, 0.02)
    assert torch.equal(torch.isneginf(found), torch.isneginf(wanted))
    assert 1 < torch.isfinite(found).sum(-1).min() < 60
    assert torch.allclose(found[torch.isfinite(found)], wanted[torch.isfinite(wanted)])


# --- KL -----------------------------------------------------------------------------------------------------------------------


@few
@given(z=logits(), seed=st.integers(0, 2**31))
def test_kl_against_the_sum(z: torch.Tensor, seed: int) -> None:
    shift = auxiliary_like(z, seed, holes=False)
    guarded = torch.where(shift > 2.5, NEG, z + shift)  # some removed
    found, single = ops.kl_divergence(guarded, z), ops.kl_divergence(guarded.float(), z.float())
    for i in range(z.shape[0]):
        p, q = softmax_of(guarded[i].numpy()), softmax_of(z[i].numpy())
        if not p.any() or not q.any():
            continue  # no law, no divergence
        wanted = float(np.sum(p[p > 0] * (np.log(p[p > 0]) - np.log(np.where(q > 0, q, 1.0)[p > 0]))))
        assert float(found[i]) == pytest.approx(max(wanted, 0.0), rel=1e-8, abs=1e-9)
        assert float(single[i]) == pytest.approx(max(wanted, 0.0), rel=1e-3, abs=1e-3)


def test_kl_of_equal_laws_is_zero_and_has_a_direction() -> None:
    z = torch.tensor([[0.0, 1.0, NEG]])
    assert ops.kl_divergence(z + 5.0, z).item() == pytest.approx(0.0, abs=1e-6)
    half = torch.tensor([[0.0, NEG, NEG]])
    assert ops.kl_divergence(half, torch.zeros(1, 3)).item() == pytest.approx(np.log(3.0), abs=1e-6)
    assert ops.kl_divergence(torch.zeros(1, 3), half).item() == POS


# --- a row depends on itself alone --------------------------------------------------------------------------------------------

SEEDS = torch.tensor([3, -7, 2**40 + 1, 12])
POSITIONS = torch.tensor([0, 5, 5, 100])


def weights_of(rows: torch.Tensor, *values: float) -> torch.Tensor:
    return torch.tensor(values)[rows]


def projection_of(size: int) -> torch.Tensor:
    """[V, 5], shared by all rows as in use."""
    return torch.randn(size, 5, generator=torch.Generator().manual_seed(size))


# Each operation on rows i64[n] of (base, two other passes); "rows" also chooses the per-row parameters.
PER_ROW = {
    "sanitize": lambda z, a, b, rows: ops.sanitize_logits(z),
    "top_k": lambda z, a, b, rows: ops.top_k_threshold(z, 5),
    "top_p": lambda z, a, b, rows: ops.top_p_threshold(z, weights_of(rows, 0.3, 0.9, 0.95, 0.999)),
    "min_p": lambda z, a, b, rows: ops.min_p_threshold(z, weights_of(rows, 0.3, 0.9, 0.01, 1.0)),
    "mix": lambda z, a, b, rows: ops.mix_delta(
        z, [a, b], [weights_of(rows, 2, 1, 0, 0.3), weights_of(rows, -2, -1, 4, 0.1)], weights_of(rows, 0, 1, 2, 3)
    ),
    "attenuation": lambda z, a, b, rows: ops.attenuation_delta(
        z, [ops.finite_or_zero(a), ops.finite_or_zero(b)], weights_of(rows, 50, 10, 1, 100), weights_of(rows, 0.01, 0.1, 1, 0.5)
    ),
    "low rank": lambda z, a, b, rows: ops.low_rank_delta(projection_of(z.shape[1]), a[:, :5]),
    "rectify": lambda z, a, b, rows: ops.rectify(
        ops.sanitize_logits(z),
        [ops.finite_or_zero(a)],
        [ops.top_k_threshold(ops.sanitize_logits(z), 9)],
        [(torch.stack([torch.randperm(z.shape[1], generator=torch.Generator().manual_seed(int(r)))[:4] for r in rows]), a[:, :4], False)],
    ),
    "warp": lambda z, a, b, rows: ops.warp(ops.sanitize_logits(z), 0.7, 30, 0.9, 0.01),
    "gumbel": lambda z, a, b, rows: ops.gumbel_argmax(ops.sanitize_logits(z), SEEDS[rows], POSITIONS[rows]),
    "kl": lambda z, a, b, rows: ops.kl_divergence(ops.sanitize_logits(z + 0.5 * ops.finite_or_zero(a)), ops.sanitize_logits(z)),
}


@pytest.mark.parametrize("name", PER_ROW)
@pytest.mark.parametrize("size", [9, 50, 513, 1500, 50_000])
def test_a_row_alone_equals_the_row_in_a_batch(name: str, size: int) -> None:
    rng = np.random.default_rng(size)
    z = torch.from_numpy(np.stack([make_row(kind, size, rng) for kind in ("normal", "ties", "some -inf", "uniform")])).float()
    a, b = (auxiliary_like(z, seed).float() for seed in (1, 2))
    a[:, :5] = ops.finite_or_zero(a[:, :5])
    operation = PER_ROW[name]
    batch = operation(z, a, b, torch.arange(4))
    for i in range(4):
        alone = operation(z[i : i + 1], a[i : i + 1], b[i : i + 1], torch.tensor([i]))
        assert same_numbers(alone, batch[i : i + 1]), f"row {i} of {name} differs from the row alone"
    order = torch.tensor([2, 0, 3])
    assert same_numbers(operation(z[order], a[order], b[order], order), batch[order])


def test_a_row_of_nothing_draws_token_zero_in_any_batch() -> None:
    """ "An all -inf row gives token 0": also beside rows that hold something."""
    for size in (10, 100, 1000):
        z = torch.full((2, size), NEG)
        assert ops.gumbel_argmax(z, SEEDS[:2], POSITIONS[:2]).tolist() == [0, 0]
        z[0, 3], z[0, 7] = 1.0, 5.0
        drawn = ops.gumbel_argmax(z, SEEDS[:2], POSITIONS[:2]).tolist()
        assert drawn[0] in (3, 7)
        assert drawn[1] == 0
