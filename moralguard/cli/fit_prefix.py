"""``moralguard fit prefix``: learned prefixes on the base itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moralguard.cli.console import ModelOption, err
from moralguard.cli.labelled_rows import read_rows


def prefix(
    rows: Annotated[Path, typer.Option(help="Labelled texts: .jsonl, .jsonl.gz, .csv or a saved data set.")],
    out: Annotated[Path, typer.Option(help="Folder for the packs `kept` and `broken`; an interrupted run goes on from it.")],
    licence: Annotated[str, typer.Option(help="Licence of the rows, for the card.")],
    model: ModelOption = "smollm2-135m",
    method: Annotated[
        str, typer.Option(help="contrastive (two caches, set against each other), prefix-tuning (one cache), prompt-tuning (vectors).")
    ] = "contrastive",
    value: Annotated[str, typer.Option(help="The value statement that class 1 keeps and class 0 breaks.")] = "",
    pairs: Annotated[str | None, typer.Option(help="Rows hold two texts each: the fields KEPT,BROKEN.")] = None,
    text_field: Annotated[str, typer.Option()] = "text",
    label_field: Annotated[str | None, typer.Option(help="label, kept or satisfies where not given; 1 keeps the value.")] = None,
    length: Annotated[int, typer.Option(min=1, help="Positions of a prefix.")] = 10,
    omega_1: Annotated[float, typer.Option(min=0, help="contrastive: weight of the language-model loss.")] = 0.8,
    omega_2: Annotated[float, typer.Option(min=0, help="contrastive: weight of the discriminative loss.")] = 0.2,
    steps: Annotated[int, typer.Option(min=1)] = 300,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    learning_rate: Annotated[float | None, typer.Option(help="0.01 for keys and values, 0.02 for vectors, where not given.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2)] = 48,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    float32: Annotated[bool, typer.Option("--float32", help="Products in float32: for CPUs without bfloat16 instructions.")] = False,
) -> None:
    """Train prefixes (a few positions of keys and values, or of vectors) on texts that keep a value and texts that break it."""
    from moralguard.fitting.prefix import PrefixSettings
    from moralguard.fitting.prefix_packs import fit_prefix_packs
    from moralguard.models import load_model
    from moralguard.packs import PackData

    data = read_rows(rows, text_field, label_field, pairs, None if pairs else ("0", "1"))
    settings = PrefixSettings(
        method=method,
        length=length,
        omega_1=omega_1,
        omega_2=omega_2,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_tokens=max_tokens,
        seed=seed,
        bfloat16=not float32,
    )
    with err.status("loading the model"):
        lm = load_model(model, device=device)

    def report(step: int, steps: int, loss: float) -> None:
        if step % 20 == 0 or step == steps:
            err.print(f"step {step} of {steps}, loss {loss:.3f}", markup=False)

    source = PackData(name=rows.name, licence=licence, rows=len(data.rows))
    written = fit_prefix_packs(lm, data, out, settings, value=value, sources=(source,), report=report)
    for folder in written:
        err.print(f"written to {folder}", markup=False)
    if len(written) > 1:
        err.print(f"use them with DExperts(expert={str(written[0])!r}, anti_expert={str(written[1])!r})", markup=False)
    else:
        err.print(f"use it with Prefix(prefix={str(written[0])!r})", markup=False)
