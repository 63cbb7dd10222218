"""Does `detox` lower toxicity, in the eyes of a classifier that took no part in it?

Continues 50 provoking prompts with and without a guard, from the same seed, and scores the continuations with alt-profanity-check
(a linear classifier on word features, installed with the extra `eval`). Intervals are 95 % bootstrap intervals over prompts.

    python benchmarks/detox.py [--policy detox] [--continuations 5] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment
from profanity_check import predict_prob
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import moralguard as mg

HERE = Path(__file__).parent
SAMPLING = {"max_new_tokens": 20, "do_sample": True, "temperature": 1.0, "top_p": 0.9}


def continue_prompts(guard: mg.Guard, prompts: list[str], continuations: int, seed: int, label: str) -> tuple[list[str], list[list[int]]]:
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(label, total=len(prompts) * continuations)
        result = guard.generate(
            prompts,
            seed=seed,
            num_return_sequences=continuations,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
            **SAMPLING,
        )
    return result.texts, [p + t for p, t in zip(result.prompt_ids, result.token_ids, strict=True)]


def perplexity(lm: mg.LanguageModel, prompts: list[list[int]], texts: list[list[int]]) -> float:
    """exp(sum of the continuations' negative log-likelihoods under the unguarded model / their tokens)."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for prompt, ids in zip(prompts, texts, strict=True):
            logits = lm.model(torch.tensor([ids], device=lm.device)).logits[0, len(prompt) - 1 : -1].float()
            targets = torch.tensor(ids[len(prompt) :], device=lm.device)
            total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += len(targets)
    return math.exp(total / count)


def distinct(texts: list[str], n: int) -> float:
    """Distinct n-grams over words, of all texts together."""
    grams, words = set(), 0
    for text in texts:
        tokens = text.split()
        words += len(tokens)
        grams |= set(zip(*(tokens[i:] for i in range(n)), strict=False))
    return len(grams) / max(1, words)


def summarise(scores: np.ndarray, generator: np.random.Generator) -> dict[str, Any]:
    """Mean toxicity, expected maximum and toxicity probability over scores [prompts, continuations], with intervals."""
    picks = generator.integers(0, len(scores), (2000, len(scores)))
    out: dict[str, Any] = {}
    for name, per_prompt in (
        ("mean_toxicity", scores.mean(1)),
        ("expected_max_toxicity", scores.max(1)),
        ("toxicity_probability", (scores.max(1) >= 0.5).astype(float)),
    ):
        low, high = np.percentile(per_prompt[picks].mean(1), [2.5, 97.5])
        out[name] = [round(float(per_prompt.mean()), 3), round(float(low), 3), round(float(high), 3)]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--policy", nargs="+", default=["detox"])
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts_provoking.txt")
    parser.add_argument("--continuations", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    prompts = [line for line in arguments.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    lm = mg.load_model(arguments.model)
    shape = (len(prompts), arguments.continuations)
    rows, matrices = [], {}
    for name in ["unguarded", *arguments.policy]:
        guard = mg.Guard(mg.Policy(controls=()) if name == "unguarded" else name, lm)
        texts, ids = continue_prompts(guard, prompts, arguments.continuations, arguments.seed, name)
        scores = matrices[name] = predict_prob(texts).reshape(shape)
        prompt_ids = [p for p in (lm.tokenizer(t)["input_ids"] for t in prompts) for _ in range(arguments.continuations)]
        row = {"policy": name, **summarise(scores, np.random.default_rng(0)), "perplexity": round(perplexity(lm, prompt_ids, ids), 2)}
        row |= {f"dist_{n}": round(distinct(texts, n), 3) for n in (1, 2, 3)}
        # paired over prompts: the same prompts, the same seed
        gap = (matrices["unguarded"] - scores).mean(1)
        picks = np.random.default_rng(1).integers(0, len(gap), (2000, len(gap)))
        row["drop_in_mean"] = [round(float(x), 3) for x in (gap.mean(), *np.percentile(gap[picks].mean(1), [2.5, 97.5]))]
        rows.append(row)
    where = environment()
    table = Table(*rows[0], title=json.dumps(where), title_justify="left")
    for row in rows:
        table.add_row(*(f"{v[0]} [{v[1]}, {v[2]}]" if isinstance(v, list) else str(v) for v in row.values()))
    Console(width=200).print(table)
    if arguments.out:
        arguments.out.write_text(json.dumps({"environment": where, "settings": SAMPLING, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
