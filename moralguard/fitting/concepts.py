"""Concepts that need no data: sentences labelled with a gender, a religion or a race, and the words that are counterparts in them.

The material is moralguard's own (``concepts.yaml``). A sentence stops where its next word depends on the concept: the state of its
last token is what subspaces are fitted on. Occupations occur in none of them: ``held_back`` keeps those for evaluation.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from string import Formatter
from typing import Any

import yaml

from moralguard.backends.hf import LanguageModel
from moralguard.backends.prompts import encode_words
from moralguard.errors import DataError, ModelError
from moralguard.fitting.labelled import LabelledTexts, checked
from moralguard.schema import nearest

LICENCE = "Apache-2.0"
_TEST_SHARE = 0.2


@dataclass(frozen=True)
class HeldBack:
    """What fitting never sees: prompts about occupations, and prompts whose next word has to agree with a gender.

    Attributes:
        prompts: each occupation in each template.
        agreement: (prompt, class).
    """

    prompts: tuple[str, ...]
    agreement: tuple[tuple[str, str], ...]


def concept_names() -> list[str]:
    return list(_material()["concepts"])


def concept_rows(name: str, seed: int = 0) -> LabelledTexts:
    """Sentences of every class, split by template: the test split's wordings never occur in training.

    Raises:
        DataError: no such concept.
    """
    concept = _concept(name)
    templates: list[str] = concept["templates"]
    held = set(random.Random(seed).sample(templates, round(_TEST_SHARE * len(templates))))
    rows = []
    for template in templates:
        (slot,) = {field for _, field, _, _ in Formatter().parse(template) if field}
        for label, cls in enumerate(concept["classes"]):
            for words in concept["slots"][cls][slot]:
                text = template.format(**{slot: words})
                rows.append((text[0].upper() + text[1:], label, "test" if template in held else "train"))
    return checked(rows, concept["classes"])


def counterpart_tokens(lm: LanguageModel, name: str) -> list[tuple[int, ...]]:
    """Token ids of the concept's counterpart words, one of each class, in their order.

    Each tuple occurs with a leading space, small and capitalised, and capitalised without one; where a word is more than one
    token, or two of them are the same, that form is left out. Empty where the concept lists none.

    Raises:
        DataError: no such concept. ModelError: there is no tokenizer.
    """
    if lm.tokenizer is None:
        raise ModelError(f"{lm.name} was given without a tokenizer; words of a concept need (model, tokenizer)")
    found: dict[tuple[int, ...], None] = {}
    for words in _concept(name)["counterparts"]:
        capitalised = [word.capitalize() for word in words]
        for form in ([f" {word}" for word in words], [f" {word}" for word in capitalised], capitalised):
            ids = [encode_words(lm, word) for word in form]
            if all(len(i) == 1 for i in ids) and len({i[0] for i in ids}) == len(ids):
                found[tuple(i[0] for i in ids)] = None
    return list(found)


def held_back(name: str = "gender") -> HeldBack:
    """Prompts for evaluation alone.

    Raises:
        DataError: nothing is held back for this concept.
    """
    material = _material()["held_back"]
    if name not in material:
        raise DataError(f"nothing is held back for the concept {name!r}; {nearest(name, material)}")
    found = material[name]
    prompts = (template.format(occupation=occupation) for template in found["templates"] for occupation in found["occupations"])
    return HeldBack(tuple(prompts), tuple((text, cls) for text, cls in found["agreement"]))


@cache
def _material() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((files("moralguard.fitting") / "concepts.yaml").read_text(encoding="utf-8"))
    return found


def _concept(name: str) -> dict[str, Any]:
    concepts = _material()["concepts"]
    if name not in concepts:
        raise DataError(f"there is no concept {name!r}; {nearest(name, concepts)}, or give rows of your own")
    found: dict[str, Any] = concepts[name]
    return found
