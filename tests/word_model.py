"""A tiny model of words, and texts of two classes that differ in the words they use."""

from __future__ import annotations

import numpy as np
from tiny_models import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moralguard.backends.hf import LanguageModel
from moralguard.fitting.labelled import LabelledTexts, checked


def word_model() -> LanguageModel:
    words = ["<unk>", "<s>", *(f"w{i}" for i in range(120))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return LanguageModel(llama(), PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>"))


def texts(label: int, count: int, seed: int = 0) -> list[str]:
    """Class 1 writes with the words 0 to 59, class 0 with 60 to 119."""
    generator = np.random.default_rng([seed, label])
    return [" ".join(f"w{w}" for w in generator.integers(0, 60, 9) + (0 if label else 60)) for _ in range(count)]


def rows(count: int = 500) -> LabelledTexts:
    splits = ["train", "train", "train", "dev", "test"]
    found = [(text, label, splits[i % 5]) for label in (0, 1) for i, text in enumerate(texts(label, count))]
    return checked(found, ("0", "1"))
