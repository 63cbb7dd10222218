"""Judgements as arrays and as data, and how values are weighed against each other."""

import json

import numpy as np
import pytest

from moralguard.discriminator.judgement import Basis, Judgement, Span
from moralguard.values import Value

HIGH = Value(id="high", statement="a rule", priority=2)
LOW = Value(id="low", statement="a wish", priority=1)
ALSO = Value(id="also", statement="another rule", priority=2)


def _judgement(values, probability, relevance):
    probability, relevance = np.array([probability], dtype=float), np.array([relevance], dtype=float)
    valence = 1 - (1 - probability) / np.maximum(relevance, 1e-9)
    basis = [[Basis(value, "", "test", (0, 4), 1) for value in values]]
    spans = [[(Span(0, 4, "text", 0.25),) for _ in values]]
    return Judgement(probability, relevance, valence, spans, basis, values)


@pytest.mark.parametrize(
    ("values", "probability", "relevance", "verdict", "decided", "overridden"),
    [
        ((HIGH, LOW), (0.1, 0.9), (0.9, 0.9), "breaks", ("high",), ("low",)),
        ((HIGH, LOW), (0.9, 0.1), (0.9, 0.95), "keeps", ("high",), ("low",)),
        ((HIGH, LOW), (0.9, 0.1), (0.1, 0.95), "breaks", ("low",), ()),
        ((HIGH, LOW), (0.9, 0.9), (0.1, 0.1), "silent", (), ()),
        ((HIGH, ALSO), (0.9, 0.1), (0.9, 0.95), "conflict", ("high", "also"), ()),
        ((HIGH, ALSO), (0.1, 0.2), (0.95, 0.95), "breaks", ("high", "also"), ()),
    ],
)
def test_the_highest_priority_at_stake_decides(values, probability, relevance, verdict, decided, overridden):
    (found,) = _judgement(values, probability, relevance).resolve()
    assert (found.verdict, found.decided_by, found.overridden) == (verdict, decided, overridden)


def test_cells_and_rows():
    judgement = _judgement((HIGH, LOW), (0.1, 0.9), (0.9, 0.9))
    assert len(judgement) == 1
    assert judgement[0].probability.shape == (2,)
    cell = judgement[0, 1]
    assert float(cell.probability) == 0.9
    assert cell.values == (LOW,)
    assert bool(cell.kept)
    assert not bool(judgement[0][0].kept)
    with pytest.raises(TypeError):
        len(cell)
    with pytest.raises(TypeError):
        cell[0]
    with pytest.raises(TypeError, match="texts by values"):
        judgement[0].resolve()


def test_a_value_s_own_threshold_counts():
    strict = Value(id="strict", statement="a rule", threshold=0.95)
    assert not bool(_judgement((strict,), (0.9,), (0.5,))[0, 0].kept)


def test_as_data():
    data = json.loads(json.dumps(_judgement((HIGH, LOW), (0.1, 0.9), (0.9, 0.9)).as_dict()))
    cell = data["judgements"][0]["judgements"][0]
    assert cell["value"] == "high"
    assert cell["probability"] == 0.1
    assert cell["spans"] == [{"start": 0, "end": 4, "text": "text", "weight": 0.25}]
