"""An evaluation as CSV and as Markdown, and a table in a README that is made from it."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moralguard.errors import DataError
from moralguard.evaluation.report.comparison import guarded_conditions, headline
from moralguard.evaluation.report.labels import Labels
from moralguard.evaluation.report.listings import warnings_of
from moralguard.evaluation.report.numbers import factor, plain
from moralguard.evaluation.report.overview import rows_of
from moralguard.evaluation.report.verdict import tally, verdict
from moralguard.evaluation.results import Evaluation, Measure

COLUMNS = (
    *("protocol", "measure", "judge", "value", "group", "capability", "unit", "better", "condition", "estimate", "low", "high", "n"),
    *("difference", "difference_low", "difference_high", "p", "p_corrected", "warnings"),
)


def write_csv(evaluation: Evaluation, path: str | Path) -> None:
    """A line a measure and condition, in UTF-8; what a measure hasn't is left empty. ``COLUMNS`` are the columns."""
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for measure in evaluation.measures:
            for condition in measure.estimates:
                writer.writerow(_line(measure, condition))


def _line(measure: Measure, condition: str) -> dict[str, Any]:
    estimate, difference = measure.estimates[condition], measure.differences.get(condition)
    line: dict[str, Any] = {
        **{name: getattr(measure, name) for name in ("protocol", "judge", "value", "group", "capability", "unit", "better")},
        **{"measure": measure.name, "condition": condition, "estimate": estimate.value},
        **{"low": estimate.low, "high": estimate.high, "n": estimate.n},
        **{"p": measure.p_values.get(condition), "p_corrected": measure.p_corrected.get(condition)},
        "warnings": "; ".join(measure.warnings),
    }
    if difference is not None:
        line |= {"difference": difference.value, "difference_low": difference.low, "difference_high": difference.high}
    return line


def as_markdown(evaluation: Evaluation, language: str = "en") -> str:
    """The verdict, the headline table, every measure by protocol, agreement, latency and warnings.

    Raises:
        DataError: there are no labels in this language.
    """
    labels = Labels(language)
    guarded = guarded_conditions(evaluation)
    names = ", ".join(each.name for each in guarded) or labels.ui("unguarded_model")
    date = str(evaluation.environment.get("date", ""))
    facts = [(labels.ui("suite"), evaluation.suite), (labels.ui("seed"), str(evaluation.seed)), (labels.ui("date"), date)]
    parts = [
        f"# {labels.ui('title')}: {inline(evaluation.model)} \N{MULTIPLICATION SIGN} {inline(names)}",
        inline(verdict(evaluation, labels)),
        *(tally(evaluation, each.name, labels) for each in guarded[:1]),
        " \N{MIDDLE DOT} ".join(f"{name}: {inline(shown)}" for name, shown in facts if shown),
    ]
    if measures := headline(evaluation):
        parts += [f"## {labels.ui('headline')}", _comparisons(measures, evaluation, labels), labels.ui("headline_note")]
    by_protocol: dict[str, list[Measure]] = {}
    for measure in evaluation.measures:
        if measure.estimates:
            by_protocol.setdefault(measure.protocol, []).append(measure)
    if by_protocol:
        parts.append(f"## {labels.ui('all_measures')}")
    for protocol, measures in by_protocol.items():
        parts += [f"### {inline(labels.protocol(protocol))}", _comparisons(measures, evaluation, labels)]
    if evaluation.agreements:
        head = [labels.ui(name) for name in ("judges", "texts", "kappa", "correlation")]
        rows = [[f"{a.first} \N{MIDDLE DOT} {a.second}", str(a.n), _two(a.kappa), _two(a.correlation)] for a in evaluation.agreements]
        parts += [f"## {labels.ui('agreement')}", markdown_table(head, rows, "lrrr")]
    if evaluation.latencies:
        head = [labels.ui(name) for name in ("condition", "ms_per_token", "ratio", "rounds")]
        rows = [
            [
                labels.condition(e.condition),
                plain(e.ms_per_token, 1),
                f"{factor(e.ratio)} [{factor(e.ratio_low)}, {factor(e.ratio_high)}]",
                str(e.rounds),
            ]
            for e in evaluation.latencies
        ]
        parts += [f"## {labels.ui('latency')}", markdown_table(head, rows, "lrrr")]
    if warnings := warnings_of(evaluation, labels):
        parts += [f"## {labels.ui('warnings')}", "\n".join(f"- {inline(warning)}" for warning in warnings)]
    return "\n\n".join(parts) + "\n"


