"""``moralguard eval``: is the guarded model aligned, and what did it cost?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moralguard.cli.console import DtypeOption, ModelOption, err, out

if TYPE_CHECKING:
    from rich.progress import Progress

    from moralguard.evaluation.results import Evaluation
    from moralguard.evaluation.subject import Report


def evaluate(
    model: ModelOption = "smollm2-135m",
    policy: Annotated[list[str] | None, typer.Option(help="Built-in name or path; may be repeated. detox where not given.")] = None,
    suite: Annotated[str, typer.Option(help="Built-in suite (--list-suites) or path of a YAML file.")] = "quick",
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="discriminator, profanity, hatesonar, detoxify, lexicon[:FILE], hf:MODEL[#label]; may be repeated; "
            "`@sensitivity,specificity` behind it corrects rates. All that are installed where not given."
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder for the report, the rows and the cache; a stopped run goes on there.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of items, draws and intervals.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    dtype: DtypeOption = "auto",
    shards: Annotated[int, typer.Option(min=1, help="Processes, by Ray (pip install ray), on this machine or a cluster.")] = 1,
    language: Annotated[str, typer.Option(help="Of the report: en or zh.")] = "en",
    list_suites: Annotated[bool, typer.Option("--list-suites", help="Show the built-in suites, and leave.")] = False,
) -> None:
    """Measure a model with and without a guard, side by side, and write a report.

    The folder gets report.html (one file, no network), result.json, measures.csv, report.md, and the rows behind them.
    """
    from moralguard.evaluation.report.labels import LANGUAGES
    from moralguard.evaluation.suites import Suite, built_in_suites

    if list_suites:
        for name in built_in_suites():
            out.print(f"{name}: {Suite.load(name).description}", markup=False, soft_wrap=True)
        return
    if language not in LANGUAGES:
        raise typer.BadParameter(f"{language!r}; expected one of {', '.join(LANGUAGES)}", param_hint="--language")
    from moralguard.evaluation.report.tables import as_markdown
    from moralguard.evaluation.run import evaluate as run

    policies = policy or ["detox"]
    chosen = Suite.load(suite)
    folder = folder or Path("moralguard-eval") / f"{Path(model).name}-{'-'.join(Path(p).stem for p in policies)}-{chosen.name}"
    folder.mkdir(parents=True, exist_ok=True)
    with _progress() as progress:
        found = run(
            model,
            policies,
            chosen,
            judges=judge,
            out=folder,
            seed=seed,
            batch_size=batch_size,
            dtype=dtype,
            shards=shards,
            report=_reporter(progress),
        )
    write_report(found, folder, language)
    out.print(as_markdown(found, language), markup=False, soft_wrap=True)
    err.print(f"written to {folder}: report.html, result.json, measures.csv, report.md", markup=False, soft_wrap=True)


def write_report(found: Evaluation, folder: Path, language: str) -> None:
    """All forms of a report; policies.md, a row a policy, where there are several."""
    from moralguard.evaluation.report.comparison import guarded_conditions
    from moralguard.evaluation.report.html import write_html
    from moralguard.evaluation.report.side_by_side import side_by_side
    from moralguard.evaluation.report.tables import as_markdown, write_csv

    write_html(found, folder / "report.html", language)
    write_csv(found, folder / "measures.csv")
    (folder / "report.md").write_text(as_markdown(found, language), encoding="utf-8")
    if len(guarded_conditions(found)) > 1:
        (folder / "policies.md").write_text(side_by_side(found, language) + "\n", encoding="utf-8")


def _progress() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=err, transient=True)


def _reporter(progress: Progress) -> Report:
    """One bar a kind of work, renewed when it starts over."""
    bar = progress.add_task("starting", total=None)
    current: list[str] = [""]

    def report(what: str, done: int, total: int) -> None:
        if what != current[0]:
            progress.reset(bar, description=what, total=total)
            current[0] = what
        progress.update(bar, completed=done, total=total)

    return report
