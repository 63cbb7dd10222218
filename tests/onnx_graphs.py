"""ONNX decoders in the forms that exporters write them, from the tiny models of ``tiny_models`` (and these models beside them).

Each builder writes into a folder of its caller's and returns the graph's path. Nothing here is the project's own exporter: these are
third parties' graphs, or what they are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM


def llama(seed: int = 0, vocab: int = 199) -> LlamaForCausalLM:
    """A tiny Llama with heads of 16: GroupQueryAttention takes no smaller ones."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.25,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


class _Flat(nn.Module):
    """A causal LM whose cache goes in and out as one tensor a layer and kind."""

    def __init__(self, model: Any, hidden: bool, after: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.model, self.hidden, self.after = model, hidden, after

    def forward(self, input_ids, attention_mask, position_ids, *past):
        cache = DynamicCache([(past[2 * i], past[2 * i + 1]) for i in range(len(past) // 2)])
        found = self.model.base_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        states = found.last_hidden_state
        logits = self.after(self.model.get_output_embeddings()(states))
        present = [t for layer in found.past_key_values.layers for t in (layer.keys, layer.values)]
        return (logits, states, *present) if self.hidden else (logits, *present)


def plain(
    model: Any,
    folder: Path,
    *,
    hidden: bool = True,
    names: str = "past_key_values.{layer}.{part}",
    present: str = "present.{layer}.{part}",
    after: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
    external: bool = False,
) -> Path:
    """The graph of ``torch.onnx.export``'s dynamo exporter, with optimum's names; weights inside unless ``external``."""
    config = model.config
    layers = config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = config.hidden_size // config.num_attention_heads
    parts = [(layer, part) for layer in range(layers) for part in ("key", "value")]
    past = [torch.zeros(2, heads, 3, size) for _ in parts]
    ids = torch.ones(2, 4, dtype=torch.int64)
    mask, positions = torch.ones(2, 7, dtype=torch.int64), torch.arange(3, 7)[None].expand(2, 4).contiguous()
    dynamic = torch.export.Dim.DYNAMIC
    two = {0: dynamic, 1: dynamic}
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    program = torch.onnx.export(
        _Flat(model, hidden, after).eval(),
        (ids, mask, positions, *past),
        dynamo=True,
        opset_version=20,
        optimize=True,
        verbose=False,
        dynamic_shapes=(two, two, two, tuple({0: dynamic, 2: dynamic} for _ in parts)),
        input_names=["input_ids", "attention_mask", "position_ids", *(names.format(layer=i, part=p) for i, p in parts)],
        output_names=["logits", *(["last_hidden_state"] if hidden else []), *(present.format(layer=i, part=p) for i, p in parts)],
    )
    model.set_attn_implementation(before)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    assert program is not None
    program.save(str(path), external_data=external)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    return path


def word_tokenizer(folder: Path, vocab: int) -> None:
    """A tokenizer of words w0, w1, ... beside a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(folder)


def genai(model: Any, folder: Path, precision: str = "fp32", **options: str) -> Path:
    """The graph of onnxruntime-genai's builder: GroupQueryAttention, no positions."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    source = folder / "source"
    model.save_pretrained(source)
    word_tokenizer(source, model.config.vocab_size)
    out = folder / "built"
    given = ["", str(source), str(out), precision, "cpu", str(folder / "cache")]
    extra = parse_extra_options(*given, [f"{name}={value}" for name, value in options.items()])
    create_model(*given, **extra)
    return out / "model.onnx"


def exporters(model: Any, folder: Path) -> Path:
    """The folder of ``transformers.exporters``: a graph for the prompt and one for what follows."""
    from transformers.exporters import OnnxConfig, OnnxExporter

    ids = torch.arange(10).reshape(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # a mask without padding would be left out of the graph
    found = OnnxExporter().export_for_generation(
        model, {"input_ids": ids, "attention_mask": mask}, OnnxConfig(dynamic=True), multi_token_decode=True
    )
    found.save_pretrained(folder)
    return folder


def _copy(path: Path, folder: Path) -> tuple[Any, Path]:
    """A graph with its weights, to be changed and saved in another folder; the configuration goes along."""
    folder.mkdir(parents=True, exist_ok=True)
    for beside in path.parent.glob("*.json"):
        (folder / beside.name).write_bytes(beside.read_bytes())
    return onnx.load(path), folder / "model.onnx"


def without_hidden(path: Path, folder: Path) -> Path:
    """As most exporters write it: logits and cache only."""
    model, target = _copy(path, folder)
    kept = [output for output in model.graph.output if output.name != "last_hidden_state"]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    onnx.save(model, target)
    return target


def _rename(graph: Any, names: dict[str, str]) -> None:
    for node in graph.node:
        for field in (node.input, node.output):
            for index, name in enumerate(field):
                field[index] = names.get(name, name)
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = names.get(value.name, value.name)


def nameless(path: Path, folder: Path) -> Path:
    """Inputs and outputs under names that tell nothing."""
    model, target = _copy(path, folder)
    inputs = {value.name: f"in{chr(97 + i)}" for i, value in enumerate(model.graph.input)}
    outputs = {value.name: f"out{chr(97 + i)}" for i, value in enumerate(model.graph.output)}
    _rename(model.graph, {**inputs, **outputs})
    del model.graph.value_info[:]
    onnx.save(model, target)
    return target


def _constant(model: Any, name: str, array: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def with_head(path: Path, folder: Path, form: str) -> Path:
    """The head in another form: "softcap", "scale", "bias", "tied", "gemm", "last" (one position) or "unknown" (a second product)."""
    model, target = _copy(without_hidden(path, folder), folder)
    nodes = model.graph.node
    head = next(node for node in nodes if "logits" in node.output)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == head.input[1])
    width, vocab = weight.dims
    head.output[0] = "raw"

    def number(name: str, value: float) -> str:
        return _constant(model, name, np.asarray(value, np.float32))

    def add(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))

    if form == "softcap":
        add("Div", ["raw", number("cap", 5.0)], "divided")
        add("Tanh", ["divided"], "bent")
        add("Mul", ["bent", "cap"], "logits")
    elif form == "scale":
        add("Mul", ["raw", number("factor", 0.25)], "logits")
    elif form == "bias":
        add("Add", ["raw", _constant(model, "bias", np.linspace(-1, 1, vocab, dtype=np.float32))], "logits")
    elif form == "unknown":
        add("MatMul", ["raw", _constant(model, "second", np.eye(vocab, dtype=np.float32))], "sum")
        add("Softmax", ["sum"], "logits")
    elif form == "tied":
        turned = np.ascontiguousarray(numpy_helper.to_array(weight).T)
        source = _constant(model, "table", turned)
        head.input[1], head.output[0] = "turned", "logits"
        at = list(nodes).index(head)
        nodes.insert(at, helper.make_node("Transpose", [source], ["turned"], perm=[1, 0]))
    elif form == "gemm":
        states = head.input[0]
        nodes.remove(head)
        add("Reshape", [states, _constant(model, "flat", np.asarray([-1, width]))], "rows")
        _constant(model, "turned", np.ascontiguousarray(numpy_helper.to_array(weight).T))
        add("Gemm", ["rows", "turned", _constant(model, "bias", np.zeros(vocab, np.float32))], "product", transB=1)
        add("Shape", ["input_ids"], "sizes")
        add("Concat", ["sizes", _constant(model, "width", np.asarray([vocab]))], "shape", axis=0)
        add("Reshape", ["product", "shape"], "logits")
    elif form == "last":
        states = head.input[0]
        nodes.remove(head)
        add("Slice", [states, *(_constant(model, f"s{i}", np.asarray([v])) for i, v in enumerate((-1, 2**40, 1)))], "end")
        add("MatMul", ["end", weight.name], "logits")
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    del model.graph.value_info[:]
    onnx.save(model, target)
    return target


def merged(path: Path, folder: Path) -> Path:
    """optimum's merged decoder: an If over ``use_cache_branch``; the branch without a cache doesn't read what is fed as past."""
    model, _ = _copy(without_hidden(path, folder), folder)
    (folder / "model.onnx").unlink()
    graph = model.graph
    outputs = list(graph.output)
    shared = {value.name for value in (*graph.input, *graph.initializer)}
    branches = []
    for name in ("then", "else"):
        branch = helper.make_graph([], name, [], [])
        mine = {out: f"{name}_{out}" for node in graph.node for out in node.output if out and out not in shared}
        if name == "else":
            for value in graph.input:
                if len(value.type.tensor_type.shape.dim) == 4:
                    mine[value.name] = f"empty_{value.name}"
                    branch.node.append(helper.make_node("Slice", [value.name, "mg_0", "mg_0", "mg_2"], [mine[value.name]]))
        for node in graph.node:
            copied = branch.node.add()
            copied.CopyFrom(node)
            for field in (copied.input, copied.output):
                for index, item in enumerate(field):
                    field[index] = mine.get(item, item)
        for output in outputs:
            value = branch.output.add()
            value.CopyFrom(output)
            value.name = mine[output.name]
        branches.append(branch)
    del graph.node[:]
    del graph.value_info[:]
    _constant(model, "mg_0", np.asarray([0]))
    _constant(model, "mg_2", np.asarray([2]))
    graph.input.append(helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1]))
    names = [output.name for output in outputs]
    graph.node.append(helper.make_node("If", ["use_cache_branch"], names, then_branch=branches[0], else_branch=branches[1]))
    target = folder / "decoder_model_merged.onnx"
    onnx.save(model, target)
    return target


def half(path: Path, folder: Path) -> Path:
    """Weights, cache and logits in float16."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model, target = _copy(path, folder)
    onnx.save(convert_float_to_float16(model, keep_io_types=False, disable_shape_infer=True), target)
    return target


def quantised(path: Path, folder: Path, bits: int = 4, symmetric: bool = True) -> Path:
    """Every product with constant weights as MatMulNBits, in blocks of 16."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model, target = _copy(path, folder)
    quantiser = MatMulNBitsQuantizer(model, bits=bits, block_size=16, is_symmetric=symmetric)
    quantiser.process()
    onnx.save(quantiser.model.model, target)
    return target


def encoder(folder: Path, *, logits: bool = False, vocab: int = 199) -> Path:
    """A graph that reads ids and a mask, and has no cache: states out, or logits over the vocabulary."""
    random = np.random.default_rng(0)
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "t"]) for name in ("input_ids", "attention_mask")]
    weights = [numpy_helper.from_array(random.normal(size=(vocab, 8)).astype(np.float32), "table")]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        helper.make_node("Cast", ["attention_mask"], ["seen"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["seen", "axis"], ["column"]),
        helper.make_node("Mul", ["embedded", "column"], ["last_hidden_state"]),
    ]
    weights.append(numpy_helper.from_array(np.asarray([2]), "axis"))
    outputs = [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["b", "t", 8])]
    if logits:
        weights.append(numpy_helper.from_array(random.normal(size=(8, vocab)).astype(np.float32), "head"))
        nodes.append(helper.make_node("MatMul", ["last_hidden_state", "head"], ["logits"]))
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "t", vocab])]
    graph = helper.make_graph(nodes, "encoder", inputs, outputs, weights)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "model.onnx")
    return folder / "model.onnx"


