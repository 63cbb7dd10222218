"""Reading safetensors files that may be broken, as torch tensors or as NumPy arrays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from moralguard.errors import ModelError

if TYPE_CHECKING:
    import torch

_DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name, in memory of their own: products round by how their operands lie in memory, and in the file they lie anywhere.

    Raises:
        ModelError: it isn't a whole safetensors file.
    """
    from safetensors.torch import load_file

    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Arrays by name, without torch; NumPy has no bfloat16, which comes as float32.

    Raises:
        ModelError: it isn't a whole safetensors file, or holds numbers that NumPy can't (8-bit floats).
    """
    try:
        found = deserialize(Path(path).read_bytes())
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    return {name: _as_array(entry, name, path) for name, entry in found}


def _as_array(entry: Any, name: str, path: Path) -> NDArray[Any]:
    dtype, shape, data = entry["dtype"], entry["shape"], entry["data"]
    if dtype == "BF16":
        words: NDArray[Any] = np.frombuffer(data, dtype=np.uint16).astype(np.uint32) << np.uint32(16)
        return words.view(np.float32).reshape(shape)
    if dtype not in _DTYPES:
        raise ModelError(f"{path} holds {name} as {dtype}, which NumPy can't read; save it as float32 or float16")
    return np.frombuffer(data, dtype=_DTYPES[dtype]).reshape(shape).copy()


def _unreadable(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path} can't be read as a safetensors file ({error}); save it again with safetensors")
