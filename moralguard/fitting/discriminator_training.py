"""Training the discriminator's English network: both readings of it, on rows of many values at once."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from moralguard.discriminator.network import Network
from moralguard.discriminator.tokens import Tokens, WordPieces
from moralguard.fitting.checkpoints import linear_rate, load_checkpoint, save_checkpoint
from moralguard.fitting.rows import Row
from moralguard.fitting.sampling import Sampler
from moralguard.schema import StrictModel

_SUPERBATCH = 16  # batches that are drawn together and sorted by length, so that little padding is computed


class TrainingSettings(StrictModel):
    """How the network is trained.

    Attributes:
        steps: optimiser steps.
        batch_size: rows a step.
        learning_rate: peak rate of the tuned layers; ``head_learning_rate`` of what starts from nothing.
        relevance_weight: weight of the relevance loss where a row says whether its value is at stake.
        smoothing: labels are moved this far towards a half.
        siblings: further values that a text is read against in the cached reading, where it has rows of them.
        cross_every: the cross reading is trained every so many steps, the cached one always.
        max_tokens: longer texts are read from a random place at this length.
        bfloat16: compute the products in bfloat16 (parameters stay float32).
    """

    steps: int = Field(4000, ge=1)
    batch_size: int = Field(64, ge=2)
    learning_rate: float = Field(1e-4, gt=0)
    head_learning_rate: float = Field(6e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    relevance_weight: float = Field(0.25, ge=0)
    smoothing: float = Field(0.02, ge=0, lt=0.5)
    siblings: int = Field(6, ge=0)
    cross_every: int = Field(2, ge=1)
    max_tokens: int = Field(80, ge=8)
    seed: int = 0
    bfloat16: bool = True
    checkpoint_every: int = Field(500, ge=1)


@dataclass(frozen=True)
class Progress:
    """What a training run tells its caller after each step: ``loss`` is a running mean."""

    step: int
    steps: int
    loss: float


def train_network(
    network: Network,
    pieces: WordPieces,
    sampler: Sampler,
    settings: TrainingSettings,
    *,
    device: str = "cpu",
    checkpoint: Path | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Network:
    """Train in place and return the network, in evaluation mode.

    Args:
        checkpoint: file that holds the state of an interrupted run; it is written every ``checkpoint_every`` steps and read
            where it exists, and a resumed run draws the rows that an unbroken one would have drawn.

    Raises:
        DataError: the checkpoint is of a run with other settings.
    """
    network.to(device).train()
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    tuned = [p for name, p in trainable.items() if name.startswith("encoder.")]
    fresh = [p for name, p in trainable.items() if not name.startswith("encoder.")]
    groups = [{"params": tuned, "lr": settings.learning_rate}, {"params": fresh, "lr": settings.head_learning_rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay, betas=(0.9, 0.98), fused=True)
    warm = max(1, int(settings.warmup * settings.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: linear_rate(step, warm, settings.steps))
    start = load_checkpoint(checkpoint, _key(settings), trainable, optimizer) if checkpoint is not None else 0
    schedule.last_epoch = start
    for group, rate in zip(optimizer.param_groups, schedule.base_lrs, strict=True):
        group["lr"] = rate * linear_rate(start, warm, settings.steps)
    running = 0.0
    batches: list[list[list[Row]]] = []
    for step in range(start, settings.steps):
        place = step % _SUPERBATCH
        if place == 0 or not batches:
            batches = _batches(sampler, step - place, settings)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=settings.bfloat16):
            chooser = random.Random(f"{settings.seed}:{step}")
            torch.manual_seed(settings.seed * 1_000_003 + step)  # dropout too is what an unbroken run's would be
            loss = batch_loss(network, pieces, batches[place], settings, chooser, device, cross=step % settings.cross_every == 0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trainable.values()), 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
        report(Progress(step + 1, settings.steps, running))
        if checkpoint is not None and (step + 1) % settings.checkpoint_every == 0 and step + 1 < settings.steps:
            save_checkpoint(checkpoint, _key(settings), trainable, optimizer, step + 1)
    return network.eval()


def _batches(sampler: Sampler, first: int, settings: TrainingSettings) -> list[list[list[Row]]]:
    texts = sampler.draw(first, settings.batch_size * _SUPERBATCH)
    texts.sort(key=lambda rows: len(rows[0].text) + len(rows[0].statement) + len(rows[0].context))
    batches = [texts[i : i + settings.batch_size] for i in range(0, len(texts), settings.batch_size)]
    random.Random(f"{settings.seed}:order:{first}").shuffle(batches)
    return batches


def batch_loss(
    network: Network,
    pieces: WordPieces,
    texts: Sequence[Sequence[Row]],
    settings: TrainingSettings,
    chooser: random.Random,
    device: str,
    cross: bool = True,
) -> Tensor:
    """Mean loss of the cached reading over all rows of a batch of texts, and of the cross reading over each text's first; a scalar.

    Each text is encoded once, and each (statement, context) of the batch too.
    """
    rows = [row for group in texts for row in group]
    owner = [i for i, group in enumerate(texts) for _ in group]
    places: dict[tuple[str, str], int] = {}
    stated = torch.tensor([places.setdefault((row.statement, row.context), len(places)) for row in rows], device=device)
    values = pieces.statements([statement for statement, _ in places], [context for _, context in places]).to(torch.device(device))
    tokens = _text_tokens(pieces, [group[0].text for group in texts], settings.max_tokens, chooser).to(torch.device(device))
    kept = torch.tensor([row.kept for row in rows], device=device)
    relevance = torch.tensor([-1.0 if row.relevance is None else row.relevance for row in rows], device=device)
    text = network.encode(tokens.ids, tokens.mask, side=1)
    value = network.encode(values.ids, values.mask, side=0)
    assert value.states is not None
    of_row = text.rows(torch.tensor(owner, device=device))
    cached = network.cached_logits(of_row, value.states[stated, :1], value.sentence[stated, None])
    loss = _loss(cached[0].reshape(-1), cached[1].reshape(-1), kept, relevance, settings)
    if not cross:
        return loss
    first = torch.tensor([owner.index(i) for i in range(len(texts))], device=device)
    pairs = network.cross_logits(text, value.rows(stated[first]))
    return loss + _loss(*pairs, kept[first], relevance[first], settings)


def _loss(relevant: Tensor, broken: Tensor, kept: Tensor, relevance: Tensor, settings: TrainingSettings) -> Tensor:
    target = (1.0 - kept) * (1.0 - 2 * settings.smoothing) + settings.smoothing
    log_broken = F.logsigmoid(relevant) + F.logsigmoid(broken)
    log_kept = torch.log(-torch.expm1(log_broken.clamp(max=-1e-6)))
    loss = -(target * log_broken + (1.0 - target) * log_kept).mean()
    known = relevance >= 0
    if settings.relevance_weight and known.any():
        loss = loss + settings.relevance_weight * F.binary_cross_entropy_with_logits(relevant[known], relevance[known])
    return loss


def _text_tokens(pieces: WordPieces, texts: Sequence[str], max_tokens: int, chooser: random.Random) -> Tokens:
    rows = []
    for ids, _ in pieces.pieces(texts):
        start = chooser.randint(0, len(ids) - max_tokens) if len(ids) > max_tokens else 0
        rows.append(ids[start : start + max_tokens])
    return pieces.rows(rows)


def _key(settings: TrainingSettings) -> str:
    return hashlib.sha256(settings.model_dump_json(exclude={"checkpoint_every"}).encode()).hexdigest()
