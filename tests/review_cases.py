"""Policies with reviews on a tiny model, and a judge whose verdicts a test can work out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from odd_models import byte_llama, byte_tokenizer

import moralguard as mg
from moralguard.discriminator.base import BaseDiscriminator, Reading
from moralguard.values import Value

VALUES = ("The text does not insult anyone.", "The text does not swear.")
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
PROMPTS = ["one", "another one", "a third", "and", "the fifth prompt"]
SAMPLED = {"do_sample": True, "temperature": 1.0, "max_new_tokens": 12}


def probability(text: str, value: int) -> float:
    """P(v|y): each character whose number leaves ``value`` when divided by 7 takes a quarter of what is left."""
    return float(0.75 ** sum(ord(character) % 7 == value for character in text))


class Numbers(BaseDiscriminator):
    """Judges by the numbers of characters (``probability``)."""

    def read(self, texts: Sequence[str], values: Sequence[Value], context: str) -> Reading:
        found = np.array([[probability(text, value) for value in range(len(values))] for text in texts])
        window = np.array([[[0, len(text)]] * len(values) for text in texts])
        return Reading(np.ones_like(found), found, window, np.ones(len(texts), dtype=np.int64), ["numbers"] * len(texts))


def least(text: str) -> float:
    return min(probability(text, value) for value in range(len(VALUES)))


def guard_of(*review: dict[str, Any], lm: Any = None, **policy: Any) -> mg.Guard:
    model = (byte_llama(), byte_tokenizer(TEMPLATE)) if lm is None else lm
    return mg.Guard({"values": list(VALUES), "controls": [], "review": list(review), **policy}, model, discriminator=Numbers())


def plain() -> mg.Guard:
    """Without a review."""
    return guard_of()
