"""The English network as ONNX graphs, written from its weights without torch.

``network.Network`` has the formulas. Everything is float32; batch, length and the number of values may be of any size. Large arrays
stay outside of the graphs, which only name their places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from moralguard.discriminator.encoder_config import EncoderConfig

OPSET = 20
_IR_VERSION = 9  # the one that came with opset 20, so that every onnxruntime that knows the opset takes it
_PAGE = 4096  # onnxruntime maps weights into memory only where they start at a page
_TABLES = ("encoder.words.weight", "encoder.positions.weight", "sides.weight")
_LEAST = float(np.finfo(np.float32).min)

_Inputs = dict[str, tuple[int, list[Any]]]  # element type and shape of each input


@dataclass(frozen=True, slots=True)
class Place:
    """Where an array lies behind the graphs: its shape, and bytes ``offset`` to ``offset + length`` of the weights' file."""

    shape: tuple[int, ...]
    offset: int
    length: int


def graph_weights(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The network's weights as the graphs read them: float32, the matrices of linear layers transposed to [in, out]."""
    return {
        name: np.ascontiguousarray(array.T if array.ndim == 2 and name not in _TABLES else array, dtype=np.float32)
        for name, array in arrays.items()
    }


def lay_out(weights: Mapping[str, np.ndarray]) -> dict[str, Place]:
    """A place for each array, one behind the other, each at the start of a page."""
    places, end = {}, 0
    for name, array in weights.items():
        start = end + -end % _PAGE
        places[name] = Place(array.shape, start, array.nbytes)
        end = start + array.nbytes
    return places


class _Graph:
    """A graph that is being written; methods add nodes and return the name of what they give."""

    def __init__(self, places: Mapping[str, Place], location: str):
        self._places = places
        self._location = location
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self.weights: dict[str, Any] = {}

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        return self.split(kind, 1, *inputs, **attributes)[0]

    def split(self, kind: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        names = [f"{kind}.{len(self._nodes)}.{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names

    def rename(self, name: str, wanted: str) -> str:
        self._nodes.append(helper.make_node("Identity", [name], [wanted]))
        return wanted

    def constant(self, value: Any, dtype: type = np.int64) -> str:
        array: np.ndarray = np.asarray(value, dtype=dtype)
        name = f"constant {array.dtype} {array.tolist()}"
        self._constants.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str) -> str:
        if name not in self.weights:
            place = self._places[name]
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=place.shape, data_location=TensorProto.EXTERNAL)
            for key, value in (("location", self._location), ("offset", place.offset), ("length", place.length)):
                tensor.external_data.add(key=key, value=str(value))
            self.weights[name] = tensor
        return name

    def linear(self, x: str, name: str) -> str:
        return self.add("Add", self.add("MatMul", x, self.weight(f"{name}.weight")), self.weight(f"{name}.bias"))

    def norm(self, x: str, name: str) -> str:
        weights = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return self.add("LayerNormalization", x, *weights, axis=-1, epsilon=1e-12)

    def pick(self, x: str, index: str, axis: int) -> str:
        return self.add("Gather", x, index, axis=axis)

    def model(self, inputs: _Inputs, outputs: Mapping[str, list[Any]]) -> Any:
        graph = helper.make_graph(
            self._nodes,
            "moralguard",
            [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
            [*self._constants.values(), *self.weights.values()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION, producer_name="moralguard")


class _Encoder(_Graph):
    """The parts of ``encoder.Encoder`` and ``heads``."""

    def __init__(self, config: EncoderConfig, places: Mapping[str, Place], location: str):
        super().__init__(places, location)
        self.config = config

    def bias(self, mask: str) -> str:
        """What attention scores get, [B, 1, 1, T]: 0 at tokens, and so little elsewhere that softmax gives 0."""
        row = self.add("Where", mask, self.constant(0.0, np.float32), self.constant(_LEAST, np.float32))
        return self.add("Unsqueeze", row, self.constant([1, 2]))

    def heads(self, x: str, perm: tuple[int, ...]) -> str:
        """[B, T, d] by heads, [B, heads, T, e] for the perm (0, 2, 1, 3)."""
        size, count = self.config.hidden_size, self.config.num_attention_heads
        return self.add("Transpose", self.add("Reshape", x, self.constant([0, 0, count, size // count])), perm=perm)

    def attend(self, query: str, key: str, value: str, bias: str) -> str:
        """Of [B, T, d] each: [B, T, d]."""
        width = self.config.hidden_size // self.config.num_attention_heads
        scores = self.add("MatMul", self.heads(query, (0, 2, 1, 3)), self.heads(key, (0, 2, 3, 1)))
        scores = self.add("Mul", scores, self.constant(1.0 / math.sqrt(width), np.float32))
        weights = self.add("Softmax", self.add("Add", scores, bias), axis=-1)
        found = self.add("Transpose", self.add("MatMul", weights, self.heads(value, (0, 2, 1, 3))), perm=(0, 2, 1, 3))
        return self.add("Reshape", found, self.constant([0, 0, self.config.hidden_size]))

    def layer(self, states: str, bias: str, name: str) -> str:
        parts = self.split("Split", 3, self.linear(states, f"{name}.qkv"), axis=-1, num_outputs=3)
        context = self.linear(self.attend(parts[0], parts[1], parts[2], bias), f"{name}.attention_out")
        states = self.norm(self.add("Add", states, context), f"{name}.attention_norm")
        inner = self.add("Gelu", self.linear(states, f"{name}.up"))
        return self.norm(self.add("Add", states, self.linear(inner, f"{name}.down")), f"{name}.out_norm")

    def upper(self, states: str, bias: str, half: str) -> str:
        for depth in range(self.config.layers - self.config.shared_layers):
            states = self.layer(states, bias, f"encoder.{half}.{depth}")
        return states

    def lower(self, ids: str, bias: str) -> str:
        length = self.add("Shape", ids, start=1, end=2)
        zero = self.constant([0])
        places = self.add("Slice", self.weight("encoder.positions.weight"), zero, length, zero)
        words = self.pick(self.weight("encoder.words.weight"), ids, 0)
        states = self.norm(self.add("Add", words, places), "encoder.embedding_norm")
        for depth in range(self.config.shared_layers):
            states = self.layer(states, bias, f"encoder.shared.{depth}")
        return states

    def sentence(self, lower: str, bias: str, mask: str) -> str:
        """[B, d], of length 1."""
        states = self.upper(lower, bias, "frozen")
        row = self.constant([1])
        weights = self.add("Unsqueeze", self.add("Cast", mask, to=TensorProto.FLOAT), self.constant([2]))
        total = self.add("ReduceSum", self.add("Mul", states, weights), row, keepdims=0)
        count = self.add("Max", self.add("ReduceSum", weights, row, keepdims=0), self.constant(1.0, np.float32))
        mean = self.add("Div", total, count)
        length = self.add("ReduceL2", mean, self.constant([-1]), keepdims=1)
        return self.add("Div", mean, self.add("Max", length, self.constant(1e-12, np.float32)))

    def on_side(self, lower: str, side: int) -> str:
        return self.add("Add", lower, self.pick(self.weight("sides.weight"), self.constant(side), 0))

    def first(self, states: str) -> str:
        return self.pick(states, self.constant(0), 1)

    def pair_head(self, read: str, text: str, value: str, name: str) -> None:
        """``heads.PairHead``: writes the graph's outputs ``relevance`` and ``broken``."""
        product = self.add("Mul", text, value)
        similarity = self.add("ReduceSum", product, self.constant([-1]), keepdims=1)
        scaled = self.linear(self.add("Mul", product, self.constant(16.0, np.float32)), f"{name}.product")
        features = self.add("Concat", read, scaled, similarity, axis=-1)
        out = self.linear(self.add("Gelu", self.linear(features, f"{name}.hidden")), f"{name}.out")
        above = self.add("Sub", similarity, self.constant(0.2, np.float32))
        logits = self.add("Add", out, self.add("Mul", self.weight(f"{name}.similarity"), above))
        for i, output in enumerate(("relevance", "broken")):
            self.rename(self.pick(logits, self.constant(i), -1), output)


def build_graphs(config: EncoderConfig, places: Mapping[str, Place], location: str) -> dict[str, Any]:
    """The graphs, ModelProto by name; ``places`` of ``graph_weights`` in the file ``location`` beside them.

    lower: ids int64, mask bool [B, T] to the states behind the shared layers, lower [B, T, d], and sentences [B, d]. values: lower,
    mask of values to their first states, vectors [B, d]. cached: lower, mask, sentences of texts, and value_vectors,
    value_sentences [N, d], to the logits relevance and broken [B, N]. cross: lower, mask, sentences of texts, and value_lower
    [B, S, d], value_mask, value_sentences of a value each, to the logits [B].
    """
    size = config.hidden_size
    mask: _Inputs = {"mask": (TensorProto.BOOL, ["batch", "length"])}
    states: _Inputs = {"lower": (TensorProto.FLOAT, ["batch", "length", size]), **mask}
    texts: _Inputs = {**states, "sentences": (TensorProto.FLOAT, ["batch", size])}
    values: _Inputs = {f"value_{name}": (TensorProto.FLOAT, ["count", size]) for name in ("vectors", "sentences")}
    pairs: _Inputs = {
        "value_lower": (TensorProto.FLOAT, ["batch", "value_length", size]),
        "value_mask": (TensorProto.BOOL, ["batch", "value_length"]),
        "value_sentences": (TensorProto.FLOAT, ["batch", size]),
    }
    plans: dict[str, tuple[Callable[[_Encoder], None], _Inputs, dict[str, list[Any]]]] = {
        "lower": (
            _write_lower,
            {"ids": (TensorProto.INT64, ["batch", "length"]), **mask},
            {"lower": ["batch", "length", size], "sentences": ["batch", size]},
        ),
        "values": (_write_values, states, {"vectors": ["batch", size]}),
        "cached": (_write_cached, {**texts, **values}, {"relevance": ["batch", "count"], "broken": ["batch", "count"]}),
        "cross": (_write_cross, {**texts, **pairs}, {"relevance": ["batch"], "broken": ["batch"]}),
    }
    found = {}
    for name, (write, inputs, outputs) in plans.items():
        graph = _Encoder(config, places, location)
        write(graph)
        found[name] = graph.model(inputs, outputs)
    return found


def _write_lower(graph: _Encoder) -> None:
    bias = graph.bias("mask")
    lower = graph.rename(graph.lower("ids", bias), "lower")
    graph.rename(graph.sentence(lower, bias, "mask"), "sentences")


def _write_values(graph: _Encoder) -> None:
    states = graph.upper(graph.on_side("lower", 0), graph.bias("mask"), "tuned")
    graph.rename(graph.first(states), "vectors")


def _write_cached(graph: _Encoder) -> None:
    bias = graph.bias("mask")
    states = graph.upper(graph.on_side("lower", 1), bias, "tuned")
    one = graph.constant([1])
    query = graph.linear(graph.add("Unsqueeze", "value_vectors", graph.constant([0])), "attention.query")
    key, value = graph.split("Split", 2, graph.linear(states, "attention.key_value"), axis=-1, num_outputs=2)
    found = graph.attend(query, key, value, bias)  # [B, N, d]
    shape = graph.add("Shape", found)
    first = graph.add("Expand", graph.add("Unsqueeze", graph.first(states), one), shape)
    asked = graph.add("Expand", "value_vectors", shape)
    read = graph.add("Concat", first, found, asked, graph.add("Mul", found, asked), axis=-1)
    graph.pair_head(read, graph.add("Unsqueeze", "sentences", one), "value_sentences", "cached_head")


def _write_cross(graph: _Encoder) -> None:
    joined = graph.add("Concat", graph.on_side("value_lower", 0), graph.on_side("lower", 1), axis=1)
    states = graph.upper(joined, graph.bias(graph.add("Concat", "value_mask", "mask", axis=1)), "tuned")
    start = graph.add("Squeeze", graph.add("Shape", "value_mask", start=1, end=2), graph.constant([0]))
    read = graph.add("Concat", graph.first(states), graph.pick(states, start, 1), axis=-1)
    graph.pair_head(read, "sentences", "value_sentences", "cross_head")