def without_mask(path: Path, folder: Path, *, keep_input: bool = False) -> Path:
    """A graph in which every token is seen: it takes no mask, or (``keep_input``) takes one and doesn't read it."""
    model, target = _copy(path, folder)
    graph = model.graph
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == "attention_mask":
                node.input[index] = "all_seen"
    past = next(value.name for value in graph.input if len(value.type.tensor_type.shape.dim) == 4)
    for name, number in (("n0", 0), ("n1", 1), ("n2", 2)):
        _constant(model, name, np.asarray([number]))
    made = [
        helper.make_node("Shape", ["input_ids"], ["sizes"]),
        helper.make_node("Shape", [past], ["past_sizes"]),
        helper.make_node("Gather", ["sizes", "n0"], ["batch"]),
        helper.make_node("Gather", ["sizes", "n1"], ["tokens"]),
        helper.make_node("Gather", ["past_sizes", "n2"], ["columns"]),
        helper.make_node("Add", ["tokens", "columns"], ["all"]),
        helper.make_node("Concat", ["batch", "all"], ["mask_sizes"], axis=0),
        helper.make_node("ConstantOfShape", ["mask_sizes"], ["all_seen"], value=numpy_helper.from_array(np.asarray([1]))),
    ]
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*made, *nodes])
    if not keep_input:
        graph.input.remove(next(value for value in graph.input if value.name == "attention_mask"))
    del graph.value_info[:]
    onnx.save(model, target)
    return target
