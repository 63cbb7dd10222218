"""A model on a device that isn't the CPU: nothing the guard makes stays behind, and the texts are the CPU's.

On a machine without a GPU the device is pretended (``pretend_device.py``): what a GPU refuses is refused.
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
import torch

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


@pytest.fixture(
    scope="module",
    params=[
        "pretend",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def told(device: str) -> dict[str, Any]:
    """Case -> what the program says of it. A process of its own, as a pretended device stays registered with torch."""
    done = subprocess.run(
        [sys.executable, HERE / "on_device.py", device],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


def test_the_device_refuses_mixed_operands(told: dict[str, Any]) -> None:
    nothing, right = told["refused"]["here"]
    mistakes, found = told["refused"]["there"]
    assert nothing == []
    assert mistakes == ["sum", "product", "concatenation", "choice", "array"]
    assert found == right


@pytest.mark.parametrize(
    "way", ["generate", "score", "attach", "processor", "slots", "stream", "review", "discriminator", "fit", "captured"]
)
def test_what_runs_on_the_cpu_runs_on_a_device(told: dict[str, Any], way: str) -> None:
    mine = {name: line for name, line in told.items() if name.split()[0] == way}
    assert mine
    errors = {name: line["error"].strip().splitlines()[-1] for name, line in mine.items() if "error" in line}
    assert not errors
    assert [name for name, line in mine.items() if not alike(line["here"], line["there"])] == []


def test_every_control_is_tried(told: dict[str, Any]) -> None:
    assert control_names().keys() <= {name.removeprefix("generate ") for name in told if name.startswith("generate ")}


def test_the_pretended_device_refuses_what_a_graph_cannot_hold(told: dict[str, Any], device: str) -> None:
    assert told["capture mistakes"]["here"] == []
    if device == "pretend":
        assert ["captured graph" in mistake for mistake in told["capture mistakes"]["there"]] == [True] * 3


def test_a_step_waits_for_the_device_once(told: dict[str, Any], device: str) -> None:
    """For its tokens: what is launched before may run behind the Python that launches it."""
    if device == "pretend":
        there = told["waits"]["there"]
        assert there == dict.fromkeys(there, 1.0)
        assert len(there) == 8
