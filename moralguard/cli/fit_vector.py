"""``moralguard fit vector``: steering vectors from labelled or paired texts, as a pack."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moralguard.cli.console import DtypeOption, ModelOption, err, out
from moralguard.cli.labelled_rows import read_rows
from moralguard.errors import DataError


class Method(StrEnum):
    mean = "mean"
    pca = "pca"


class Pooling(StrEnum):
    last = "last"
    mean = "mean"


def vector(
    rows: Annotated[Path, typer.Option(help="Labelled texts: .jsonl, .jsonl.gz, .csv or a saved data set.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder of the pack to write; it must be empty.")],
    model: ModelOption = "smollm2-135m",
    dtype: DtypeOption = "auto",
    licence: Annotated[str, typer.Option(help="Licence of the rows, for the pack's card.")] = "none stated",
    value: Annotated[list[str] | None, typer.Option(help="Statement of a value that the vector moves towards; may be repeated.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Rows hold two texts each: the fields KEPT,BROKEN.")] = None,
    text_field: Annotated[str, typer.Option()] = "text",
    label_field: Annotated[str | None, typer.Option(help="label, kept or satisfies where not given.")] = None,
    kept: Annotated[str | None, typer.Option(help="The class that keeps the value; 1 where labels are 0 and 1.")] = None,
    method: Annotated[Method, typer.Option(help="mean difference, or first principal direction of the differences.")] = Method.mean,
    layers: Annotated[str | None, typer.Option(help="Layers to choose from, e.g. 8,12,16; all but the last where not given.")] = None,
    best: Annotated[int, typer.Option(min=0, help="Layers to keep, those whose vectors tell held-back rows apart; 0 keeps all.")] = 1,
    pooling: Annotated[
        Pooling, typer.Option(help="State of a text: of its last token, or the mean over all but the first.")
    ] = Pooling.last,
    name: Annotated[str | None, typer.Option(help="The pack's name; the folder's where not given.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longer texts are cut.")] = 64,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Fit vectors that move a model's states from texts that break a value to texts that keep it, and write them as a pack."""
    from moralguard.fitting.labelled import read_text_pairs
    from moralguard.fitting.vectors import fit_vectors
    from moralguard.models import load_model
    from moralguard.packs import PackData, write_pack

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is there and not an empty folder; name a new one, or remove it")
    texts = read_rows(rows, text_field, label_field, pairs)
    if pairs is not None and kept is not None:
        raise DataError("--pairs names the kept texts' field first, so leave --kept out")
    if pairs is None and kept is None and texts.classes != ("0", "1"):
        raise DataError(f"the rows are of the classes {', '.join(texts.classes)}; name the one that keeps the value with --kept")
    candidates = None if layers is None else _numbers(layers)
    lm = load_model(model, dtype=dtype)
    with err.status("reading states and fitting"):
        fitted = fit_vectors(
            lm,
            texts,
            method.value,
            pairs=None if pairs is None else read_text_pairs(rows, *(field.strip() for field in pairs.split(","))),
            kept=kept,
            layers=candidates,
            best=best or None,
            pooling=pooling.value,
            seed=seed,
            max_tokens=max_tokens,
        )
    fitted.save(folder)
    own = ", ".join(map(str, fitted.vectors))
    write_pack(
        folder,
        kind="steering-vectors",
        method=fitted.method,
        lm=lm,
        name=name or folder.resolve().name,
        data=(PackData(name=rows.name, licence=licence, rows=len(texts.rows)),),
        settings=fitted.settings,
        metrics=fitted.metrics,
        description=f"states of layer {own}, towards {fitted.settings['kept']} ({', '.join(texts.classes)})",
        values=tuple(value or ()),
    )
    for layer, found in fitted.metrics["layers"].items():
        mark = "*" if int(layer) in fitted.vectors else " "
        out.print(
            f"{mark} layer {layer:>3}: right in {found['accuracy']:.1%} of held-back rows, {found['separation']:.2f} deviations apart, "
            f"length {found['vector_length']:.3g} on states of {found['state_length']:.3g}"
        )
    err.print(f"written to {folder}; use it with SteeringVectors(vectors={str(folder)!r})", markup=False)


def _numbers(layers: str) -> list[int]:
    try:
        return [int(part) for part in layers.split(",")]
    except ValueError:
        raise DataError(f"--layers is {layers!r}; expected numbers with commas between them, such as 8,12,16") from None
