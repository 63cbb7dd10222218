"""Learned prefixes: what a pass on the model's own weights reads before its text, as keys and values of every layer.

Prefix-tuning (Li & Liang 2021, arXiv 2101.00190) learns the keys and values themselves. A prompt of learned vectors (Lester et al.
2021, arXiv 2104.08691) becomes keys and values by one forward pass when it is loaded: attention is causal, so what follows doesn't
change them, and no request pays for them again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moralguard.backends.hf import LanguageModel
from moralguard.backends.kv_cache import KeyValue, is_plain, key_values
from moralguard.errors import ModelError

_LAYER = re.compile(r"(keys|values)\.(0|[1-9][0-9]*)")


@dataclass(frozen=True, eq=False)
class LearnedPrefix:
    """A prefix of n positions that no tokens stand at.

    Attributes:
        name: where it came from.
        layers: keys and values f[1, heads, n, head_dim] a layer, in the model's dtype, rotated for the positions 0 to n - 1 where
            the model rotates its keys.
    """

    name: str
    layers: tuple[KeyValue, ...]

    @property
    def length(self) -> int:
        """n."""
        return int(self.layers[0][0].shape[-2])


def prefix_of(lm: LanguageModel, tensors: Mapping[str, torch.Tensor], name: str) -> LearnedPrefix:
    """The prefix that a file holds.

    Args:
        lm: the model that reads it.
        tensors: ``embeddings`` f[n, d], d the width of the input embeddings; or ``keys.i`` and ``values.i`` f[heads, n, head_dim] for
            every layer i that keeps keys and values.
        name: for messages.

    Raises:
        ModelError: neither of the two, a layer is missing or too much, a shape isn't the model's, or the model keeps more than keys
            and values (recurrent state), which a prefix can't be put into.
    """
    if not is_plain(lm.model.config.get_text_config()):
        raise ModelError(
            f"{name} is a learned prefix, but layers of {lm.name} keep a state that isn't keys and values, which no prefix can be put "
            "into; use a trigger (tokens) or a prompt there"
        )
    if set(tensors) == {"embeddings"}:
        return LearnedPrefix(name, _of_embeddings(lm, tensors["embeddings"], name))
    return LearnedPrefix(name, _of_cache(lm, tensors, name))


def _of_embeddings(lm: LanguageModel, embeddings: torch.Tensor, name: str) -> tuple[KeyValue, ...]:
    width = int(lm.model.get_input_embeddings().weight.shape[1])
    if embeddings.ndim != 2 or embeddings.shape[1] != width or not len(embeddings) or not embeddings.is_floating_point():
        raise ModelError(
            f"{name} holds embeddings {_form(embeddings)}; {lm.name} reads floats [n, {width}] with n of 1 or more: fit the prefix for "
            "this model"
        )
    return _read(lm, embeddings=embeddings[None].to(lm.device, lm.dtype))


def keys_and_values(lm: LanguageModel, ids: Sequence[int]) -> tuple[KeyValue, ...]:
    """Keys and values [1, heads, n, head_dim] a layer that the model itself computes for tokens."""
    return _read(lm, ids=torch.tensor([list(ids)], device=lm.device))


def _read(lm: LanguageModel, ids: torch.Tensor | None = None, embeddings: torch.Tensor | None = None) -> tuple[KeyValue, ...]:
    cache = lm.new_cache()
    with torch.no_grad():
        lm.forward(cache=cache, input_ids=ids, inputs_embeds=embeddings)
    return tuple(key_values(cache))


def _of_cache(lm: LanguageModel, tensors: Mapping[str, torch.Tensor], name: str) -> tuple[KeyValue, ...]:
    probe = keys_and_values(lm, [0])
    wanted = {f"{side}.{layer}" for side in ("keys", "values") for layer in range(len(probe))}
    strange = sorted(key for key in tensors if not _LAYER.fullmatch(key))
    if strange or not tensors:
        raise ModelError(
            f"{name} holds {', '.join(strange) or 'nothing'}; expected `tokens`, `embeddings`, or `keys.i` and `values.i` for each layer i"
        )
    if set(tensors) != wanted:
        odd = ", ".join(sorted(set(tensors) ^ wanted)[:4])
        raise ModelError(
            f"{name} isn't the cache of this model: {lm.name} keeps keys and values in {len(probe)} layers, the file has {len(tensors)} "
            f"tensors, and {odd} is missing or too much; copy it again whole, or fit the prefix for this model"
        )
    length = tensors["keys.0"].shape[1] if tensors["keys.0"].ndim == 3 else 0
    layers = []
    for layer, pair in enumerate(probe):
        found = []
        for side, like in zip(("keys", "values"), pair, strict=True):
            tensor = tensors[f"{side}.{layer}"]
            shape = (like.shape[1], length, like.shape[3])
            if tuple(tensor.shape) != shape or length == 0 or not tensor.is_floating_point():
                raise ModelError(
                    f"{name} holds {side}.{layer} {_form(tensor)}; {lm.name} has floats [{shape[0]}, n, {shape[2]}] there, n of 1 or more "
                    "and the same in every layer: fit the prefix for this model"
                )
            found.append(tensor[None].to(lm.device, lm.dtype))
        layers.append((found[0], found[1]))
    return tuple(layers)


def _form(tensor: torch.Tensor) -> str:
    return f"of {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
