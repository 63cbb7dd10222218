"""Edits of a decoder's graph: hidden states as outputs, and a low-rank projection in front of the head.

The user's file is never touched: edits are made on what ``read_graph`` gives (weights stay where they are) and kept in the user's cache
folder under a hash of the graph and the edit.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moralguard.backends.onnx.head_place import HeadPlace, same_tensor
from moralguard.backends.onnx.scope import Scope
from moralguard.errors import ModelError

HIDDEN, BEFORE, STRENGTH = "mg_hidden", "mg_head_logits", "mg_alpha"

_VERSION = "1"  # of the edits; another one makes other files


def find_output(model: Any, place: HeadPlace) -> str | None:
    """The graph's own output that holds the states at every position, if it has one."""
    if place.scope.outer is not None:
        return None
    for output in model.graph.output:
        if same_tensor(place.scope, output.name, place.states) or same_tensor(place.scope, output.name, place.hidden):
            return str(output.name)
    return None


def expose(model: Any, places: Sequence[HeadPlace], *, hidden: bool, before: bool) -> None:
    """Give the head's input (``mg_hidden``, f32) and output (``mg_head_logits``, f32) as outputs of ``model``, in place."""
    wanted = [(HIDDEN, "states")] if hidden else []
    wanted += [(BEFORE, "before")] if before else []
    for name, part in wanted:
        for place in places:
            _add_output(place.scope, getattr(place, part), name)
        outer = places[0].scope.outer
        if outer is not None:
            _lift(outer, name)


def _float_info(name: str) -> Any:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def _add_output(scope: Scope, tensor: str, name: str) -> None:
    from onnx import TensorProto, helper

    # a cast states the output's type, whatever the tensor's is; the runtime drops it where it changes nothing
    scope.graph.node.append(helper.make_node("Cast", [tensor], [name], to=TensorProto.FLOAT, name=f"{name}_cast"))
    scope.graph.output.append(_float_info(name))


def _lift(outer: Scope, name: str) -> None:
    """Give a branch's new output as an output of the If of the graph around it, under the same name."""
    for node in outer.graph.node:
        if node.op_type == "If" and any(any(output.name == name for output in a.g.output) for a in node.attribute if a.HasField("g")):
            # an inner name must differ from the outer one
            for attribute in node.attribute:
                attribute.g.output[-1].name = f"{name}_{attribute.name}"
                attribute.g.node[-1].output[0] = f"{name}_{attribute.name}"
            node.output.append(name)
    outer.graph.output.append(_float_info(name))


def insert_projection(model: Any, places: Sequence[HeadPlace], basis: np.ndarray, kind: int) -> None:
    """Put h - alpha (h U) U^T in the head's input's place, alpha a new input ``mg_alpha`` f32[batch, 1, 1], in place.

    The hidden states that the graph gives stay those before the projection. alpha = 0 leaves the logits as they were.

    Args:
        basis: U, f32[d, r].
        kind: ONNX element type of the head's input.

    Raises:
        ModelError: the head reads flat rows [batch * tokens, d] that can't be told apart by request.
    """
    from onnx import TensorProto, helper, numpy_helper

    dtype = helper.tensor_dtype_to_np_dtype(kind)
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(basis, dtype), "mg_basis"))
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(basis.T, dtype), "mg_basis_t"))
    graph.input.append(helper.make_tensor_value_info(STRENGTH, TensorProto.FLOAT, ["mg_batch", 1, 1]))
    for place in places:
        node, tensor, at = place.node, place.hidden, 0
        maker = place.scope.makers.get(tensor)
        if node.op_type == "Gemm":
            if maker is None or maker.op_type != "Reshape":
                raise ModelError("the head is a Gemm whose input isn't a reshaped [batch, tokens, d]; a projection can't be inserted")
            node, tensor = maker, maker.input[0]
        nodes = list(place.scope.graph.node)
        index = next(i for i, n in enumerate(nodes) if n is node or n == node)
        made = [
            helper.make_node("MatMul", [tensor, "mg_basis"], ["mg_inner"]),
            helper.make_node("Cast", [STRENGTH], ["mg_alpha_cast"], to=kind),
            helper.make_node("Mul", ["mg_inner", "mg_alpha_cast"], ["mg_scaled"]),
            helper.make_node("MatMul", ["mg_scaled", "mg_basis_t"], ["mg_removed"]),
            helper.make_node("Sub", [tensor, "mg_removed"], ["mg_projected"]),
        ]
        nodes[index].input[at] = "mg_projected"
        del place.scope.graph.node[:]
        place.scope.graph.node.extend([*nodes[:index], *made, *nodes[index:]])


def cache_folder() -> Path:
    """Where edited graphs are kept: ``onnx`` in moralguard's cache folder of this user (or ``$MORALGUARD_CACHE``)."""
    from moralguard import pinned_wheel

    return pinned_wheel.cache_folder() / "onnx"


def graph_key(path: Path, *extra: bytes) -> str:
    """Hash of a graph's file and of what an edit adds."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    for item in (_VERSION.encode(), path.name.encode(), *extra):
        digest.update(len(item).to_bytes(8, "little") + item)
    return digest.hexdigest()


def keep(key: str, content: bytes) -> Path | None:
    """Write an edited graph into the cache folder; None where that can't be written to (the graph is then made anew each time)."""
    with contextlib.suppress(OSError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{key}.onnx"
        descriptor, temporary = tempfile.mkstemp(dir=folder, suffix=".part")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, target)  # whole or not at all, whoever else writes it
        return target
    return None
