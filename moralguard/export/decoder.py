"""A causal LM as a function of flat tensors, which is what an ONNX graph is, and its trace by ``torch.export``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from moralguard.backends.kv_cache import KeyValue, cache_from, is_plain, key_values, new_cache
from moralguard.errors import ModelError

LogitsKept = Literal["last", "all"]

# traced sizes 0 and 1 would become constants of the graph, and equal sizes one dimension
_ROWS, _TOKENS, _PAST = 2, 3, 5
# their tables of angles change with the length of the text while it grows, by a branch that a graph can't hold
_CHANGING_ROPES = {"dynamic", "longrope"}


@dataclass(frozen=True)
class GraphNames:
    """Names of a decoder graph's inputs and outputs, in the order of its function."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class FlatDecoder(torch.nn.Module):
    """(ids, mask[, positions], keys and values of every layer) -> (logits, last hidden state, the extended keys and values).

    Args:
        model: a causal LM of transformers, in eager attention.
        kept: "last" gives logits [B, 1, V], as decoding needs them; "all" gives [B, S, V], as scoring and assisted generation do.
            A model whose head takes no choice gives all.
    """

    def __init__(self, model: Any, kept: LogitsKept = "last"):
        super().__init__()
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        self.has_positions = "position_ids" in parameters
        self.keeps_last = kept == "last" and "logits_to_keep" in parameters

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits f[B, 1 or S, V], last hidden state f[B, S, d], keys and values f[B, heads, P + S, head_dim] of every layer.

        Args:
            input_ids: i64[B, S]. attention_mask: i64[B, P + S], 0 at padding.
            rest: position_ids i64[B, S] where the model has positions, then f[B, heads, P, head_dim] keys and values by layer.
        """
        past = rest[1:] if self.has_positions else rest
        cache = cache_from(list(zip(past[::2], past[1::2], strict=True)))
        arguments: dict[str, Any] = {"position_ids": rest[0]} if self.has_positions else {}
        if self.keeps_last:
            arguments["logits_to_keep"] = 1
        with catch_states(self.model, everywhere=not self.keeps_last) as states:
            output = self.model(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, return_dict=True, **arguments
            )
        flat = [tensor for pair in key_values(output.past_key_values) for tensor in pair]
        return (output.logits, states[-1], *flat)

    def names(self, layers: int) -> GraphNames:
        positions = ("position_ids",) if self.has_positions else ()
        pairs = [f"{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
        return GraphNames(
            ("input_ids", "attention_mask", *positions, *(f"past_key_values.{pair}" for pair in pairs)),
            ("logits", "last_hidden_state", *(f"present.{pair}" for pair in pairs)),
        )


@contextmanager
def catch_states(model: Any, everywhere: bool) -> Iterator[list[torch.Tensor]]:
    """What the head is given, f[B, S, d], in the model's forward passes while inside.

    Args:
        everywhere: the head runs at every position. Where it runs at the last one only, states of the others are the decoder's
            output, which is the head's input in the models of transformers that skip the rest; the comparison with PyTorch tells.
    """
    states: list[torch.Tensor] = []

    def on_head(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
        states.append(args[0])

    def on_decoder(_module: Any, _args: Any, output: Any) -> None:
        states.append(output[0])

    if everywhere:
        handle = model.get_output_embeddings().register_forward_pre_hook(on_head)
    else:
        handle = model.get_decoder().register_forward_hook(on_decoder)
    try:
        yield states
    finally:
        handle.remove()


def check_exportable(model: Any, name: str) -> None:
    """Refuse what a decoder graph with a plain cache can't hold.

    Raises:
        ModelError: recurrent layers, rotary tables that change with the length, no output head, or quantised weights.
    """
    config = model.config.get_text_config()
    kind = type(model).__name__
    if not is_plain(config):
        kinds = ", ".join(sorted(set(config.layer_types)))
        raise ModelError(
            f"{name} ({kind}) can't be exported: its layers ({kinds}) keep more than keys and values, which the exported graph's cache "
            "can't hold; guard it with PyTorch"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(
            f"{name} ({kind}) can't be exported: its weights are quantised, and PyTorch's exporter reads floating-point ones; export the "
            "unquantised model and quantise the graph with onnxruntime's tools"
        )
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    changing = _CHANGING_ROPES & {str(part.get("rope_type", part.get("type"))) for part in nested}
    if changing:
        raise ModelError(
            f"{name} ({kind}) can't be exported: its rotary positions are of type {', '.join(changing)}, whose angles change with the "
            "length of the text; guard it with PyTorch"
        )
    if model.get_output_embeddings() is None or model.get_decoder() in (None, model):
        raise ModelError(f"{name} ({kind}) can't be exported: it has no output head over a decoder; expected a causal LM of transformers")


def sample_past(model: Any, name: str) -> list[KeyValue]:
    """Keys and values that the model itself makes of a few tokens, which tell their number, heads and sizes."""
    cache = new_cache(model.config.get_text_config())
    ids = torch.arange(_ROWS * _PAST).view(_ROWS, _PAST).remainder(model.get_input_embeddings().weight.shape[0])
    with torch.no_grad():
        output = model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, return_dict=True)
    found = getattr(output, "past_key_values", None)
    if found is not cache or any(keys.ndim != 4 or keys.shape[2] != _PAST for pair in key_values(cache) for keys in pair):
        raise ModelError(
            f"{name} ({type(model).__name__}) can't be exported: it doesn't keep keys and values [rows, heads, tokens, width] for every "
            "layer; guard it with PyTorch"
        )
    return key_values(cache)


def trace(decoder: FlatDecoder, name: str) -> tuple[torch.export.ExportedProgram, int]:
    """The decoder's program with free numbers of rows, tokens and earlier tokens, and its number of layers.

    Raises:
        ModelError: PyTorch can't trace the model; says its reason.
    """
    pairs = sample_past(decoder.model, name)
    past = [tensor for pair in pairs for tensor in pair]
    device = past[0].device
    mask = torch.ones(_ROWS, _PAST + _TOKENS, dtype=torch.int64, device=device)
    mask[1, :2] = 0  # a mask of ones alone may be dropped from the graph
    ids = torch.arange(1, 1 + _ROWS * _TOKENS, device=device).view(_ROWS, _TOKENS)
    positions = (torch.arange(_PAST, _PAST + _TOKENS, device=device).expand(_ROWS, -1).contiguous(),) if decoder.has_positions else ()
    free = torch.export.Dim.DYNAMIC
    rest = (*({0: free, 1: free} for _ in positions), *({0: free, 2: free} for _ in past))
    shapes = ({0: free, 1: free}, {0: free, 1: free}, rest)
    try:
        with torch.no_grad(), _traceable(decoder.model), quiet():
            program = torch.export.export(decoder, (ids, mask, *positions, *past), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises whatever the traced code and its own passes raise
        raise ModelError(
            f"{name} ({type(decoder.model).__name__}) can't be exported: PyTorch can't trace it into a graph with free lengths: "
            f"{reason(error)}"
        ) from error
    return program, len(pairs)


@contextmanager
def _traceable(model: Any) -> Iterator[None]:
    """Attention and mixtures of experts written out in plain products, which every opset has; put back afterwards."""
    attention = model.config._attn_implementation
    experts = model.get_experts_implementation() if model._can_set_experts_implementation() else None
    try:
        model.set_attn_implementation("eager")
        if experts is not None:
            model.set_experts_implementation("batched_mm")
        yield
    finally:
        model.set_attn_implementation(attention)
        if experts is not None:
            model.set_experts_implementation(experts)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's warnings about its own insides; what matters is checked on the graph afterwards."""
    import logging

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def reason(error: BaseException) -> str:
    """The first line of what it was in the end: the exporter wraps errors in advice of many lines."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:400]
