"""``moralguard fit trigger``: tokens in front of any text that lower violation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moralguard.cli.console import ModelOption, err
from moralguard.cli.labelled_rows import read_rows


def trigger(
    rows: Annotated[Path, typer.Option(help="Labelled texts: .jsonl, .jsonl.gz, .csv or a saved data set.")],
    out: Annotated[Path, typer.Option(help="Folder for the pack.")],
    licence: Annotated[str, typer.Option(help="Licence of the rows, for the card.")],
    model: ModelOption = "smollm2-135m",
    value: Annotated[str, typer.Option(help="The value statement that class 1 keeps and class 0 breaks.")] = "",
    pairs: Annotated[str | None, typer.Option(help="Rows hold two texts each: the fields KEPT,BROKEN.")] = None,
    text_field: Annotated[str, typer.Option()] = "text",
    label_field: Annotated[str | None, typer.Option(help="label, kept or satisfies where not given; 1 keeps the value.")] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens of the trigger.")] = 3,
    first: Annotated[str, typer.Option(help="The word that is repeated at the start.")] = "the",
    candidates: Annotated[int, typer.Option(min=1, help="Tokens that are run at each place.")] = 20,
    beam_size: Annotated[int, typer.Option(min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Most often that all places are gone through.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts of each class that triggers are compared on.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=2)] = 32,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Search tokens that, in front of any text, make texts that keep a value likelier against those that break it."""
    from moralguard.fitting.trigger import TriggerSettings
    from moralguard.fitting.trigger_pack import fit_trigger_pack
    from moralguard.models import load_model
    from moralguard.packs import PackData, read_pack

    data = read_rows(rows, text_field, label_field, pairs, None if pairs else ("0", "1"))
    settings = TriggerSettings(
        length=length,
        first=first,
        num_candidates=candidates,
        beam_size=beam_size,
        rounds=rounds,
        batch_size=batch_size,
        max_tokens=max_tokens,
        seed=seed,
    )
    with err.status("loading the model"):
        lm = load_model(model, device=device)

    def report(step: int, steps: int, loss: float, text: str) -> None:
        err.print(f"place {step} of at most {steps}: {loss:.4f} nats a token, {text!r}", markup=False)

    source = PackData(name=rows.name, licence=licence, rows=len(data.rows))
    folder, found = fit_trigger_pack(lm, data, out, settings, value=value, sources=(source,), report=report)
    err.print(f"found {found.text!r}; written to {folder}", markup=False)
    metrics = read_pack(folder, "prefix").card.metrics
    before, after = metrics["difference without a trigger"], metrics["difference behind the trigger"]
    err.print(f"held-back rows, nats a token of kept minus violating texts: {before} without, {after} behind the trigger", markup=False)
    if after >= before:
        err.print(
            "it isn't lower: the trigger fits the texts it was found on alone; give more rows and a larger --batch-size", markup=False
        )
    err.print(f"use it with Prefix(prefix={str(folder)!r})", markup=False)
