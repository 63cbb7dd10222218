"""``moralguard score``: how likely texts keep values."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from moralguard.cli.console import err, out

if TYPE_CHECKING:
    from moralguard.cli.scored import ScoredText
    from moralguard.cli.texts import TextRow
    from moralguard.values import Value

_CHUNK = 256


class Format(StrEnum):
    """How scores are written."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"


class SpansMethod(StrEnum):
    """How the spans that a score rests on are found."""

    OCCLUSION = "occlusion"
    GRADIENT = "gradient"


_SUFFIXES = {".json": Format.JSON, ".jsonl": Format.JSONL, ".ndjson": Format.JSONL, ".csv": Format.CSV}


def score(
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts, `-` for standard input (a text a line), or files: .txt (a text a line), .csv, .jsonl or .ndjson (see --field).",
            show_default=False,
        ),
    ] = None,
    value: Annotated[list[str] | None, typer.Option(help="A value statement or a known id; may be repeated.")] = None,
    policy: Annotated[str | None, typer.Option(help="Score against this policy's values: built-in name or path.")] = None,
    list_values: Annotated[bool, typer.Option("--list-values", help="Show the values that go by an id, and leave.")] = False,
    context: Annotated[str | None, typer.Option(help='Culture, setting or register the texts are read in, e.g. "Japan".')] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="P(v|y) under which a value is broken; each value's own where not given.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Add relevance, valence and the spans that decided (slower).")] = False,
    spans_method: Annotated[SpansMethod, typer.Option(help="How --explain finds the spans.")] = SpansMethod.OCCLUSION,
    field: Annotated[str, typer.Option(help="The .csv column or .jsonl field that holds the text.")] = "text",
    encoding: Annotated[str, typer.Option(help="Encoding of files and standard input, e.g. latin-1.")] = "utf-8",
    output_format: Annotated[
        Format | None, typer.Option("--format", help="table where not given, or what the --output file's ending says.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write to this file (UTF-8) and not to standard output.")] = None,
    no_fail: Annotated[bool, typer.Option("--no-fail", help="Exit code 0 where values are broken, too.")] = False,
) -> None:
    """Score texts: the probability P(v|y) that each text keeps each value.

    Exit codes: 0 every text keeps every value; 3 at least one text breaks one (0 under --no-fail); 1 an error; 2 wrong usage.
    """
    form = _choose_format(output_format, as_json, output)
    if list_values:
        _show_known_values(as_json=form is Format.JSON)
        return
    if not texts:
        raise typer.BadParameter("give a text, a file or `-` for standard input", param_hint="TEXTS")
    if not value and policy is None:
        from moralguard.discriminator.inputs import known_values

        some = ", ".join(list(known_values())[:4])
        raise typer.BadParameter(
            f'say what the texts must keep: --value "The text does not insult anyone.", --value with a known id ({some}, ...; '
            "--list-values shows all), or --policy detox",
            param_hint="--value",
        )
    from moralguard.cli import report
    from moralguard.cli.chosen_values import choose_values
    from moralguard.cli.texts import files_among, read_texts

    values = choose_values(value or [], policy, threshold)
    if output is not None:
        report.check_output(output, files_among(texts))
    rows = read_texts(texts, field, encoding)
    scored = _score(rows, values, context, str(spans_method) if explain else None)
    if form is Format.TABLE:
        from moralguard.cli.score_table import write_table

        write_table(scored, values, output, explain=explain)
    else:
        write = {Format.JSON: report.as_json, Format.JSONL: report.as_json_lines, Format.CSV: report.as_csv}[form]
        report.write(write(scored, values, context or ""), output)
    if any(text.broken for text in scored) and not no_fail:
        raise typer.Exit(3)


def _choose_format(chosen: Format | None, as_json: bool, output: Path | None) -> Format:
    if as_json:
        if chosen not in (None, Format.JSON):
            raise typer.BadParameter(f"--json and --format {chosen} contradict each other; give one of them", param_hint="--json")
        return Format.JSON
    if chosen is not None:
        return chosen
    return Format.TABLE if output is None else _SUFFIXES.get(output.suffix.lower(), Format.TABLE)


def _show_known_values(as_json: bool) -> None:
    from moralguard.discriminator.inputs import known_values

    if as_json:
        sys.stdout.write(json.dumps(known_values(), ensure_ascii=False) + "\n")
        return
    table = Table("value", "statement", box=None)
    for name, wordings in known_values().items():
        table.add_row(name, Text(wordings["en"]))
    out.print(table)


def _score(rows: list[TextRow], values: list[Value], context: str | None, spans_method: str | None) -> list[ScoredText]:
    """Score in chunks, with a progress bar on the terminal's error stream where there are several."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from moralguard import Discriminator
    from moralguard.cli.scored import score_chunk

    with err.status("loading the discriminator"):
        discriminator = Discriminator.load()
    # spans take some hundred readings a text: smaller chunks keep the bar moving
    size = _CHUNK if spans_method is None else 8
    scored: list[ScoredText] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=len(rows) <= size or not err.is_terminal) as progress:
        bar = progress.add_task("scoring", total=len(rows))
        for start in range(0, len(rows), size):
            scored.extend(score_chunk(discriminator, rows[start : start + size], values, context, spans_method))
            progress.update(bar, completed=len(scored))
    return scored
