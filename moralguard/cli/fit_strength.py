"""``moralguard fit strength`` and ``fit prompts``: choices made by measuring them on prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from moralguard.cli.console import ModelOption, err, out
from moralguard.errors import DataError

PromptsOption = Annotated[Path, typer.Option(help="Provoking prompts, one a line (.txt), or .jsonl with the field `prompt`.")]
ContinuationsOption = Annotated[int, typer.Option(min=1)]
PerplexityOption = Annotated[float, typer.Option(help="Largest perplexity allowed, as a ratio to the unguarded model's.")]


def strength(
    policy: Annotated[str, typer.Option(help="Built-in name or path of a YAML or JSON file.")],
    prompts: PromptsOption,
    setting: Annotated[list[str], typer.Option("--set", help="control.setting=values, such as dexperts.alpha=0.5,1,2; may be repeated.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for policy.yaml, search.json and front.png.")],
    model: ModelOption = "smollm2-135m",
    value: Annotated[list[str] | None, typer.Option(help="Values that the texts are judged by; the policy's own where not given.")] = None,
    most_perplexity: PerplexityOption = 1.3,
    continuations: ContinuationsOption = 5,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 20,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Search the strengths of a policy's controls: least violation within a perplexity limit."""
    from moralguard.fitting.effect import discriminator_judge
    from moralguard.fitting.strength import plot_search, search_strengths
    from moralguard.models import load_model
    from moralguard.policy import Policy

    chosen = Policy.load(policy)
    values: list[Any] = list(value or chosen.values)
    if not values:
        raise DataError(f"policy {chosen.name!r} names no value; give --value, what the texts are judged by")
    grid = dict(_read_setting(text) for text in setting)
    with err.status("loading the model"):
        lm = load_model(model)
    chosen = chosen.for_model(lm)
    folder.mkdir(parents=True, exist_ok=True)
    search = search_strengths(
        chosen,
        lm,
        read_prompts(prompts),
        discriminator_judge(values),
        grid,
        most_perplexity=most_perplexity,
        checkpoint=folder / "search.json",
        report=lambda settings, effect: err.print(f"{settings or 'unguarded'}: {_line(effect)}", markup=False),
        continuations=continuations,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    table = Table(*grid, "violation", "rate", "perplexity", "ratio", "front")
    table.add_row(*["unguarded"] * len(grid), *_cells(search.unguarded), "1.00", "")
    for item in search.tried:
        mark = ("chosen" if item is search.chosen else "yes") if item.front or item is search.chosen else ""
        ratio = f"{item.effect.perplexity / search.unguarded.perplexity:.2f}"
        table.add_row(*(f"{v:g}" for v in item.settings.values()), *_cells(item.effect), ratio, mark)
    out.print(table)
    plot_search(search, folder / "front.png")
    if search.without_effect:
        reason = " (the gate may never open: search gate.min_risk, too)" if search.policy is not None and search.policy.gate else ""
        err.print(f"no combination changed any text: these prompts don't move the controls{reason}", markup=False)
    if search.policy is None:
        raise DataError(f"no combination stays under {most_perplexity} times the unguarded perplexity; try smaller strengths")
    (folder / "policy.yaml").write_text(search.policy.as_yaml(), encoding="utf-8")
    err.print(f"written to {folder}; use it with --policy {folder / 'policy.yaml'}", markup=False)


def prompts(
    candidates: Annotated[Path, typer.Option(help="Candidate prefixes, one a line; `\\n` in a line is a line break.")],
    prompts: PromptsOption,
    value: Annotated[list[str], typer.Option(help="Values that the texts are judged by; may be repeated.")],
    against: Annotated[Path | None, typer.Option(help="Candidates of the other side: choose a DExperts contrast, not prefixes.")] = None,
    model: ModelOption = "smollm2-135m",
    most: Annotated[int, typer.Option(min=1, help="Largest number of prefixes.")] = 3,
    most_perplexity: PerplexityOption = 1.3,
    continuations: ContinuationsOption = 3,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 20,
    seed: Annotated[int, typer.Option()] = 0,
    policy: Annotated[Path | None, typer.Option("--out", help="Policy file to write.")] = None,
) -> None:
    """Choose self-debiasing prefixes, or the two prompts of a contrast, by their measured effect."""
    from moralguard.fitting.effect import discriminator_judge
    from moralguard.fitting.prompts import choose_contrast, choose_prefixes
    from moralguard.models import load_model
    from moralguard.policy import Policy

    with err.status("loading the model"):
        lm = load_model(model)
    table = Table("prompts", "violation", "rate", "perplexity")
    measured: dict[str, Any] = {"continuations": continuations, "max_new_tokens": max_new_tokens, "seed": seed}
    shared: dict[str, Any] = {
        "most_perplexity": most_perplexity,
        "report": lambda chosen, effect: table.add_row(" | ".join(chosen) or "unguarded", *_cells(effect)),
    }
    judge, asked = discriminator_judge(value), read_prompts(prompts)
    if against is None:
        choice = choose_prefixes(lm, _lines(candidates), asked, judge, most=most, **shared, **measured)
    else:
        choice = choose_contrast(lm, _lines(candidates), _lines(against), asked, judge, **shared, **measured)
    out.print(table)
    if choice.control is None:
        raise DataError("no candidate lowers the violation within the limit; write others")
    out.print(f"chosen: {' | '.join(choice.chosen)}", markup=False)
    if policy is not None:
        written = Policy(name=policy.stem, values=value, controls=(choice.control,))
        policy.write_text(written.as_yaml(), encoding="utf-8")
        err.print(f"written to {policy}", markup=False)


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file (one a line) or of JSON lines with the field ``prompt`` (a text, or an object with ``text``).

    Raises:
        DataError: the file isn't there, holds no prompt, or a row without one.
    """
    from moralguard.fitting.row_files import read_json_lines

    if path.suffix in (".jsonl", ".gz"):
        found = []
        for number, record in enumerate(read_json_lines(path), 1):
            prompt = record.get("prompt")
            text = prompt.get("text") if isinstance(prompt, dict) else prompt
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"{path}, row {number}: field 'prompt' must hold a text")
            found.append(text)
    else:
        found = _lines(path)
    if not found:
        raise DataError(f"{path} holds no prompt")
    return found


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"{path} doesn't exist")
    return [line.replace("\\n", "\n") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _read_setting(text: str) -> tuple[str, list[float]]:
    name, _, values = text.partition("=")
    try:
        return name.strip(), [float(value) for value in values.split(",")]
    except ValueError:
        raise DataError(f"--set {text!r} isn't control.setting=values; expected something like dexperts.alpha=0.5,1,2") from None


def _cells(effect: Any) -> list[str]:
    return [f"{effect.violation:.3f}", f"{effect.violation_rate:.3f}", f"{effect.perplexity:.2f}"]


def _line(effect: Any) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in dataclasses.asdict(effect).items())
