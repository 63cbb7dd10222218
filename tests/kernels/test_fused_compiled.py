"""What the compiler makes of the kernels for a GPU that isn't there; ``.ci/run`` does the same for all variants and architectures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton on this platform")


def test_the_full_chain_compiles_without_spills() -> None:
    program = Path(__file__).with_name("compile_ahead.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    only = ["mix-bfloat16", "chain-bfloat16", "score-mix-bfloat16", "noise"]
    command = [sys.executable, "-W", "ignore", str(program), "--arch", "90", "--only", *only]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = ["rectify_kernel", "bound_kernel", "refine_kernel", "split_rows_kernel", "score_kernel", "gumbel_kernel"]
    assert [item["kernel"] for item in found] == kernels
    assert found[-1]["fused_multiply_adds"] == 0, "the noise must round after every step, as the reference does"


def test_no_batch_size_compiles_a_kernel_anew() -> None:
    """As Triton itself tells variants apart: a server's first batch of 16 must not wait for a compiler."""
    program = Path(__file__).with_name("dry_launch.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-W", "ignore", str(program)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *later = [json.loads(line) for line in done.stdout.splitlines()]
    # the base's filters alone, then the whole draw; no log-sums without an attenuation
    assert first == {
        **dict.fromkeys(("bound_kernel", "refine_kernel", "split_rows_kernel"), 2),
        **dict.fromkeys(("rectify_kernel", "score_kernel", "gumbel_kernel"), 1),
        "log_sums_kernel": 0,
    }
    assert later == [first] * 4
