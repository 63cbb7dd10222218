"""Tiny random causal language models whose next-token laws are spread out: far from uniform, far from one token.

Each factory is a plain function of its seed: the same seed gives the same weights, and the caller's random state is left as it was.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 199  # odd and not a multiple of a power of two, so that a padding mistake shows
HIDDEN = 32
POSITIONS = 128


def _build(model_class: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        for name, parameter in model.named_parameters():  # biases and norm weights too, or a forgotten one would not show
            if parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
            if not torch.isfinite(parameter).all():
                raise ValueError(f"{name} is not finite")
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def llama(seed: int = 0, vocab: int = VOCAB, layers: int = 2, spread: float = 0.25) -> LlamaForCausalLM:
    """A Llama: rotary positions, grouped key-value heads (4 query heads, 2 key heads), untied embeddings."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=spread,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return _build(LlamaForCausalLM, config, seed)


def gpt2(seed: int = 0, vocab: int = VOCAB, layers: int = 3, spread: float = 0.25) -> GPT2LMHeadModel:
    """A GPT-2: learned absolute positions, tied embeddings."""
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=POSITIONS,
        n_embd=HIDDEN,
        n_layer=layers,
        n_head=4,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return _build(GPT2LMHeadModel, config, seed)


def gpt_neox(seed: int = 0, vocab: int = VOCAB, layers: int = 2, spread: float = 0.25) -> GPTNeoXForCausalLM:
    """A GPT-NeoX: partly rotary positions, parallel residual, untied embeddings."""
    config = GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        initializer_range=spread,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return _build(GPTNeoXForCausalLM, config, seed)


def qwen2(seed: int = 0, vocab: int = VOCAB, layers: int = 2, spread: float = 0.25) -> Qwen2ForCausalLM:
    """A Qwen2: rotary positions, biases on query, key and value, tied embeddings."""
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=spread,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return _build(Qwen2ForCausalLM, config, seed)


FAMILIES = {"llama": llama, "gpt2": gpt2, "gpt_neox": gpt_neox, "qwen2": qwen2}
