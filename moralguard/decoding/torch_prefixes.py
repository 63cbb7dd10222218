"""Rows that begin behind a learned prefix, in one forward with rows that don't."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from moralguard.backends.kv_cache import cache_from, drop_oldest, key_values

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel
    from moralguard.backends.learned_prefix import LearnedPrefix

Prefixes = Sequence["LearnedPrefix | None"]


def lengths_of(prefixes: Prefixes) -> list[int]:
    return [0 if prefix is None else prefix.length for prefix in prefixes]


def first_cache(prefixes: Prefixes) -> tuple[DynamicCache, torch.Tensor]:
    """A cache whose rows hold their prefix, right-aligned, and its mask i64[R, n]; rows without a prefix hold padding."""
    lengths = lengths_of(prefixes)
    width = max(lengths)
    known = next(prefix for prefix in prefixes if prefix is not None)
    pairs = []
    for layer, (keys, values) in enumerate(known.layers):
        rows = []
        for side, like in enumerate((keys, values)):
            empty = like.new_zeros(1, like.shape[1], width, like.shape[3])
            padded = [empty if prefix is None else _padded(prefix.layers[layer][side], width) for prefix in prefixes]
            rows.append(torch.cat(padded))
        pairs.append((rows[0], rows[1]))
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths], device=known.layers[0][0].device)
    return cache_from(pairs), mask


def _padded(values: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, 0, width - values.shape[-2], 0))


def pads_first(cache: DynamicCache, mask: torch.Tensor) -> torch.Tensor:
    """Move the padding between a row's prefix and its text in front of both, and drop what no row needs; the new mask i64[R, W].

    From then on the rows are left-padded like any others, so joining, cutting and rewinding needn't know of prefixes.
    """
    order = mask.argsort(dim=-1, stable=True)
    layers: list[Any] = cache.layers
    for layer, (keys, values) in zip(layers, key_values(cache), strict=True):
        places = order[:, None, :, None].expand(-1, keys.shape[1], -1, -1)
        layer.keys = keys.gather(2, places.expand(-1, -1, -1, keys.shape[3]))
        layer.values = values.gather(2, places.expand(-1, -1, -1, values.shape[3]))
    mask = mask.gather(-1, order)
    unused = mask.shape[1] - int(mask.sum(-1).max())
    drop_oldest(cache, unused)
    return mask[:, unused:]


def reads_apart(lm: LanguageModel, rows: Sequence[Sequence[int]], prefixes: Prefixes) -> bool:
    """Whether rows of different lengths have to be read one length at a time: attention counts columns where it has a window, and
    padding between a prefix and its text would push the prefix out of it too early."""
    config = lm.model.config.get_text_config()
    window = min((w for name in ("sliding_window", "attention_chunk_size") if (w := getattr(config, name, None))), default=None)
    if window is None or len({len(row) for row in rows}) == 1:
        return False
    return any(prefixes) and max(map(len, rows)) + max(lengths_of(prefixes)) >= window
