"""What each method did and cost, on its own page of docs/methods: a sentence made of the committed comparison; CI runs it with --check.

python benchmarks/method_effects.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from readme_tables import CONTROLS, RESULTS

from moralguard.evaluation.report.numbers import factor, interval, number, plain
from moralguard.evaluation.report.tables import update_between_markers
from moralguard.evaluation.results import UNGUARDED, Evaluation, Measure

PAGES = Path(__file__).parents[1] / "docs" / "methods"
SEVERAL = {"prefix": ("prefix", "contrastive-prefixes")}  # pages that more than one condition is about
NO_ROW = ("README", "trigger")
JUDGES = ("profanity", "hatesonar")


def page_names() -> list[str]:
    return sorted(path.stem for path in PAGES.glob("*.md") if path.stem not in NO_ROW)


def effect(evaluations: list[Evaluation], page: str) -> str:
    """The paragraph of a page.

    Raises:
        SystemExit: no committed run has the method.
    """
    return "\n".join(_sentence(evaluations, name, name == page) for name in SEVERAL.get(page, (page,)))


def _sentence(evaluations: list[Evaluation], name: str, own: bool) -> str:
    found = next((each for each in evaluations if name in {condition.name for condition in each.conditions}), None)
    if found is None:
        sys.exit(f"no run of {', '.join(CONTROLS)} has the condition {name!r}; measure it, or name its page in NO_ROW")
    by_judge = [(judge, _measure(found, "expected_maximum", judge)) for judge in JUDGES]
    before = " and ".join(number(measure.estimates[UNGUARDED].value, measure.unit) for _, measure in by_judge)
    toxicity = " and ".join(
        f"{number(measure.estimates[name].value, measure.unit)} {interval(measure.estimates[name], measure.unit)} by {judge}"
        for judge, measure in by_judge
    ).replace("\\", "")
    fluency = _measure(found, "perplexity", None).estimates
    time = next(each for each in found.latencies if each.condition == name)
    begins = "**Measured**" if own else f"`{name}`"
    place = f" on SmolLM2-135M, [beside the other methods](README.md#side-by-side) (unguarded {before})" if own else ""
    return (
        f"{begins}{place}: expected maximum toxicity {toxicity}, perplexity x {plain(fluency[name].value / fluency[UNGUARDED].value, 2)}, "
        f"time a token x {factor(time.ratio)} ({factor(time.ratio_low)} to {factor(time.ratio_high)})."
    )


def _measure(evaluation: Evaluation, name: str, judge: str | None) -> Measure:
    return next(
        m for m in evaluation.measures if (m.protocol, m.name, m.judge) == ("toxicity", name, judge) and m.value is None and m.group is None
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a page differs")
    check = parser.parse_args().check
    evaluations = [Evaluation.load(RESULTS / name) for name in CONTROLS]
    different = []
    for name in page_names():
        path = PAGES / f"{name}.md"
        old = path.read_text(encoding="utf-8")
        new = update_between_markers(old, "measured", effect(evaluations, name))
        if new != old:
            different.append(path.name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if check and different:
        sys.exit(
            f"{', '.join(different)}: what is measured there isn't what benchmarks/results says; run python benchmarks/method_effects.py"
        )


if __name__ == "__main__":
    main()
