"""Hugging Face causal language models as the guard sees them."""

from __future__ import annotations

import hashlib
import inspect
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from transformers import DynamicCache

from moralguard.backends.capabilities import Capabilities
from moralguard.backends.head import Head, fit_head
from moralguard.backends.kv_cache import is_plain, new_cache
from moralguard.errors import ModelError


@dataclass
class Captured:
    """What hooks caught during a forward pass.

    Attributes:
        hidden: f[R, n, d], the input of the head (last hidden state after the final norm) at the positions it was given.
        head_logits: f[R, n, V], the head's raw output, before any scale or soft cap.
        states: f[R, T, d], the decoder's output at every position of the pass, when asked for.
    """

    hidden: torch.Tensor | None = None
    head_logits: torch.Tensor | None = None
    states: torch.Tensor | None = None


@dataclass(frozen=True)
class ForwardOutput:
    """One forward pass, at the last position of every row.

    Attributes:
        logits: f32[R, V].
        hidden: f[R, d], last hidden state, when asked for.
        head_logits: f[R, V] before scale and soft cap, when asked for.
        states: f[R, T, d], all positions of this pass, when asked for.
    """

    logits: torch.Tensor
    hidden: torch.Tensor | None = None
    head_logits: torch.Tensor | None = None
    states: torch.Tensor | None = None


