"""The compiled kernels on a GPU: against the reference, under graph replay, in any batch, under stress, and their law."""

from __future__ import annotations

import pytest
import torch
from problems import KINDS, Problem, problem
from scipy import stats

import moralguard_kernels as ops
from moralguard.decoding.rectification import rectify
from moralguard.decoding.terms import Attenuation, Keep, Mix, Terms
from moralguard.trace.attribution import score
from moralguard_kernels import philox, reference_ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]

TERM_SETS = [(), ("mix",), ("two mixes", "low rank"), ("attenuation",), ("mix", "candidates"), ("mix", "biased candidates")]


def sample(p: Problem, **more: bool) -> tuple[torch.Tensor, ...]:
    return ops.sample_logits(p.logits, p.seed, p.position, **p.warp, **p.terms, **more)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_compiled_noise_has_the_references_bits() -> None:
    g = torch.Generator().manual_seed(0)
    seed = torch.randint(-(2**62), 2**62, (64,), generator=g)
    position = torch.randint(0, 2**31, (64,), generator=g)
    ids = torch.randint(0, 262_144, (64, 4096), generator=g)
    found = ops.gumbel_noise(seed.cuda(), position.cuda(), ids.cuda()).cpu()
    assert torch.equal(found, philox.gumbel_noise(seed, position, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocabulary", [1000, 32_000, 151_936])
def test_mixes_have_the_references_bits(kind: str, vocabulary: int, dtype: torch.dtype) -> None:
    p = problem(kind, ("two mixes",), dtype=dtype, vocabulary=vocabulary, seed=1)
    found = ops.rectify_logits(p.on("cuda").logits, **p.on("cuda").terms).cpu()
    assert torch.equal(found, reference_ops.rectify_logits(p.logits, **p.terms))


@pytest.mark.parametrize("terms", TERM_SETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocabulary", [1000, 49_152, 262_144])
def test_draws_are_the_references(kind: str, terms: tuple[str, ...], vocabulary: int) -> None:
    p = problem(kind, terms, filters=bool(terms), warp="mixed", rows=6, vocabulary=vocabulary, seed=3, slots=True)
    found = [tensor.cpu() for tensor in sample(p.on("cuda"), counterfactual=True)]
    wanted = sample(p, counterfactual=True)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[4], wanted[4])
    assert torch.equal(found[3] & ~ops.SPLIT, wanted[3])
    assert torch.allclose(found[1], wanted[1], atol=2e-5, rtol=1e-5)
    assert torch.allclose(found[2], wanted[2], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("terms", TERM_SETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocabulary", [1000, 49_152, 262_144])
def test_scores_are_the_references(kind: str, terms: tuple[str, ...], vocabulary: int) -> None:
    p = problem(kind, terms, filters=bool(terms), rows=6, vocabulary=vocabulary, seed=3, slots=True)
    for tokens in (reference_ops.rectify_logits(p.logits, **p.terms).argmax(-1), torch.arange(6) * 150):
        found = ops.score_tokens(p.on("cuda").logits, tokens.cuda(), **p.on("cuda").terms)
        for a, b in zip(found, ops.score_tokens(p.logits, tokens, **p.terms), strict=True):
            assert torch.allclose(a.cpu(), b, atol=2e-5, rtol=1e-4)


def test_scores_have_the_same_bits_alone_in_a_batch_and_every_time() -> None:
    p = problem("normal", ("mix",), filters=True, rows=96, vocabulary=128_256, seed=2).on("cuda")
    tokens = torch.arange(96, device="cuda") * 1000
    together = ops.score_tokens(p.logits, tokens, **p.terms)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(ops.score_tokens(p.logits, tokens, **p.terms), together, strict=True))
    for row in (0, 41, 95):
        one = slice(row, row + 1)
        terms = {
            name: [s[one] for s in value] if name == "sources" else value[one] if isinstance(value, torch.Tensor) else value
            for name, value in p.terms.items()
        }
        assert all(torch.equal(a, b[one]) for a, b in zip(ops.score_tokens(p.logits[one], tokens[one], **terms), together, strict=True))


def test_a_controls_share_on_the_device_is_the_cpus() -> None:
    """What a trace asks for: through the kernel on the device, from the rectified logits on the CPU."""
    p = problem("normal", ("mix", "attenuation"), rows=6, vocabulary=32_000, seed=4)
    laws = []
    for device in ("cpu", "cuda"):
        t = p.on(device).terms
        terms = Terms((Mix(tuple(t["sources"]), (t["weights"][:, 1], t["weights"][:, 2])), Keep(top_p=0.9)))
        other = Terms((Attenuation(tuple(t["biased"]), t["decay_constant"], t["epsilon"]),), torch.arange(6, device=device) % 2 == 0)
        laws.append([rectify(p.on(device).logits, used) for used in ((terms, other), (other,), ())])
    tokens = laws[0][0].logits.argmax(-1)
    for here, there in zip(*laws, strict=True):
        for wanted, found in zip(score(here, tokens), score(there, tokens.cuda()), strict=True):
            assert torch.allclose(found.cpu().double(), wanted.double(), atol=1e-4, rtol=1e-5)
        assert "logits" not in vars(there), "the rectified logits were stored"


def test_identical_tokens_over_many_seeds() -> None:
    p = problem("normal", ("mix",), filters=True, warp="all", rows=512, vocabulary=32_000, seed=5)
    assert torch.equal(sample(p.on("cuda"))[0].cpu(), sample(p)[0])


@pytest.mark.parametrize("kind", ["normal", "flat"])
def test_a_row_has_the_same_bits_alone_and_in_a_batch(kind: str) -> None:
    p = problem(kind, ("mix",), filters=True, warp="mixed", rows=96, vocabulary=128_256, seed=2).on("cuda")
    together = sample(p)
    for row in (0, 1, 41, 95):
        one = slice(row, row + 1)
        own = Problem(
            p.logits[one],
            p.seed[one],
            p.position[one],
            {name: value[one] for name, value in p.warp.items()},
            {
                name: [s[one] for s in value] if name == "sources" else value[one] if isinstance(value, torch.Tensor) else value
                for name, value in p.terms.items()
            },
        )
        assert all(torch.equal(a, b[one]) for a, b in zip(sample(own)[:4], together[:4], strict=True))


def test_a_graph_replays_with_new_inputs() -> None:
    """Logits, noise and settings change between replays; nothing but the captured memory may carry over."""
    p = problem("normal", ("mix",), filters=True, warp="mixed", rows=16, vocabulary=128_256, seed=0).on("cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sample(p)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = sample(p, counterfactual=True)
    for seed, kind in enumerate(("flat", "ties", "normal", "holes", "spike"), start=1):
        fresh = problem(kind, ("mix",), filters=True, warp="mixed", rows=16, vocabulary=128_256, seed=seed).on("cuda")
        p.logits.copy_(fresh.logits)
        p.seed.copy_(fresh.seed)
        p.position.copy_(fresh.position)
        for held, new in zip(p.terms["sources"], fresh.terms["sources"], strict=True):
            held.copy_(new)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, sample(fresh, counterfactual=True), strict=True))


def captured(p: Problem, stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]:
    """A graph of one call, with its own results."""
    with torch.cuda.stream(stream):
        sample(p)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = sample(p)
    return graph, found


def test_graphs_of_one_stream_replay_at_the_same_time() -> None:
    """Captured on one stream, replayed on two: what they count arrivals with is each one's own."""
    stream = torch.cuda.Stream()
    problems = [problem("flat", ("mix",), filters=True, warp="mixed", rows=32, vocabulary=128_256, seed=s).on("cuda") for s in (0, 1)]
    wanted = [[tensor.clone() for tensor in sample(p)] for p in problems]
    graphs = [captured(p, stream) for p in problems]
    others = [torch.cuda.Stream() for _ in graphs]
    for _ in range(50):
        for (graph, found), other in zip(graphs, others, strict=True):
            found[0].fill_(-1)
            other.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other):
                graph.replay()
        torch.cuda.synchronize()
        for (_, found), expected in zip(graphs, wanted, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_graph_outlives_a_larger_batch_on_its_stream() -> None:
    stream = torch.cuda.Stream()
    small = problem("normal", ("mix",), filters=True, warp="mixed", rows=4, vocabulary=32_000, seed=0).on("cuda")
    graph, found = captured(small, stream)
    wanted = found[0].clone()
    large = problem("normal", ("mix",), filters=True, warp="mixed", rows=700, vocabulary=32_000, seed=1).on("cuda")
    with torch.cuda.stream(stream):
        sample(large)
    torch.cuda.synchronize()
    filler = torch.full((2**20,), 7, dtype=torch.int32, device="cuda")  # takes whatever memory became free
    found[0].fill_(-1)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found[0], wanted)
    assert int(filler.sum()) == 7 * 2**20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_another_device_than_the_current_one() -> None:
    p = problem("normal", ("mix",), filters=True, warp="mixed", rows=4, vocabulary=32_000, seed=0)
    assert torch.equal(sample(p.on("cuda:1"))[0].cpu(), sample(p)[0])


@pytest.mark.parametrize(("kind", "rows"), [("normal", 1), ("normal", 300), ("flat", 1), ("flat", 64), ("ties", 40)])
def test_whoever_comes_last_sees_what_all_wrote(kind: str, rows: int) -> None:
    """Hundreds of runs over the same input: a race would give other tokens in some."""
    p = problem(kind, ("mix",), filters=True, warp="mixed", rows=rows, vocabulary=128_256, seed=8).on("cuda")
    first = [tensor.clone() for tensor in sample(p)]
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(300):
        for a, b in zip(sample(p), first, strict=True):
            different += (a != b).sum()
    assert int(different) == 0


def test_two_streams_do_not_share_scratch_memory() -> None:
    problems = [problem("normal", ("mix",), filters=True, warp="mixed", rows=32, vocabulary=128_256, seed=s).on("cuda") for s in (0, 1)]
    wanted = [sample(p)[0].clone() for p in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(50):
        found = []
        for stream, p in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                found.append(sample(p)[0])
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("filtered", [False, True])
def test_draws_follow_the_law_at_every_temperature(filtered: bool) -> None:
    """A million draws each, chi-squared, Holm's correction over the temperatures at .001."""
    vocabulary, draws, chunk = 64, 1_000_000, 50_000
    z = torch.linspace(-3.0, 3.0, vocabulary)[torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))].cuda()
    values = []
    for temperature in (0.5, 1.0, 1.7):
        counts = torch.zeros(vocabulary, dtype=torch.int64)
        warp = {"temperature": torch.full((chunk,), temperature, device="cuda")}
        if filtered:
            warp["top_k"] = torch.full((chunk,), 40, dtype=torch.int32, device="cuda")
        for first in range(0, draws, chunk):
            keys = torch.arange(first, first + chunk, device="cuda")
            token = ops.sample_logits(z.expand(chunk, vocabulary).contiguous(), keys, torch.full_like(keys, 17), **warp, summary=False)[0]
            counts += torch.bincount(token, minlength=vocabulary).cpu()
        law = reference_ops.rows.warp(z.double().cpu()[None], temperature, 40 if filtered else 0)
        expected = torch.softmax(law, -1)[0].numpy() * draws
        inside = expected > 0
        assert counts.numpy()[~inside].sum() == 0
        values.append(stats.chisquare(counts.numpy()[inside], expected[inside]).pvalue)
    for rank, value in enumerate(sorted(values)):
        assert value > 0.001 / (len(values) - rank), values


def test_ops_go_through_inductor() -> None:
    p = problem("normal", ("mix",), filters=True, warp="mixed", rows=4, vocabulary=32_000, seed=1).on("cuda")

    def step(logits: torch.Tensor) -> torch.Tensor:
        return ops.sample_logits(logits * 2.0, p.seed, p.position, **p.warp, **p.terms)[0] + 1

    assert torch.equal(torch.compile(step, fullgraph=True)(p.logits), step(p.logits))


def test_opcheck_on_the_device() -> None:
    p = problem("normal", ("mix", "candidates"), filters=True, warp="mixed", seed=1).on("cuda")
    for name, arguments, keywords in (
        ("rectify_logits", (p.logits,), p.terms),
        ("score_tokens", (p.logits, p.position % 1000), p.terms),
        ("sample_logits", (p.logits, p.seed, p.position), {**p.warp, **p.terms, "counterfactual": True}),
    ):
        assert set(torch.library.opcheck(getattr(torch.ops.moralguard, name).default, arguments, keywords).values()) == {"SUCCESS"}
