"""``moralguard fit head``: an attribute head (for PPLM) or a prefix head (for FUDGE) from labelled texts, as a pack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from moralguard.cli.console import DtypeOption, ModelOption, err, out
from moralguard.cli.labelled_rows import read_rows
from moralguard.errors import DataError

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel
    from moralguard.fitting.hidden_states import Progress
    from moralguard.fitting.labelled import LabelledTexts

_MEASURES = {"rows": "rows", "accuracy": "accuracy", "balanced_accuracy": "balanced", "auroc": "AUROC"}
_ATTRIBUTE = "logistic regression on pooled hidden states (arXiv 1912.02164, section 4.2)"
_MLP = "multi-layer perceptron on pooled hidden states"
_PREFIX = "factored future discriminator, every prefix an example (arXiv 2104.05218, section 3)"


class Kind(StrEnum):
    attribute = "attribute"
    prefix = "prefix"


def head(
    rows: Annotated[Path, typer.Option(help="Labelled texts: .jsonl, .jsonl.gz, .csv, or a data set's folder.")],
    kind: Annotated[Kind, typer.Option(help="attribute: for PPLM; prefix: for FUDGE.")],
    value: Annotated[str, typer.Option(help="Statement of the value that the sought class keeps.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder of the pack to write.")],
    licence: Annotated[str, typer.Option(help="Licence of the rows, for the pack's card.")],
    model: ModelOption = "smollm2-135m",
    dtype: DtypeOption = "auto",
    text_field: Annotated[str, typer.Option(help="Field that holds the text.")] = "text",
    label_field: Annotated[str | None, typer.Option(help="Field that holds the label; label, kept or satisfies where not given.")] = None,
    pairs: Annotated[str | None, typer.Option(help="KEPT,BROKEN: rows hold a text of either class in these fields.")] = None,
    target: Annotated[str | None, typer.Option(help="Class that is sought, its name or number; of two classes the second.")] = None,
    name: Annotated[str | None, typer.Option(help="The pack's name; the folder's where not given.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="attribute: layers to choose from, e.g. -1,4,8, or all. -1, for PPLM, is alone.")
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="attribute: mean (for PPLM), last, or both to choose from: mean,last.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="attribute: width of a hidden layer; a linear head where not given.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="prefix: columns of the two thin matrices; 16 where not given.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longer texts are cut.")] = 64,
    seed: Annotated[int, typer.Option()] = 0,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Compute the states in bfloat16.")] = False,
) -> None:
    """Fit a head to a model's hidden states from labelled texts, and write it as a pack."""
    from moralguard.models import load_model
    from moralguard.packs import PackData, write_pack
    from moralguard.values import Value

    Value.from_statement(value)  # told before the fit and not behind it
    _check_options(kind, {"--layers": layers, "--pooling": pooling, "--hidden": hidden}, {"--rank": rank})
    _check_folder(folder)
    texts = read_rows(rows, text_field, label_field, pairs)
    sought = _target(texts, target)
    lm = load_model(model, dtype=dtype)
    settings: dict[str, Any] = {"target": sought, "classes": list(texts.classes), "max_tokens": max_tokens, "seed": seed}
    settings["bfloat16"] = bfloat16
    with _bar() as progress:
        if kind is Kind.attribute:
            chosen = _layers(layers, lm)
            poolings = tuple((pooling or "mean").split(","))
            found, metrics = _attribute(lm, texts, chosen, poolings, hidden, max_tokens, seed, bfloat16, progress, folder)
            method = _ATTRIBUTE if hidden is None else _MLP
        else:
            found, metrics = _prefix(lm, texts, sought, rank or 16, max_tokens, seed, bfloat16, progress, folder)
            method = _PREFIX
    about = f"{kind.value} head for {lm.name} that seeks class {texts.classes[sought]!r} of {', '.join(texts.classes)}"
    written = write_pack(
        folder,
        kind="attribute-head" if kind is Kind.attribute else "prefix-head",
        method=method,
        lm=lm,
        name=name or folder.resolve().name,
        data=(PackData(name=rows.name, licence=licence, rows=len(texts.rows)),),
        settings=settings | found,
        metrics=metrics,
        description=about,
        values=(value,),
    )
    _show(metrics)
    if kind is Kind.attribute and (hidden is not None or found["layer"] != -1 or found["pooling"] != "mean"):
        err.print(
            "PPLM can't take this head: it steers by a linear head on the mean of the last states. It judges texts only; "
            "for PPLM fit without --layers, --pooling and --hidden",
            markup=False,
        )
    err.print(f"written to {written}", markup=False)


