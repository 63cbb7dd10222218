"""Fitting experts: a LoRA adapter on the base itself, trained as a language model on texts of one kind.

Liu et al. 2021 (arXiv 2105.03023) train expert and anti-expert as whole models; as adapters (Hu et al. 2021, arXiv 2106.09685) both
ride the base's forward as extra rows and take megabytes instead of gigabytes. Written in peft's format.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field

from moralguard.backends.hf import LanguageModel
from moralguard.errors import DataError, ModelError
from moralguard.fitting.hidden_states import encode_texts
from moralguard.fitting.training_loop import LoopSettings, Report, padded, run_key, texts_of_a_step, train


class ExpertSettings(LoopSettings):
    """How an adapter is trained; see ``LoopSettings`` for the rest.

    Attributes:
        rank, alpha: of the adapter; its product is scaled by alpha / rank.
        modules: names of the linear modules that are adapted, or "all-linear". MLP projections alone are a third of a decoder's
            linear modules, and decoding pays for each.
    """

    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    modules: tuple[str, ...] | str = ("gate_proj", "up_proj", "down_proj")
    steps: int = Field(600, ge=1)
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)


def fit_expert(
    lm: LanguageModel,
    texts: Sequence[str],
    out: str | Path,
    settings: ExpertSettings | None = None,
    *,
    report: Report = lambda step, steps, loss: None,
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
    key = run_key(settings, lm, rows)
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
    report: Report,
) -> None:
    optimizer = torch.optim.AdamW(trainable.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98))
    lengths = [len(ids) for ids in rows]

    def loss_of_step(step: int) -> torch.Tensor:
        ids, mask = padded([rows[i] for i in texts_of_a_step(lengths, settings, step)], lm.device)
        logits = wrapped(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    wrapped.train()
    try:
        train(trainable, optimizer, settings, loss_of_step, device=lm.device, checkpoint=checkpoint, key=key, report=report)
    finally:
        wrapped.eval()
