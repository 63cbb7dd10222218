"""``moralguard pack``: list, show and check packs of fitted weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from moralguard.cli.console import DtypeOption, err, out
from moralguard.errors import GuardError

app = typer.Typer(name="pack", help="List, show and check packs of fitted weights.", no_args_is_help=True)

PackArgument = Annotated[str, typer.Argument(help="A pack's folder, or pack:NAME for one that comes with moralguard.")]


@app.command("list")
def pack_list() -> None:
    """The packs that come with moralguard."""
    from moralguard.packs import PREFIX, read_pack, shipped_packs

    table = Table("pack", "kind", "what it is", box=None)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for name in shipped_packs():
        card = read_pack(PREFIX + name).card
        table.add_row(*map(_clean, (PREFIX + name, card.kind, card.description)))
    if table.row_count:
        out.print(table)
    else:
        err.print("no pack comes with this installation; `moralguard fit` makes them")


@app.command("show")
def pack_show(pack: PackArgument) -> None:
    """A pack's card; exit code 1 where the pack isn't what its card says."""
    from moralguard.packs import read_pack

    found = read_pack(pack)
    card, base = found.card, found.card.base
    table = Table(show_header=False, box=None)
    for name, value in (
        ("pack", str(found.folder)),
        ("kind", card.kind),
        ("name", card.name),
        ("description", card.description),
        ("values", "\n".join(card.values)),
        ("method", card.method),
        ("fitted on", f"{base.name}, fingerprint {base.fingerprint}, tokenizer {base.tokenizer}"),
        ("shape", f"hidden width {base.width}, vocabulary {base.vocabulary}"),
        ("data", "\n".join(f"{row.name}: {row.rows} rows, {row.licence}{', ' * bool(row.url)}{row.url}" for row in card.data)),
        ("settings", _lines(card.settings.items())),
        ("metrics", _lines(card.metrics.items())),
        ("made with", ", ".join(f"{name} {version}" for name, version in card.program.items())),
        ("files", _lines(card.files.items())),
    ):
        if value:
            table.add_row(Text(name, style="bold"), _clean(value))
    out.print(table)


@app.command("check")
def pack_check(
    pack: PackArgument,
    model: Annotated[str | None, typer.Option(help="Check too that it fits this model: folder, GGUF file or Hugging Face id.")] = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Whether a pack is whole and what its card says, and fits a model; exit code 1 and the reason where not."""
    from moralguard.packs import read_pack

    try:
        found = read_pack(pack)
        fits = ""
        if model is not None:
            from moralguard.models import load_model

            with err.status("loading the model"):
                lm = load_model(model, dtype=dtype)
            found.check(lm)
            fits = f"; fits {lm.name} (fingerprint {lm.fingerprint})"
    except GuardError as error:
        err.print(_clean(f"{type(error).__name__}: {error}"), soft_wrap=True)
        raise typer.Exit(1) from None
    count = len(found.card.files)
    line = f"{found.folder}: {found.card.kind} {found.card.name!r}, {count} file{'' if count == 1 else 's'} as the card says{fits}"
    out.print(_clean(line), soft_wrap=True)


def _lines(items: Iterable[tuple[str, Any]]) -> str:
    return "\n".join(f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}" for name, value in items)


def _clean(text: str) -> Text:
    """Text from a card that anyone may have written: no markup, no control characters."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text))
