"""A PyTorch model behind the interface of ``OnnxLanguageModel``: the same weights and the same sums, in NumPy arrays.

What runs on it is the NumPy runtime alone, so its tokens are to be those of the PyTorch runtime, with no rounding of an export between.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from moralguard.backends.capabilities import Capabilities
from moralguard.backends.hf import LanguageModel
from moralguard.backends.kv_cache import cache_from, drop_newest, drop_oldest, join_rows, key_values, select_rows
from moralguard.backends.onnx.head import Head
from moralguard.backends.onnx.model import OnnxForward


class Cache:
    """transformers' cache with the methods of ``OnnxCache``."""

    def __init__(self, inner: Any):
        self.inner = inner

    def select_rows(self, rows: np.ndarray) -> None:
        select_rows(self.inner, torch.from_numpy(rows))

    def twin(self) -> Cache:
        return Cache(cache_from(key_values(self.inner)))

    def join(self, other: Cache) -> None:
        join_rows(self.inner, other.inner)

    def drop_newest(self, n: int) -> None:
        drop_newest(self.inner, n)

    def drop_oldest(self, n: int) -> None:
        drop_oldest(self.inner, n)

    def key_values(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(k.numpy(), v.numpy()) for k, v in key_values(self.inner)]


class NumpyModel:
    arrays: ClassVar[str] = "numpy"
    rewindable: ClassVar[bool] = True

    def __init__(self, model: Any, tokenizer: Any = None):
        self.lm = LanguageModel(model, tokenizer)
        for name in ("name", "vocab_size", "context_length", "width", "eos_token_ids", "pad_token_id", "fingerprint", "tokenizer_hash"):
            setattr(self, name, getattr(self.lm, name))
        self.tokenizer, self.spell = tokenizer, self.lm.spell
        head = self.lm.head
        self.head = None if head is None else Head(head.weight.detach().float().numpy(), head.scale, head.softcap)

    def missing(self, needs: Capabilities) -> list[str]:
        return needs.missing_from(Capabilities(hidden=self.head is not None, history=True, auxiliary=True, per_request=True))

    def logits_of(self, states: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.lm.logits_of(torch.tensor(states)).numpy()

    def new_cache(self) -> Cache:
        return Cache(self.lm.new_cache())

    def forward(
        self,
        *,
        cache: Cache,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        position_ids: np.ndarray | None = None,
        hidden: bool = False,
        states: bool = False,
    ) -> OnnxForward:
        def tensor(value: np.ndarray | None) -> torch.Tensor | None:
            return None if value is None else torch.tensor(value)

        def array(value: torch.Tensor | None) -> np.ndarray | None:
            return None if value is None else value.float().numpy()

        with torch.no_grad():
            output = self.lm.forward(
                cache=cache.inner,
                input_ids=tensor(input_ids),
                attention_mask=tensor(attention_mask),
                position_ids=tensor(position_ids),
                hidden=hidden,
                states=states,
            )
        return OnnxForward(output.logits.numpy(), array(output.hidden), array(output.head_logits), array(output.states))
