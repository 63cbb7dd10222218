"""Operations on transformers' ``DynamicCache``: build from tensors, select rows, drop the newest tokens.

The guard keeps plain dynamic layers even for sliding-window models (their mask does the windowing), so that caches can be
rewound and reordered freely; models with recurrent state get the cache their config asks for and are re-read instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

KeyValue = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, each [R, heads, W, head_dim]."""


def is_plain(config: PretrainedConfig) -> bool:
    """Whether every layer keeps keys and values only, so that its cache can be cut, reordered and perturbed."""
    layer_types = getattr(config, "layer_types", None)
    return layer_types is None or set(layer_types) <= _ATTENTION_LAYERS


def new_cache(config: PretrainedConfig) -> DynamicCache:
    return DynamicCache() if is_plain(config) else DynamicCache(config=config)


def cache_from(pairs: Sequence[KeyValue]) -> DynamicCache:
    """A cache that starts from these tensors without copying them; updates concatenate, so the tensors stay as they are."""
    cache = DynamicCache()
    for keys, values in pairs:
        layer = DynamicLayer()
        layer.dtype, layer.device = keys.dtype, keys.device
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        cache.layers.append(layer)
    return cache


def key_values(cache: DynamicCache) -> list[KeyValue]:
    """Keys and values of every layer of a plain cache, [R, heads, W, head_dim] each."""
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def select_rows(cache: DynamicCache, rows: torch.Tensor) -> None:
    """Keep and reorder rows in place; an index may repeat (a fork)."""
    cache.reorder_cache(rows)  # type: ignore[arg-type]


def join_rows(cache: DynamicCache, other: DynamicCache) -> None:
    """Rows of another plain cache behind one's own; the narrower of the two gets columns of padding in front."""
    layers: list[Any] = cache.layers
    for layer, (keys, values) in zip(layers, key_values(other), strict=True):
        layer.keys, layer.values = torch.cat(_of_one_width(layer.keys, keys)), torch.cat(_of_one_width(layer.values, values))


def _of_one_width(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(one.shape[-2], other.shape[-2])
    padded = (torch.nn.functional.pad(values, (0, 0, width - values.shape[-2], 0)) for values in (one, other))
    return next(padded), next(padded)


def drop_newest(cache: DynamicCache, tokens: int) -> None:
    """Forget the newest tokens of every row of a plain cache."""
    layers: list[Any] = cache.layers
    for layer in layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys[..., :-tokens, :], layer.values[..., :-tokens, :]


def drop_oldest(cache: DynamicCache, columns: int) -> None:
    """Forget the oldest columns of a plain cache: padding that no row uses any more."""
    layers: list[Any] = cache.layers
    for layer in layers:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys[..., columns:, :], layer.values[..., columns:, :]
