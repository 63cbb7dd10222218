"""The fused ops against eager PyTorch, torch.compile and other samplers, after a check that they are right.

Two chains, both from bf16 logits of a base, an expert and an anti-expert:
    mix     the dense mix z + alpha (z+ - z-) alone, stored as float32;
    chain   DExperts with its base nucleus, temperature, top-k, top-p and the draw; eager PyTorch takes transformers' own warpers.
On a GPU every contender is captured in a CUDA graph, one for each of several input sets (which exceed the L2 cache together wherever
16 of them can), and the replays are timed with events; the copy bandwidth is measured in the same run. Without a GPU the reference path
is timed and said so. ``--batch`` divides a long run: torch.compile takes a while at every point.

    python benchmarks/kernels.py [--quick] [--batch 1 8] [--device cuda] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import moralguard_kernels as ops
from moralguard.evaluation.environment import environment
from moralguard_kernels import reference_ops

ALPHA, FILTER_P, TOP_K = 2.0, 0.9, 50
SETS_BYTES, MOST_SETS = 256 * 2**20, 16  # inputs rotated over: several times the L2 cache, or as many sets


@dataclass(frozen=True)
class Point:
    """A point of the grid; top_p applies after the mix, the base nucleus is always .9."""

    logits: str
    batch: int
    vocabulary: int
    temperature: float
    top_p: float


@dataclass(frozen=True)
class Inputs:
    base: torch.Tensor
    expert: torch.Tensor
    anti_expert: torch.Tensor
    seed: torch.Tensor
    position: torch.Tensor


def inputs_of(point: Point, device: str, index: int, real: torch.Tensor | None) -> Inputs:
    g = torch.Generator().manual_seed(index)
    shape = (point.batch, point.vocabulary)
    if real is not None:
        rows = torch.randint(0, len(real), (3, point.batch), generator=g)
        base, expert, anti_expert = real[rows[0]], real[rows[1]], real[rows[2]]
    else:
        base, expert, anti_expert = (torch.randn(shape, generator=g) * 3 for _ in range(3))
    matrices = [z.to(torch.bfloat16).to(device) for z in (base, expert, anti_expert)]
    seed = torch.randint(-(2**62), 2**62, (point.batch,), generator=g).to(device)
    return Inputs(*matrices, seed, torch.full((point.batch,), index, device=device))


def _mix_terms(x: Inputs) -> dict[str, object]:
    weights = torch.tensor([[0.0, ALPHA, -ALPHA]], device=x.base.device).expand(len(x.base), 3).contiguous()
    return {"sources": [x.expert, x.anti_expert], "groups": [2], "weights": weights}


def fused_mix(x: Inputs) -> Callable[[], torch.Tensor]:
    terms = _mix_terms(x)
    return lambda: ops.rectify_logits(x.base, **terms)


def eager_mix(x: Inputs) -> torch.Tensor:
    return x.base.float() + ALPHA * (x.expert.float() - x.anti_expert.float())


def fused_chain(point: Point, x: Inputs) -> Callable[[], torch.Tensor]:
    def each(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full((point.batch,), value, dtype=dtype, device=x.base.device)

    terms = _mix_terms(x) | {
        "base_top_p": each(FILTER_P),
        "temperature": each(point.temperature),
        "top_k": each(TOP_K, torch.int32),
        "top_p": each(point.top_p),
    }
    return lambda: ops.sample_logits(x.base, x.seed, x.position, **terms, summary=False)


def eager_chain(point: Point, x: Inputs) -> torch.Tensor:
    """As in the authors' code and transformers' generate: filter the base, mix, warp, softmax, draw.

    The draw is what ``torch.multinomial`` does for one token; its checks, which wait for the device, can't be captured in a graph.
    """
    none = torch.empty(0, dtype=torch.int64, device=x.base.device)
    z = TopPLogitsWarper(FILTER_P)(none, x.base.float())
    z = z + ALPHA * (x.expert.float() - x.anti_expert.float())
    if point.temperature != 1.0:
        z = TemperatureLogitsWarper(point.temperature)(none, z)
    z = TopKLogitsWarper(TOP_K)(none, z)
    if point.top_p < 1.0:
        z = TopPLogitsWarper(point.top_p)(none, z)
    law = torch.softmax(z, -1)
    return (law / torch.empty_like(law).exponential_()).argmax(-1)


def flashinfer_chain(point: Point, x: Inputs) -> torch.Tensor:
    """FlashInfer has no base filter with a mix: it gets the mixed logits as PyTorch makes them, and draws."""
    import flashinfer

    none = torch.empty(0, dtype=torch.int64, device=x.base.device)
    z = TopPLogitsWarper(FILTER_P)(none, x.base.float()) + ALPHA * (x.expert.float() - x.anti_expert.float())
    return flashinfer.sampling.top_k_top_p_sampling_from_logits(z / point.temperature, TOP_K, point.top_p)


def vllm_chain(point: Point, x: Inputs) -> torch.Tensor:
    """vLLM's own top-k / top-p over mixed logits, then its exponential race."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p, random_sample

    none = torch.empty(0, dtype=torch.int64, device=x.base.device)
    z = TopPLogitsWarper(FILTER_P)(none, x.base.float()) + ALPHA * (x.expert.float() - x.anti_expert.float())
    k = torch.full((point.batch,), TOP_K, device=z.device)
    p = torch.full((point.batch,), point.top_p, device=z.device)
    return random_sample(torch.softmax(apply_top_k_top_p(z / point.temperature, k, p), -1), {})


def importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def contenders(point: Point, compiled: bool) -> dict[str, Callable[[Inputs], Callable[[], object]]]:
    """Name -> (inputs -> what is timed)."""
    found: dict[str, Callable[[Inputs], Callable[[], object]]] = {
        "mix/eager": lambda x: lambda: eager_mix(x),
        "mix/fused": fused_mix,
        "chain/eager": lambda x: lambda: eager_chain(point, x),
        "chain/fused": lambda x: fused_chain(point, x),
    }
    if compiled:
        mix = torch.compile(lambda b, e, a: eager_mix(Inputs(b, e, a, b, b)), fullgraph=True)
        chain = torch.compile(lambda b, e, a: eager_chain(point, Inputs(b, e, a, b, b)))
        found["mix/compile"] = lambda x: lambda: mix(x.base, x.expert, x.anti_expert)
        found["chain/compile"] = lambda x: lambda: chain(x.base, x.expert, x.anti_expert)
    if compiled and importable("flashinfer"):
        found["chain/flashinfer"] = lambda x: lambda: flashinfer_chain(point, x)
    if compiled and importable("vllm"):
        found["chain/vllm"] = lambda x: lambda: vllm_chain(point, x)
    return found


def check(device: str) -> None:
    """The gate: bits of the mix, tokens of the chain. Nothing is timed unless both are right."""
    for vocabulary in (32_000, 151_936):
        point = Point("random", 8, vocabulary, 0.7, 0.95)
        here, there = inputs_of(point, device, 1, None), inputs_of(point, "cpu", 1, None)
        assert torch.equal(fused_mix(here)().cpu(), fused_mix(there)()), "the mix has other bits than the reference"
        found, wanted = fused_chain(point, here)()[0].cpu(), fused_chain(point, there)()[0]
        assert torch.equal(found, wanted), f"tokens {found.tolist()} differ from the reference's {wanted.tolist()}"


def timed(calls: list[Callable[[], object]], device: str, repeats: int) -> list[float]:
    """Microseconds a call, one number a repeat, over the input sets in turn."""
    if device != "cuda":
        times = []
        for i in range(repeats + 1):
            start = time.perf_counter()
            calls[i % len(calls)]()
            times.append(1e6 * (time.perf_counter() - start))
        return times[1:]
    for call in calls:  # compiles, and makes scratch memory outside the graphs
        call()
        call()
    torch.cuda.synchronize()
    graphs = []
    for call in calls:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graphs.append(graph)
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for graph in graphs:
            graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(graphs))
    return times[2:]


