"""What a decoder's graph takes and gives, found by structure: types, ranks, dimensions and who reads what; names only where they help.

Known forms: optimum's and ``torch.onnx.export``'s (``past_key_values.N.key``), with and without a merged decoder
(``use_cache_branch``); ``transformers.exporters``' (``input.past_key_values.layers.N.keys``), whose prefill and decode are two
graphs; onnxruntime-genai's builder's (GroupQueryAttention, which shares one buffer between past and present).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moralguard.errors import ModelError

EXPORT_HINT = "export it with its cache: `moralguard export MODEL OUT`, or optimum's task text-generation-with-past"

_FLOAT: dict[int, np.dtype[Any]] = {1: np.dtype(np.float32), 10: np.dtype(np.float16)}
_ANY_FLOAT = {1, 10, 11, 16}
_INT: dict[int, np.dtype[Any]] = {6: np.dtype(np.int32), 7: np.dtype(np.int64)}
_BOOL = 9
_ENCODERS = re.compile(r"encoder_hidden_states|encoder_outputs|decoder_input_ids|pixel_values|input_features|cross")


@dataclass(frozen=True)
class Value:
    """A graph's input or output: its name, ONNX element type, and dimensions (a number, a symbol, or None where it has no name)."""

    name: str
    kind: int
    dims: tuple[int | str | None, ...]

    @property
    def rank(self) -> int:
        return len(self.dims)


@dataclass(frozen=True)
class CacheSlot:
    """Keys or values of one layer: [batch, heads, positions, size].

    Attributes:
        past: the input's name; None in a graph that only starts a text (prefill).
        present: the output's name.
    """

    past: str | None
    present: str
    heads: int
    size: int
    dtype: np.dtype


@dataclass(frozen=True)
class Ports:
    """Inputs and outputs of a decoder by their part; None where the graph has no such input.

    Attributes:
        ids: token ids [batch, tokens]. mask: attention mask [batch, all tokens]. positions: [batch, tokens].
        kinds: NumPy types of the integer inputs, by name.
        switch: ``use_cache_branch`` of a merged decoder, bool[1].
        column: positions of the new columns, i64[tokens] (transformers' ``cache_position``).
        slots: keys and values, keys first, layer by layer.
        logits: the output's name.
        grouped: the cache is GroupQueryAttention's: rows are aligned on the left side, past and present are one buffer.
        vocabulary: V where the graph states it.
    """

    ids: str
    mask: str | None
    positions: str | None
    kinds: dict[str, np.dtype]
    switch: str | None
    column: str | None
    slots: tuple[CacheSlot, ...]
    logits: str
    grouped: bool
    vocabulary: int | None


def _dimension(dim: Any) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    # transformers.exporters writes some numbers as symbols
    return int(dim.dim_param) if dim.dim_param.isdigit() else dim.dim_param or None


def _values(items: Iterable[Any]) -> list[Value]:
    return [
        Value(item.name, item.type.tensor_type.elem_type, tuple(_dimension(dim) for dim in item.type.tensor_type.shape.dim))
        for item in items
    ]


