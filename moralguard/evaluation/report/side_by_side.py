"""Several policies under one another: a row a policy, a column a measure, all from one run."""

from __future__ import annotations

from collections.abc import Sequence

from moralguard.errors import DataError
from moralguard.evaluation.report.comparison import headline, main_conditions
from moralguard.evaluation.report.labels import Labels
from moralguard.evaluation.report.numbers import digits_for, factor, interval, number, plain
from moralguard.evaluation.report.tables import markdown_table
from moralguard.evaluation.results import UNGUARDED, Evaluation, Measure

NONE = "\N{EN DASH}"


def side_by_side(evaluation: Evaluation, language: str = "en", measures: Sequence[tuple[str, str]] = ()) -> str:
    """A Markdown table: every policy's measures with their intervals, perplexities over the unguarded one's, and time a token.

    Args:
        measures: (protocol, name) of the columns, one a judge; the headline measures where none are named.

    Raises:
        DataError: there are no labels in this language, or the run has none of the measures.
    """
    labels = Labels(language)
    found = headline(evaluation)
    if measures:
        whole = [m for m in evaluation.measures if m.value is None and m.group is None and m.estimates]
        found = [m for protocol, name in measures for m in whole if (m.protocol, m.name) == (protocol, name)]
    if not found:
        raise DataError("this evaluation has none of the measures asked for, so there is no table to make of it")
    latencies = {latency.condition: latency for latency in evaluation.latencies}
    head = [labels.ui("condition"), *(_title(measure, labels) for measure in found)]
    head += [f"{labels.ui('latency')} ({labels.ui('ratio')})"] if latencies else []
    rows = []
    for condition in main_conditions(evaluation):
        row = [labels.condition(condition.name), *(_cell(measure, condition.name) for measure in found)]
        if latencies:
            time = latencies.get(condition.name)
            row.append(f"{factor(time.ratio)} [{factor(time.ratio_low)}, {factor(time.ratio_high)}]" if time else NONE)
        rows.append(row)
    return markdown_table(head, rows, "l" + "r" * (len(head) - 1))


def _title(measure: Measure, labels: Labels) -> str:
    name = labels.measure(measure.protocol, measure.name)
    return f"{name} ({measure.judge})" if measure.judge else name


def _cell(measure: Measure, condition: str) -> str:
    estimate, base = measure.estimates.get(condition), measure.estimates.get(UNGUARDED)
    if estimate is None:
        return NONE
    if measure.unit == "perplexity" and base is not None and condition != UNGUARDED:
        return f"\N{MULTIPLICATION SIGN} {plain(estimate.value / base.value, 2)}"
    if digits_for(measure.unit, estimate.value) < 3:
        return number(estimate.value, measure.unit)
    return f"{number(estimate.value, measure.unit)} {interval(estimate, measure.unit)}"
