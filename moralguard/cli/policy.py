"""``moralguard policy``: list, show and check policies."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.table import Table

from moralguard.cli.console import DtypeOption, ModelOption, err, out
from moralguard.errors import GuardError

app = typer.Typer(name="policy", help="List, show and check policies.", no_args_is_help=True)


@app.command("list")
def policy_list() -> None:
    """The built-in policies."""
    from moralguard.policy import Policy, built_in_policies

    table = Table("policy", "controls", "what it does", box=None)
    for name in built_in_policies():
        loaded = Policy.load(name)
        table.add_row(name, ", ".join(c.versioned_name() for c in loaded.effective_controls()), loaded.description)
    out.print(table)


@app.command("show")
def policy_show(policy: Annotated[str, typer.Argument(help="Built-in name or path.")]) -> None:
    """A policy as YAML, ready to be saved and edited."""
    from moralguard.policy import Policy

    sys.stdout.write(Policy.load(policy).as_yaml())


@app.command("schema")
def policy_schema_command() -> None:
    """JSON schema of policy files, for editors."""
    from moralguard.policy import policy_schema

    sys.stdout.write(json.dumps(policy_schema(), indent=2) + "\n")


@app.command("check")
def policy_check(
    policy: Annotated[str, typer.Argument(help="Built-in name or path.")],
    model: ModelOption = "smollm2-135m",
    dtype: DtypeOption = "auto",
) -> None:
    """Which controls would run on a model, and why one wouldn't; exit code 1 where one can't."""
    from moralguard.binding import bind_control, bind_gate
    from moralguard.controls.conflicts import check_conflicts
    from moralguard.models import load_model
    from moralguard.policy import Policy

    loaded = Policy.load(policy)
    with err.status("loading the model"):
        lm = load_model(model, dtype=dtype)
    entry, acting = loaded.fitted_for(lm), loaded.for_model(lm)
    table = Table("control", "runs", "why", box=None)
    failed = False
    able = []
    reviews = [method for method in loaded.review if method.active]
    for control in acting.effective_controls():
        name = control.versioned_name()
        if not control.active:
            table.add_row(name, "no", "its strength is 0")
            continue
        try:
            bound = bind_control(control, lm, acting)
        except GuardError as error:
            failed = True
            table.add_row(name, "[red]no[/]", str(error))
            continue
        able.append(bound)
        passes = len({item.key for item in bound.passes})
        processor = (
            "generate"
            if reviews
            else "attach, generate"
            if (control.needs.hidden and not control.own_states) or control.needs.grad
            else "logits_processor, attach, generate"
        )
        table.add_row(name, "[green]yes[/]", f"{passes} auxiliary pass{'' if passes == 1 else 'es'} a step; through {processor}")
    try:
        check_conflicts(acting.name, able)
    except GuardError as error:
        failed = True
        table.add_row("all", "[red]no[/]", str(error))
    for method in reviews:
        failed = failed or lm.tokenizer is None
        why = "judges whole texts; through generate, stream and `moralguard serve`"
        row = ("[red]no[/]", f"{lm.name} has no tokenizer") if lm.tokenizer is None else ("[green]yes[/]", why)
        table.add_row(method.versioned_name(), *row)
    if acting.gate is not None:
        try:
            bind_gate(acting.gate, lm, acting)
            table.add_row("gate", "[green]yes[/]", "controls act where it is open")
        except GuardError as error:
            failed = True
            table.add_row("gate", "[red]no[/]", str(error))
    if not acting.effective_controls() and not reviews:
        table.add_row("-", "no", "the policy names neither controls nor values: nothing would act")
    out.print(f"policy [bold]{loaded.name}[/] on [bold]{lm.name}[/] ({type(lm.model).__name__}), on_error: {loaded.on_error}")
    if loaded.fitted:
        out.print("the controls fitted on this model act" if entry else "general controls act: the policy has none fitted on this model")
    out.print(table)
    if failed:
        raise typer.Exit(1)