def copy_bandwidth(repeats: int) -> float:
    """Bytes a second of a large copy on the device, read and written."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    microseconds = statistics.median(timed([lambda: target.copy_(source)], "cuda", repeats))
    return 2 * source.nbytes / (microseconds * 1e-6)


def bytes_moved(name: str, point: Point) -> int:
    """What must go through memory once: the mix reads three sources and stores float32; the chain reads the base."""
    tokens = point.batch * point.vocabulary
    return tokens * (6 + 4) if name.startswith("mix") else tokens * 2


def real_logits(file: Path | None) -> torch.Tensor:
    """Logits of the demo model over a few texts, f32[positions, 49152]; kept ones where a file holds them."""
    if file is not None:
        return load_file(file)["logits"].float()
    import moralguard as mg

    lm = mg.load_model("smollm2-135m", device="cpu")
    text = Path(__file__).with_name("decode.py").read_text() + (Path(__file__).parents[1] / "README.md").read_text()
    ids = torch.tensor([lm.tokenizer(text)["input_ids"][:1024]])
    with torch.inference_mode():
        return lm.model(ids).logits[0].float()


def grid(quick: bool, batches: Sequence[int] | None, real: torch.Tensor) -> list[tuple[Point, torch.Tensor | None]]:
    batches = batches or ((1, 64) if quick else (1, 8, 64, 256))
    vocabularies = (32_000, 128_256) if quick else (32_000, 128_256, 151_936, 256_000)
    settings = ((1.0, 0.9),) if quick else ((0.7, 0.9), (1.0, 0.9), (1.0, 0.99), (1.3, 0.95))
    found: list[tuple[Point, torch.Tensor | None]] = []
    for batch in batches:
        for temperature, top_p in settings:
            found += [(Point("random", batch, v, temperature, top_p), None) for v in vocabularies]
            found.append((Point("real", batch, real.shape[1], temperature, top_p), real))
    return found


def measure(point: Point, real: torch.Tensor | None, device: str, repeats: int, bandwidth: float | None) -> list[dict[str, object]]:
    count = 2
    if device == "cuda":
        count = max(2, min(MOST_SETS, SETS_BYTES // (6 * point.batch * point.vocabulary)))
        torch.compiler.reset()  # else every point is one more recompilation of the same code, until torch gives up and runs it eagerly
    sets = [inputs_of(point, device, index, real) for index in range(count)]
    rows: list[dict[str, object]] = []
    for name, make in contenders(point, device == "cuda").items():
        times = sorted(timed([make(x) for x in sets], device, repeats))
        middle = statistics.median(times)
        row: dict[str, object] = {"contender": name, **asdict(point), "us_p50": round(middle, 2)}
        row |= {"us_p20": round(times[len(times) // 5], 2), "us_p80": round(times[-1 - len(times) // 5], 2)}
        row["bytes"] = bytes_moved(name, point)
        row["percent_of_copy"] = round(100 * bytes_moved(name, point) / (middle * 1e-6) / bandwidth, 1) if bandwidth else None
        rows.append(row)
    split = torch.stack([(fused_chain(point, x)()[3] & ops.SPLIT) != 0 for x in sets]).float().mean()
    for kind in ("mix", "chain"):
        eager = next(float(str(row["us_p50"])) for row in rows if row["contender"] == f"{kind}/eager")
        for row in rows:
            if str(row["contender"]).startswith(kind):
                row["times_faster_than_eager"] = round(eager / float(str(row["us_p50"])), 2)
                row["overflowing_rows"] = round(float(split), 4) if row["contender"] == "chain/fused" and device == "cuda" else None
    return rows


def survivors(real: torch.Tensor) -> list[dict[str, object]]:
    """How many tokens of real logits the exact filter keeps: what decides whether a row ends in the second launch."""
    rows: list[dict[str, object]] = []
    for temperature in (0.7, 1.0, 1.3):
        for top_p in (0.8, 0.9, 0.95, 0.99):
            kept = (~torch.isneginf(reference_ops.rows.warp(real, temperature, 0, top_p))).sum(-1)
            rows.append(
                {
                    "temperature": temperature,
                    "top_p": top_p,
                    "median": int(kept.median()),
                    "over_2048": round(float((kept > 2048).float().mean()), 4),
                }
            )
    return rows


def plot(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for axis, kind in zip(axes, ("mix", "chain"), strict=True):
        names = dict.fromkeys(str(row["contender"]) for row in rows if str(row["contender"]).startswith(kind))
        for name in names:
            points = sorted((int(str(r["bytes"])), float(str(r["us_p50"]))) for r in rows if r["contender"] == name)
            axis.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1, label=name)
        axis.set(xscale="log", yscale="log", xlabel="bytes that must move", ylabel="microseconds", title=kind)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def write(result: dict[str, object], rows: list[dict[str, object]], stem: Path) -> None:
    stem.with_suffix(".json").write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="two batches, two vocabularies, one setting")
    parser.add_argument("--batch", type=int, nargs="+", help="these batch sizes alone")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--real", type=Path, help="safetensors file of the demo model's logits, for a machine without the model")
    parser.add_argument("--out", type=Path, help="folder for kernels-DEVICE.json, .csv and .png, written anew after every point")
    arguments = parser.parse_args()
    device, repeats = arguments.device, arguments.repeats or (30 if arguments.device == "cuda" else 5)
    console = Console(width=150)
    check(device)
    console.print("checked: the mix has the reference's bits, the chain its tokens")
    real = real_logits(arguments.real)
    bandwidth = copy_bandwidth(repeats) if device == "cuda" else None
    console.print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s" if bandwidth else "no GPU: what is timed is the reference path on the CPU")
    result: dict[str, object] = {"environment": environment(), "device": device, "copy_bandwidth": bandwidth}
    result["survivors_on_real_logits"] = survivors(real)
    chosen = "".join(f"-b{batch}" for batch in arguments.batch or ())
    stem = None if arguments.out is None else arguments.out / f"kernels-{device}{chosen}"
    if stem is not None:
        stem.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for point, logits in grid(arguments.quick or device != "cuda", arguments.batch, real):
        rows += measure(point, logits, device, repeats, bandwidth)
        console.print(json.dumps(rows[-1]), soft_wrap=True, highlight=False)
        if stem is not None:
            write(result, rows, stem)
    columns = ("contender", "logits", "batch", "vocabulary", "temperature", "top_p", "us_p50", "us_p20", "us_p80", "percent_of_copy")
    table = Table(*columns, "x eager", "overflowing")
    for row in rows:
        table.add_row(*(str(row[name]) for name in columns), str(row["times_faster_than_eager"]), str(row["overflowing_rows"]))
    console.print(table)
    if stem is not None:
        plot(rows, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
