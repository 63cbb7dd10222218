"""The network's weights on disk: safetensors, the frozen part as int8 with a scale a row, the rest as float16."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moralguard.backends.tensor_files import load_tensors
from moralguard.discriminator.encoder_config import EncoderConfig
from moralguard.discriminator.network import Network
from moralguard.errors import ModelError

_SCALE = ".scale"


def is_frozen(name: str) -> bool:
    """Whether a parameter of ``Network`` stays as it was pre-trained."""
    return name.startswith(("encoder.words", "encoder.positions", "encoder.embedding_norm", "encoder.shared", "encoder.frozen"))


def rounded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as int8 [n, m] and a float32 scale a row [n]; the largest entry of a row becomes 127."""
    scale = tensor.abs().amax(1).clamp(min=1e-12) / 127.0
    return torch.round(tensor / scale[:, None]).to(torch.int8), scale


def pack(network: Network) -> dict[str, Tensor]:
    """The network's tensors as they are stored."""
    stored: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        tensor = tensor.detach().cpu().float()
        if is_frozen(name) and tensor.dim() == 2:
            stored[name], stored[name + _SCALE] = rounded(tensor)
        else:
            stored[name] = tensor.half().contiguous()
    return stored


def unpack(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """float32 tensors of what ``pack`` returned."""
    found = {}
    for name, tensor in stored.items():
        if name.endswith(_SCALE):
            continue
        if tensor.dtype == torch.int8:
            found[name] = tensor.float() * stored[name + _SCALE].float()[:, None]
        else:
            found[name] = tensor.float()
    return found


def save_network(network: Network, path: Path) -> None:
    """Write the network; ``load_network`` gives back its rounded weights."""
    save_file(pack(network), path, metadata={"config": network.config.model_dump_json()})


def load_network(path: Path) -> Network:
    """A network in float32, in evaluation mode.

    Raises:
        ModelError: the file isn't whole, or isn't such a network.
    """
    from safetensors import SafetensorError, safe_open

    tensors = load_tensors(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        config = EncoderConfig.model_validate_json(metadata["config"])
        with torch.device("meta"):
            network = Network(config)
        network.load_state_dict(unpack(tensors), assign=True)
    except (KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path} isn't a discriminator's network ({str(error)[:300]}); fit it again or reinstall moralguard") from error
    return network.eval().requires_grad_(False)
