"""``moralguard fit``: turn labelled text into what the guard needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moralguard.cli import fit_experts, fit_head, fit_prefix, fit_strength, fit_subspace, fit_trigger, fit_vector
from moralguard.cli.console import err

fit_app = typer.Typer(
    name="fit", help="Turn labelled text into what the guard needs: heads, experts, subspaces, strengths.", no_args_is_help=True
)
fit_app.command("head")(fit_head.head)
fit_app.command("subspace")(fit_subspace.subspace)
fit_app.command("vector")(fit_vector.vector)
fit_app.command("experts")(fit_experts.experts)
fit_app.command("prefix")(fit_prefix.prefix)
fit_app.command("trigger")(fit_trigger.trigger)
fit_app.command("strength")(fit_strength.strength)
fit_app.command("prompts")(fit_strength.prompts)


@fit_app.command()
def discriminator(
    out: Annotated[Path, typer.Option(help="Folder to write; an interrupted run goes on from the checkpoint in it.")],
    data: Annotated[Path | None, typer.Option(help="Folder with the labelled files that the shipped weights come from.")] = None,
    rows: Annotated[
        list[Path] | None,
        typer.Option(help="A file of your own rows (.jsonl, .csv: text, statement or value, kept); may be repeated."),
    ] = None,
    start: Annotated[Path | None, typer.Option(help="Folder of a BERT encoder to start from; all-MiniLM-L6-v2 where not given.")] = None,
    base: Annotated[str | None, typer.Option(help="Go on from these weights: `shipped`, or a folder that this command wrote.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 4000,
    batch_size: Annotated[int, typer.Option(min=2)] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of the encoder's tuned layers.")] = 1e-4,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    checkpoint_every: Annotated[int, typer.Option(min=1)] = 250,
    float32: Annotated[bool, typer.Option("--float32", help="Products in float32: for CPUs without bfloat16 instructions.")] = False,
) -> None:
    """Train the discriminator P(v|y) on rows (text, value statement, kept or broken), and calibrate it."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from moralguard.discriminator.packs import shipped_folder
    from moralguard.fitting.discriminator_fit import fit_discriminator
    from moralguard.fitting.discriminator_training import Progress, TrainingSettings

    settings = TrainingSettings(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        checkpoint_every=checkpoint_every,
        bfloat16=not float32,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Bar(*columns, console=err)
    task = bar.add_task("training", total=steps)

    def report(progress: Progress) -> None:
        if not err.is_terminal:  # a log: a line now and then
            if progress.step % 50 == 0 or progress.step == progress.steps:
                err.print(f"step {progress.step} of {progress.steps}, loss {progress.loss:.4f}")
            return
        if not bar.live.is_started:
            bar.start()
        bar.update(task, completed=progress.step, description=f"training, loss {progress.loss:.3f}")
        if progress.step == progress.steps:
            bar.stop()

    try:
        going_on_from = None if base is None else shipped_folder() if base == "shipped" else Path(base)
        written = fit_discriminator(
            out,
            data=data,
            rows=rows or [],
            start=start,
            base=going_on_from,
            settings=settings,
            device=device,
            report=report,
            say=lambda line: err.print(line, markup=False),
        )
    finally:
        bar.stop()
    err.print(f"written to {written}; use it with moralguard.Discriminator.load({str(written)!r})", markup=False)
