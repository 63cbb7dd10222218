"""``moralguard generate``: continue prompts under a guard."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moralguard.cli.console import DtypeOption, ModelOption, err, out
from moralguard.errors import PolicyError

if TYPE_CHECKING:
    from moralguard.decoding.records import GenerationResult, ReviewRecord
    from moralguard.guard import Guard
    from moralguard.policy import Policy


def generate(
    prompt: Annotated[
        str, typer.Argument(help="Text, `-` for standard input, or a file: .txt (a prompt a line) or .jsonl (field `prompt`).")
    ],
    policy: Annotated[
        str | None, typer.Option(help="Built-in name or path of a YAML or JSON file; detox where neither this nor --value is given.")
    ] = None,
    value: Annotated[list[str] | None, typer.Option(help="A value statement to guard, with no policy file; may be repeated.")] = None,
    model: ModelOption = "smollm2-135m",
    dtype: DtypeOption = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 40,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; the policy's own where not given.")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    num_return_sequences: Annotated[int, typer.Option(min=1)] = 1,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Unguarded and guarded side by side, and what acted.")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write a record of every token to this file: JSON, or a page to look at (.html).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message: use the model's chat template.")] = False,
) -> None:
    """Continue a prompt under a guard."""
    from moralguard.guard import Guard
    from moralguard.models import load_model

    prompts = _read_prompts(prompt)
    chosen = _choose_policy(policy, value or [])
    with err.status("loading the model"):
        lm = load_model(model, dtype=dtype)
        guard = Guard(chosen, lm)
    if chosen.fitted and guard.fitted is None:
        models = ", ".join(entry.model for entry in chosen.fitted)
        message = (
            f"policy {chosen.name} has controls fitted on {models}, none on {lm.name}: its general ones act; `moralguard fit` fits some"
        )
        err.print(message, markup=False, soft_wrap=True)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "num_return_sequences": num_return_sequences,
        **{k: v for k, v in (("temperature", temperature), ("top_p", top_p), ("top_k", top_k)) if v is not None},
    }
    if temperature is not None:
        settings["do_sample"] = temperature > 0
    inputs: list[Any] = [[{"role": "user", "content": text}] for text in prompts] if chat else list(prompts)
    unguarded = None
    if compare:
        baseline = Guard(_without_controls(chosen), lm)
        unguarded = _run(baseline, inputs, seed, settings, False, "unguarded")
    result = _run(guard, inputs, seed, settings, compare or trace is not None, "guarded")
    shown = [text for text in prompts for _ in range(num_return_sequences)]
    if trace is not None:
        _write_trace(trace, guard, shown, result, unguarded)
    if as_json:
        sys.stdout.write(json.dumps(_as_data(guard, shown, result, unguarded), ensure_ascii=False) + "\n")
    elif unguarded is not None and result.traces is not None:
        from moralguard.trace.terminal import comparison

        for i, (text, before, records) in enumerate(zip(shown, unguarded.texts, result.traces, strict=True)):
            review = None if result.reviews is None else result.reviews[i]
            replaced = result.texts[i] if review is not None and (review.refused or review.revised) else None
            out.print(comparison(text + ("\n" if chat else ""), before, records, chosen.name, replaced))
            if review is not None:
                out.print(_told(review), markup=False, soft_wrap=True)
    else:
        for text in result.texts:
            out.print(text, markup=False, soft_wrap=True)


def _run(guard: Guard, inputs: list[Any], seed: int, settings: dict[str, Any], trace: bool, label: str) -> GenerationResult:
    """Generate with a progress bar on the terminal's error stream."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        bar = progress.add_task(f"generating, {label}", total=len(inputs) * settings["num_return_sequences"])
        update: Callable[[int, int], None] = lambda done, total: progress.update(bar, completed=done, total=total)  # noqa: E731
        return guard.generate(inputs, seed=seed, trace=trace, progress=update, **settings)


def _write_trace(path: Path, guard: Guard, prompts: list[str], result: GenerationResult, unguarded: GenerationResult | None) -> None:
    if path.suffix.lower() not in (".html", ".htm"):
        path.write_text(json.dumps(_as_data(guard, prompts, result, unguarded), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    from moralguard.trace.html import traces_page

    statements = {value.id: value.statement for value in guard.policy.values}
    title = f"{guard.lm.name}, {guard.policy.name}"
    page = traces_page(result.traces or [], title=title, texts=result.texts, prompts=prompts, statements=statements)
    path.write_text(page, encoding="utf-8")


def _as_data(guard: Guard, prompts: list[str], result: GenerationResult, unguarded: GenerationResult | None) -> dict[str, Any]:
    data = result.as_dict()
    for i, completion in enumerate(data["completions"]):
        completion["prompt"] = prompts[i]
        if unguarded is not None:
            completion["unguarded_text"] = unguarded.texts[i]
    return {"model": guard.lm.name, "policy": guard.policy.name, **data, "counters": guard.counters.as_dict()}


def _read_prompts(argument: str) -> list[str]:
    if argument == "-":
        return _not_empty([sys.stdin.read().rstrip("\n")], "standard input")
    path = Path(argument)
    # a long text isn't a path, and asking the file system about it may fail
    if len(argument) > 255 or "\n" in argument or not path.is_file():
        return _not_empty([argument], "the prompt")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return _not_empty(lines, argument)
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise PolicyError(
                f'{argument}, line {number}: expected a JSON object with the field "prompt" ({type(error).__name__})'
            ) from None
    return _not_empty(prompts, argument)


def _not_empty(prompts: list[str], where: str) -> list[str]:
    from moralguard.errors import PromptError

    if not prompts or any(not prompt for prompt in prompts):
        raise PromptError(f"{where} holds no text; give at least one character to continue")
    return prompts


def _choose_policy(policy: str | None, values: list[str]) -> Policy:
    from moralguard.policy import Policy

    if values and policy is None:
        return Policy.from_values(*values)
    chosen = Policy.load(policy or "detox")
    if not values:
        return chosen
    return chosen.replaced(values=(*chosen.values, *Policy.from_values(*values).values))


def _told(review: ReviewRecord) -> str:
    """What a review did, in a line; no draft's text."""
    scores = ", ".join(f"{value} {probability:.2f}" for value, probability in review.scores.items())
    parts = [", ".join(review.methods), f"{len(review.drafts)} draft{'s' * (len(review.drafts) != 1)}"]
    parts += [f"tokens taken back {review.rollbacks} times"] if review.rollbacks else []
    parts += [f"P(value kept): {scores}"] if scores else []
    parts += [f"refused by {review.refused_by}"] if review.refused else []
    return "review: " + "; ".join([*parts, *review.notes])


def _without_controls(policy: Policy) -> Policy:
    return policy.replaced(name="unguarded", controls=(), fitted=(), review=())
