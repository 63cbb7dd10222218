"""Fitting prefixes: vectors, or keys and values of every layer, in front of a frozen model.

Prompt tuning (Lester et al. 2021, arXiv 2104.08691) and prefix-tuning (Li & Liang 2021, arXiv 2101.00190) train one prefix as a language
model on the texts of one class. Contrastive prefixes (Qian et al. 2022, arXiv 2202.13257, the supervised method) train one a class at
once: omega_1 L_LM + omega_2 L_d, L_LM the language-model loss of each text behind its class's prefix, L_d = -log P(class | text), the
softmax over the classes of log p(text | prefix).

Deviations: keys and values are trained as they are, from those of real words (which Li & Liang found to matter most), and not through
a network or matrix that is thrown away; L_LM is a mean over tokens; a text's first token isn't predicted, as a request always has one.
peft has the first two methods, but starts a cache from noise and reads one prefix a forward, where L_d needs both.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from moralguard.backends.hf import LanguageModel
from moralguard.backends.kv_cache import cache_from
from moralguard.backends.learned_prefix import keys_and_values, prefix_of
from moralguard.errors import DataError
from moralguard.fitting.checkpoints import linear_rate, load_checkpoint, save_checkpoint
from moralguard.schema import StrictModel

Prefix = dict[str, Tensor]
"""What a pack holds: ``embeddings`` f[n, d], or ``keys.i`` and ``values.i`` f[heads, n, head_dim]; nothing is no prefix."""
Row = tuple[list[int], int]
"""Token ids of a text and its class, a place in the list of prefixes."""


class PrefixSettings(StrictModel):
    """How prefixes are trained.

    Attributes:
        method: "prompt-tuning" (vectors), "prefix-tuning" (keys and values) or "contrastive" (keys and values of both classes).
        length: positions of a prefix; 10 is Li & Liang's for table-to-text.
        omega_1, omega_2: weights of L_LM and L_d of "contrastive"; ours, as the paper chooses them a task. omega_2 0 trains the
            classes apart.
        steps: optimiser steps; batch_size texts each.
        learning_rate: None is 0.01 for keys and values and 0.02 for vectors, found on SmolLM2; the papers' rates belong to what is left
            out here (see the module).
        max_tokens: longer texts are cut.
        bfloat16: compute the products in bfloat16 (the prefix stays float32).
    """

    method: Literal["prompt-tuning", "prefix-tuning", "contrastive"] = "contrastive"
    length: int = Field(10, ge=1)
    omega_1: float = Field(0.8, ge=0)
    omega_2: float = Field(0.2, ge=0)
    steps: int = Field(300, ge=1)
    batch_size: int = Field(16, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    max_tokens: int = Field(48, ge=2)
    seed: int = 0
    bfloat16: bool = True
    checkpoint_every: int = Field(100, ge=1)

    @property
    def rate(self) -> float:
        return self.learning_rate or (0.02 if self.method == "prompt-tuning" else 0.01)


def fit_prefixes(
    lm: LanguageModel,
    classes: Sequence[Sequence[list[int]]],
    settings: PrefixSettings,
    checkpoint: Path,
    *,
    report: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> list[Prefix]:
    """Train one prefix a class, all at once; the model is as before afterwards.

    Args:
        classes: token ids of the texts of each class, two or more a text; one class for all methods but "contrastive".
        checkpoint: an interrupted run goes on from it, to the same bits; deleted at the end.
        report: called with (step, steps, running mean of the loss).

    Raises:
        DataError: a class without a text, or a checkpoint of another run.
        ModelError: the model takes no prefix.
    """
    if not classes or not all(classes):
        raise DataError("a class has no text of two tokens or more; a prefix needs text to learn from")
    rows = [(ids, label) for label, texts in enumerate(classes) for ids in texts]
    key = hashlib.sha256(f"{settings.model_dump_json(exclude={'checkpoint_every'})}{lm.fingerprint}{rows}".encode()).hexdigest()
    prefixes = [_first(lm, texts, settings) for texts in classes]
    trainable = {f"{label}.{name}": p for label, prefix in enumerate(prefixes) for name, p in prefix.items()}
    optimizer = torch.optim.AdamW(trainable.values(), lr=settings.rate, weight_decay=0.0)
    start = load_checkpoint(checkpoint, key, trainable, optimizer)
    warm, running = max(1, int(settings.warmup * settings.steps)), 0.0
    frozen = {p: p.requires_grad for p in lm.model.parameters()}
    for p in frozen:
        p.requires_grad_(False)
    try:
        for step in range(start, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.rate * linear_rate(step, warm, settings.steps)
            ids, mask, labels = _batch(rows, settings, step, lm.device)
            with torch.enable_grad(), torch.autocast(lm.device.type, torch.bfloat16) if settings.bfloat16 else nullcontext():
                loss = loss_of(nats_behind(lm, prefixes, ids, mask), mask, labels, settings)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(list(trainable.values()), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
            report(step + 1, settings.steps, running)
            if (step + 1) % settings.checkpoint_every == 0 and step + 1 < settings.steps:
                save_checkpoint(checkpoint, key, trainable, optimizer, step + 1)
    finally:
        for p, required in frozen.items():
            p.requires_grad_(required)
    checkpoint.unlink(missing_ok=True)
    return [{name: p.detach() for name, p in prefix.items()} for prefix in prefixes]


def loss_of(nats: Tensor, mask: Tensor, labels: Tensor, settings: PrefixSettings) -> Tensor:
    """The loss of a batch: L_LM, or with several classes omega_1 L_LM + omega_2 L_d (Qian et al., supervised method).

    Args:
        nats: f32[classes, B, T - 1], of each token behind the first under each prefix, 0 at padding.
        mask: i64[B, T]. labels: i64[B].
    """
    own = nats[labels, torch.arange(len(labels), device=nats.device)]
    language = own.sum() / mask[:, 1:].sum()
    if len(nats) == 1:
        return language
    return settings.omega_1 * language + settings.omega_2 * F.cross_entropy(-nats.sum(-1).T, labels)


def nats_behind(lm: LanguageModel, prefixes: Sequence[Prefix], ids: Tensor, mask: Tensor) -> Tensor:
    """Nats f32[classes, B, T - 1] of the tokens i64[B, T] behind the first, behind each prefix; right-padded, 0 at padding."""
    many, rows = ids.repeat(len(prefixes), 1), len(ids)
    padding = mask.repeat(len(prefixes), 1)
    if not prefixes[0]:
        logits = lm.model(input_ids=many, attention_mask=padding, use_cache=False).logits
    elif "embeddings" in prefixes[0]:
        text = lm.model.get_input_embeddings()(ids)
        embeds = torch.cat([torch.cat([p["embeddings"].to(text.dtype).expand(rows, -1, -1), text], 1) for p in prefixes])
        length = embeds.shape[1] - ids.shape[1]
        padding = F.pad(padding, (length, 0), value=1)
        logits = lm.model(inputs_embeds=embeds, attention_mask=padding, use_cache=False).logits[:, length:]
    else:
        sides = [[torch.cat([p[f"{side}.{i}"].to(lm.dtype).expand(rows, -1, -1, -1) for p in prefixes]) for side in ("keys", "values")]
                 for i in range(len(prefixes[0]) // 2)]  # fmt: skip
        padding = F.pad(padding, (sides[0][0].shape[2], 0), value=1)
        past = cache_from([(keys, values) for keys, values in sides])
        logits = lm.model(input_ids=many, attention_mask=padding, past_key_values=past, use_cache=True).logits
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), many[:, 1:].flatten(), reduction="none")
    return nats.view(len(prefixes), rows, -1) * mask[:, 1:]


def _first(lm: LanguageModel, texts: Sequence[list[int]], settings: PrefixSettings) -> Prefix:
    """Where training starts: tokens drawn from the class's own texts."""
    tokens = [token for ids in texts for token in ids]
    ids = random.Random(settings.seed).choices(tokens, k=settings.length)
    found: Prefix
    if settings.method == "prompt-tuning":
        found = {"embeddings": lm.model.get_input_embeddings()(torch.tensor(ids, device=lm.device))}
    else:
        pairs = enumerate(keys_and_values(lm, ids))
        found = {f"{side}.{i}": tensor[0] for i, pair in pairs for side, tensor in zip(("keys", "values"), pair, strict=True)}
    prefix_of(lm, found, "the first prefix")  # refuses a model that takes none before anything is trained
    return {name: tensor.detach().float().clone().requires_grad_() for name, tensor in found.items()}


def _batch(rows: Sequence[Row], settings: PrefixSettings, step: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids and mask i64[B, T] and classes i64[B] of a step: a pure function of the step. Texts of a like length go together."""
    chooser = random.Random(f"{settings.seed}:{step}")
    pool = sorted(chooser.sample(range(len(rows)), min(len(rows), 8 * settings.batch_size)), key=lambda i: len(rows[i][0]))
    first = chooser.randrange(max(1, len(pool) - settings.batch_size + 1))
    chosen = [rows[i] for i in pool[first : first + settings.batch_size]]
    return *padded([ids for ids, _ in chosen], device), torch.tensor([label for _, label in chosen], device=device)


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask i64[B, T]."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
