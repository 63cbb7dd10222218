"""Contrast and scope rows: labels on both sides, splits that don't leak, statements for every value."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import yaml

import moralguard.fitting
from moralguard.fitting.contrast import contrast_rows
from moralguard.fitting.rows import Row
from moralguard.fitting.scope import scope_rows

STATEMENTS = Path(moralguard.fitting.__file__).with_name("statements.yaml")


@pytest.fixture(scope="module")
def contrast() -> list[Row]:
    return contrast_rows()


@pytest.fixture(scope="module")
def scope() -> list[Row]:
    return scope_rows()


def test_statements_are_varied_and_distinct() -> None:
    statements = yaml.safe_load(STATEMENTS.read_text(encoding="utf-8"))
    wordings = [text.lower().rstrip(".") for value in statements.values() for side in ("keeps", "breaks") for text in value[side]]
    assert len(wordings) == len(set(wordings))
    assert all(10 <= len(value["keeps"]) <= 14 and 4 <= len(value["breaks"]) <= 6 for value in statements.values())


def test_every_value_has_statements_and_both_labels(contrast: list[Row]) -> None:
    statements = yaml.safe_load(STATEMENTS.read_text(encoding="utf-8"))
    labels: defaultdict[str, set[float]] = defaultdict(set)
    for row in contrast:
        labels[row.value_id].add(row.kept)
    assert set(labels) <= set(statements)
    assert all(found == {0.0, 1.0} for found in labels.values())


def test_rows_are_well_formed(contrast: list[Row], scope: list[Row]) -> None:
    assert 4000 <= len(contrast) <= 6000
    assert 2500 <= len(scope) <= 3500
    for row in contrast + scope:
        assert row.text
        assert "{" not in row.text + row.statement
        assert row.kept == 1.0 or row.relevance == 1.0
    assert len({(row.text, row.value_id) for row in contrast}) == len(contrast)


def test_the_seed_decides_the_rows(contrast: list[Row], scope: list[Row]) -> None:
    assert contrast_rows(0) == contrast
    assert contrast_rows(1) != contrast
    assert scope_rows(0) == scope
    assert scope_rows(1) != scope


def test_dev_does_not_occur_in_train(contrast: list[Row], scope: list[Row]) -> None:
    texts = {split: {row.text for row in contrast if row.split == split} for split in ("train", "dev")}
    assert texts["dev"]
    assert not texts["dev"] & texts["train"]
    norms = {split: {row.value_id for row in scope if row.split == split} for split in ("train", "dev")}
    assert norms["dev"]
    assert not norms["dev"] & norms["train"]


def test_a_mere_identity_is_kept_and_hostility_to_it_is_not() -> None:
    rows = [row for seed in range(3) for row in contrast_rows(seed)]
    neutral = [row for row in rows if row.text.startswith("I am a") and row.text.count(".") == 1 and len(row.text) < 40]
    hostile = [row for row in rows if row.text.startswith("I hate ") and row.text.count(" ") == 2 and row.value_id == "no_identity_attack"]
    assert len(neutral) > 10
    assert all(row.kept == 1.0 for row in neutral)
    assert hostile
    assert all(row.kept == 0.0 for row in hostile)


def test_a_broken_norm_is_not_at_stake_elsewhere(scope: list[Row]) -> None:
    by_text: defaultdict[tuple[str, str], set[tuple[float, float | None]]] = defaultdict(set)
    for row in scope:
        by_text[row.value_id, row.text].add((row.kept, row.relevance))
        assert row.context or row.relevance == 1.0
    assert all(labels in ({(0.0, 1.0), (1.0, 0.0)}, {(1.0, 1.0), (1.0, 0.0)}) for labels in by_text.values())
