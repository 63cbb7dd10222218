"""Packs of kind ``prefix`` for tiny models, and the laws behind a prefix from a model's own forward in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from oracles import Reference
from safetensors.torch import save_file
from transformers import DynamicCache

from moralguard.backends.hf import LanguageModel
from moralguard.packs import write_pack

Tensors = dict[str, torch.Tensor]


def write(folder: Path, lm: Any, tensors: Tensors) -> str:
    """A pack of these tensors; its folder."""
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "prefix.safetensors")
    data = ({"name": "none", "licence": "CC0-1.0", "rows": 0},)
    return str(write_pack(folder, kind="prefix", method="test", lm=lm, name=folder.name, data=data, settings={}, metrics={}))


def random_vectors(model: Any, length: int = 4, seed: int = 0) -> Tensors:
    weight = model.get_input_embeddings().weight.detach()
    generator = torch.Generator().manual_seed(seed)
    return {"embeddings": torch.randn(length, weight.shape[1], generator=generator) * float(weight.std())}


def random_cache(model: Any, length: int = 5, seed: int = 0) -> Tensors:
    """Keys and values that no token gives, as spread out as those of tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape[0], length, tensor.shape[2], generator=generator) * float(tensor.std())
        for name, tensor in cache_of(model, [1, 2, 3]).items()
    }


def cache_of(model: Any, ids: Sequence[int]) -> Tensors:
    """What the model itself keeps of these tokens."""
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([list(ids)]), use_cache=True, past_key_values=DynamicCache()).past_key_values
    return {f"{side}.{i}": getattr(layer, side)[0].clone() for i, layer in enumerate(cache.layers) for side in ("keys", "values")}


def logits_behind(reference: Reference, tensors: Tensors, start: int | None = None) -> Callable[[Sequence[int]], torch.Tensor]:
    """ids -> f64[T, V], the logits at each of them, read whole behind a prefix; ``start`` is a wrong first position."""
    model = reference.model

    def read(ids: Sequence[int]) -> torch.Tensor:
        row = torch.tensor([list(ids)])
        with torch.no_grad():
            if "tokens" in tensors:
                return model(input_ids=torch.cat([tensors["tokens"][None], row], 1), use_cache=False).logits[0, -len(ids) :]
            if "embeddings" in tensors:
                embeds = torch.cat([tensors["embeddings"][None].double(), model.get_input_embeddings()(row)], 1)
                return model(inputs_embeds=embeds, use_cache=False).logits[0, -len(ids) :]
            past = DynamicCache()
            for layer in range(len(tensors) // 2):
                past.update(tensors[f"keys.{layer}"][None].double(), tensors[f"values.{layer}"][None].double(), layer)
            first = past.get_seq_length() if start is None else start
            positions = torch.arange(first, first + len(ids))[None]
            return model(input_ids=row, past_key_values=past, position_ids=positions).logits[0]

    return read


def language_model(model: Any) -> LanguageModel:
    return LanguageModel(model, None)
