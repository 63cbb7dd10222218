"""Models with an unusual head or cache, a byte-level tokenizer, and every control at a strength, for the integration tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from tiny_models import HIDDEN, POSITIONS, VOCAB, llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from moralguard.controls import PPLM, Control, DExperts, Fudge, NullspaceProjection, Prompt, SelfDebias

torch.set_num_threads(1)  # models this small only lose to threads that wait for each other, above all where other work runs beside

SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _build(model_class: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.generation_config.bos_token_id = None
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def gemma2(seed: int = 0, softcap: float = 3.0) -> Gemma2ForCausalLM:
    """z = softcap * tanh(E h / softcap), so low that it bends every large logit; layers alternate between a window of 8 and all."""
    config = Gemma2Config(
        **SHAPE, vocab_size=VOCAB, head_dim=8, sliding_window=8, final_logit_softcapping=softcap, attn_implementation="eager"
    )
    return _build(Gemma2ForCausalLM, config, seed)


def granite(seed: int = 0, logits_scaling: float = 0.6) -> GraniteForCausalLM:
    """z = E h / logits_scaling."""
    config = GraniteConfig(**SHAPE, vocab_size=VOCAB, logits_scaling=logits_scaling, embedding_multiplier=3.0, residual_multiplier=0.5)
    return _build(GraniteForCausalLM, config, seed)


def cohere(seed: int = 0, logit_scale: float = 1.5) -> CohereForCausalLM:
    """z = logit_scale * E h, with tied embeddings."""
    return _build(CohereForCausalLM, CohereConfig(**SHAPE, vocab_size=VOCAB, logit_scale=logit_scale), seed)


def mistral(seed: int = 0, sliding_window: int = 8) -> MistralForCausalLM:
    """Every layer sees the newest sliding_window positions only."""
    return _build(MistralForCausalLM, MistralConfig(**SHAPE, vocab_size=VOCAB, sliding_window=sliding_window), seed)


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
"""The 256 byte symbols; a token's id is its place here."""


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, and one token each for ' a' and ' b': random ids give text full of broken characters."""
    vocabulary = {symbol: i for i, symbol in enumerate([*BYTES, "Ġa", "Ġb"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "a"), ("Ġ", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, chat_template=template)


BYTE_VOCAB = len(BYTES) + 2


def byte_llama(seed: int = 0) -> Any:
    """A Llama over the byte tokenizer's vocabulary."""
    return llama(seed=seed, vocab=BYTE_VOCAB)


def future(token_ids: torch.Tensor, candidates: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """A discriminator that sees the number of unpadded tokens, their sum and the candidate; it depends on nothing else."""
    length, total = attention_mask.sum(-1), (token_ids * attention_mask).sum(-1)
    return 3 * torch.sin(0.37 * candidates + (0.11 * total + length)[:, None])


def basis(rank: int = 3, seed: int = 5, width: int = HIDDEN) -> torch.Tensor:
    """Orthonormal columns [width, rank]."""
    return torch.linalg.qr(torch.randn(width, rank, generator=torch.Generator().manual_seed(seed))).Q


@cache
def expert(seed: int = 21) -> Any:
    return llama(seed=seed, layers=1)


BAG = tuple(range(20, 60))

CONTROLS: dict[str, Callable[..., Control]] = {
    "dexperts": lambda alpha=1.5: DExperts(expert=expert(), anti_expert=Prompt([9, 8, 7]), alpha=alpha, filter_p=0.95),
    "fudge": lambda strength=2.0: Fudge(discriminator=future, strength=strength, top_k=30),
    "self_debias": lambda decay_constant=100.0: SelfDebias(prefixes=[[11, 12, 13], [14]], decay_constant=decay_constant),
    "nullspace": lambda keep=0.25: NullspaceProjection(basis=basis(), keep=keep),
    "pplm": lambda stepsize=0.3: PPLM(bag_of_words=[BAG], stepsize=stepsize, num_iterations=2, gamma=1.0),
}
"""Every control at a strength that shows; call with another strength, by position."""

ZERO = {"dexperts": 0.0, "fudge": 0.0, "self_debias": 0.0, "nullspace": 1.0, "pplm": 0.0}
"""The strength at which each control is the base itself."""

ANYWHERE = ("dexperts", "fudge", "self_debias")
"""Controls that a plain logits processor can carry."""

PROMPTS = ([3, 17, 5, 101, 44, 9, 3], [7], [60, 61, 62], [150, 2, 150, 2])


def left_padded(prompts: Sequence[Sequence[int]], pad: int = 0) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask i64[R, T]."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}
