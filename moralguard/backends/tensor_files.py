"""Reading safetensors files that may be broken."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from moralguard.errors import ModelError


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name.

    Raises:
        ModelError: it isn't a whole safetensors file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} can't be read as a safetensors file ({error}); save it again with safetensors") from error
