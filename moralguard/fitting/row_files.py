"""Reading labelled files: gzip or plain JSON lines, CSV, and a user's own rows."""

from __future__ import annotations

import csv
import gzip
import html
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moralguard.errors import DataError
from moralguard.fitting.rows import Row

_USER = re.compile(r"@[\w_]+:?")
_LINK = re.compile(r"https?://\S+|\[URL\]")
_SPACE = re.compile(r"\s+")


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a ``.jsonl`` or ``.jsonl.gz`` file.

    Raises:
        DataError: the file isn't there, or a line isn't a JSON object.
    """
    if not path.is_file():
        raise DataError(f"{path} doesn't exist; give the folder that holds the labelled files")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: expected a JSON object ({error.msg})") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}")
            yield record


def clean(text: str) -> str:
    """A text as it is read in training: entities resolved, handles and links made one word each, spaces joined."""
    text = _LINK.sub("http", html.unescape(html.unescape(text)))
    text = _USER.sub("@user", text.replace("[USER]", "@user"))
    return _SPACE.sub(" ", text).strip()


def split_of(key: str, dev: int = 5, test: int = 5) -> str:
    """The split that a text belongs to: the same text is always in the same one. ``dev`` and ``test`` are percentages."""
    place = zlib.crc32(key.encode()) % 100
    return "test" if place < test else "dev" if place < test + dev else "train"


def read_user_rows(path: Path) -> list[Row]:
    """A user's own labelled rows, ``.jsonl``, ``.jsonl.gz`` or ``.csv``.

    Fields: ``text``; ``statement`` (the value's wording) or ``value`` (a known id, or any statement); ``kept`` or
    ``satisfies`` (1, 0, true, false); optional ``context``, ``relevance``, ``split``.

    Raises:
        DataError: naming the file, the line, the field and what was expected.
    """
    if path.suffix == ".csv":
        if not path.is_file():
            raise DataError(f"{path} doesn't exist")
        with path.open(encoding="utf-8", newline="") as file:
            records: list[dict[str, Any]] = list(csv.DictReader(file))
    else:
        records = list(read_json_lines(path))
    return [_user_row(record, f"{path}, row {number}", path.stem) for number, record in enumerate(records, 1)]


def _user_row(record: dict[str, Any], where: str, source: str) -> Row:
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: field 'text' must hold the text that was judged")
    statement = record.get("statement") or record.get("value")
    if not isinstance(statement, str) or not statement.strip():
        raise DataError(f"{where}: give the value as 'statement' (a sentence) or 'value' (a known id)")
    label = record.get("kept", record.get("satisfies"))
    known = {"1": 1.0, "0": 0.0, "true": 1.0, "false": 0.0, "1.0": 1.0, "0.0": 0.0}
    if str(label).lower() not in known:
        raise DataError(f"{where}: 'kept' must be 1 or 0 (got {label!r})")
    relevance = record.get("relevance")
    try:
        at_stake = None if relevance in (None, "") else float(str(relevance))
    except ValueError:
        raise DataError(f"{where}: 'relevance' must be a number from 0 to 1 (got {relevance!r})") from None
    has_statement = bool(record.get("statement")) or " " in statement
    return Row(
        text=text,
        value_id=str(record.get("value") or statement),
        kept=known[str(label).lower()],
        statement=statement if has_statement else "",
        relevance=at_stake,
        context=str(record.get("context") or ""),
        source=source,
        split=str(record.get("split") or split_of(text)),
    )