def readme_table(evaluation: Evaluation, language: str = "en") -> str:
    """The headline measures as a small Markdown table without intervals of the single numbers.

    Raises:
        DataError: there are no labels in this language, or there is no measure to show.
    """
    labels = Labels(language)
    measures = headline(evaluation)
    if not measures:
        raise DataError("this evaluation has no measure over all its items, so there is no table to make of it")
    conditions = guarded_conditions(evaluation)
    several = len(conditions) > 1
    judges = {measure.judge for measure in measures if measure.judge}
    rows = []
    for row in rows_of(measures, evaluation, labels):
        name = f"{row['measure']} ({row['judge']})" if row["judge"] and len(judges) > 1 else row["measure"]
        difference = f"{row['difference']['value']} {row['difference']['interval']}" if row["difference"] else "\N{EN DASH}"
        rows.append(
            [
                name,
                *([row["condition"]] if several else []),
                *(row[side]["value"] if row[side] else "\N{EN DASH}" for side in ("unguarded", "guarded")),
                difference,
                row["p"] or "\N{EN DASH}",
                f"{row['sign']} {row['told']}",
            ]
        )
    guarded = conditions[0].name if len(conditions) == 1 else labels.ui("guarded")
    head = [labels.ui("measure"), *([labels.ui("condition")] if several else []), labels.ui("unguarded"), guarded]
    head += [f"{labels.ui('difference')} (95 %)", labels.ui("p"), labels.ui("outcome")]
    return markdown_table(head, rows, "l" + ("l" if several else "") + "rrrrl")


def update_between_markers(text: str, name: str, table: str) -> str:
    """``text`` with ``table`` between the lines ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.

    Raises:
        DataError: a marker is missing, stands twice, or the end comes first; or the table holds a marker itself.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if begin in table or end in table:
        raise DataError(f"the table for {name!r} holds one of the markers {begin!r} and {end!r} itself; choose another name")
    for marker in (begin, end):
        if (count := text.count(marker)) != 1:
            raise DataError(f"the marker {marker!r} stands {count} times in the text; expected once, on a line of its own")
    start, stop = text.index(begin) + len(begin), text.index(end)
    if stop < start:
        raise DataError(f"{end!r} stands before {begin!r}; expected it behind the table")
    return f"{text[:start]}\n{table.strip()}\n{text[stop:]}"


def inline(text: str) -> str:
    """Text that Markdown shows as it is, on one line, also within a table."""
    return re.sub(r"([\\`*_\[\]<>|~#&])", r"\\\1", " ".join(text.split()))


def _comparisons(measures: Sequence[Measure], evaluation: Evaluation, labels: Labels) -> str:
    conditions = guarded_conditions(evaluation)
    several = len(conditions) > 1
    head = [labels.ui("measure"), *([labels.ui("condition")] if several else []), labels.ui("unguarded")]
    head += [conditions[0].name if len(conditions) == 1 else labels.ui("guarded"), *(labels.ui(n) for n in ("difference", "p", "outcome"))]
    rows = []
    for row in rows_of(measures, evaluation, labels):
        about = ", ".join(part for part in (row["about"], row["judge"] or "") if part)
        name = f"{row['measure']} ({about})" if about else row["measure"]
        shown = [f"{row[k]['value']} {row[k]['interval']}" if row[k] else "\N{EN DASH}" for k in ("unguarded", "guarded", "difference")]
        told = f"{row['sign']} {row['told']}"
        rows.append([name, *([row["condition"]] if several else []), *shown, row["p"] or "\N{EN DASH}", told])
    return markdown_table(head, rows, "l" + ("l" if several else "") + "rrrrl")


def _two(number: float | None) -> str:
    return "\N{EN DASH}" if number is None else plain(number, 2)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], alignment: str) -> str:
    """A table in Markdown; ``alignment`` has an l or an r a column."""
    rule = ["---:" if side == "r" else "---" for side in alignment]
    lines = [[inline(cell) for cell in head], rule, *([inline(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