def all_nodes(graph: Any) -> Iterator[Any]:
    """Nodes of a graph and of the graphs in its nodes' branches."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_nodes(attribute.g)


def inspect(model: Any, where: str, heads: int | None = None, size: int | None = None) -> Ports:
    """Find the parts of a decoder's graph.

    Args:
        model: ``onnx.ModelProto``.
        where: how messages name it.
        heads, size: of the cache, where the graph leaves them open (from ``config.json``).

    Raises:
        ModelError: it is an encoder, has no KV cache, or has an input whose meaning can't be told.
    """
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in _values(graph.input) if value.name not in weights]
    outputs = _values(graph.output)
    if any(_ENCODERS.search(value.name) for value in inputs):
        names = ", ".join(value.name for value in inputs if _ENCODERS.search(value.name))
        raise ModelError(
            f"{where} takes {names}: it is part of an encoder-decoder or a multimodal model; expected a decoder-only causal LM"
        )

    past = [v for v in inputs if v.kind in _ANY_FLOAT and v.rank == 4]
    present = [v for v in outputs if v.kind in _ANY_FLOAT and v.rank == 4]
    rest = [v for v in inputs if v not in past]
    words = [v for v in rest if v.kind in _INT and v.rank == 2]
    ids = _find_ids(graph, words, where)
    logits = _find_logits([v for v in outputs if v not in present], where)
    if not present:
        kind = "an encoder" if logits is None or any("token_type" in v.name for v in words) else "an encoder or a decoder without its cache"
        raise ModelError(
            f"{where} gives no keys and values (its outputs: {', '.join(v.name for v in outputs)}), so it is {kind}; expected a causal LM "
            f"with a KV cache: {EXPORT_HINT}"
        )
    if logits is None:
        raise ModelError(
            f"{where} gives no logits (its outputs: {', '.join(v.name for v in outputs)}); expected a causal LM: {EXPORT_HINT}"
        )
    mask, positions = _find_mask(graph, ids, [v for v in words if v is not ids])
    switch = next((v for v in rest if v.kind == _BOOL and v.rank <= 1), None)
    column = next((v for v in rest if v.kind in _INT and v.rank == 1 and v.dims[0] in (ids.dims[1], None)), None)
    known = {v.name for v in (ids, mask, positions, switch, column) if v is not None}
    unknown = [f"{v.name} {list(v.dims)}" for v in rest if v.name not in known]
    if unknown:
        raise ModelError(
            f"{where} takes inputs whose meaning can't be told: {', '.join(unknown)}; expected token ids, a mask, positions and keys and "
            f"values [batch, heads, positions, size]. Layers with a recurrent state aren't supported; for others, {EXPORT_HINT}"
        )
    attention = next((node for node in all_nodes(graph) if node.op_type == "GroupQueryAttention"), None)
    if attention is not None and size is None:
        size = _grouped_size(graph, attention)
    return Ports(
        ids=ids.name,
        mask=None if mask is None else mask.name,
        positions=None if positions is None else positions.name,
        kinds={v.name: _INT[v.kind] for v in (ids, mask, positions, column) if v is not None},
        switch=None if switch is None else switch.name,
        column=None if column is None else column.name,
        slots=_slots(past, present, where, heads, size),
        logits=logits.name,
        grouped=attention is not None,
        vocabulary=logits.dims[-1] if isinstance(logits.dims[-1], int) and logits.dims[-1] > 0 else None,
    )


def _grouped_size(graph: Any, attention: Any) -> int | None:
    """The width of a head of GroupQueryAttention, from its table of cosines [positions, width / 2]; None without one."""
    table = attention.input[7] if len(attention.input) > 7 else ""
    return next((2 * int(tensor.dims[1]) for tensor in graph.initializer if tensor.name == table), None)


def _readers(graph: Any, name: str) -> Iterator[Any]:
    """Nodes that read a value, through casts and reshapes."""
    for node in graph.node:
        if name in node.input:
            yield node
            if node.op_type in ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten"):
                yield from _readers(graph, node.output[0])
        for attribute in node.attribute:  # a branch reads its outer graph's values by name
            if attribute.HasField("g"):
                yield from _readers(attribute.g, name)


def _find_ids(graph: Any, words: list[Value], where: str) -> Value:
    """The input that indexes the largest table: the embedding's."""
    rows = {tensor.name: tensor.dims[0] for tensor in _all_weights(graph) if len(tensor.dims) >= 2}

    def table(value: Value) -> int:
        lookups = [n for n in _readers(graph, value.name) if n.op_type in ("Gather", "GatherBlockQuantized") and n.input[0] in rows]
        return max((int(rows[node.input[0]]) for node in lookups), default=0)

    named = next((v for v in words if v.name in ("input_ids", "input.input_ids")), None)
    found = named or max(words, key=table, default=None)
    if found is None or (named is None and not table(found)):
        listed = ", ".join(f"{value.name} {list(value.dims)}" for value in _values(graph.input)) or "none"
        raise ModelError(f"{where} has no input of token ids [batch, tokens] (its inputs: {listed}); expected a causal LM")
    return found


