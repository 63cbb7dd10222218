"""Training a few parameters beside a frozen model: every step is a pure function of its number, so an interrupted run ends where an
unbroken one does, to the same bits."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from moralguard.backends.hf import LanguageModel
from moralguard.fitting.checkpoints import linear_rate, load_checkpoint, save_checkpoint
from moralguard.schema import StrictModel

Report = Callable[[int, int, float], None]
"""Called with (step, steps, running mean of the loss)."""


class LoopSettings(StrictModel):
    """What every training run of texts has.

    Attributes:
        steps: optimiser steps; batch_size texts each.
        warmup: share of the steps in which the rate rises; then it falls to nothing.
        max_tokens: longer texts are cut.
        bfloat16: compute the products in bfloat16 (what is trained stays float32).
    """

    steps: int = Field(300, ge=1)
    batch_size: int = Field(16, ge=1)
    warmup: float = Field(0.05, ge=0, lt=1)
    max_tokens: int = Field(48, ge=2)
    seed: int = 0
    bfloat16: bool = True
    checkpoint_every: int = Field(100, ge=1)


def run_key(settings: LoopSettings, lm: LanguageModel, rows: Any) -> str:
    """Names a run: its settings, model and data."""
    return hashlib.sha256(f"{settings.model_dump_json(exclude={'checkpoint_every'})}{lm.fingerprint}{rows}".encode()).hexdigest()


def train(
    trainable: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    settings: LoopSettings,
    loss_of: Callable[[int], Tensor],
    *,
    device: torch.device,
    checkpoint: Path,
    key: str,
    report: Report,
) -> None:
    """Run the steps that the checkpoint doesn't hold yet; it is left to the caller to delete it.

    Args:
        optimizer: over ``trainable``; its rate is the peak of a linear warm-up and decay.
        loss_of: the loss of a step, by its number.

    Raises:
        DataError: the checkpoint is of a run with another key.
    """
    peak = [group["lr"] for group in optimizer.param_groups]
    start = load_checkpoint(checkpoint, key, trainable, optimizer)
    warm, running = max(1, int(settings.warmup * settings.steps)), 0.0
    for step in range(start, settings.steps):
        for group, rate in zip(optimizer.param_groups, peak, strict=True):
            group["lr"] = rate * linear_rate(step, warm, settings.steps)
        with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16) if settings.bfloat16 else nullcontext():
            loss = loss_of(step)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trainable.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
        report(step + 1, settings.steps, running)
        if (step + 1) % settings.checkpoint_every == 0 and step + 1 < settings.steps:
            save_checkpoint(checkpoint, key, trainable, optimizer, step + 1)


def texts_of_a_step(lengths: Sequence[int], settings: LoopSettings, step: int) -> list[int]:
    """Which texts a step reads: by chance, those of a like length together."""
    chooser = random.Random(f"{settings.seed}:{step}")
    pool = sorted(chooser.sample(range(len(lengths)), min(len(lengths), 8 * settings.batch_size)), key=lambda i: lengths[i])
    first = chooser.randrange(max(1, len(pool) - settings.batch_size + 1))
    return pool[first : first + settings.batch_size]


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask i64[B, T]."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
