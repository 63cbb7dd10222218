"""LoRA adapters as reversible hooks: different adapters for different rows of one forward, nothing injected into the model.

Hu et al. 2021 (arXiv 2106.09685): y = W x + (alpha / r) B A x.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers.pytorch_utils import Conv1D

from moralguard.backends.hf import LanguageModel
from moralguard.backends.lora_folder import is_adapter_folder as is_adapter_folder
from moralguard.backends.tensor_files import load_tensors
from moralguard.errors import ModelError

_UNSUPPORTED = ("use_dora", "modules_to_save", "lora_bias", "layer_replication", "rank_pattern", "alpha_pattern")


RiderT = TypeVar("RiderT")
AdaptedModule = tuple[torch.nn.Module, torch.Tensor, torch.Tensor, float]


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """A trained low-rank adapter.

    Attributes:
        name: folder it came from.
        weights: (module of the model, A f[r, in], B f[out, r], scale) for every adapted module.
    """

    name: str
    weights: tuple[AdaptedModule, ...]


def load_adapter(path: str | Path, lm: LanguageModel) -> LoraAdapter:
    """Read a PEFT-format LoRA folder (adapter_config.json and adapter_model.safetensors) for this model.

    Raises:
        ModelError: files are missing, the adapter isn't plain LoRA, or its modules don't fit the model.
    """
    folder = Path(path)
    weights_file = folder / "adapter_model.safetensors"
    if not weights_file.is_file():
        raise ModelError(f"{folder} has no adapter_model.safetensors; save the adapter with safe_serialization=True")
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder}/adapter_config.json isn't a LoRA configuration with r and lora_alpha: {error!r}") from error
    extras = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        extras.append(f"bias={config['bias']}")
    if config.get("peft_type", "LORA") != "LORA" or extras:
        raise ModelError(f"{folder} isn't a plain LoRA adapter ({', '.join(extras) or config.get('peft_type')}); merge or retrain it")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    modules = dict(lm.model.named_modules())
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_tensors(weights_file).items():
        if ".lora_embedding_" in key:
            raise ModelError(f"{folder} adapts an embedding ({key}), which only linear modules can be; retrain it without")
        name, _, side = key.removesuffix(".weight").rpartition(".lora_")
        name = name.removeprefix("base_model.model.")
        pairs.setdefault(name, {})[side] = tensor
    weights: list[AdaptedModule] = []
    for name, pair in pairs.items():
        if name not in modules or set(pair) != {"A", "B"}:
            raise ModelError(f"{folder} adapts module {name!r}, which {lm.name} doesn't have; the adapter is of another model")
        a, b = pair["A"], pair["B"]
        shape = tuple(modules[name].weight.shape)
        # Linear keeps [out, in], GPT-2's Conv1D [in, out]
        wanted = shape if isinstance(modules[name], Conv1D) else shape[::-1]
        if a.ndim != 2 or b.ndim != 2 or (a.shape[1], b.shape[0]) != wanted or a.shape[0] != b.shape[1]:
            raise ModelError(
                f"{folder}: module {name!r} maps {wanted[0]} to {wanted[1]} in {lm.name}, but the adapter holds A {tuple(a.shape)} and "
                f"B {tuple(b.shape)}"
            )
        weights.append((modules[name], a.to(lm.device, lm.dtype), b.to(lm.device, lm.dtype), scale))
    return LoraAdapter(str(folder), tuple(weights))


@contextmanager
def apply_adapters(rows: Sequence[LoraAdapter | None]) -> Iterator[None]:
    """Inside, row i of this thread's forward passes goes through adapter rows[i]; outside, the model is as before."""
    plans: dict[torch.nn.Module, list[tuple[slice, AdaptedModule]]] = {}
    for span, adapter in row_spans(rows):
        for adapted in adapter.weights:
            plans.setdefault(adapted[0], []).append((span, adapted))
    owner, handles = threading.get_ident(), []

    def hook_for(plan: list[tuple[slice, AdaptedModule]]) -> Any:
        def add_low_rank(_module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if threading.get_ident() != owner:
                return None
            output = output.clone()
            for span, (_, a, b, scale) in plan:
                output[span] += (args[0][span] @ a.T @ b.T) * scale
            return output

        return add_low_rank

    try:
        for module, plan in plans.items():
            handles.append(module.register_forward_hook(hook_for(plan)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def row_spans(rows: Sequence[RiderT | None]) -> list[tuple[slice, RiderT]]:
    """Runs of neighbouring rows with the same adapter, or whatever else rides some rows of a forward."""
    spans: list[tuple[slice, RiderT]] = []
    for i, rider in enumerate(rows):
        if rider is None:
            continue
        if spans and spans[-1][1] is rider and spans[-1][0].stop == i:
            spans[-1] = (slice(spans[-1][0].start, i + 1), rider)
        else:
            spans.append((slice(i, i + 1), rider))
    return spans
