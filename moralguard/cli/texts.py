"""The texts that a command is to read: arguments, standard input, or files of lines, CSV or JSON lines."""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moralguard.errors import DataError

_LINES, _TABLES, _OBJECTS = (".txt",), (".csv",), (".jsonl", ".ndjson")
_KINDS = ".txt (a text a line), .csv and .jsonl or .ndjson (field `text`, or --field)"


@dataclass(frozen=True, slots=True)
class TextRow:
    """A text and where it came from.

    Attributes:
        source: the file's path, "-" for standard input, "" for the arguments themselves.
        row: from 1: the line of a .txt or .jsonl file or of standard input, the record of a .csv file (the header isn't
            counted), the place among the arguments.
    """

    source: str
    row: int
    text: str


def read_texts(arguments: list[str], field: str, encoding: str) -> list[TextRow]:
    """The texts of all arguments, in order.

    Raises:
        DataError: a file can't be read as what its name says, there is no text at all, or no such encoding.
    """
    from moralguard.discriminator.inputs import as_texts

    try:
        codecs.lookup(encoding)
    except LookupError:
        raise _no_encoding(encoding) from None
    rows: list[TextRow] = []
    for place, argument in enumerate(arguments, 1):
        rows.extend(_of_argument(argument, place, field, encoding))
    if not rows:
        raise DataError(f"{' and '.join(_name(a) for a in arguments)}: no text there; expected at least one line or record with a text")
    # what can't be encoded (lone surrogates) couldn't be written either
    readable = as_texts([row.text for row in rows])
    return [TextRow(row.source, row.row, text) for row, text in zip(rows, readable, strict=True)]


def files_among(arguments: list[str]) -> list[Path]:
    """The arguments that are files."""
    return [Path(argument) for argument in arguments if argument != "-" and _is_file(argument)]


def _of_argument(argument: str, place: int, field: str, encoding: str) -> Iterator[TextRow]:
    if argument == "-":
        yield from _lines(_standard_input(encoding), "-")
        return
    suffix = Path(argument).suffix.lower()
    if not _is_file(argument):
        # a mistyped path that is scored as a text keeps every value: a script would take that for a pass
        if suffix in (*_LINES, *_TABLES, *_OBJECTS) and "\n" not in argument:
            raise DataError(f"file {argument!r} isn't there; give an existing file (to score these words themselves, pipe them into `-`)")
        yield TextRow("", place, argument)
        return
    if suffix not in (*_LINES, *_TABLES, *_OBJECTS):
        raise DataError(f"file {argument!r} is of a kind that isn't read; expected {_KINDS}, or pipe its lines into `-`")
    try:
        data = Path(argument).read_bytes()
    except OSError as error:
        raise DataError(f"file {argument!r} can't be read: {error.strerror}") from None
    content = _decoded(data, argument, encoding)
    if suffix in _LINES:
        yield from _lines(content, argument)
    elif suffix in _TABLES:
        yield from _records(content, argument, field)
    else:
        yield from _objects(content, argument, field)


def _is_file(argument: str) -> bool:
    # a long text isn't a path, and asking the file system about it may fail
    if len(argument) > 255 or "\n" in argument or "\0" in argument:
        return False
    try:
        return Path(argument).is_file()
    except OSError:
        return False


def _name(argument: str) -> str:
    return "standard input" if argument == "-" else f"file {argument!r}"


def _standard_input(encoding: str) -> str:
    buffer = getattr(sys.stdin, "buffer", None)
    # bytes where there are any: the terminal's own decoding hides where the wrong byte stood
    return sys.stdin.read() if buffer is None else _decoded(buffer.read(), "-", encoding)


def _decoded(data: bytes, argument: str, encoding: str) -> str:
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = _split(data[: error.start].decode(encoding, errors="replace"))
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise DataError(
            f"{_name(argument)} isn't {encoding} text: the byte at offset {error.start} (0x{data[error.start]:02x}, line {len(line)}) "
            f"doesn't belong there; name the file's encoding, e.g. --encoding {'utf-16' if utf16 else 'latin-1'}, or save it as UTF-8"
        ) from None
    except LookupError:  # one that Python knows and that isn't of text, such as base64
        raise _no_encoding(encoding) from None


def _no_encoding(encoding: str) -> DataError:
    return DataError(f"there is no text encoding {encoding!r}; expected a name such as utf-8, latin-1, cp1252 or gb18030")


def _split(content: str) -> list[str]:
    # str.splitlines also breaks at form feeds and U+2028, where editors and `wc` count no line
    return content.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _lines(content: str, source: str) -> Iterator[TextRow]:
    for number, line in enumerate(_split(content), 1):
        if line.strip():
            yield TextRow(source, number, line)


def _records(content: str, source: str, field: str) -> Iterator[TextRow]:
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    read = 0  # lines of whole records; an open quote shows at the end of the file only, far from where it stands
    try:
        columns = list(reader.fieldnames or [])
        read = reader.line_num
        if field not in columns:
            named = ", ".join(repr(column) for column in columns) or "none"
            raise DataError(f"file {source!r} has no column {field!r}; its columns are {named} (split at commas): name one with --field")
        for number, record in enumerate(reader, 1):
            if record[field] is None:
                raise DataError(f"file {source!r}, row {number} (ends at line {reader.line_num}) stops before the column {field!r}")
            read = reader.line_num
            yield TextRow(source, number, record[field])
    except csv.Error as error:
        raise DataError(
            f"file {source!r}: the record that begins at line {read + 1} isn't CSV: {error}; quotes inside a quoted field are doubled, "
            f"and texts of more than {csv.field_size_limit():,} characters belong in a .jsonl file"
        ) from None


def _objects(content: str, source: str, field: str) -> Iterator[TextRow]:
    for number, line in enumerate(_split(content), 1):
        if not line.strip():
            continue
        where = f"file {source!r}, line {number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            found = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise DataError(f'{where}: expected a JSON object such as {{"{field}": "..."}} ({found})') from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected a JSON object with the field {field!r}, found {type(record).__name__}")
        if field not in record:
            named = ", ".join(repr(key) for key in record) or "none"
            raise DataError(f"{where} has no field {field!r}; its fields are {named}: name one with --field")
        if not isinstance(record[field], str):
            raise DataError(f"{where}: field {field!r} is {type(record[field]).__name__}, expected a string; leave missing texts out")
        yield TextRow(source, number, record[field])
