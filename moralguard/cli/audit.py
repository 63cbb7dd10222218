"""``moralguard audit``: check audit logs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moralguard.cli.console import err, out

app = typer.Typer(name="audit", help="Check audit logs of `moralguard serve`.", no_args_is_help=True)


@app.callback()
def audit() -> None:
    """Check audit logs of `moralguard serve`."""


@app.command("verify")
def verify(
    file: Annotated[Path, typer.Argument(help="The log, as `moralguard serve --audit` writes it.")],
    head: Annotated[str | None, typer.Option(help="A hash that was kept elsewhere: the log must hold it, or its end is missing.")] = None,
) -> None:
    """Check a log's chain of hashes; exit code 1 where a line was changed, removed, moved or cut."""
    from moralguard.serving.audit import verify as check

    found = check(file, head=head)
    if found.problem is not None:
        err.print(f"[bold red]not sound[/]: {found.lines} lines are, then ", end="")
        err.print(found.problem, markup=False)
        raise typer.Exit(1)
    out.print(f"sound: {found.lines} lines; newest hash {found.head}", markup=False, soft_wrap=True)
