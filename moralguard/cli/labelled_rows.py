"""Labelled rows as the fit commands name them: a file with a text and a label a row, or with two texts a row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moralguard.errors import DataError

if TYPE_CHECKING:
    from moralguard.fitting.labelled import LabelledTexts


def read_rows(rows: Path, text: str, label: str | None, pairs: str | None, classes: Sequence[str] | None = None) -> LabelledTexts:
    """The checked rows of a file; ``pairs`` is "KEPT,BROKEN", the fields that hold a text of either class.

    Raises:
        DataError: ``pairs`` isn't two fields, or the rows can't be read.
    """
    from moralguard.fitting.labelled import read_labelled, read_pairs

    if pairs is None:
        return read_labelled(rows, text=text, label=label, classes=classes)
    fields = [field.strip() for field in pairs.split(",")]
    if len(fields) != 2 or not all(fields) or label is not None:
        raise DataError(f"--pairs is {pairs!r}; expected two fields, KEPT,BROKEN, and no --label-field: the field is the label")
    return read_pairs(rows, *fields)
