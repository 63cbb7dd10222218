"""Time a token under the guard over time a token without it, side by side in one run.

Every round runs all variants one after the other, so that drift of the machine hits all alike; a variant's ratio is taken within
its round against the faster of transformers' ``model.generate`` and the own loop with an empty policy. Times are between tokens
(the prompt is read before the first), greedy, over the same number of tokens.

``--shape 1b`` and ``8b`` are Llamas of these sizes with random weights, for latency on a GPU (``tiny`` is there to try the program).
``--graphs`` adds transformers' generate with a static cache, which captures the forward in CUDA graphs, alone and with the guard as
its logits processor; their ratios are among themselves. A control that reads hidden states can't ride a captured forward: it is left
out there, and said so.

    python benchmarks/decode.py [--batch 1 8] [--dtype float32] [--rounds 9] [--tokens 24] [--only NAME ...] [--out FILE]
    python benchmarks/decode.py --shape 8b --device cuda --dtype bfloat16 --batch 1 8 64 --graphs --out FILE
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.controls import PPLM, DExperts, FactoredHead, Fudge, NullspaceProjection, Prompt, SelfDebias
from moralguard.controls.base import Control
from moralguard.decoding.loop import decode
from moralguard.decoding.records import Completion
from moralguard.decoding.settings import DecodingSettings
from moralguard.errors import UnsupportedPathError
from moralguard.evaluation.environment import environment

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 49_152},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "vocab_size": 128_256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 128_256},
}

PROMPTS = [
    "The history of the city begins with a small settlement",
    "My neighbour told me that the new people in the street",
    "The scientists who worked on the project said that",
    "When I was young, my family used to travel to",
    "The most important thing to know about cooking rice is",
    "In the middle of the night a loud noise woke",
    "The company announced on Monday that its employees",
    "A good teacher always tries to understand why",
]

GOALS = {"nullspace": 1.03, "fudge": 1.10, "dexperts": 1.35, "self-debias": 2.3, "pplm-bow": 11.0, "pplm-head": 18.0}
GOALS_BFLOAT16 = {"self-debias": 1.5}


def variants(lm: mg.LanguageModel) -> dict[str, tuple[Control, ...]]:
    """The controls at the settings the goals are stated for; random heads and bases, as only time is measured."""
    width = lm.head.weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, 8, generator=generator)).Q
    head = FactoredHead(torch.randn(16, width, generator=generator) / width, torch.randn(16, width, generator=generator))
    classifier = (torch.randn(2, width, generator=generator) / width, torch.zeros(2))
    prefixes = [
        f"The following text contains {what}:\n"
        for what in ("hate", "insults", "threats", "sexual language", "swear words", "identity attacks")
    ]
    bag = [["kind", "good", "happy", "peace", "friend", "love", "help", "warm", "smile", "gentle"]]
    return {
        "nullspace": (NullspaceProjection(basis=basis),),
        "fudge": (Fudge(discriminator=head),),
        "dexperts": (DExperts(expert=Prompt("The following text is polite:\n"), anti_expert=Prompt("The following text is rude:\n")),),
        "self-debias": (SelfDebias(prefixes=prefixes),),
        "pplm-bow": (PPLM(bag_of_words=bag),),
        "pplm-head": (PPLM(head=classifier),),
    }


class Clock(LogitsProcessor):
    """Notes the time of every call and changes nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return scores


def random_llama(shape: str, device: str, dtype: torch.dtype, tokenizer: Path | None) -> LanguageModel:
    """A Llama of a known shape with random weights; the demo model's tokenizer spells its prompts, or one in a folder."""
    config = LlamaConfig(**SHAPES[shape], num_key_value_heads=4 if shape == "tiny" else 8, max_position_embeddings=2048)
    config.tie_word_embeddings = shape == "1b"
    kept = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(kept)
    model.generation_config.eos_token_id = None
    spelling = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else mg.load_model("smollm2-135m", device="cpu").tokenizer
    return LanguageModel(model, spelling, name=f"random-{shape}")


