"""Which folders are LoRA adapters; asked without torch."""

from __future__ import annotations

from pathlib import Path


def is_adapter_folder(path: str | Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format."""
    return (Path(path) / "adapter_config.json").is_file()
