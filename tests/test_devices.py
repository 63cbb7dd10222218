"""A model on a device that isn't the CPU: nothing the guard makes stays behind, and the texts are the CPU's.

The device is pretended (``pretend_device.py``): what a GPU refuses is refused, on a machine without one.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moralguard.controls.registry import control_names

HERE = Path(__file__).parent


def alike(here: Any, there: Any) -> bool:
    if isinstance(here, list):
        return len(here) == len(there) and all(map(alike, here, there))
    if isinstance(here, dict):
        return here.keys() == there.keys() and all(alike(value, there[name]) for name, value in here.items())
    if isinstance(here, float):
        return math.isclose(here, there, rel_tol=1e-3, abs_tol=1e-4)
    return bool(here == there)


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """Case -> what the program says of it. A process of its own, as the device stays registered with torch."""
    done = subprocess.run(
        [sys.executable, HERE / "on_pretend_device.py"],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


def test_the_pretended_device_refuses_what_a_gpu_refuses(told: dict[str, Any]) -> None:
    nothing, right = told["refused"]["here"]
    mistakes, found = told["refused"]["there"]
    assert nothing == []
    assert mistakes == ["sum", "product", "concatenation", "choice", "array"]
    assert found == right


@pytest.mark.parametrize("way", ["generate", "score", "attach", "processor", "slots", "stream", "review", "discriminator", "fit"])
def test_what_runs_on_the_cpu_runs_on_a_device(told: dict[str, Any], way: str) -> None:
    mine = {name: line for name, line in told.items() if name.split()[0] == way}
    assert mine
    errors = {name: line["error"].strip().splitlines()[-1] for name, line in mine.items() if "error" in line}
    assert not errors
    assert [name for name, line in mine.items() if not alike(line["here"], line["there"])] == []


def test_every_control_is_tried(told: dict[str, Any]) -> None:
    assert control_names().keys() <= {name.removeprefix("generate ") for name in told if name.startswith("generate ")}


def test_what_the_benchmark_captures_never_waits(told: dict[str, Any]) -> None:
    assert "error" not in told["captured"], told["captured"]["error"]
    (here, nothing), (there, refused) = told["captured"]["here"], told["captured"]["there"]
    assert nothing == []
    assert refused == [True] * 3
    assert here == there
