"""A LoRA adapter merged into a copy of its model, so that an expert can be one ONNX graph."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from moralguard.backends.hf import LanguageModel
from moralguard.backends.lora import LoraAdapter, is_adapter_folder, load_adapter
from moralguard.errors import ModelError
from moralguard.packs import is_pack, read_pack


def find_adapter(source: str | Path, lm: LanguageModel) -> LoraAdapter:
    """The adapter of ``pack:NAME``, a pack's folder or a PEFT folder.

    Raises:
        ModelError: it is none of these, isn't a LoRA, or is of another model.
    """
    if is_pack(source):
        pack = read_pack(source, "lora-expert")
        pack.check(lm)
        return load_adapter(pack.folder, lm)
    if not is_adapter_folder(source):
        raise ModelError(
            f"{str(source)!r} isn't an adapter; expected pack:NAME, a folder that `moralguard fit experts` wrote, or a LoRA folder with "
            "adapter_config.json and adapter_model.safetensors"
        )
    return load_adapter(source, lm)


def merge_adapter(lm: LanguageModel, adapter: LoraAdapter) -> Any:
    """A copy of the model with W + scale B A in the adapted modules (Hu et al. 2021, arXiv 2106.09685); ``lm`` stays as it is."""
    merged = copy.deepcopy(lm.model)
    places = {id(module): name for name, module in lm.model.named_modules()}
    for module, a, b, scale in adapter.weights:
        target: Any = merged.get_submodule(places[id(module)])
        shift = scale * (b.float() @ a.float())
        if isinstance(module, Conv1D):  # keeps [in, out]
            shift = shift.T
        weight = target.weight.detach()
        # a parameter of its own: an adapted head must not change the embeddings that it shares its weight with
        target.weight = torch.nn.Parameter((weight.float() + shift).to(weight.dtype), requires_grad=False)
    return merged
