"""The discriminator's files: the shipped weights, and adaptations as packs."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from moralguard.discriminator.adaptation import Adaptation, Head
from moralguard.discriminator.calibration import Calibration
from moralguard.discriminator.han_path import HanPath
from moralguard.discriminator.stored_weights import load_arrays, read_network, stored_fingerprint
from moralguard.discriminator.tokens import WordPieces
from moralguard.errors import ModelError
from moralguard.values import Value

if TYPE_CHECKING:
    import torch

    from moralguard.discriminator.onnx_path import OnnxPath
    from moralguard.discriminator.torch_paths import WordPath

FORMAT = 1
NETWORK, TOKENIZER, CHARACTERS, CHARACTER_SIZES, SETTINGS = (
    "network.safetensors",
    "tokenizer.json",
    "characters.safetensors",
    "characters.json",
    "settings.json",
)


def shipped_folder() -> Path:
    """The weights that come with the package."""
    return Path(str(files("moralguard.discriminator") / "shipped"))


def load_parts(
    folder: str | Path | None, device: str | torch.device, dtype: torch.dtype | str
) -> tuple[WordPath, HanPath, dict[str, Calibration]]:
    """Both paths on torch, and the calibrations, of a discriminator's folder.

    Raises:
        ModelError: a file is missing or isn't what it should be, or dtype isn't float32 or bfloat16.
    """
    import torch

    from moralguard.discriminator.character_path import load_character_path
    from moralguard.discriminator.torch_paths import TorchCharacters, WordPath
    from moralguard.discriminator.weights import load_network

    place = _whole(folder)
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if kind not in (torch.float32, torch.bfloat16):
        raise ModelError(f"the discriminator runs in float32 or bfloat16, not {dtype}")
    try:
        calibrations = _calibrations(place)
        network = load_network(place / NETWORK).to(device, kind)
        words = WordPath(network, WordPieces(place / TOKENIZER))
        characters = load_character_path(place / CHARACTERS, place / CHARACTER_SIZES).to(device).requires_grad_(False)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{place} isn't a whole discriminator ({str(error)[:300]}); fit it again or reinstall moralguard") from error
    return words, HanPath(TorchCharacters(characters), words), calibrations


def load_onnx_parts(folder: str | Path | None, exported: Path | None) -> tuple[OnnxPath, HanPath, dict[str, Calibration]]:
    """Both paths without torch, English on onnxruntime and Chinese in NumPy, and the calibrations, of a discriminator's folder.

    Args:
        exported: a folder that ``export_onnx`` wrote from the same weights; where None, the graphs are built from the weights.

    Raises:
        ModelError: a file is missing or isn't what it should be, ``exported`` is of other weights, or onnxruntime isn't installed.
    """
    from moralguard.discriminator.numpy_characters import load_numpy_characters
    from moralguard.discriminator.onnx_network import OnnxNetwork
    from moralguard.discriminator.onnx_path import OnnxPath

    place = _whole(folder)
    weights = place / NETWORK
    calibrations = _calibrations(place)
    bound_to = stored_fingerprint(weights)
    if exported is None:
        network = OnnxNetwork.from_arrays(*read_network(weights), bound_to)
    else:
        network = OnnxNetwork(exported)
        if network.fingerprint != bound_to:
            raise ModelError(f"{exported} was exported from other weights ({network.fingerprint}); export it again with export_onnx()")
    words = OnnxPath(network, WordPieces(place / TOKENIZER))
    return words, HanPath(load_numpy_characters(place / CHARACTERS, place / CHARACTER_SIZES), words), calibrations


def _whole(folder: str | Path | None) -> Path:
    place = shipped_folder() if folder is None else Path(folder)
    for name in (NETWORK, TOKENIZER, CHARACTERS, CHARACTER_SIZES, SETTINGS):
        if not (place / name).is_file():
            raise ModelError(
                f"{place} holds no {name}; expected a folder written by `moralguard fit discriminator`, or reinstall moralguard"
            )
    return place


def _calibrations(place: Path) -> dict[str, Calibration]:
    try:
        settings = json.loads((place / SETTINGS).read_text(encoding="utf-8"))
        if settings["format"] != FORMAT:
            raise ModelError(f"{place / SETTINGS} is of format {settings['format']}, this moralguard reads {FORMAT}; fit it again")
        return {name: Calibration.model_validate(item) for name, item in settings["calibrations"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{place} isn't a whole discriminator ({str(error)[:300]}); fit it again or reinstall moralguard") from error


def save_adaptation(item: Adaptation, folder: Path, bound_to: str) -> None:
    """Write an adaptation as ``adaptation.safetensors`` and ``card.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, head in item.heads.items():
        tensors[f"{name}.weights"] = np.ascontiguousarray(head.weights, dtype=np.float64)
        tensors[f"{name}.scale_shift"] = np.array([head.scale, head.shift], dtype=np.float64)
    save_file(tensors, folder / "adaptation.safetensors")
    card: dict[str, Any] = {
        "format": FORMAT,
        "kind": "discriminator-adaptation",
        "bound_to": bound_to,
        "value": item.value.model_dump(),
        "context": item.context,
        "examples": item.examples,
        "left_out_accuracy": item.left_out_accuracy,
        "parameters": sum(tensor.size for tensor in tensors.values()),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_adaptation(folder: Path, bound_to: str) -> Adaptation:
    """An adaptation from its pack.

    Raises:
        ModelError: no pack, a broken one, or one of another discriminator.
    """
    try:
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        if card["kind"] != "discriminator-adaptation" or card["format"] != FORMAT:
            raise ModelError(f"{folder} is a pack of kind {card['kind']!r}, format {card['format']}; expected a discriminator's adaptation")
        if card["bound_to"] != bound_to:
            raise ModelError(
                f"{folder} was adapted on the discriminator {card['bound_to']}, this one is {bound_to}; adapt again from the examples"
            )
        tensors = load_arrays(folder / "adaptation.safetensors")
        heads = {}
        for name in {key.partition(".")[0] for key in tensors}:
            scale, shift = tensors[f"{name}.scale_shift"].tolist()
            heads[name] = Head(scale, tensors[f"{name}.weights"], shift)
        return Adaptation(Value(**card["value"]), card["context"], heads, int(card["examples"]), float(card["left_out_accuracy"]))
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ModelError(f"{folder} isn't an adaptation's pack ({type(error).__name__}: {error})") from error
