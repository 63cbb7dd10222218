"""``moralguard fit experts``: a LoRA expert and anti-expert on the base itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moralguard.cli.console import ModelOption, err
from moralguard.cli.labelled_rows import read_rows


def experts(
    rows: Annotated[Path, typer.Option(help="Labelled texts: .jsonl, .jsonl.gz, .csv or a saved data set.")],
    out: Annotated[Path, typer.Option(help="Folder for the packs `expert` and `anti-expert`; an interrupted run goes on from it.")],
    licence: Annotated[str, typer.Option(help="Licence of the rows, for the card.")],
    model: ModelOption = "smollm2-135m",
    value: Annotated[str, typer.Option(help="The value statement that class 1 keeps and class 0 breaks.")] = "",
    pairs: Annotated[str | None, typer.Option(help="Rows hold two texts each: the fields KEPT,BROKEN.")] = None,
    text_field: Annotated[str, typer.Option()] = "text",
    label_field: Annotated[str | None, typer.Option(help="label, kept or satisfies where not given; 1 keeps the value.")] = None,
    rank: Annotated[int, typer.Option(min=1)] = 8,
    modules: Annotated[str, typer.Option(help="Linear modules that are adapted, or all-linear.")] = "gate_proj,up_proj,down_proj",
    steps: Annotated[int, typer.Option(min=1)] = 300,
    batch_size: Annotated[int, typer.Option(min=1)] = 24,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    max_tokens: Annotated[int, typer.Option(min=2)] = 40,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    float32: Annotated[bool, typer.Option("--float32", help="Products in float32: for CPUs without bfloat16 instructions.")] = False,
) -> None:
    """Train an expert on texts that keep a value and an anti-expert on texts that break it, for DExperts."""
    from moralguard.fitting.expert_packs import fit_expert_packs
    from moralguard.fitting.experts import ExpertSettings
    from moralguard.models import load_model
    from moralguard.packs import PackData

    data = read_rows(rows, text_field, label_field, pairs, None if pairs else ("0", "1"))
    settings = ExpertSettings(
        rank=rank,
        alpha=2 * rank,
        modules=modules if modules == "all-linear" else tuple(name.strip() for name in modules.split(",")),
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_tokens=max_tokens,
        seed=seed,
        bfloat16=not float32,
    )
    with err.status("loading the model"):
        lm = load_model(model, device=device)

    def report(name: str, step: int, steps: int, loss: float) -> None:
        if step % 20 == 0 or step == steps:
            err.print(f"{name}: step {step} of {steps}, loss {loss:.3f}", markup=False)

    written = fit_expert_packs(
        lm, data, out, settings, value=value, sources=(PackData(name=rows.name, licence=licence, rows=len(data.rows)),), report=report
    )
    for folder in written:
        err.print(f"written to {folder}", markup=False)
    err.print(f"use them with DExperts(expert={str(written[0])!r}, anti_expert={str(written[1])!r})", markup=False)
