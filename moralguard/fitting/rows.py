"""Labelled rows: what every fitting program reads and every data source is turned into."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One text judged against one value.

    Attributes:
        text: the text that was judged.
        value_id: short name of the value; rows of one value share it, however its statement is worded.
        kept: 1 where the text keeps the value, 0 where it breaks it.
        statement: the value's wording in this row; "" where the trainer draws a wording of ``value_id``.
        relevance: 1 where the value is at stake in the text, 0 where it isn't, None where nobody said.
        context: culture, setting, register or the turn that the text answers; "" for none.
        source: the data set that the row is from.
        split: train, dev or test.
    """

    text: str
    value_id: str
    kept: float
    statement: str = ""
    relevance: float | None = None
    context: str = ""
    source: str = ""
    split: str = "train"
