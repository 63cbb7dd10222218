"""Traces for a terminal: both texts side by side, changed tokens coloured, and what acted."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from moralguard.trace.records import TokenTrace

_CHANGED = "bold green"
_ROWS = 8


def marked_text(prompt: str, trace: Sequence[TokenTrace]) -> Text:
    """The prompt dimmed, the guarded continuation behind it, tokens that the unguarded model would not have drawn coloured."""
    text = Text(prompt, style="dim")
    for record in trace:
        text.append(record.token, style=_CHANGED if record.changed else "")
    return text


def comparison(prompt: str, unguarded: str, trace: Sequence[TokenTrace], policy: str, replaced: str | None = None) -> RenderableType:
    """Unguarded and guarded text, then the table of what acted.

    Args:
        replaced: what a review put in the guarded text's place, whose tokens the trace doesn't tell.
    """
    plain = Text(prompt, style="dim") + Text(unguarded)
    changed = sum(record.changed for record in trace)
    subtitle = f"{changed} of {len(trace)} tokens changed (coloured)"
    guarded = marked_text(prompt, trace)
    if replaced is not None:
        apart = "" if replaced[:1].isspace() else "\n"
        guarded, subtitle = Text(prompt + apart, style="dim") + Text(replaced), "replaced by the policy's review"
    return Group(
        Panel(plain, title="unguarded", title_align="left", border_style="red"),
        Panel(guarded, title=f"guarded by {policy}", title_align="left", subtitle=subtitle, border_style="green"),
        *([acting_table(trace)] if trace or replaced is None else []),
    )


def acting_table(trace: Sequence[TokenTrace]) -> RenderableType:
    """The changed tokens with the largest KL: what was drawn, what would have been, and each control's share."""
    if not trace:
        return Text("no token was drawn", style="dim")
    controls = list(trace[0].contributions)
    mean_kl = sum(record.kl for record in trace) / len(trace)
    shown = sorted((r for r in trace if r.changed), key=lambda record: -record.kl)[:_ROWS]
    title = f"mean KL(guarded || base) {mean_kl:.3f} nats a token"
    if not shown:
        return Text(f"no token was changed; {title}", style="dim")
    table = Table(title=title, title_justify="left", title_style="dim", caption=_caption(trace, controls), caption_justify="left")
    for heading in ("position", "unguarded token", "guarded token"):
        table.add_column(heading, justify="right" if heading == "position" else "left")
    table.add_column("KL", justify="right")
    for control in controls:
        table.add_column(control, justify="right")
    for record in sorted(shown, key=lambda r: r.position):
        shares = ["-" if (share := record.contributions.get(c)) is None else f"{share:+.2f}" for c in controls]
        table.add_row(
            str(record.position), repr(record.counterfactual), Text(repr(record.token), style=_CHANGED), f"{record.kl:.2f}", *shares
        )
    return table


def _caption(trace: Sequence[TokenTrace], controls: Sequence[str]) -> str:
    values = [f"{c}: {', '.join(trace[0].values[c])}" for c in controls if trace[0].values.get(c)]
    lines = ["shares: change in the guarded token's log-odds that each control made"]
    if values:
        lines.append(f"values kept by {'; '.join(values)}")
    return "\n".join(lines)
