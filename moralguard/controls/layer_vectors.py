"""Vectors a layer, as steering takes them: from a pack, a file or a mapping."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moralguard.backends.arrays import is_tensor
from moralguard.backends.tensor_files import load_arrays
from moralguard.errors import PolicyError
from moralguard.packs import is_pack, read_pack

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel

_PREFIX = "layer."  # of a tensor's name in a file: layer.12


def layer_of(name: Any) -> int:
    """A mapping's key, which JSON makes a text."""
    if isinstance(name, bool) or not str(name).isdecimal() or int(name) < 1:
        raise PolicyError(f"steering has a vector for {name!r}; expected the number of a layer, 1 or more")
    return int(name)


def checked_vectors(vectors: Mapping[int, Any]) -> dict[int, Any]:
    """The same vectors, once they are known to be f[d] of one width; plain lists stay plain, so that a policy file can hold them."""
    found, widths = {}, set()
    for layer, vector in vectors.items():
        try:
            array = vector.detach().float().cpu().numpy() if is_tensor(vector) else np.asarray(vector, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise PolicyError(f"the steering vector of layer {layer} is a {type(vector).__name__}; expected numbers [d]") from error
        if array.ndim != 1 or not np.isfinite(array).all() or not array.any():
            raise PolicyError(f"the steering vector of layer {layer} has shape {array.shape}; expected finite numbers [d], not all 0")
        widths.add(len(array))
        found[layer] = tuple(float(x) for x in vector) if isinstance(vector, (list, tuple)) else array
    if len(widths) != 1:
        raise PolicyError(
            f"steering has vectors of {', '.join(map(str, sorted(widths))) or 'no'} numbers; expected one width and one layer at least"
        )
    return found


def load_vectors(source: str, lm: LanguageModel | None = None) -> dict[int, Any]:
    """{layer: v} of a pack, checked against the model where one is given; or of a bare file."""
    if is_pack(source):
        pack = read_pack(source, "steering-vectors")
        if lm is not None:
            pack.check(lm)
        path = pack.folder / "vectors.safetensors"
    else:
        path = Path(source)
        if not path.is_file():
            raise PolicyError(f"steering vectors {source!r} aren't there; expected a pack, or a safetensors file with layer.N f[d]")
    tensors = load_arrays(path)
    strange = next((name for name in tensors if not name.startswith(_PREFIX)), None)
    if strange is not None:
        raise PolicyError(f"{path} holds {strange!r}; expected layer.N f[d] alone, N the layer's number")
    return checked_vectors({layer_of(name.removeprefix(_PREFIX)): vector for name, vector in tensors.items()})