@dataclass(eq=False)
class LanguageModel:
    """A causal LM with an optional tokenizer. The model's weights and modules are never changed.

    Args:
        model: a ``transformers`` causal LM (a compiled wrapper is unwrapped).
        tokenizer: its tokenizer, or None where prompts are token ids.
        name: how messages name it.
    """

    arrays: ClassVar[str] = "torch"

    model: Any
    tokenizer: Any = None
    name: str = ""
    vocab_size: int = field(init=False)
    context_length: int | None = field(init=False)

    def __post_init__(self) -> None:
        self.model = getattr(self.model, "_orig_mod", self.model)
        config = getattr(self.model, "config", None)
        if config is None or not hasattr(self.model, "generate"):
            raise ModelError(
                f"{type(self.model).__name__} isn't a transformers model that generates; expected a causal LM such as "
                "AutoModelForCausalLM.from_pretrained(...) returns, or what moralguard.load_model gives"
            )
        self.name = self.name or getattr(config, "_name_or_path", "") or type(self.model).__name__
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"{self.name} is an encoder-decoder model ({type(self.model).__name__}); moralguard guards decoder-only "
                "(causal) models. Load a causal LM instead"
            )
        embedding = self.model.get_output_embeddings()
        weight = getattr(embedding, "weight", None)
        text_config = config.get_text_config()
        self.vocab_size = int(weight.shape[0]) if weight is not None and weight.ndim == 2 else int(text_config.vocab_size)
        # ALiBi models state no limit
        self.context_length = getattr(text_config, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def width(self) -> int:
        """d, the width of the states that the head reads."""
        weight = getattr(self.model.get_output_embeddings(), "weight", None)
        if weight is None or weight.ndim != 2 or not weight.is_floating_point():  # a quantised head keeps its rows packed
            weight = self.model.get_input_embeddings().weight
        return int(weight.shape[1])

    def missing(self, needs: Capabilities) -> list[str]:
        """Names of the capabilities in ``needs`` that this model lacks."""
        plain = is_plain(self.model.config.get_text_config())
        # the head is looked for (a short forward pass) only where it is asked for
        hidden = needs.hidden and self.head is not None
        offered = Capabilities(hidden=hidden, grad=plain, cache=plain, history=True, auxiliary=True, per_request=True, edits=True)
        return needs.missing_from(offered)

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        eos = getattr(self.model.generation_config, "eos_token_id", None)
        if eos is None:
            return frozenset()
        return frozenset(int(i) for i in (eos if isinstance(eos, (list, tuple)) else [eos]))

    @cached_property
    def pad_token_id(self) -> int | None:
        """The id transformers pads with: its own choice where the model names none is the first end-of-text token."""
        for source in (self.model.generation_config, self.tokenizer):
            pad = getattr(source, "pad_token_id", None)
            if pad is not None:
                return int(pad)
        return min(self.eos_token_ids) if self.eos_token_ids else None

    @cached_property
    def head(self) -> Head | None:
        """The head's form, found by running two tokens and comparing E h + b with the logits; None where it has none known."""
        embedding = self.model.get_output_embeddings()
        weight = getattr(embedding, "weight", None)
        if weight is None or weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta:
            return None
        ids = torch.tensor([[0, min(1, self.vocab_size - 1)]], device=self.device)
        with torch.no_grad(), self.capture() as captured:
            logits = self.model(input_ids=ids, use_cache=False).logits
        if captured.hidden is None or captured.head_logits is None or captured.hidden.shape[-1] != weight.shape[1]:
            return None
        softcap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return fit_head(weight.detach(), captured.head_logits.flatten(0, 1).float(), logits.flatten(0, 1).float(), softcap)

    @cached_property
    def _forward_parameters(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.model.forward).parameters)

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of the architecture and of samples of the weights; packs are bound to it.

        Samples are rounded to bfloat16, so that weights loaded in float32 and in bfloat16 are one model.
        """
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)][:64]
            digest.update(sample.to(device="cpu", dtype=torch.bfloat16).view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def tokenizer_hash(self) -> str | None:
        """Short hash of the tokenizer's vocabulary, tokens and ids; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        entries = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(entries.encode()).hexdigest()[:16]

    def spell(self, token_id: int) -> str:
        """The text of one token; its id in angle brackets where there is no tokenizer."""
        return f"<{token_id}>" if self.tokenizer is None else self.tokenizer.decode([token_id])

    def new_cache(self) -> DynamicCache:
        return new_cache(self.model.config.get_text_config())

    @contextmanager
    def capture(self, states: bool = False) -> Iterator[Captured]:
        """Catch the head's input and output (and every position's state) in this thread's forward passes while inside."""
        captured, owner, handles = Captured(), threading.get_ident(), []
        head = self.model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{self.name} ({type(self.model).__name__}) has no output embeddings, so hidden states can't be read")

        def on_head(_module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if threading.get_ident() == owner:
                captured.hidden, captured.head_logits = args[0], output

        def on_decoder(_module: Any, _args: Any, output: Any) -> None:
            if threading.get_ident() == owner:
                captured.states = output[0]

        try:
            handles.append(head.register_forward_hook(on_head))
            if states:
                handles.append(self.model.base_model.register_forward_hook(on_decoder))
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    def logits_of(self, states: torch.Tensor) -> torch.Tensor:
        """f32[..., V] of last hidden states f[..., d].

        Raises:
            ModelError: the head has no known form.
        """
        if self.head is None:
            raise ModelError(f"the head of {self.name} has no known form, so the probabilities of given tokens can't be read")
        return self.head.bend(self.model.get_output_embeddings()(states).float())

    def forward(
        self,
        *,
        cache: DynamicCache,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        hidden: bool = False,
        states: bool = False,
    ) -> ForwardOutput:
        """One pass that extends ``cache`` in place.

        Args:
            cache: keys and values of earlier positions [R, heads, W, head_dim].
            input_ids: i64[R, T], or inputs_embeds f[R, T, d].
            attention_mask: i64[R, W + T], 0 at padding; None where there is none.
            position_ids: i64[R, T].
            hidden: return the last hidden state and the head's raw output.
            states: return the decoder's output at every position of this pass.
        """
        arguments: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "return_dict": True}
        if input_ids is not None:
            arguments["input_ids"] = input_ids
        else:
            arguments["inputs_embeds"] = inputs_embeds
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask
        if position_ids is not None and "position_ids" in self._forward_parameters:
            arguments["position_ids"] = position_ids
        if "logits_to_keep" in self._forward_parameters:
            arguments["logits_to_keep"] = 1
        if not (hidden or states):
            return ForwardOutput(self.model(**arguments).logits[:, -1].float())
        with self.capture(states=states) as captured:
            logits = self.model(**arguments).logits[:, -1].float()
        if captured.hidden is None or captured.head_logits is None:
            raise ModelError(f"{self.name}: the head wasn't called in the forward pass, so its hidden state can't be read")
        return ForwardOutput(logits, captured.hidden[:, -1], captured.head_logits[:, -1], captured.states)
