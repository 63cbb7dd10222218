"""The discriminator's stored weights as NumPy arrays: what a process without torch reads them with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from moralguard.discriminator.encoder_config import EncoderConfig
from moralguard.errors import ModelError

SCALE = ".scale"  # behind the name of a matrix that is stored as int8: its scale a row
# as the pre-trained encoder has them: the same under every fit, so they tell none from another
_COMMON = ("encoder.words", "encoder.shared", "encoder.frozen", "encoder.positions")


def load_arrays(path: Path, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file whose names are ``wanted``, as they are stored.

    Raises:
        ModelError: it isn't a whole safetensors file.
    """
    try:
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118  (it is no mapping)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} can't be read as a safetensors file ({error}); save it again with safetensors") from error


def read_network(path: Path) -> tuple[EncoderConfig, dict[str, np.ndarray]]:
    """Sizes and float32 weights of the English network that ``weights.save_network`` wrote, by the names of ``Network``.

    Raises:
        ModelError: the file isn't whole, or isn't such a network.
    """
    stored = load_arrays(path)
    try:
        with safe_open(path, "np") as file:
            config = EncoderConfig.model_validate_json((file.metadata() or {})["config"])
        return config, {name: _unpacked(stored, name) for name in stored if not name.endswith(SCALE)}
    except (KeyError, ValueError, SafetensorError) as error:
        raise ModelError(f"{path} isn't a discriminator's network ({str(error)[:300]}); fit it again or reinstall moralguard") from error


def _unpacked(stored: dict[str, np.ndarray], name: str) -> np.ndarray:
    array = stored[name].astype(np.float32)
    return array * stored[name + SCALE].astype(np.float32)[:, None] if stored[name].dtype == np.int8 else array


def stored_fingerprint(path: Path) -> str:
    """``fingerprint`` of a network's file; only what it is made of is read.

    Raises:
        ModelError: it isn't a whole safetensors file.
    """
    return fingerprint(load_arrays(path, lambda name: not name.startswith(_COMMON)).items())


def fingerprint(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """A hash of the weights that were fitted, rounded to bfloat16; 16 hex digits."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays, key=lambda item: item[0]):
        if not name.startswith(_COMMON):
            bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
            # to the nearest, ties to even, as torch rounds
            digest.update(name.encode() + ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes())
    return digest.hexdigest()[:16]
