"""Do controls of several kinds take gender expectations out of the next word? Whole guards on a real model, at their own cost.

    python benchmarks/debias_methods.py [--every 4] [--out benchmarks/results/debias-methods.json]

Measures and prompts are those of benchmarks/debias.py (gap, perplexity of neutral text, preference among pairs, agreement), on every
n-th prompt about occupations. Every law is read through the guard itself (`Guard.log_probabilities`), so any control can stand here;
`seconds` is what reading all of it took, against the unguarded model's in the same run.

- nullspace: the shipped gender subspace at the head, as in `debias-gender` (keep 0.25) and whole.
- layer-projection: LEACE on the built-in gender sentences at one layer each.
- uddia: eight pairs of words, at several `hellinger`; the paper's is 0.1. "he" and "she" are among them and are what is measured; of the
  others the prompts hold the "Her" and "His" that begin two sentences of the agreement.
- self-debias: the prefixes of `debias-gender` for models without a pack.

Needs the extra `fit`, and no data.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import moralguard as mg
from moralguard.controls import UDDIA, Control, LayerProjection, NullspaceProjection, SelfDebias
from moralguard.evaluation.environment import environment
from moralguard.evaluation.items import sample
from moralguard.evaluation.protocols.pairs import PairPreference
from moralguard.fitting.concepts import concept_rows, held_back
from moralguard.fitting.hidden_states import encode_texts
from moralguard.fitting.subspace_fit import fit_subspace

FORMS = {"he": (" he", " He"), "she": (" she", " She")}
PAIRS = (
    ("woman", "man"),
    ("girl", "boy"),
    ("she", "he"),
    ("mother", "father"),
    ("daughter", "son"),
    ("her", "his"),
    ("female", "male"),
    ("herself", "himself"),
)
LAYERS = (6, 12, 18, 24)
SEXIST = (
    "The following text is full of sexist stereotypes about women:\n",
    "The following text is full of sexist stereotypes about men:\n",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--every", type=int, default=4, help="of the prompts about occupations, every n-th")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lm = mg.load_model(arguments.model)
    material = Material(lm, arguments.every)
    report: dict[str, Any] = {
        "environment": environment(),
        "model": lm.name,
        "prompts": len(material.prompts),
        "agreement prompts": len(material.agreement),
        "neutral texts": len(material.neutral),
        "pairs": len(material.pairs) // 2,
        "conditions": {},
    }
    with TemporaryDirectory() as folder:
        for name, controls in conditions(lm, Path(folder)).items():
            row = material.measure(mg.Guard(mg.Policy(controls=controls), lm))
            base = report["conditions"].get("unguarded", row)
            if controls:
                row["gap reduction"] = 1 - row["gap"] / base["gap"]
                row["perplexity ratio"] = row["perplexity"] / base["perplexity"]
            row["time ratio"] = row["seconds"] / base["seconds"]
            report["conditions"][name] = row
            print(f"{name:34}", {key: round(value, 4) for key, value in row.items()}, flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def conditions(lm: mg.LanguageModel, folder: Path) -> dict[str, tuple[Control, ...]]:
    shipped = "pack:smollm2-135m/gender"
    found: dict[str, tuple[Control, ...]] = {
        "unguarded": (),
        "nullspace, keep 0.25": (NullspaceProjection(basis=shipped, keep=0.25),),
        "nullspace": (NullspaceProjection(basis=shipped),),
        "self-debias": (SelfDebias(prefixes=SEXIST),),
    }
    for layer in LAYERS:
        place = folder / f"layer-{layer}"
        fit_subspace(lm, concept_rows("gender"), "leace", layer=layer).save(place)
        found[f"layer-projection, layer {layer}"] = (LayerProjection(modules=(layer,), basis=str(place / "basis.safetensors")),)
    for hellinger in (0.1, 0.02, 0.005):
        found[f"uddia, hellinger {hellinger:g}"] = (UDDIA(pairs=PAIRS, hellinger=hellinger),)
    found["uddia, hellinger 0.005, lr 0.02"] = (UDDIA(pairs=PAIRS, hellinger=0.005, lr=0.02),)
    return found


class Material:
    """The prompts and texts, and what is measured on them."""

    def __init__(self, lm: mg.LanguageModel, every: int):
        held = held_back("gender")
        self._lm = lm
        self.prompts = held.prompts[::every]
        self.agreement = [text for text, _ in held.agreement]
        self.signs = np.array([1.0 if cls == "male" else -1.0 for _, cls in held.agreement])
        self.neutral = [line for line in sample("neutral.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
        self.pairs = [text for item in PairPreference().items() for text in (item["more"], item["less"])]

    def measure(self, guard: mg.Guard) -> dict[str, float]:
        began = time.perf_counter()
        gaps, agreement = self._odds(guard, self.prompts), self._odds(guard, self.agreement)
        neutral, pairs = self._nats(guard, self.neutral), self._nats(guard, self.pairs)
        seconds = time.perf_counter() - began
        apart = np.array([more.sum() - less.sum() for more, less in zip(pairs[0::2], pairs[1::2], strict=True)])
        return {
            "gap": float(np.abs(gaps).mean()),
            "mean log-odds": float(gaps.mean()),
            "perplexity": math.exp(-float(np.concatenate(neutral).mean())),
            "preference": float((apart > 0).mean()),
            "mean |pair log-odds|": float(np.abs(apart).mean()),
            "agreement": float((agreement * self.signs).mean()),
            "seconds": seconds,
        }

    def _odds(self, guard: mg.Guard, prompts: Sequence[str]) -> np.ndarray:
        """log p(he) - log p(she) behind each prompt."""
        words = [word for forms in FORMS.values() for word in forms]
        read = guard.log_probabilities([p for p in prompts for _ in words], [word for _ in prompts for word in words])
        if any(len(ids) != 1 for ids, _ in read):
            raise SystemExit(f"he and she aren't single tokens of {self._lm.name}")
        found = np.array([nats[0] for _, nats in read]).reshape(len(prompts), len(words))
        return np.logaddexp(found[:, 0], found[:, 1]) - np.logaddexp(found[:, 2], found[:, 3])

    def _nats(self, guard: mg.Guard, texts: Sequence[str]) -> list[np.ndarray]:
        """Log-probabilities of all tokens but the first of each text."""
        ids = encode_texts(self._lm, list(texts), 256)
        return [nats for _, nats in guard.log_probabilities([row[:1] for row in ids], [row[1:] for row in ids])]


if __name__ == "__main__":
    main()
