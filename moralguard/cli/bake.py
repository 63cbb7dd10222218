"""``moralguard bake``: a nullspace projection as weights, for stacks that can't run it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moralguard.cli.console import err


def bake(
    model: Annotated[str, typer.Argument(help="Demo model, local folder or Hugging Face id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet, or be empty.")],
    policy: Annotated[str, typer.Option(help="Built-in policy or file, of one nullspace projection.")] = "debias-gender",
    form: Annotated[str, typer.Option(help="checkpoint: a whole model with a changed head; lora: an adapter for the head.")] = "checkpoint",
    dtype: Annotated[str, typer.Option(help="Of the checkpoint: auto, float32 or bfloat16.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")] = False,
) -> None:
    """Write a model, or an adapter, whose head does what a nullspace projection does; any serving stack runs it."""
    from moralguard.export.bake import bake as write
    from moralguard.models import load_model
    from moralguard.policy import Policy

    loaded = Policy.load(policy)
    with err.status("loading the model"):
        lm = load_model(model, dtype=dtype, device="cpu", trust_remote_code=trust_remote_code)
        folder = write(lm, loaded, out, form)  # type: ignore[arg-type]  # a wrong one is refused with a message
    err.print(f"written to {folder}", markup=False, soft_wrap=True)
