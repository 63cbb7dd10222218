"""Scores as JSON, JSON lines and CSV, and where they are written."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moralguard.cli.console import err
from moralguard.cli.scored import ScoredText
from moralguard.errors import DataError
from moralguard.values import Value


def as_json(scored: Sequence[ScoredText], values: Sequence[Value], context: str) -> str:
    """One object: the values, the context, the texts, and how many texts break each value."""
    data = {
        "values": [value.model_dump(mode="json") for value in values],
        "context": context,
        "texts": [_as_data(text, _several_sources(scored)) for text in scored],
        "broken": broken_counts(scored, values),
    }
    return json.dumps(data, ensure_ascii=False) + "\n"


def as_json_lines(scored: Sequence[ScoredText], values: Sequence[Value], context: str) -> str:
    """One object a text."""
    named = _several_sources(scored)
    return "".join(json.dumps(_as_data(text, named), ensure_ascii=False) + "\n" for text in scored)


def as_csv(scored: Sequence[ScoredText], values: Sequence[Value], context: str) -> str:
    """One line a text; explanations add relevance and valence by value, and the spans as JSON.

    Raises:
        DataError: a value goes by the name of another column.
    """
    named = _several_sources(scored)
    explained = any(text.explanation is not None for text in scored)
    parts = ("relevance", "valence", "spans")
    header = [*(["source"] if named else []), "row", "text", *(value.id for value in values), "verdict", "broken"]
    header += [f"{value.id}.{part}" for value in values for part in parts] if explained else []
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(
            f"two CSV columns would be named {repeated[0]!r}; reword that value or give it another id in a policy, or use --json"
        )
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    for text in scored:
        cells: list[Any] = [*([text.row.source] if named else []), text.row.row, text.row.text, *text.scores.values()]
        cells += [text.verdict, ";".join(text.broken)]
        for found in text.explanation or []:
            cells += [found["relevance"], found["valence"], json.dumps(found["spans"], ensure_ascii=False)]
        writer.writerow(cells)
    return file.getvalue()


def _several_sources(scored: Sequence[ScoredText]) -> bool:
    # the row alone says which text it was, unless rows of several files stand together
    return len({text.row.source for text in scored}) > 1


def _as_data(text: ScoredText, named: bool) -> dict[str, Any]:
    data: dict[str, Any] = {"source": text.row.source} if named else {}
    data |= {"row": text.row.row, "text": text.row.text, "scores": text.scores, "broken": list(text.broken), "verdict": text.verdict}
    return data if text.explanation is None else data | {"explanation": text.explanation}


def broken_counts(scored: Sequence[ScoredText], values: Sequence[Value]) -> dict[str, int]:
    """How many texts break each value."""
    return {value.id: sum(value.id in text.broken for text in scored) for value in values}


def summary(scored: Sequence[ScoredText], values: Sequence[Value]) -> str:
    """One line: how many texts there are and how many break which value."""
    total = f"{len(scored)} text{'' if len(scored) == 1 else 's'}"
    breaking = sum(bool(text.broken) for text in scored)
    if not breaking:
        return f"{total}: every value is kept"
    each = ", ".join(f"{name} {count}" for name, count in broken_counts(scored, values).items() if count)
    return f"{total}: {breaking} break{'s' if breaking == 1 else ''} a value ({each})"


def check_output(output: Path, inputs: Sequence[Path]) -> None:
    """See before scoring, which may take long, that the result can be written.

    Raises:
        DataError: the folder isn't there, it is a folder itself, or the texts would be overwritten.
    """
    if not output.parent.is_dir():
        raise DataError(f"--output {str(output)!r}: folder {str(output.parent)!r} isn't there; create it first")
    if output.is_dir():
        raise DataError(f"--output {str(output)!r} is a folder; name a file in it")
    if output.exists() and any(output.samefile(path) for path in inputs):
        raise DataError(f"--output {str(output)!r} is a file that texts are read from; name another so that it isn't overwritten")


def write(text: str, output: Path | None) -> None:
    """Write to a file, or to standard output.

    Raises:
        DataError: the file can't be written, or standard output's encoding lacks a character.
    """
    if output is None:
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError as error:
            raise DataError(
                f"standard output takes {error.encoding} only and the result holds other characters; write it with --output FILE (UTF-8) "
                "or set PYTHONIOENCODING=utf-8"
            ) from None
        return
    try:
        # newlines as they are: a carriage return within a CSV text is the text's own
        output.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise DataError(f"--output {str(output)!r} can't be written: {error.strerror}") from None
    err.print(f"wrote {output}", markup=False, soft_wrap=True)
