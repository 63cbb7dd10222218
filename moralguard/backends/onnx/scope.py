"""A graph's constants: initialisers, constant nodes, and what follows from them alone (a transposed or a dequantised weight)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moralguard.backends.onnx.weights import read_tensor

_CONSTANT = {"Transpose", "Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "DequantizeLinear"}


@dataclass
class Scope:
    """A graph and the graphs around it, whose constants its nodes may read.

    Attributes:
        graph: ``onnx.GraphProto``.
        outer: the graph that the node with this branch is in.
    """

    graph: Any
    outer: Scope | None = None
    makers: dict[str, Any] = field(init=False)
    weights: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.makers = {name: node for node in self.graph.node for name in node.output if name}
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}

    def weight(self, name: str) -> Any | None:
        """The initialiser or constant of this name."""
        if name in self.weights:
            return self.weights[name]
        maker = self.makers.get(name)
        if maker is not None:
            return next((a.t for a in maker.attribute if a.name == "value"), None) if maker.op_type == "Constant" else None
        return self.outer.weight(name) if self.outer else None

    def maker(self, name: str) -> Any | None:
        if name in self.makers:
            return self.makers[name]
        return None if name in self.weights or self.outer is None else self.outer.maker(name)


def is_constant(scope: Scope, name: str) -> bool:
    if scope.weight(name) is not None:
        return True
    node = scope.maker(name)
    return node is not None and node.op_type in _CONSTANT and all(is_constant(scope, i) for i in node.input if i)


def constant(scope: Scope, name: str, folder: Path) -> np.ndarray | None:
    """A constant's value, [any shape]; transposes are views, so that a weight on disk stays there."""
    tensor = scope.weight(name)
    if tensor is not None:
        return read_tensor(tensor, folder)
    node = scope.maker(name)
    if node is None or not is_constant(scope, name):
        return None
    if node.op_type in ("Identity", "Cast"):
        return constant(scope, node.input[0], folder)
    if node.op_type == "Transpose":
        array = constant(scope, node.input[0], folder)
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        return None if array is None else np.transpose(array, order)
    return _compute(scope, name, folder)


def _compute(scope: Scope, name: str, folder: Path) -> np.ndarray:
    """Compute a constant by the runtime itself (a dequantised weight, say)."""
    import onnxruntime
    from onnx import TensorProto, helper

    nodes: list[Any] = []
    weights: dict[str, Any] = {}

    def collect(wanted: str) -> None:
        tensor = scope.weight(wanted)
        if tensor is not None:
            if tensor.data_location == tensor.EXTERNAL:
                raw = tensor.__class__(name=wanted, data_type=tensor.data_type, dims=tensor.dims)
                raw.raw_data = _raw(tensor, folder)
                tensor = raw
            weights[wanted] = tensor
            return
        node = scope.maker(wanted)
        if node is not None and node not in nodes:
            for source in node.input:
                if source:
                    collect(source)
            nodes.append(node)

    collect(name)
    given = []
    for key, tensor in weights.items():
        tensor = tensor.__class__.FromString(tensor.SerializeToString())
        tensor.name = key
        given.append(tensor)
    last = helper.make_node("Cast", [name], ["mg_constant"], to=TensorProto.FLOAT)
    output = helper.make_tensor_value_info("mg_constant", TensorProto.FLOAT, None)
    graph = helper.make_graph([*nodes, last], "constant", [], [output], given)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {})[0])


def _raw(tensor: Any, folder: Path) -> bytes:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / entries["location"]).open("rb") as file:
        file.seek(int(entries.get("offset", 0)))
        return file.read(int(entries["length"]))
