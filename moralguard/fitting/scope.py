"""Context-scope rows: norms that hold in one culture or setting, judged inside and outside it.

The statement names its scope ("In Japan, one does not tip waiters."). The same text and statement are at stake where the context
matches the scope or is empty, and not at stake where the context is another one. The norms are in ``scope.yaml``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from moralguard.fitting.rows import Row

MATERIAL = Path(__file__).with_name("scope.yaml")
DEV_SHARE = 0.15
MATCHING = 3  # rows per text whose context matches
EMPTY = 2
ELSEWHERE = 3
_FORMS = (
    "{Where}, {clause}.",
    "{Where}, {clause}.",
    "{Clause} {where}.",
    "A rule that holds {where}: {clause}.",
    "Elsewhere it may be fine, but {where}, {clause}.",
    "{Elsewhere} this may be fine, but {where}, {clause}.",
)


def scope_rows(seed: int = 0) -> list[Row]:
    """Generate the rows: the same for the same seed, split by norm so that dev norms never occur in train."""
    rng = random.Random(seed)
    material: dict[str, Any] = yaml.safe_load(MATERIAL.read_text(encoding="utf-8"))
    scopes, norms = material["scopes"], material["norms"]
    dev = set(rng.sample(sorted(norms), round(DEV_SHARE * len(norms))))
    rows: dict[Row, None] = {}
    for name, norm in norms.items():
        for row in _norm_rows(name, norm, scopes, "dev" if name in dev else "train", rng):
            rows.setdefault(row)
    return list(rows)


def _norm_rows(name: str, norm: dict[str, Any], scopes: dict[str, Any], split: str, rng: random.Random) -> Iterator[Row]:
    """Rows of one norm: each of its texts in matching, empty and other contexts."""
    own = scopes[norm["scope"]]
    shared = {norm["scope"], *norm.get("also", []), *own.get("near", [])}
    others = [scope for key, scope in scopes.items() if key not in shared and scope["kind"] == own["kind"]]

    def row(text: str, kept: float, relevance: float, context: str) -> Row:
        statement = _statement(norm, own, rng.choice(others), rng)
        return Row(text, f"scope_{name}", kept, statement, relevance, context, source="scope", split=split)

    for kept, texts in ((0.0, norm["breaks"]), (1.0, norm["keeps"])):
        for text in texts:
            for _ in range(MATCHING):
                yield row(text, kept, 1.0, rng.choice([*own["contexts"], own["contexts"][0]]))
            for _ in range(EMPTY):
                yield row(text, kept, 1.0, "")
            for scope in rng.sample(others, min(ELSEWHERE, len(others))):
                yield row(text, 1.0, 0.0, rng.choice(scope["contexts"]))


def _statement(norm: dict[str, Any], own: dict[str, Any], other: dict[str, Any], rng: random.Random) -> str:
    """A wording of the norm that names its scope and, in some forms, another scope where it doesn't hold."""
    where, clause, elsewhere = rng.choice(own["where"]), rng.choice(norm["clauses"]), rng.choice(other["where"])
    return rng.choice(_FORMS).format(where=where, Where=_upper(where), clause=clause, Clause=_upper(clause), Elsewhere=_upper(elsewhere))


def _upper(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]
