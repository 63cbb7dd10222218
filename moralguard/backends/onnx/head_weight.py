"""The head's weight as one float32 matrix, whatever form the graph keeps it in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moralguard.backends.onnx.head import Head
from moralguard.backends.onnx.head_place import HeadPlace
from moralguard.backends.onnx.scope import Scope, constant


def read_head(place: HeadPlace, folder: Path) -> Head | None:
    """The head with its weight; None where the weight's form isn't known (a permuted quantisation, say)."""
    node = place.node
    attributes = {a.name: a for a in node.attribute}
    if node.op_type == "MatMulNBits":
        weight = _dequantised(place.scope, node, attributes, folder)
    else:
        weight = constant(place.scope, node.input[1], folder)
        turned = any(name in attributes and attributes[name].i for name in ("transB", "transBatchB"))
        if weight is not None and not turned:
            weight = weight.T if weight.ndim == 2 else None
        factor = attributes["alpha"].f if "alpha" in attributes else 1.0
        if weight is not None and factor != 1.0:
            weight = weight.astype(np.float32) * np.float32(factor)
    if weight is None or weight.ndim != 2 or weight.dtype.kind not in "fV":
        return None
    if weight.dtype != np.float32:
        weight = weight.astype(np.float32)
    if not weight.flags.aligned:  # a view of a file at an odd place, which every product would copy again
        weight = np.array(weight)
    return Head(weight, place.scale, place.softcap)


def _dequantised(scope: Scope, node: Any, attributes: dict[str, Any], folder: Path) -> np.ndarray | None:
    """E f32[V, d] of a MatMulNBits: blocks of ``block_size`` inputs share a scale and a zero point (com.microsoft, opset 1)."""
    width, rows, bits, block = (int(attributes[name].i) for name in ("K", "N", "bits", "block_size"))
    inputs = list(node.input) + [""] * 4
    packed, scales = (constant(scope, name, folder) for name in inputs[1:3])
    if packed is None or scales is None or bits not in (2, 4, 8) or inputs[4]:
        return None  # inputs[4]: rows permuted by a group index
    blocks = -(-width // block)
    numbers = _unpacked(np.asarray(packed).reshape(rows, blocks, -1), bits)[..., :block].astype(np.float32)
    if inputs[3]:
        points = np.asarray(constant(scope, inputs[3], folder))
        if points.dtype == np.uint8:
            points = _unpacked(points.reshape(rows, -1), bits)[:, :blocks]
        numbers -= points.reshape(rows, blocks, 1).astype(np.float32)
    else:
        numbers -= np.float32(1 << (bits - 1))
    numbers *= np.asarray(scales, np.float32).reshape(rows, blocks, 1)
    return numbers.reshape(rows, -1)[:, :width]


def _unpacked(array: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of ``bits`` bits from bytes, the lowest first, along the last axis."""
    if bits == 8:
        return array
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (array[..., None] >> shifts & np.uint8((1 << bits) - 1)).reshape(*array.shape[:-1], -1)
