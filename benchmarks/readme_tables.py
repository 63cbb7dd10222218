"""Tables of README.md, README.zh-CN.md and docs/methods/README.md, made from the committed results; CI runs it with --check.

python benchmarks/readme_tables.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from moralguard.evaluation.report.side_by_side import side_by_side
from moralguard.evaluation.report.tables import readme_table, update_between_markers
from moralguard.evaluation.results import Evaluation

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
READMES = {"en": ROOT / "README.md", "zh": ROOT / "README.zh-CN.md"}
DETOX = ("detox-rtp-challenging.json", "detox-rtp-self-debias.json", "detox-rtp-pplm.json")
SHOWN = (
    ("toxicity", "expected_maximum"),
    ("toxicity", "toxicity_probability"),
    ("toxicity", "perplexity"),
    ("toxicity", "dist_2"),
    ("values", "total"),
    ("human-distance", "total"),
    ("fluency", "perplexity"),
    ("fluency", "unchanged"),
    ("task", "accuracy"),
    ("pairs", "preference_distance"),
    ("question-bias", "s_dis"),
    ("truthfulness", "mc1"),
    ("over-refusal", "refused_safe"),
    ("compliance", "harm"),
    ("red-team", "attack_success"),
)
METHODS = ROOT / "docs" / "methods" / "README.md"
BESIDE = (  # the columns of the comparison of all controls
    *(("toxicity", name) for name in ("expected_maximum", "toxicity_probability", "perplexity", "dist_2", "dist_3")),
    ("fluency", "unchanged"),
)
OUTSIDE = (None, "profanity", "hatesonar")  # judges that took no part in any fitting
CONTROLS = ("eval-controls.json", "eval-controls-more.json")
HEADINGS = {
    "en": ("", "expected maximum", "toxicity probability", "the same, by hatesonar", "perplexity", "dist-2 / dist-3"),
    "zh": ("", "期望最大毒性", "毒性概率", "毒性概率（hatesonar 判定）", "困惑度", "dist-2 / dist-3"),
}
NAMES = {
    "en": {
        "unguarded": "unguarded",
        "detox": "`detox`",
        "dexperts": "DExperts alone, alpha 3",
        "fudge": "FUDGE alone, strength 4",
        "self-debias": "self-debiasing alone",
        "pplm": "PPLM alone ({count} of the prompts: unguarded {unguarded})",
        "prompts": "`prompts` (no packs)",
    },
    "zh": {
        "unguarded": "无护栏",
        "detox": "`detox`",
        "dexperts": "仅 DExperts，alpha 3",
        "fudge": "仅 FUDGE，strength 4",
        "self-debias": "仅自去偏 (self-debiasing)",
        "pplm": "仅 PPLM（其中 {count} 个提示；无护栏为 {unguarded}）",
        "prompts": "`prompts`（无需训练包）",
    },
}


def detox_table(language: str) -> str:
    """The table of the RealToxicityPrompts runs; a run on other prompts tells its own unguarded figures."""
    files = [json.loads((RESULTS / name).read_text()) for name in DETOX if (RESULTS / name).is_file()]
    first = files[0]
    rows: dict[str, list[str]] = {}
    for file in files:
        base = file["rows"][0]
        same = file["settings"] == first["settings"]
        for row in file["rows"] if file is first else file["rows"][1:]:
            own = ", ".join(f"{base[j][m][0]:.2f}" for j, m in _FIGURES)
            name = NAMES[language][row["policy"]].format(count=file["settings"]["count"], unguarded=own)
            if not same and "{count}" not in NAMES[language][row["policy"]]:
                sys.exit(f"{row['policy']} was measured on other prompts than the table's first file")
            rows[row["policy"]] = [name, *_cells(row, base)]
    lines = ["| " + " | ".join(HEADINGS[language]) + " |", "|---" * len(HEADINGS[language]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(rows[name]) + " |" for name in NAMES[language] if name in rows)])


_FIGURES = (("profanity", "expected_max_toxicity"), ("profanity", "toxicity_probability"), ("hatesonar", "toxicity_probability"))


def controls_table() -> str:
    """Every control alone and the compositions, from runs of ``moralguard eval`` whose unguarded rows are the same; a later run's row of
    a policy stands in place of an earlier one's."""
    tables = []
    for name in CONTROLS:
        whole = Evaluation.load(RESULTS / name)
        measures = tuple(m for m in whole.measures if m.judge in OUTSIDE)
        tables.append(side_by_side(whole.replaced(measures=measures), measures=BESIDE).splitlines())
    head = tables[0][:3]  # headings, rule, unguarded
    if any(table[:3] != head for table in tables):
        sys.exit(f"{', '.join(CONTROLS)}: the unguarded rows differ, so their other rows can't stand in one table")
    rows = {line.split("|")[1]: line for table in tables for line in table[3:]}
    return "\n".join([*head, *rows.values()])


def _cells(row: dict[str, Any], base: dict[str, Any]) -> list[str]:
    cells = []
    for judge, name in _FIGURES:
        value, low, high = row[judge][name]
        digits = 3 if name == "expected_max_toxicity" else 2
        change = f" ({100 * (value / base[judge][name][0] - 1):+.0f} %)" if row is not base else ""
        cells.append(f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]{change}")
    ratio = f"{row['perplexity']:.1f}" if row is base else f"x {row['perplexity'] / base['perplexity']:.2f}"
    return [*cells, ratio, f"{row['dist_2']:.2f} / {row['dist_3']:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a table differs")
    check = parser.parse_args().check
    whole = Evaluation.load(RESULTS / "eval-quick-detox.json")
    evaluation = whole.replaced(measures=tuple(measure for measure in whole.measures if (measure.protocol, measure.name) in SHOWN))
    different = []
    texts = {path: path.read_text(encoding="utf-8") for path in (*READMES.values(), METHODS)}
    made = dict(texts)
    for language, path in READMES.items():
        made[path] = update_between_markers(made[path], "eval", readme_table(evaluation, language))
        made[path] = update_between_markers(made[path], "detox", detox_table(language))
    made[METHODS] = update_between_markers(made[METHODS], "comparison", controls_table())
    for path, old in texts.items():
        if made[path] != old:
            different.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(made[path], encoding="utf-8")
    if check and different:
        sys.exit(f"{', '.join(different)}: a table isn't what benchmarks/results says; run python benchmarks/readme_tables.py")


if __name__ == "__main__":
    main()
