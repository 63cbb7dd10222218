"""What a result was measured on: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Machine, versions and, in a checkout, the commit; ready for JSON."""
    import torch

    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "transformers", "moralguard")},
        "commit": _commit(),
    }
    return {key: value for key, value in found.items() if value is not None}


def _commit() -> str | None:
    """Of the checkout that the package runs from; elsewhere as ``$MORALGUARD_COMMIT`` says, for files that travelled without it."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return os.environ.get("MORALGUARD_COMMIT")
    told = []
    for arguments in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "moralguard", "kernels"]):
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=here, timeout=30)
        except (OSError, subprocess.TimeoutExpired):  # no git
            return None
        told.append(done.stdout.strip())
    return told[0] + ("+uncommitted" if told[1] else "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # Triton has no wheels for some platforms
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
