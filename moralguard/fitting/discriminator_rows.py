"""The rows that the shipped discriminator's English network is trained on, and the share of each source."""

from __future__ import annotations

from pathlib import Path

from moralguard.fitting.contrast import contrast_rows
from moralguard.fitting.english_rows import english_rows
from moralguard.fitting.open_rows import open_rows
from moralguard.fitting.rows import Row
from moralguard.fitting.scope import scope_rows

SHARES = {
    "contrast": 0.11,
    "edos": 0.06,
    "davidson": 0.03,
    "stormfront": 0.03,
    "hatemoji": 0.05,
    "paradetox": 0.04,
    "toxigen": 0.03,
    "realtoxicity": 0.07,
    "diasafety": 0.05,
    "hh": 0.03,
    "requests": 0.04,
    "virtue": 0.05,
    "justice": 0.07,
    "deontology": 0.06,
    "commonsense": 0.06,
    "utilitarianism": 0.01,
    "valueeval": 0.18,
    "moralchoice": 0.02,
    "valuebench": 0.03,
    "pii": 0.01,
    "truthfulqa": 0.01,
    "bold": 0.03,
    "open": 0.03,
    "scope": 0.04,
}


def discriminator_rows(data: Path, seed: int = 0) -> list[Row]:
    """Every row, of all splits: the labelled files under ``data``, generated contrast and scope pairs, and open-domain rows."""
    rows = [*english_rows(data, seed), *contrast_rows(seed), *scope_rows(seed)]
    texts = sorted({row.text for row in rows if row.split == "train" and 20 <= len(row.text) <= 200})
    return rows + open_rows(texts, 12_000, seed)
