"""Learned prefixes as packs, with what they learned measured on texts held back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from moralguard.backends.hf import LanguageModel
from moralguard.controls.prefix_pack import PREFIX_FILE
from moralguard.fitting.hidden_states import encode_texts
from moralguard.fitting.labelled import LabelledTexts
from moralguard.fitting.prefix import Prefix, PrefixSettings, fit_prefixes, nats_behind
from moralguard.fitting.training_loop import Report, padded
from moralguard.packs import PackData, write_pack

_MOST_HELD_BACK = 200
_METHODS = {
    "prompt-tuning": "prompt tuning (arXiv 2104.08691)",
    "prefix-tuning": "prefix-tuning (arXiv 2101.00190)",
    "contrastive": "contrastive prefixes, supervised (arXiv 2202.13257)",
}


def fit_prefix_packs(
    lm: LanguageModel,
    data: LabelledTexts,
    out: str | Path,
    settings: PrefixSettings,
    *,
    value: str = "",
    sources: Sequence[PackData] = (),
    report: Report = lambda step, steps, loss: None,
) -> list[Path]:
    """Train on the training split and write the packs ``kept`` (class 1) and, contrastive, ``broken`` (class 0); their folders.

    The cards hold the perplexity of held-back texts of both classes without the prefix and behind it, and with two prefixes how often
    the likelier one is that of the text's class.

    Raises:
        DataError: a class has no text of two tokens or more, or there is a checkpoint of another run.
        ModelError: the model takes no prefix.
    """
    sides = (("kept", 1), ("broken", 0)) if settings.method == "contrastive" else (("kept", 1),)

    def rows(texts: Sequence[str]) -> list[list[int]]:
        return [ids for ids in encode_texts(lm, texts, settings.max_tokens) if len(ids) >= 2]

    classes = [rows([row.text for row in data.of("train") if row.label == label]) for _, label in sides]
    checkpoint = Path(out) / "checkpoint.safetensors"
    prefixes = fit_prefixes(lm, classes, settings, checkpoint, report=report)
    held_back = (*data.of("test"), *data.of("dev"))
    texts = {
        name: rows([row.text for row in held_back if row.label == label][:_MOST_HELD_BACK]) for name, label in (("kept", 1), ("broken", 0))
    }
    metrics = _metrics(lm, prefixes, [name for name, _ in sides], texts)
    folders = []
    for (name, label), prefix in zip(sides, prefixes, strict=True):
        folder = Path(out) / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.contiguous().cpu() for key, tensor in prefix.items()}, folder / PREFIX_FILE)
        write_pack(
            folder,
            kind="prefix",
            method=_METHODS[settings.method],
            lm=lm,
            name=name,
            data=tuple(sources),
            settings=settings.model_dump(mode="json"),
            metrics=metrics,
            description=f"Trained on texts that {'keep' if label else 'break'} the value.",
            values=(value,) if value else (),
        )
        folders.append(folder)
    return folders


def _metrics(lm: LanguageModel, prefixes: Sequence[Prefix], names: Sequence[str], texts: dict[str, list[list[int]]]) -> dict[str, float]:
    found, right, seen = {}, 0, 0
    for kind, rows in texts.items():
        if not rows:
            continue
        nats, tokens = _sums(lm, [{}], rows), sum(len(row) - 1 for row in rows)
        found[f"perplexity of {kind} texts without a prefix"] = round(math.exp(float(nats.sum()) / tokens), 2)
        behind = _sums(lm, prefixes, rows)
        for name, mine in zip(names, behind, strict=True):
            found[f"perplexity of {kind} texts behind {name!r}"] = round(math.exp(float(mine.sum()) / tokens), 2)
        if len(prefixes) > 1:
            right += int((behind.argmin(0) == list(names).index(kind)).sum())
            seen += len(rows)
    if seen:
        found["share of texts likelier behind their own class's prefix"] = round(right / seen, 4)
    return found


def _sums(lm: LanguageModel, prefixes: Sequence[Prefix], rows: Sequence[list[int]]) -> torch.Tensor:
    """Nats of each text behind each prefix, f64[classes, n]."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(rows), 32):
            ids, mask = padded(rows[start : start + 32], lm.device)
            parts.append(nats_behind(lm, prefixes, ids, mask).double().sum(-1).cpu())
    return torch.cat(parts, 1)
