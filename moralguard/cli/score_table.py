"""Scores as a table for a terminal, and the spans that they rest on."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moralguard.cli import report
from moralguard.cli.console import out
from moralguard.cli.scored import ScoredText
from moralguard.values import Value

_BROKEN = "bold red"
_NARROWEST_TEXT = 16
_WIDEST_HEADING = 16
_FILE_WIDTH = 120


def write_table(scored: Sequence[ScoredText], values: Sequence[Value], output: Path | None, *, explain: bool) -> None:
    """Print the table and its summary, or write them to a file."""
    # off a terminal the table is put together first, so that what can't be encoded becomes one message and no half a table
    console = out if output is None and out.is_terminal else Console(file=io.StringIO(), highlight=False, width=_width(output))
    several = len({text.row.source for text in scored}) > 1
    console.print(_table(scored, values, console.width, several))
    if explain:
        for text in scored:
            _print_explanation(console, text, _place(text, several))
    console.print(Text(report.summary(scored, values)), soft_wrap=True)
    if isinstance(console.file, io.StringIO):
        report.write(console.file.getvalue(), output)


def _width(output: Path | None) -> int:
    return out.width if output is None else _FILE_WIDTH


def _table(scored: Sequence[ScoredText], values: Sequence[Value], width: int, several: bool) -> Table:
    headings = [min(max(len(value.id), 5), _WIDEST_HEADING) for value in values]
    places = [_place(text, several) for text in scored]
    place = min(max(3, *map(len, places)), 24)
    # cells are padded by a space on both sides
    room = max(_NARROWEST_TEXT, width - place - sum(headings) - 2 * (len(values) + 2))
    table = Table(box=None, padding=(0, 1))
    table.add_column("row", justify="right", width=place, overflow="fold")
    table.add_column("text", width=room, no_wrap=True, overflow="ellipsis")
    for value, heading in zip(values, headings, strict=True):
        table.add_column(Text(value.id), justify="right", width=heading, overflow="fold")
    for text, name in zip(scored, places, strict=True):
        cells = [Text(f"{p:.3f}", style=_BROKEN if value in text.broken else "green") for value, p in text.scores.items()]
        table.add_row(Text(name), Text(" ".join(_printable(text.row.text[: 4 * room]).split())), *cells)
    return table


def _place(text: ScoredText, several: bool) -> str:
    return f"{Path(text.row.source).name}:{text.row.row}" if several and text.row.source else str(text.row.row)


def _print_explanation(console: Console, text: ScoredText, place: str) -> None:
    for found in text.explanation or []:
        broken = not found["kept"]
        line = Text(f"\nrow {place}  ")
        line.append(found["value"], style="bold")
        line.append(f"  P(v|y) {found['probability']:.3f}", style=_BROKEN if broken else "green")
        line.append(f"  relevance {found['relevance']:.3f}  valence {found['valence']:.3f}  {'broken' if broken else 'kept'}")
        console.print(line)
        shown = Text(_printable(text.row.text))
        for span in found["spans"]:
            shown.stylize("bold white on red" if broken else "bold yellow", span["start"], span["end"])
        console.print(shown)
        if found["spans"]:
            weights = ", ".join(f'"{_printable(span["text"])}" {span["weight"]:+.3f}' for span in found["spans"])
            console.print(Text(f"spans: {weights}", style="dim"))


def _printable(text: str) -> str:
    """The text, as long as before (spans count its characters), with no character that steers the terminal."""
    return "".join(" " if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf") and c != "\u200d" else c for c in text)
