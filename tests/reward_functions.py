"""Reward functions for the tests: one on batches (torch or NumPy), the same on one text in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tiny_models import HIDDEN, VOCAB

from moralguard.controls import FactoredHead


def batched_reward(numpy: bool = False, scale: float = 1.0, ignores_mask: bool = False) -> Callable[..., Any]:
    """scale (sin(.37 w + .11 sum + length) / 2 + .5): it sees the candidate w, the unpadded tokens' sum and their number."""

    def reward(token_ids: Any, candidates: Any, attention_mask: Any) -> Any:
        mask = 0 * attention_mask + 1 if ignores_mask else attention_mask
        phase = 0.37 * candidates + (0.11 * (token_ids * mask).sum(-1) + mask.sum(-1))[:, None]
        return scale * ((np.sin(phase) if numpy else torch.sin(phase)) / 2 + 0.5)

    return reward


def single_reward(ids: list[int], scale: float = 1.0) -> np.ndarray:
    """f64[V]: the same for one text and every token of the vocabulary."""
    return scale * (np.sin(0.37 * np.arange(VOCAB) + 0.11 * sum(ids) + len(ids)) / 2 + 0.5)


def head(seed: int = 0, scale: float = 0.3) -> FactoredHead:
    """A random factored head with every part."""
    random = np.random.default_rng(seed)
    query, key = (scale * random.normal(size=(6, HIDDEN)).astype(np.float32) for _ in range(2))
    linear, state = (scale * random.normal(size=HIDDEN).astype(np.float32) for _ in range(2))
    return FactoredHead(query, key, linear, 0.3, state)


def head_logits(head: FactoredHead, state: np.ndarray, unembedding: np.ndarray) -> np.ndarray:
    """f64[V]: (query h) . (key e_w) + linear . e_w + state . h + bias for every w, from h f64[d] and E f64[V, d]."""
    query, key, linear, own = (np.asarray(part, dtype=np.float64) for part in (head.query, head.key, head.linear, head.state))
    return np.array([(query @ state) @ (key @ e) + linear @ e + own @ state + head.bias for e in unembedding])
