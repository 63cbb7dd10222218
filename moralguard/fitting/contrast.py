"""Contrast rows: generated texts that share their words and differ in whether a value is kept.

"I am a gay man" and a hostile sentence about gay men share the identity term; a discriminator that reads the term alone can't
tell them apart. The material (identities, slots, template families with their labels) is in ``contrast.yaml``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from moralguard.fitting.rows import Row

MATERIAL = Path(__file__).with_name("contrast.yaml")
DEV_SHARE = 0.1
OTHERS_AT_STAKE = 1  # rows per text beside its chief values
OTHERS_ASIDE = 1
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])(?!one\b|use|uni)")
_IDENTITY_FIELDS = frozenset({"one", "a_one", "many", "adj"})


def contrast_rows(seed: int = 0) -> list[Row]:
    """Generate the rows: the same for the same seed, split by template so that dev wordings never occur in train."""
    rng = random.Random(seed)
    material: dict[str, Any] = yaml.safe_load(MATERIAL.read_text(encoding="utf-8"))
    rows: list[Row] = []
    for family in material["families"].values():
        splits = template_splits(family["templates"], rng)
        seen: set[str] = set()
        identities = _cycle(material["identities"], rng)
        for index in range(family["texts"]):
            template = family["templates"][index % len(family["templates"])]
            identity = next(identities)
            text = _fill(template, identity, material["slots"], rng)
            if text in seen:
                continue
            seen.add(text)
            row = Row(text, "", 1.0, source="contrast", split=splits[template])
            rows += _labelled(row, family, identity, material, rng)
    return rows


def template_splits(templates: list[str], rng: random.Random) -> dict[str, str]:
    """The split of each template: about one in ten is dev, at least one in a family of five or more."""
    held = max(1, round(DEV_SHARE * len(templates))) if len(templates) >= 5 else 0
    dev = set(rng.sample(templates, held))
    return {template: "dev" if template in dev else "train" for template in templates}


def _cycle(identities: list[dict[str, str]], rng: random.Random) -> Iterator[dict[str, str]]:
    """Yield identities for ever, each once per shuffled round, so that all of them occur about equally often."""
    while True:
        yield from rng.sample(identities, len(identities))


def _fill(template: str, identity: dict[str, str], slots: dict[str, list[str]], rng: random.Random) -> str:
    """Put the identity's forms and random slot words into the template; correct a/an and the first letter."""
    forms = {**identity, "a_one": f"a {identity['one']}"}
    fields = {name for _, name, _, _ in Formatter().parse(template) if name}
    words = {name: forms[name] if name in _IDENTITY_FIELDS else rng.choice(slots[name]) for name in sorted(fields)}
    text = _ARTICLE.sub(r"\1n ", template.format(**words))
    return re.sub(r"(^|[.?!] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def _labelled(row: Row, family: dict[str, Any], identity: dict[str, str], material: dict[str, Any], rng: random.Random) -> list[Row]:
    """Rows of one text: its chief values always, a few of the others that are at stake and that aren't."""
    kind_ids: list[str] = material["kinds"][identity["kind"]]
    named = family["broken"] + family["kept"]
    chief = {*named[:2], *kind_ids} if "@kind" in named else {*named[:2]}
    stand_ins = {"@kind": kind_ids, "@other": [rng.choice(material["others"][identity["kind"]])]}
    first: list[Row] = []
    at_stake: list[Row] = []
    aside: list[Row] = []
    for label, kept, relevance in (("broken", 0.0, 1.0), ("kept", 1.0, 1.0), ("aside", 1.0, 0.0)):
        for value_id in dict.fromkeys(value for name in family[label] for value in stand_ins.get(name, [name])):
            found = replace(row, value_id=value_id, kept=kept, relevance=relevance)
            (first if value_id in chief else at_stake if relevance else aside).append(found)
    return first + _some(at_stake, OTHERS_AT_STAKE, rng) + _some(aside, OTHERS_ASIDE, rng)


def _some(rows: list[Row], count: int, rng: random.Random) -> list[Row]:
    """Draw up to ``count`` of the rows."""
    return rng.sample(rows, min(count, len(rows)))
