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

import random
from collections.abc import Sequence
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
from moralguard.fitting.training_loop import LoopSettings, Report, padded, run_key, texts_of_a_step, train

Prefix = dict[str, Tensor]
"""What a pack holds: ``embeddings`` f[n, d], or ``keys.i`` and ``values.i`` f[heads, n, head_dim]; nothing is no prefix."""
Row = tuple[list[int], int]
"""Token ids of a text and its class, a place in the list of prefixes."""


class PrefixSettings(LoopSettings):
    """How prefixes are trained; see ``LoopSettings`` for the rest.

    Attributes:
        method: "prompt-tuning" (vectors), "prefix-tuning" (keys and values) or "contrastive" (keys and values of both classes).
        length: positions of a prefix; 10 is Li & Liang's for table-to-text.
        omega_1, omega_2: weights of L_LM and L_d of "contrastive"; ours, as the paper chooses them a task. omega_2 0 trains the
            classes apart.
        learning_rate: None is 0.01 for keys and values and 0.02 for vectors, found on SmolLM2; the papers' rates belong to what is left
            out here (see the module).
    """

    method: Literal["prompt-tuning", "prefix-tuning", "contrastive"] = "contrastive"
    length: int = Field(10, ge=1)
    omega_1: float = Field(0.8, ge=0)
    omega_2: float = Field(0.2, ge=0)
    learning_rate: float | None = Field(None, gt=0)

    @property
    def rate(self) -> float:
        return self.learning_rate or (0.02 if self.method == "prompt-tuning" else 0.01)


def fit_prefixes(
    lm: LanguageModel,
    classes: Sequence[Sequence[list[int]]],
    settings: PrefixSettings,
    checkpoint: Path,
    *,
    report: Report = lambda step, steps, loss: None,
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
    prefixes = [_first(lm, texts, settings) for texts in classes]
    trainable = {f"{label}.{name}": p for label, prefix in enumerate(prefixes) for name, p in prefix.items()}
    optimizer = torch.optim.AdamW(trainable.values(), lr=settings.rate, weight_decay=0.0)
    lengths = [len(ids) for ids, _ in rows]

    def loss_of_step(step: int) -> Tensor:
        chosen = [rows[i] for i in texts_of_a_step(lengths, settings, step)]
        ids, mask = padded([ids for ids, _ in chosen], lm.device)
        labels = torch.tensor([label for _, label in chosen], device=lm.device)
        return loss_of(nats_behind(lm, prefixes, ids, mask), mask, labels, settings)

    frozen = {p: p.requires_grad for p in lm.model.parameters()}
    for p in frozen:
        p.requires_grad_(False)
    try:
        key = run_key(settings, lm, rows)
        train(trainable, optimizer, settings, loss_of_step, device=lm.device, checkpoint=checkpoint, key=key, report=report)
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
