"""``moralguard fit subspace``: a subspace for nullspace projection, from a built-in concept or labelled texts, as a pack."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moralguard.cli.console import DtypeOption, ModelOption, err, out
from moralguard.errors import DataError

if TYPE_CHECKING:
    from moralguard.fitting.labelled import LabelledTexts
    from moralguard.packs import PackData


class Method(StrEnum):
    leace = "leace"
    inlp = "inlp"
    directions = "directions"


class Pooling(StrEnum):
    last = "last"
    mean = "mean"


def subspace(
    folder: Annotated[Path, typer.Option("--out", help="Folder of the pack to write; it must be empty.")],
    model: ModelOption = "smollm2-135m",
    dtype: DtypeOption = "auto",
    concept: Annotated[str | None, typer.Option(help="A built-in concept: gender, religion or race.")] = None,
    rows: Annotated[Path | None, typer.Option(help="Labelled texts of your own: text, label (.jsonl, .jsonl.gz, .csv).")] = None,
    licence: Annotated[str, typer.Option(help="Licence of the rows, for the pack's card.")] = "none stated",
    method: Annotated[Method, typer.Option(help="directions: words' log-odds, or class means where there are no words.")] = Method.leace,
    rank: Annotated[int | None, typer.Option(min=1, help="leace, directions: directions to remove at most.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="inlp: classifiers to fit; 8 where not given.")] = None,
    min_accuracy: Annotated[float, typer.Option(min=0, max=1, help="inlp: stop at a classifier that is right less often.")] = 0.0,
    name: Annotated[str | None, typer.Option(help="The pack's name; the folder's where not given.")] = None,
    value: Annotated[list[str] | None, typer.Option(help="Statement of a value that the subspace stands for; may be repeated.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longer texts are cut.")] = 64,
    seed: Annotated[int, typer.Option()] = 0,
    layer: Annotated[int, typer.Option(help="States behind so many layers, for layer-projection; -1 are the head's, for nullspace.")] = -1,
    pooling: Annotated[
        Pooling, typer.Option(help="State of a text: of its last token, or the mean over all but the first.")
    ] = Pooling.last,
    mlp: Annotated[bool, typer.Option("--mlp", help="Probe with a network too.")] = False,
) -> None:
    """Fit the directions of a concept in a model's last hidden state, probe them, and write them as a pack."""
    from moralguard.fitting.concepts import counterpart_tokens
    from moralguard.fitting.subspace_fit import fit_subspace
    from moralguard.models import load_model
    from moralguard.packs import write_pack

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is there and not an empty folder; name a new one, or remove it")
    texts, data = _texts(concept, rows, licence, seed)
    lm = load_model(model, dtype=dtype)
    words = counterpart_tokens(lm, concept) if concept and method is Method.directions and layer == -1 else None
    with err.status("reading states and fitting"):
        fitted = fit_subspace(
            lm,
            texts,
            method.value,
            counterparts=words,
            rank=rank,
            rounds=rounds,
            min_accuracy=min_accuracy,
            seed=seed,
            max_tokens=max_tokens,
            mlp=mlp,
            layer=layer,
            pooling=pooling.value,
        )
    fitted.save(folder)
    states = "the last hidden state" if layer == -1 else f"the states of layer {layer}"
    about = concept or f"the labels of {data.name}"
    write_pack(
        folder,
        kind="subspace",
        method=fitted.method,
        lm=lm,
        name=name or folder.resolve().name,
        data=(data,),
        settings=fitted.settings,
        metrics=fitted.metrics,
        description=f"{fitted.subspace.rank} directions of {about} ({', '.join(texts.classes)}) in {states}",
        values=tuple(value or ()),
    )
    _show(fitted.metrics)
    use = "NullspaceProjection(" if layer == -1 else f"LayerProjection(modules=({layer},), "
    err.print(f"written to {folder}; use it with {use}basis={str(folder)!r})", markup=False)


def _texts(concept: str | None, rows: Path | None, licence: str, seed: int) -> tuple[LabelledTexts, PackData]:
    from moralguard.fitting.concepts import LICENCE, concept_rows
    from moralguard.fitting.labelled import read_labelled
    from moralguard.packs import PackData

    if concept is not None and rows is None:
        texts = concept_rows(concept, seed)
        return texts, PackData(name=f"moralguard's own sentences about {concept}", licence=LICENCE, rows=len(texts.rows))
    if rows is not None and concept is None:
        texts = read_labelled(rows)
        return texts, PackData(name=rows.name, licence=licence, rows=len(texts.rows))
    raise DataError("give either --concept (gender, religion or race) or --rows FILE, one of them")


def _show(metrics: dict[str, Any]) -> None:
    found = metrics["probe"]
    out.print(f"rank {metrics['rank']}, {metrics['rows']} rows, {metrics['held_back_rows']} of them held back")
    out.print(f"a linear probe is right in {found['before']:.1%} before, {found['after']:.1%} after (majority {found['majority']:.1%})")
    if "mlp_before" in found:
        out.print(f"a network is right in {found['mlp_before']:.1%} before, {found['mlp_after']:.1%} after")
    if "mean_log_odds" in metrics:
        odds = metrics["mean_log_odds"]
        out.print(f"mean log-odds of the words, absolute: {odds['before']:.3f} before, {odds['after']:.3f} after")
