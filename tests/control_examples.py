"""One example of every control that comes with moralguard, at cheap settings that show, on one tiny model."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import prefix_packs
import torch
from odd_models import BAG, BYTE_VOCAB, basis, byte_llama, byte_tokenizer, future
from reward_functions import batched_reward, head
from tiny_models import llama

from moralguard.backends.hf import LanguageModel
from moralguard.controls import (
    ARGS,
    PPLM,
    RAD,
    SASA,
    UDDIA,
    ContrastiveDecoding,
    Control,
    DExperts,
    Fudge,
    GeDi,
    Guidance,
    Instruction,
    LayerProjection,
    ModelArithmetic,
    NullspaceProjection,
    Prefix,
    Prompt,
    ProxyTuning,
    SafeDecoding,
    SelfDebias,
    SteeringVectors,
    WordList,
)


@cache
def example_model() -> LanguageModel:
    """A Llama over bytes with a tokenizer, which every example can be bound to."""
    return LanguageModel(byte_llama(), byte_tokenizer())


@cache
def _other(seed: int) -> Any:
    return llama(seed=seed, vocab=BYTE_VOCAB, layers=1)


def examples(folder: Path) -> dict[str, Control]:
    """Name in policies -> a control; no two of them conflict. What has to be a file is written into ``folder``."""
    model = example_model()
    one, two = (torch.randn(model.width, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    vectors = prefix_packs.random_vectors(model.model)
    return {
        "args": ARGS(reward=batched_reward(), w=2.0, k=60),
        "arithmetic": ModelArithmetic(formula="base - 0.5*max(base, rude)", passes={"rude": Prompt([30, 31])}),
        "contrastive": ContrastiveDecoding(amateur=_other(31), coef=0.3, alpha=0.01),
        "dexperts": DExperts(expert=_other(21), anti_expert=Prompt([9, 8, 7]), alpha=1.5, filter_p=0.95),
        "fudge": Fudge(discriminator=future, strength=2.0, top_k=120),
        "gedi": GeDi(code_desired=Prompt([40]), code_undesired=Prompt([41]), disc_weight=3.0, filter_p=0.2),
        "guidance": Guidance(positive=Prompt([50, 51]), negative=Prompt([52])),
        "instruction": Instruction(text=(60, 61), w=0.7),
        "layer-projection": LayerProjection(modules=(1,), basis=basis(2, seed=6), keep=0.3),
        "nullspace": NullspaceProjection(basis=basis(), keep=0.25),
        "pplm": PPLM(bag_of_words=[BAG], stepsize=0.3, num_iterations=1, gamma=1.0),
        "prefix": Prefix(prefix=prefix_packs.write(folder / "prefix", model, vectors), strength=0.6),
        "proxy-tuning": ProxyTuning(expert=_other(41), anti_expert=_other(42), alpha=0.5),
        "rad": RAD(reward=head(), beta=4.0, k=100),
        "safe-decoding": SafeDecoding(expert=Prompt([70, 71]), alpha=1.5, num_common_tokens=80),
        "sasa": SASA(probe=(one, 0.1), beta=3.0, k=100),
        "self-debias": SelfDebias(prefixes=[[11, 12, 13], [14]], decay_constant=300.0),
        "steering": SteeringVectors(vectors={1: two}, strength=0.5),
        "uddia": UDDIA(head=(two, 0.0), steps=1, top_layers=1, max_perplexity=None),
        "word-list": WordList(words=("a b", "z"), penalty=2.0),
    }
