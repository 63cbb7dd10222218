"""Checkpoints of a training run: parameters and AdamW's state in one safetensors file, so that a resumed run is the unbroken one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moralguard.errors import DataError


def save_checkpoint(path: Path, key: str, trainable: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write the state after ``step`` steps; ``key`` names the run's settings and data."""
    tensors = {f"parameter.{name}": p.detach() for name, p in trainable.items()}
    for name, p in trainable.items():
        state = optimizer.state[p]
        # a step of its own each: some parameters aren't trained in every step
        tensors |= {f"first.{name}": state["exp_avg"], f"second.{name}": state["exp_avg_sq"], f"count.{name}": state["step"]}
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"run": json.dumps({"step": step, "key": key})})
    os.replace(partial, path)


def load_checkpoint(path: Path, key: str, trainable: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Read a checkpoint into parameters and optimizer; the number of steps it had run, 0 where there is no file.

    Raises:
        DataError: it is of a run with other settings or data.
    """
    if not path.is_file():
        return 0
    with safe_open(path, "pt") as file:
        run = json.loads((file.metadata() or {}).get("run", "{}"))
    if run.get("key") != key:
        raise DataError(f"{path} is the checkpoint of a run with other settings; delete it, or give the settings it was started with")
    tensors = load_file(path)
    with torch.no_grad():
        for name, p in trainable.items():
            p.copy_(tensors[f"parameter.{name}"])
            optimizer.state[p] = {
                "step": tensors[f"count.{name}"].to(p.device),
                "exp_avg": tensors[f"first.{name}"].to(p.device),
                "exp_avg_sq": tensors[f"second.{name}"].to(p.device),
            }
    return int(run["step"])


def linear_rate(step: int, warm: int, steps: int) -> float:
    """Linear warm-up, then linear decay to nothing: a factor of the peak rate."""
    return min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))
