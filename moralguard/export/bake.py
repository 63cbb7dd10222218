"""Nullspace projection without the guard: in the unembedding of a copied checkpoint, or as a LoRA on the head.

With h' = h - (1 - a) U_out U_in^T h the logits are E h' = (E - (1 - a) (E U_out) U_in^T) h, so a serving stack that takes no hidden-state
control can serve a changed head, or add a rank-r LoRA to it for single requests: A = U_in^T, B = -(1 - a) E U_out.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file

from moralguard.backends.hf import LanguageModel
from moralguard.controls.nullspace import NullspaceProjection
from moralguard.errors import ModelError, PolicyError
from moralguard.policy import Policy

Form = Literal["checkpoint", "lora"]


def head_change(lm: LanguageModel, policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    """(B f32[V, r], A f32[r, d]): what the policy adds to the head's weight is B A.

    Raises:
        PolicyError: the policy does more than remove a fixed, linear share: another control, a gate, A-INLP's adaptive share, an affine
            eraser (LEACE's mean would need a bias), or two subspaces whose order matters.
    """
    acting = policy.for_model(lm)
    active = [control for control in acting.effective_controls() if control.active]
    controls = [control for control in active if isinstance(control, NullspaceProjection)]
    others = sorted({control.control_name for control in active if not isinstance(control, NullspaceProjection)})
    gated = acting.gate is not None or any(control.when is not None for control in controls)
    if others or gated or not controls:
        reason = f"has {', '.join(others)}" if others else ("has a gate" if gated else "removes nothing")
        raise PolicyError(f"policy {policy.name!r} {reason}; only nullspace projections that always act can be baked into a head")
    if len(controls) > 1:
        raise PolicyError(f"policy {policy.name!r} has {len(controls)} projections; bake one, or fit one subspace for both concepts")
    control = controls[0]
    if control.adaptive:
        raise PolicyError("an adaptive projection's share changes with every token, so it can't be baked; set adaptive: false")
    u_in, u_out, mu, _ = control.arrays(lm)
    if mu is not None and bool(mu.abs().max() > 0):
        raise PolicyError("a LEACE eraser moves the mean, too, which a head without bias can't do; bake a plain basis")
    weight = lm.model.get_output_embeddings().weight
    b = -(1 - control.keep) * (weight.detach().float() @ u_out.to(weight.device))
    return b, u_in.T.contiguous().to(weight.device)


def bake(lm: LanguageModel, policy: Policy, out: str | Path, form: Form = "checkpoint") -> Path:
    """Write what the policy does to the head; the model itself stays as it is.

    Args:
        lm: a transformers model; policy: one nullspace projection that always acts.
        out: a folder that isn't there yet, or is empty.
        form: "checkpoint", a whole model whose head is changed (and no longer tied to the embedding, which stays as it was); or "lora", an
            adapter for the head in PEFT's layout, ``lm_head`` being its only module.

    Raises:
        PolicyError: the policy can't be baked. ModelError: the head has no weight of a known form, or the folder isn't empty.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} isn't empty; give a folder that isn't there yet")
    if form not in ("checkpoint", "lora"):
        raise ModelError(f"form is {form!r}; expected checkpoint or lora")
    head = lm.model.get_output_embeddings()
    if lm.head is None or not isinstance(head, torch.nn.Linear):
        raise ModelError(f"{lm.name} has no head of a known form, so there is nothing to bake into")
    b, a = head_change(lm, policy)
    folder.mkdir(parents=True, exist_ok=True)
    if form == "lora":
        _write_lora(lm, folder, b, a)
        return folder
    config = copy.deepcopy(lm.model.config)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{lm.name} is quantised; bake the unquantised model")
    state = {name: tensor.detach().cpu() for name, tensor in lm.model.state_dict().items()}
    name = next(name for name, module in lm.model.named_modules() if module is head) + ".weight"
    state[name] = (head.weight.detach().float() + b @ a).to(head.weight.dtype).cpu()
    if head.bias is None:
        state.pop(name.removesuffix("weight") + "bias", None)
    config.save_pretrained(folder)
    if lm.model.generation_config is not None:
        lm.model.generation_config.save_pretrained(folder)
    save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    if lm.tokenizer is not None:
        lm.tokenizer.save_pretrained(folder)
    return folder


def _write_lora(lm: LanguageModel, folder: Path, b: torch.Tensor, a: torch.Tensor) -> None:
    rank = a.shape[0]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lm.name,
        "r": rank,
        "lora_alpha": rank,  # a scale of 1
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["lm_head"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    prefix = "base_model.model.lm_head."
    tensors = {f"{prefix}lora_A.weight": a.cpu().contiguous(), f"{prefix}lora_B.weight": b.cpu().contiguous()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