def time_transformers(
    lm: mg.LanguageModel, prompts: list[list[int]], tokens: int, processors: Sequence[LogitsProcessor] = (), **generation: object
) -> float:
    """Seconds a token of model.generate."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=lm.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=lm.device)
    clock = Clock()
    lm.model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([*processors, clock]),
        **generation,
    )
    return _per_token(clock.times)


def time_own_loop(guard: mg.Guard, prompts: list[list[int]], tokens: int) -> float:
    """Seconds a token of the guard's own loop."""
    settings = DecodingSettings(max_new_tokens=tokens, batch_size=len(prompts))
    context = guard._context(settings, 0, False)
    requests = [Completion(ids, 0) for ids in prompts]
    times: list[float] = []
    for index, _ in decode(context, requests):
        if index == 0:
            if guard.lm.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
    return _per_token(times)


def _per_token(times: list[float]) -> float:
    return statistics.median(after - before for before, after in pairwise(times))


GRAPHS = ", CUDA graphs"


def measure(lm: mg.LanguageModel, batch: int, tokens: int, rounds: int, only: list[str] | None, graphs: bool) -> list[dict[str, object]]:
    texts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
    prompts = [[int(i) for i in lm.tokenizer(text)["input_ids"]] for text in texts]
    runs: dict[str, Callable[[int], float]] = {"transformers": lambda n: time_transformers(lm, prompts, n)}
    empty = mg.Guard(mg.Policy(controls=()), lm)
    runs["empty policy"] = lambda n: time_own_loop(empty, prompts, n)
    for name, controls in variants(lm).items():
        if only is None or name in only:
            guard = mg.Guard(mg.Policy(controls=controls), lm)
            runs[name] = lambda n, guard=guard: time_own_loop(guard, prompts, n)
            if graphs:
                runs[name + GRAPHS] = lambda n, guard=guard: time_transformers(
                    lm, prompts, n, [guard.logits_processor()], cache_implementation="static"
                )
    if graphs:
        runs["transformers" + GRAPHS] = lambda n: time_transformers(lm, prompts, n, cache_implementation="static")
    for name, run in list(runs.items()):
        try:
            run(4)
        except UnsupportedPathError as error:
            print(f"{name} left out: {error}")
            del runs[name]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run(max(6, tokens // 3) if name.startswith("pplm") else tokens))
    unguarded = [min(pair) for pair in zip(seconds["transformers"], seconds["empty policy"], strict=True)]
    goals = GOALS | (GOALS_BFLOAT16 if lm.dtype == torch.bfloat16 else {})
    rows = []
    for name, times in seconds.items():
        baseline = seconds["transformers" + GRAPHS] if name.endswith(GRAPHS) else unguarded
        ratios = sorted(t / b for t, b in zip(times, baseline, strict=True))
        rows.append(
            {
                "variant": name,
                "batch": batch,
                "dtype": str(lm.dtype).removeprefix("torch."),
                "ms_per_token": round(1e3 * statistics.median(times), 2),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_p20": round(ratios[len(ratios) // 5], 3),
                "ratio_p80": round(ratios[-1 - len(ratios) // 5], 3),
                "goal": goals.get(name) if batch == 1 else None,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shape", choices=SHAPES, help="a Llama of this shape with random weights instead of the model")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer for --shape, for a machine without the demo model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--graphs", action="store_true", help="also generate() with CUDA graphs")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.shape:
        lm = random_llama(arguments.shape, arguments.device, getattr(torch, arguments.dtype), arguments.tokenizer)
    else:
        lm = mg.load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    where = environment() | {"model": lm.name}
    rows: list[dict[str, object]] = []
    for batch in arguments.batch:
        rows += measure(lm, batch, arguments.tokens, arguments.rounds, arguments.only, arguments.graphs)
        if arguments.out:  # after each batch: a run on a lent machine may be cut
            arguments.out.write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")
    table = Table("variant", "batch", "dtype", "ms a token", "ratio", "p20-p80", "goal", title=json.dumps(where), title_justify="left")
    for r in rows:
        spread = f"{r['ratio_p20']}-{r['ratio_p80']}"
        table.add_row(*(str(v) for v in (r["variant"], r["batch"], r["dtype"], r["ms_per_token"], r["ratio"], spread, r["goal"] or "")))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
