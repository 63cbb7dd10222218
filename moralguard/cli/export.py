"""``moralguard export``: an ONNX decoder from a Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moralguard.cli.console import err


def export(
    model: Annotated[str, typer.Argument(help="Demo model, local folder or Hugging Face id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet, or be empty.")],
    adapter: Annotated[str | None, typer.Option(help="LoRA to merge: pack:NAME, a pack's folder or a PEFT folder.")] = None,
    dtype: Annotated[str, typer.Option(help="Of weights, cache and logits: float32 or float16.")] = "float32",
    opset: Annotated[int, typer.Option(help="Of the ai.onnx operators, 18 to 23.")] = 20,
    logits: Annotated[str, typer.Option(help="last: of the last position only; all: of every position.")] = "last",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")] = False,
) -> None:
    """Write a model as ONNX, with cache and last hidden state, and compare it with PyTorch; the guard runs it without torch."""
    from moralguard.export.folder import export_model
    from moralguard.models import load_model

    with err.status("loading the model") as status:
        lm = load_model(model, dtype="float32", device="cpu", trust_remote_code=trust_remote_code)
        done = export_model(
            lm,
            out,
            adapter=adapter,
            dtype=dtype,
            opset=opset,
            logits=logits,  # type: ignore[arg-type]  # a wrong one is refused with a message
            report=status.update,
        )
    err.print(f"written to {done.folder}; logits within {done.difference.logits:.1g} of PyTorch's", markup=False, soft_wrap=True)
    if not done.tokenizer:
        err.print("no tokenizer.json lies there, so prompts will be token ids", markup=False)
