"""Call the kernels for a GPU that isn't there: Triton tells the variants apart and compiles them; the launch itself does nothing.

Prints one JSON line a batch size: how many variants of each kernel have been compiled by then.
"""

from __future__ import annotations

import json
from typing import Any

from compile_ahead import KERNELS  # first: it sees to it that Triton doesn't interpret

# isort: split
import torch
import triton
from problems import problem
from triton.backends.compiler import GPUTarget

from moralguard_kernels.fused import launch


class Utilities:
    """Of a driver: loads nothing."""

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 2, 64, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "max_num_regs": 65_536, "multiprocessor_count": 132, "warpSize": 32}


class Launcher:
    """Takes what a compiled kernel is called with."""

    def __init__(self, source: Any, metadata: Any):
        pass

    def __call__(self, *_: Any) -> None:
        pass


class Driver:
    """As much of one as a launch asks for."""

    utils = Utilities()
    launcher_cls = Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compiled(kernel: Any) -> int:
    """Variants that Triton keeps of a kernel for device 0."""
    return len(kernel.device_caches[0][0])


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    for rows in (1, 2, 16, 17, 64):
        p = problem("normal", ("mix",), filters=True, warp="mixed", rows=rows, vocabulary=49_152, dtype=torch.bfloat16)
        launch.sample_logits(p.logits, p.seed, p.position, **p.warp, **p.terms)
        launch.rectify_logits(p.logits, **p.terms)
        launch.score_tokens(p.logits, p.position, **p.terms)
        launch.gumbel_noise(p.seed, p.position, torch.zeros(rows, 40, dtype=torch.int64))
        print(json.dumps({name: compiled(getattr(launch, name)) for name in KERNELS}), flush=True)


if __name__ == "__main__":
    main()