def _all_weights(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _all_weights(attribute.g)


def _find_mask(graph: Any, ids: Value, others: list[Value]) -> tuple[Value | None, Value | None]:
    """(mask, positions) among the integer inputs that aren't the ids."""
    mask = next((v for v in others if "mask" in v.name), None)
    positions = next((v for v in others if "position" in v.name), None)
    left = [v for v in others if v is not mask and v is not positions]
    for value in left:
        lookups = {"Gather", "MatMul", "Mul", "Cos", "Sin", "RotaryEmbedding"}
        same = value.dims[1] == ids.dims[1] and value.dims[1] is not None
        if positions is None and same and any(node.op_type in lookups for node in _readers(graph, value.name)):
            positions = value
        elif mask is None:
            mask = value
    return mask, positions


def _find_logits(outputs: list[Value], where: str) -> Value | None:
    """The output over the vocabulary: the widest of those with three (or two) dimensions."""
    scores = [v for v in outputs if v.kind in _ANY_FLOAT and v.rank in (2, 3)]
    named = next((v for v in scores if v.name in ("logits", "output.logits", "lm_logits")), None)
    found = named or max((v for v in scores if isinstance(v.dims[-1], int)), key=lambda v: int(v.dims[-1] or 0), default=None)
    if named is None and found is not None and "hidden" in found.name:
        return None
    if found is not None and found.kind not in _FLOAT:
        raise ModelError(f"{where} computes in bfloat16, which NumPy can't read; export it in float32 or float16")
    return found


_PART = re.compile(r"key|(?<![a-z])k(?![a-z])", re.I)


def _order(name: str) -> tuple[int, int] | None:
    """(layer, 0 for keys or 1 for values), read from a name; None where it doesn't tell."""
    layer = re.search(r"\d+", name)
    # what stands behind the layer's number: "past_key_values.0.value" has "key" before it
    tail = "" if layer is None else name[layer.end() :]
    if layer is None or not re.search(r"key|value|(?<![a-z])[kv](?![a-z])", tail, re.I):
        return None
    return int(layer.group()), 0 if _PART.search(tail) else 1


def _sorted(values: list[Value]) -> list[Value]:
    """Layer by layer, keys first; in the graph's order where names don't tell."""
    orders = [_order(v.name) for v in values]
    if None in orders or len(set(orders)) != len(orders):
        return values
    return [v for _, v in sorted(zip(orders, values, strict=True), key=lambda pair: pair[0])]  # type: ignore[arg-type, return-value]


def _slots(past: list[Value], present: list[Value], where: str, heads: int | None, size: int | None) -> tuple[CacheSlot, ...]:
    if past and len(past) != len(present):
        raise ModelError(
            f"{where} takes {len(past)} tensors of keys and values and gives {len(present)}; expected as many of each. {EXPORT_HINT}"
        )
    slots = []
    taken: list[Value | None] = [*_sorted(past)] if past else [None] * len(present)
    for before, after in zip(taken, _sorted(present), strict=True):
        shape = (before or after).dims
        kind = (before or after).kind
        count = shape[1] if isinstance(shape[1], int) else heads
        width = shape[3] if isinstance(shape[3], int) else size
        if count is None or width is None or isinstance(shape[2], int):
            raise ModelError(
                f"{where} keeps {(before or after).name} as {list(shape)}; expected [batch, heads, positions, size] with heads and size "
                f"stated and positions open. {EXPORT_HINT}"
            )
        if kind not in _FLOAT:
            raise ModelError(f"{where} keeps its cache in bfloat16, which NumPy can't read; export it in float32 or float16")
        slots.append(CacheSlot(None if before is None else before.name, after.name, count, width, _FLOAT[kind]))
    return tuple(slots)