def _attribute(
    lm: LanguageModel,
    texts: LabelledTexts,
    layers: tuple[int, ...],
    poolings: tuple[str, ...],
    hidden: int | None,
    max_tokens: int,
    seed: int,
    bfloat16: bool,
    progress: Progress,
    folder: Path,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fit and save; settings for the card, and metrics."""
    from moralguard.fitting.attribute_head import fit_attribute_head

    fitted = fit_attribute_head(
        lm,
        texts,
        layers=layers,
        poolings=poolings,
        hidden=hidden,
        max_tokens=max_tokens,
        seed=seed,
        bfloat16=bfloat16,
        progress=progress,
    )
    fitted.save(folder)
    return {"layer": fitted.layer, "pooling": fitted.pooling, "hidden": hidden}, fitted.metrics


def _prefix(
    lm: LanguageModel,
    texts: LabelledTexts,
    target: int,
    rank: int,
    max_tokens: int,
    seed: int,
    bfloat16: bool,
    progress: Progress,
    folder: Path,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fit and save; settings for the card, and metrics."""
    from moralguard.fitting.prefix_head import PrefixHeadSettings, train_prefix_head

    settings = PrefixHeadSettings(rank=rank, max_tokens=max_tokens, seed=seed, bfloat16=bfloat16)
    fitted = train_prefix_head(lm, texts, settings, target=target, progress=progress)
    fitted.head.save(folder)
    return settings.model_dump(), fitted.metrics


def _check_options(kind: Kind, attribute: dict[str, Any], prefix: dict[str, Any]) -> None:
    for name, given in (prefix if kind is Kind.attribute else attribute).items():
        if given is not None:
            raise DataError(f"{name} isn't an option of --kind {kind.value}; leave it out")


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; --out names the folder of the pack")
    strange = (
        sorted(path.name for path in folder.iterdir() if path.name not in ("card.json", "head.safetensors")) if folder.is_dir() else []
    )
    if strange:
        raise DataError(f"{folder} holds {', '.join(strange[:5])}; give a new folder, or one with an earlier head")


def _target(texts: LabelledTexts, given: str | None) -> int:
    names = texts.classes
    if given is None:
        if len(names) > 2:
            raise DataError(f"the rows are of {len(names)} classes ({', '.join(names)}); say with --target which one is sought")
        return 1
    if given in names:
        return names.index(given)
    if given.isdecimal() and int(given) < len(names):
        return int(given)
    raise DataError(f"--target {given!r} is none of {', '.join(names)} (0 to {len(names) - 1})")


def _layers(given: str | None, lm: LanguageModel) -> tuple[int, ...]:
    from moralguard.fitting.hidden_states import LAST

    if given is None:
        return (LAST,)
    if given == "all":
        # behind the last layer stands LAST: transformers gives it as layer L too
        return (LAST, *range(1, lm.model.config.get_text_config().num_hidden_layers))
    try:
        return tuple(dict.fromkeys(int(part) for part in given.split(",")))
    except ValueError:
        raise DataError(f"--layers is {given!r}; expected numbers such as -1,4,8, or all") from None


@contextmanager
def _bar() -> Iterator[Progress]:
    """A bar on stderr, or in a log a line now and then."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task("reading states", total=None)
        told = 0

        def report(done: int, total: int) -> None:
            nonlocal told
            bar.update(task, completed=done, total=total)
            if done == total:
                bar.update(task, description="fitting")
            tenth = 10 * done // total
            if not err.is_terminal and tenth > told:
                told = tenth
                err.print(f"states of {done} of {total} texts")

        yield report


def _show(metrics: dict[str, Any]) -> None:
    """The metrics as a table: a line for each split, of a prefix head for each share of the text too, then the search."""
    lines = []
    for split in ("train", "dev", "test"):
        found = metrics.get(split, {})
        if "accuracy" in found:
            lines.append((split, found))
        lines += [(f"{split}, {share} read", part) for share, part in found.items() if isinstance(part, dict)]
    lines += [(f"layer {part['layer']}, {part['pooling']}, {part['by']}", part) for part in metrics.get("search", ())]
    train = metrics.get("train", {})
    if "prefixes" in train:
        seen = f"{train['texts']} training texts, {train['prefixes']} prefixes, {metrics['epochs']} passes"
        out.print(f"{seen}; loss {train['loss']:.3f}")
        if not lines:
            err.print("no dev or test texts, so nothing says what the head is worth; mark some with a field 'split'")
            return
    table = Table("", *_MEASURES.values())
    for title, found in lines:
        cells = [found.get(key) for key in _MEASURES]
        table.add_row(title, *("" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells))
    out.print(table)
