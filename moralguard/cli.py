"""The command line: ``moralguard generate`` and ``moralguard policy``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from moralguard import __version__
from moralguard.errors import ControlError, GuardError, PolicyError

if TYPE_CHECKING:
    from moralguard.decoding.records import GenerationResult
    from moralguard.guard import Guard
    from moralguard.policy import Policy

app = typer.Typer(name="moralguard", help="Guard middleware for text generation.", no_args_is_help=True, pretty_exceptions_enable=False)
policy_app = typer.Typer(name="policy", help="List, show and check policies.", no_args_is_help=True)
app.add_typer(policy_app)

_out = Console(highlight=False)
_err = Console(stderr=True, highlight=False)

ModelOption = Annotated[str, typer.Option(help="Demo model, local folder, GGUF file or Hugging Face id.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]


def main() -> None:
    """Entry point: moralguard's own errors become one message and exit code 1."""
    try:
        app()
    except GuardError as error:
        _err.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        _err.print(str(error), markup=False)
        if isinstance(error, ControlError) and error.result is not None:
            for text in error.result.texts:
                _out.print(text, markup=False)
        sys.exit(1)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Show the version and leave.")] = False) -> None:
    if show:
        _out.print(__version__)
        raise typer.Exit


@app.command()
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
    trace: Annotated[Path | None, typer.Option(help="Write a record of every token to this JSON file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message: use the model's chat template.")] = False,
) -> None:
    """Continue a prompt under a guard."""
    from moralguard.guard import Guard
    from moralguard.models import load_model

    prompts = _read_prompts(prompt)
    chosen = _choose_policy(policy, value or [])
    with _err.status("loading the model"):
        lm = load_model(model, dtype=dtype)
        guard = Guard(chosen, lm)
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
        trace.write_text(json.dumps(_as_data(guard, shown, result, unguarded), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if as_json:
        sys.stdout.write(json.dumps(_as_data(guard, shown, result, unguarded), ensure_ascii=False) + "\n")
    elif unguarded is not None and result.traces is not None:
        from moralguard.trace.terminal import comparison

        for text, before, records in zip(shown, unguarded.texts, result.traces, strict=True):
            _out.print(comparison(text + ("\n" if chat else ""), before, records, chosen.name))
    else:
        for text in result.texts:
            _out.print(text, markup=False, soft_wrap=True)


def _run(guard: Guard, inputs: list[Any], seed: int, settings: dict[str, Any], trace: bool, label: str) -> GenerationResult:
    """Generate with a progress bar on the terminal's error stream."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_err, transient=True) as progress:
        bar = progress.add_task(f"generating, {label}", total=len(inputs) * settings["num_return_sequences"])
        update: Callable[[int, int], None] = lambda done, total: progress.update(bar, completed=done, total=total)  # noqa: E731
        return guard.generate(inputs, seed=seed, trace=trace, progress=update, **settings)


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


def _without_controls(policy: Policy) -> Policy:
    return policy.replaced(name="unguarded", controls=())


@policy_app.command("list")
def policy_list() -> None:
    """The built-in policies."""
    from moralguard.policy import Policy, built_in_policies

    table = Table("policy", "controls", "what it does", box=None)
    for name in built_in_policies():
        loaded = Policy.load(name)
        table.add_row(name, ", ".join(c.versioned_name() for c in loaded.effective_controls()), loaded.description)
    _out.print(table)


@policy_app.command("show")
def policy_show(policy: Annotated[str, typer.Argument(help="Built-in name or path.")]) -> None:
    """A policy as YAML, ready to be saved and edited."""
    from moralguard.policy import Policy

    sys.stdout.write(Policy.load(policy).as_yaml())


@policy_app.command("schema")
def policy_schema_command() -> None:
    """JSON schema of policy files, for editors."""
    from moralguard.policy import policy_schema

    sys.stdout.write(json.dumps(policy_schema(), indent=2) + "\n")


@policy_app.command("check")
def policy_check(
    policy: Annotated[str, typer.Argument(help="Built-in name or path.")],
    model: ModelOption = "smollm2-135m",
    dtype: DtypeOption = "auto",
) -> None:
    """Which controls would run on a model, and why one wouldn't; exit code 1 where one can't."""
    from moralguard.guard import bind_control
    from moralguard.models import load_model
    from moralguard.policy import Policy

    loaded = Policy.load(policy)
    with _err.status("loading the model"):
        lm = load_model(model, dtype=dtype)
    table = Table("control", "runs", "why", box=None)
    failed = False
    for control in loaded.effective_controls():
        name = control.versioned_name()
        if not control.active:
            table.add_row(name, "no", "its strength is 0")
            continue
        try:
            bound = bind_control(control, lm, loaded)
        except GuardError as error:
            failed = True
            table.add_row(name, "[red]no[/]", str(error))
            continue
        passes = len({item.key for item in bound.passes})
        processor = "attach, generate" if control.needs.hidden or control.needs.grad else "logits_processor, attach, generate"
        table.add_row(name, "[green]yes[/]", f"{passes} auxiliary pass{'' if passes == 1 else 'es'} a step; through {processor}")
    if not loaded.effective_controls():
        table.add_row("-", "no", "the policy names neither controls nor values: nothing would act")
    _out.print(f"policy [bold]{loaded.name}[/] on [bold]{lm.name}[/] ({type(lm.model).__name__}), on_error: {loaded.on_error}")
    _out.print(table)
    if failed:
        raise typer.Exit(1)
