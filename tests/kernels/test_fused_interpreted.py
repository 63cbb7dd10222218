"""The kernels under Triton's interpreter against the reference, their scratch memory poisoned."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from problems import KINDS, Problem, problem

from moralguard_kernels import SPLIT, philox, reference_ops

pytest.importorskip("triton", reason="no Triton on this platform")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("there is a GPU: set TRITON_INTERPRET=1 to run the kernels in the interpreter", allow_module_level=True)

from moralguard_kernels.fused import launch
from moralguard_kernels.fused.launch import Shape

DRAWN_TERMS = [("mix",), ("two mixes", "low rank"), ("attenuation",), ("mix", "candidates"), ("mix", "biased candidates")]
# the second ends hardly any row in the second launch, so that the third is used
SHAPES = {"wide": Shape(1000, 512, 4, 1024), "overflowing": Shape(1000, 512, 4, 16)}


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty comes filled with NaN or the largest integer, so that what a kernel doesn't write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the interpreter's numpy on -inf - -inf, torch on operations without a deterministic form
        assert torch.empty(3).isnan().all()
        yield
    torch.use_deterministic_algorithms(False)


def same_draw(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    token, log_probability, kl, flags, other = found
    assert torch.equal(token, wanted[0])
    assert torch.equal(flags & ~SPLIT, wanted[3])
    assert torch.equal(other, wanted[4])
    assert torch.allclose(log_probability, wanted[1], atol=1e-5, rtol=1e-5)
    assert torch.allclose(kl, wanted[2], atol=1e-5, rtol=1e-4)


def draw_both(p: Problem, shape: Shape, counterfactual: bool = True) -> tuple[torch.Tensor, ...]:
    arguments = {**p.warp, **p.terms, "counterfactual": counterfactual}
    found = launch.sample_logits(p.logits, p.seed, p.position, **arguments, shape=shape)
    same_draw(found, reference_ops.sample_logits(p.logits, p.seed, p.position, **arguments))
    return found


def test_noise_has_the_references_bits() -> None:
    seed = torch.tensor([5, -(2**40) - 3, 2**63 - 1])
    position = torch.tensor([3, 99, 2**31])
    ids = torch.randint(0, 262_144, (3, 700), generator=torch.Generator().manual_seed(0))
    assert torch.equal(launch.gumbel_noise(seed, position, ids), philox.gumbel_noise(seed, position, ids))


@pytest.mark.parametrize("kind", KINDS)
def test_mixes_have_the_references_bits(kind: str) -> None:
    p = problem(kind, ("two mixes",), seed=1)
    found = launch.rectify_logits(p.logits, **p.terms, shape=SHAPES["wide"])
    assert torch.equal(found, reference_ops.rectify_logits(p.logits, **p.terms))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_widened(dtype: torch.dtype) -> None:
    p = problem("holes", ("two mixes",), dtype=dtype, seed=2)
    found = launch.rectify_logits(p.logits, **p.terms, shape=SHAPES["wide"])
    assert found.dtype == torch.float32
    assert torch.equal(found, reference_ops.rectify_logits(p.logits, **p.terms))


@pytest.mark.parametrize(
    ("terms", "filters"),
    [
        ((), True),
        (("low rank", "attenuation"), False),
        (("mix", "candidates"), True),
        (("mix", "biased candidates"), True),
        (("two mixes", "low rank", "attenuation", "candidates"), True),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_rectification(terms: tuple[str, ...], filters: bool, seed: int, shape: str) -> None:
    p = problem("holes", terms, filters=filters, seed=seed, slots=bool(seed))
    found = launch.rectify_logits(p.logits, **p.terms, shape=SHAPES[shape])
    wanted = reference_ops.rectify_logits(p.logits, **p.terms)
    assert torch.equal(torch.isneginf(found), torch.isneginf(wanted))
    there = ~torch.isneginf(wanted)
    assert torch.allclose(found[there], wanted[there], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warp", ["free", "greedy", "k", "p", "min-p", "all", "mixed"])
def test_draw_from_the_base(kind: str, warp: str) -> None:
    draw_both(problem(kind, warp=warp, seed=len(warp)), SHAPES["wide"])


@pytest.mark.parametrize(
    "terms", [("mix",), ("two mixes", "low rank"), ("attenuation",), ("mix", "candidates"), ("mix", "biased candidates")]
)
@pytest.mark.parametrize("filters", [False, True])
def test_draw_from_the_rectified_law(terms: tuple[str, ...], filters: bool) -> None:
    draw_both(problem("normal", terms, filters=filters, warp="mixed", seed=7, slots=True), SHAPES["wide"])


@pytest.mark.parametrize("terms", [(), ("mix",), ("mix", "candidates")])
@pytest.mark.parametrize("kind", ["flat", "uniform", "ties", "holes"])
def test_flat_rows_are_drawn_by_the_third_launch(kind: str, terms: tuple[str, ...]) -> None:
    p = problem(kind, terms, filters=bool(terms), warp="mixed", seed=4)
    *_, flags, _ = draw_both(p, SHAPES["overflowing"])
    if kind != "holes" and "candidates" not in terms:
        assert bool((flags & SPLIT).any()), "no row overflowed, so nothing was tested"


def test_every_stage_of_the_third_launch() -> None:
    """k, then p of the mass that k left, then min-p, over a base nucleus; every row overflows."""
    p = problem("flat", ("mix",), filters=True, warp="all", seed=9)
    p.terms["base_top_p"] = torch.full((3,), 0.98)
    p.terms["base_top_k"] = torch.full((3,), 900, dtype=torch.int32)
    *_, flags, _ = draw_both(p, SHAPES["overflowing"], counterfactual=False)
    assert bool((flags & SPLIT).all())


def test_a_row_alone_has_the_bits_it_has_in_a_batch() -> None:
    p = problem("normal", ("mix",), filters=True, warp="mixed", seed=3, rows=4)
    together = launch.sample_logits(p.logits, p.seed, p.position, **p.warp, **p.terms, shape=SHAPES["wide"])
    for row in range(4):
        own = {name: value[row : row + 1] for name, value in p.warp.items()}
        terms = dict(p.terms, sources=[source[row : row + 1] for source in p.terms["sources"]])
        terms |= {name: p.terms[name][row : row + 1] for name in ("weights", "base_top_k", "base_top_p", "base_min_p")}
        alone = launch.sample_logits(
            p.logits[row : row + 1], p.seed[row : row + 1], p.position[row : row + 1], **own, **terms, shape=SHAPES["wide"]
        )
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(alone[:4], together[:4], strict=True))


def tokens_of(p: Problem) -> torch.Tensor:
    """The most probable token in the first row, any token in the second, one of the candidates in the others."""
    tokens = reference_ops.rectify_logits(p.logits, **p.terms).argmax(-1)
    tokens[1] = 998
    if "candidate_ids" in p.terms:
        tokens[2:] = p.terms["candidate_ids"][2:, 33]
    return tokens


def score_both(p: Problem, tokens: torch.Tensor, shape: str = "wide") -> tuple[torch.Tensor, ...]:
    found = launch.score_tokens(p.logits, tokens, **p.terms, shape=SHAPES[shape])
    for a, b in zip(found, reference_ops.score_tokens(p.logits, tokens, **p.terms), strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("terms", [(), ("two mixes", "low rank")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_any_and_of_the_most_probable_tokens(kind: str, terms: tuple[str, ...], dtype: torch.dtype) -> None:
    p = problem(kind, terms, dtype=dtype, seed=11)
    score_both(p, tokens_of(p))


@pytest.mark.parametrize("terms", [(), ("attenuation",), ("mix", "candidates"), ("low rank", "biased candidates")])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_under_filters_and_candidates(terms: tuple[str, ...], seed: int, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "CHUNK", 16)  # several chunks of candidates, the last of them of none
    p = problem("holes" if seed else "normal", terms, filters=True, seed=seed, slots=bool(seed))
    score_both(p, tokens_of(p), shape)


def test_scores_keep_infinite_and_nearly_certain_odds() -> None:
    z = torch.full((4, 1000), float("-inf"))
    z[0, 7], z[0, 600] = 69.0, 0.0
    z[1, 7] = 3.0
    z[2, 600] = 3.0
    log_probability, log_odds, kl = score_both(Problem(z, torch.empty(0), torch.empty(0)), torch.full((4,), 7))
    assert log_odds.tolist() == [69.0, float("inf"), float("-inf"), float("-inf")]
    assert log_probability[0] == pytest.approx(-1.08e-30, rel=1e-2)
    assert log_probability[1:].tolist() == [0.0, float("-inf"), float("-inf")]
    assert kl.tolist() == [0.0, 0.0, 0.0, 0.0]


def test_a_row_is_scored_alone_as_in_a_batch() -> None:
    p = problem("normal", ("mix", "low rank"), filters=True, seed=3, rows=4)
    tokens = torch.tensor([1, 400, 777, 999])
    together = launch.score_tokens(p.logits, tokens, **p.terms, shape=SHAPES["wide"])
    for row in range(4):
        one = slice(row, row + 1)
        terms = {name: [s[one] for s in value] if name == "sources" else value[one] for name, value in p.terms.items() if name != "groups"}
        terms |= {"groups": [2], "projection": p.terms["projection"]}
        alone = launch.score_tokens(p.logits[one], tokens[one], **terms, shape=SHAPES["wide"])
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, together, strict=True))


def test_ids_outside_the_vocabulary_are_no_candidates() -> None:
    p = problem("normal", ("candidates",), seed=0)
    p.terms["candidate_ids"][:, 0] = 10**6
    p.terms["candidate_ids"][:, 1] = -5
    found = launch.rectify_logits(p.logits, **p.terms, shape=SHAPES["wide"])
    assert (~torch.isneginf(found)).sum(-1).tolist() == [38, 38, 38]


def test_the_configuration_knows_nothing_of_the_batch() -> None:
    for vocabulary in (100, 32_000, 49_152, 128_256, 151_936, 262_144):
        shape = launch.shape_of(vocabulary)
        assert shape.tile % launch.GROUP == 0
        assert shape.tiles * shape.tile >= vocabulary
        assert shape.capacity >= 1024  # what FUDGE's candidates need


@pytest.mark.parametrize("terms", [("mix",), ("attenuation",)])
@pytest.mark.parametrize("kind", ["normal", "flat", "ties", "holes"])
def test_the_second_launch_has_the_same_bits_however_it_is_cut(kind: str, terms: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """One program a row, as for a large batch, and three, as for a small one on a large GPU."""
    p = problem(kind, terms, filters=True, warp="mixed", vocabulary=6000, seed=4)
    shape, found = Shape(6000, 1024, 4, 2048), []
    for processors, strips in ((1, 1), (132, 3)):
        monkeypatch.setattr(launch, "_processors", lambda device, processors=processors: processors)
        assert -(-shape.groups // launch._strip_width(processors, shape.groups, 6)) == strips
        found.append(draw_both(p, shape))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("virtual", [1, 2, 7, 64, 1000, 65_535])
@pytest.mark.parametrize("groups", [1, 8, 250, 1002, 2048])
def test_strips_are_whole_blocks_and_cover_a_row(groups: int, virtual: int) -> None:
    for processors in (1, 20, 132, 160):
        width = launch._strip_width(processors, groups, virtual)
        assert width % (launch.BLOCK // launch.GROUP) == 0
        assert 0 < width <= launch.STRIP
