"""What the commands share: a console for results, one for messages, and options of the same name and meaning."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)

ModelOption = Annotated[str, typer.Option(help="Demo model, local folder, GGUF file or Hugging Face id.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
