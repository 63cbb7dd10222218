"""Fitting experts: a LoRA adapter on the base itself, trained as a language model on texts of one kind.

Liu et al. 2021 (arXiv 2105.03023) train expert and anti-expert as whole models; as adapters (Hu et al. 2021, arXiv 2106.09685) both
ride the base's forward as extra rows and take megabytes instead of gigabytes. Written in peft's format.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field

from moralguard.backends.hf import LanguageModel
from moralguard.errors import DataError, ModelError
from moralguard.fitting.checkpoints import linear_rate, load_checkpoint, save_checkpoint
from moralguard.fitting.hidden_states import encode_texts
from moralguard.schema import StrictModel


class ExpertSettings(StrictModel):
    """How an adapter is trained.

    Attributes:
        rank, alpha: of the adapter; its product is scaled by alpha / rank.
        modules: names of the linear modules that are adapted, or "all-linear". MLP projections alone are a third of a decoder's
            linear modules, and decoding pays for each.
        steps: optimiser steps; batch_size texts each.
        max_tokens: longer texts are cut.
        bfloat16: compute the products in bfloat16 (the adapter stays float32).
    """

    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    modules: tuple[str, ...] | str = ("gate_proj", "up_proj", "down_proj")
    steps: int = Field(600, ge=1)
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    max_tokens: int = Field(48, ge=2)
    seed: int = 0
    bfloat16: bool = True
    checkpoint_every: int = Field(100, ge=1)


def fit_expert(
    lm: LanguageModel,
    texts: Sequence[str],
    out: str | Path,
    settings: ExpertSettings | None = None,
    *,
    report: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> Path:
    """Train an adapter on ``texts`` and write it to ``out`` (adapter_config.json, adapter_model.safetensors).

    An interrupted run goes on from the checkpoint in ``out``, to the same bits. The model is as before afterwards.

    Args:
        report: called with (step, steps, running mean of the loss).

    Raises:
        DataError: no text of two tokens or more, or a checkpoint of another run.
        ModelError: peft isn't installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ModelError("fitting experts needs peft: pip install 'moralguard[fit]'") from error
    settings = settings or ExpertSettings()
    folder = Path(out)
    rows = [ids for ids in encode_texts(lm, texts, settings.max_tokens) if len(ids) >= 2]
    if not rows:
        raise DataError(f"none of the {len(texts)} texts has two tokens or more; an expert needs text to learn from")
    key = hashlib.sha256(f"{settings.model_dump_json(exclude={'checkpoint_every'})}{lm.fingerprint}{rows}".encode()).hexdigest()
    checkpoint = folder / "checkpoint.safetensors"
    torch.manual_seed(settings.seed)  # peft draws A
    modules = settings.modules if isinstance(settings.modules, str) else list(settings.modules)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=modules, lora_dropout=0.0, task_type="CAUSAL_LM")
    frozen = {name: p.requires_grad for name, p in lm.model.named_parameters()}
    wrapped = get_peft_model(lm.model, config)
    try:
        trainable = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
        for p in trainable.values():
            p.data = p.data.float()
        _train(lm, wrapped, trainable, rows, settings, checkpoint, key, report)
        for p in trainable.values():
            p.data = p.data.half()  # half the size; the rounding is far below what training leaves open
        wrapped.save_pretrained(str(folder), safe_serialization=True)
    finally:
        wrapped.unload()
        for name, p in lm.model.named_parameters():
            p.requires_grad_(frozen[name])
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty template; the pack's card says it all
    config_file = folder / "adapter_config.json"
    written = json.loads(config_file.read_text(encoding="utf-8"))
    written["base_model_name_or_path"] = None  # a path of the machine it was fitted on; the card names the model
    config_file.write_text(json.dumps(written, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    checkpoint.unlink(missing_ok=True)
    return folder


def _train(
    lm: LanguageModel,
    wrapped: Any,
    trainable: dict[str, torch.nn.Parameter],
    rows: Sequence[list[int]],
    settings: ExpertSettings,
    checkpoint: Path,
    key: str,
    report: Callable[[int, int, float], None],
) -> None:
    optimizer = torch.optim.AdamW(trainable.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98))
    start = load_checkpoint(checkpoint, key, trainable, optimizer)
    warm = max(1, int(settings.warmup * settings.steps))
    kind = lm.device.type
    running = 0.0
    wrapped.train()
    try:
        for step in range(start, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * linear_rate(step, warm, settings.steps)
            ids, mask = _batch(rows, settings, step, lm.device)
            with torch.enable_grad(), torch.autocast(kind, torch.bfloat16) if settings.bfloat16 else nullcontext():
                logits = wrapped(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
                targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(list(trainable.values()), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
            report(step + 1, settings.steps, running)
            if (step + 1) % settings.checkpoint_every == 0 and step + 1 < settings.steps:
                save_checkpoint(checkpoint, key, trainable, optimizer, step + 1)
    finally:
        wrapped.eval()


def _batch(rows: Sequence[list[int]], settings: ExpertSettings, step: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and mask i64[B, T] of a step: a pure function of the step. Texts of a like length go together."""
    chooser = random.Random(f"{settings.seed}:{step}")
    pool = sorted(chooser.sample(range(len(rows)), min(len(rows), 8 * settings.batch_size)), key=lambda i: len(rows[i]))
    first = chooser.randrange(max(1, len(pool) - settings.batch_size + 1))
    chosen = [rows[i] for i in pool[first : first + settings.batch_size]]
    width = max(map(len, chosen))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in chosen], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in chosen], device=device)
    return ids, mask
