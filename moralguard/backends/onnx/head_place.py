"""Where the output head stands in a graph: walking back from the logits.

Between logits and head there may be casts, reshapes, a choice of positions, a scale and a soft cap; the head is a MatMul, a Gemm or a
MatMulNBits with constant weights (tied to the embedding or not). What lies in front of the head is the last hidden state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moralguard.backends.onnx.scope import Scope, constant, is_constant

_SAME = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"}
_CHOICE = {"Slice", "Gather", "GatherND", "GatherElements", "Split"}
_ALIAS = {"Cast", "Identity"}


@dataclass(frozen=True)
class HeadPlace:
    """A head in a graph.

    Attributes:
        scope: the graph that it is in: the model's own, or a branch of it.
        node: the matrix product.
        hidden: the product's first input, [..., d].
        states: the hidden states before positions are chosen, [batch, tokens, d] (or flat: [batch * tokens, d]).
        before: the logits before a scale or a soft cap.
        scale, softcap: of the head's form.
    """

    scope: Scope
    node: Any
    hidden: str
    states: str
    before: str
    scale: float
    softcap: float | None


def branches(scope: Scope, output: str) -> list[Scope]:
    """The scopes that compute an output: the graph itself, or each branch of the If that gives it."""
    maker = scope.makers.get(output)
    if maker is None or maker.op_type != "If":
        return [scope]
    return [Scope(attribute.g, scope) for attribute in maker.attribute if attribute.HasField("g")]


def find_heads(model: Any, logits: str, folder: Path) -> list[HeadPlace]:
    """The head in every branch that computes the logits; empty where one can't be found."""
    scope = Scope(model.graph)
    maker = scope.makers.get(logits)
    index = list(maker.output).index(logits) if maker is not None and maker.op_type == "If" else None
    found = []
    for inner in branches(scope, logits):
        name = logits if index is None else inner.graph.output[index].name
        place = _walk(inner, name, folder)
        if place is None:
            return []
        found.append(place)
    return found


def _scalar(scope: Scope, name: str, folder: Path) -> float | None:
    array = constant(scope, name, folder)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def _walk(scope: Scope, name: str, folder: Path) -> HeadPlace | None:
    before = name
    steps: list[tuple[str, float]] = []  # from the logits back: ("scale", s) or ("tanh", 0)
    for _ in range(32):
        node = scope.makers.get(name)
        if node is None:
            return None
        if node.op_type in _SAME or node.op_type in _CHOICE:
            name = node.input[0]
        elif node.op_type == "Tanh":
            steps.append(("tanh", 0.0))
            before = name = node.input[0]
        elif node.op_type in ("Mul", "Div", "Add"):
            side = next((i for i in (1, 0) if is_constant(scope, node.input[i])), None)
            if side is None or (node.op_type == "Div" and side == 0):
                return None
            number = _scalar(scope, node.input[side], folder)
            name = node.input[1 - side]
            if node.op_type == "Add":  # the head's bias; what comes before a scale includes it
                continue
            if number is None or number == 0:
                return None
            steps.append(("scale", number if node.op_type == "Mul" else 1 / number))
            before = name
        elif node.op_type in ("MatMul", "Gemm", "MatMulNBits", "FusedMatMul"):
            form = _form(steps)
            if form is None or is_constant(scope, node.input[0]) or not is_constant(scope, node.input[1]):
                return None
            return HeadPlace(scope, node, node.input[0], _all_positions(scope, node.input[0]), before, *form)
        else:
            return None
    return None


def _form(steps: Sequence[tuple[str, float]]) -> tuple[float, float | None] | None:
    kinds = [kind for kind, _ in steps]
    if kinds == ["scale", "tanh", "scale"]:
        cap = steps[0][1]
        return (1.0, cap) if abs(cap * steps[2][1] - 1) < 1e-3 else None
    if "tanh" in kinds:
        return None
    return float(np.prod([number for _, number in steps])), None


def _all_positions(scope: Scope, name: str) -> str:
    """The hidden states before a choice of positions; the head's own input where none is chosen."""
    found, at = name, name
    while (node := scope.makers.get(at)) is not None and node.op_type in _SAME | _CHOICE:
        at = node.input[0]
        if node.op_type in _CHOICE:
            found = at
    if found == name:
        node = scope.makers.get(name)  # a Gemm reads a flat copy
        if node is not None and node.op_type in ("Reshape", "Flatten"):
            return str(node.input[0])
    return found


def same_tensor(scope: Scope, first: str, second: str) -> bool:
    """Whether two names hold the same numbers: equal up to casts and copies."""

    def root(name: str) -> str:
        while (node := scope.makers.get(name)) is not None and node.op_type in _ALIAS:
            name = node.input[0]
        return name

    return root(first) == root(second)
