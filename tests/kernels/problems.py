"""Random problems for the ops: logits with holes, ties and spikes, and any mixture of terms, filters and settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

KINDS = ("normal", "flat", "uniform", "spike", "ties", "holes")
TERMS = ("mix", "two mixes", "low rank", "attenuation", "candidates", "biased candidates")


@dataclass
class Problem:
    """Arguments of ``sample_logits``; ``terms`` alone are those of ``rectify_logits``."""

    logits: torch.Tensor
    seed: torch.Tensor
    position: torch.Tensor
    warp: dict[str, Any] = field(default_factory=dict)
    terms: dict[str, Any] = field(default_factory=dict)

    def on(self, device: str) -> Problem:
        def move(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(device)
            return [move(item) for item in value] if isinstance(value, list) else value

        warp, terms = ({name: move(value) for name, value in group.items()} for group in (self.warp, self.terms))
        return Problem(self.logits.to(device), self.seed.to(device), self.position.to(device), warp, terms)


def logits_of(kind: str, rows: int, vocabulary: int, generator: torch.Generator) -> torch.Tensor:
    z = torch.randn(rows, vocabulary, generator=generator) * 4
    if kind == "flat":
        z = z / 16
    if kind == "uniform":
        z = torch.full_like(z, 1.25)
    if kind == "spike":
        z[:, vocabulary // 2] = 60.0
    if kind == "ties":
        z = (z / 2).round()
    if kind == "holes":
        z[torch.rand(z.shape, generator=generator) < 0.5] = float("-inf")
        z[0, 1], z[-1, vocabulary // 3] = float("nan"), float("inf")
        z[rows // 2] = float("-inf")
    return z


def problem(
    kind: str,
    terms: tuple[str, ...] = (),
    *,
    filters: bool = False,
    warp: str = "free",
    rows: int = 3,
    vocabulary: int = 1000,
    dtype: torch.dtype = torch.float32,
    slots: bool = False,
    seed: int = 0,
) -> Problem:
    """A problem; ``warp`` is free, greedy, k, p, min-p, all or mixed (other settings in every row)."""
    g = torch.Generator().manual_seed(seed)
    count = rows + 2 if slots else rows
    found = Problem(
        logits_of(kind, rows, vocabulary, g).to(dtype),
        torch.randint(-(2**62), 2**62, (count,), generator=g),
        torch.randint(0, 5000, (rows,), generator=g),
    )

    def source() -> torch.Tensor:
        # a wider matrix, so that rows have a stride of their own
        return torch.randn(rows, vocabulary + 24, generator=g).mul_(3).to(dtype)[:, :vocabulary]

    def each(*values: float, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor([values[i % len(values)] for i in range(count)], dtype=kind)

    t = found.terms
    if slots:
        t["slots"] = torch.randperm(count, generator=g)[:rows].to(torch.int32)
    if "mix" in terms:
        t |= {"sources": [source(), source()], "groups": [2], "weights": torch.tensor([[0.0, 2.0, -2.0]]).expand(count, 3).contiguous()}
    if "two mixes" in terms:
        t |= {"sources": [source() for _ in range(3)], "groups": [2, 1], "weights": torch.randn(count, 5, generator=g)}
        t["sources"][0][0, 5] = float("nan")
        t["sources"][1][0, 6] = float("-inf")
    if "low rank" in terms:
        t |= {"projection": torch.randn(vocabulary, 5, generator=g), "coefficients": torch.randn(rows, 5, generator=g)}
    if "attenuation" in terms:
        t |= {"biased": [source() for _ in range(2)], "decay_constant": each(50.0, 0.0, 10.0), "epsilon": each(0.01, 1.0)}
        t["biased"][1][rows - 1, 3] = float("nan")
    if "candidates" in terms or "biased candidates" in terms:
        ids = torch.stack([torch.randperm(vocabulary, generator=g)[:40] for _ in range(rows)])
        t |= {"candidate_ids": ids, "candidate_bias": torch.randn(rows, 40, generator=g), "keep_rest": "candidates" not in terms}
        if seed % 2:
            t["candidate_count"] = torch.tensor([(40, -1, 7)[i % 3] for i in range(rows)], dtype=torch.int32)
    if filters:
        t |= {
            "base_top_k": each(0, 300, 0, kind=torch.int32),
            "base_top_p": each(0.9, 1.0, 0.99),
            "base_min_p": each(0.0, 0.0, 1e-3),
        }
    if warp == "greedy":
        found.warp["temperature"] = each(0.0)
    if warp in ("k", "all"):
        found.warp["top_k"] = each(20, vocabulary, 400, kind=torch.int32)
    if warp in ("p", "all"):
        found.warp["top_p"] = each(0.9, 0.5, 0.99)
    if warp in ("min-p", "all"):
        found.warp["min_p"] = each(0.05, 1e-4)
    if warp == "all":
        found.warp["temperature"] = each(0.7, 1.3)
    if warp == "mixed":
        found.warp |= {
            "temperature": each(0.7, 0.0, 1.3, 1.0),
            "top_k": each(0, 50, 400, kind=torch.int32),
            "top_p": each(1.0, 0.9, 0.95),
            "min_p": each(0.0, 0.0, 0.01),
        }
    return found
