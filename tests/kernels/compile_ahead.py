"""Compile every kernel variant for GPUs that aren't there, and print what the compiler made of it as JSON lines.

    python tests/kernels/compile_ahead.py [--arch 80 90 100] [--only NAME ...] [--out FILE]

The launchers run on tensors without memory and with the kernels replaced by recorders, so that what is compiled is what would be launched.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported

import torch
import triton
from sass_paths import instructions_to_arrival
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moralguard_kernels.fused import launch

# Registers a thread that leave room for at least one program an SM, with head-room over what is seen, as compilers differ.
CEILINGS = {
    "bound_kernel": 208,
    "refine_kernel": 248,
    "split_rows_kernel": 248,
    "rectify_kernel": 176,
    "score_kernel": 248,  # 235 with Triton 3.6 where every term is there
    "log_sums_kernel": 64,
    "gumbel_kernel": 64,
}
# What every token of a tile goes through: an exponential where masses are summed, a store of whole vectors where logits are written.
# A variant whose summary or terms take exponentials before has a way that is shorter than its own: its number is a lower bound.
ON_THE_WAY = {"bound_kernel": "MUFU.EX2", "score_kernel": "MUFU.EX2", "log_sums_kernel": "MUFU.EX2", "rectify_kernel": r"STG\S*\.128"}
STREAMING = tuple(ON_THE_WAY)
KERNELS = ("bound_kernel", "refine_kernel", "split_rows_kernel", "rectify_kernel", "score_kernel", "log_sums_kernel", "gumbel_kernel")
COLUMNS = (
    "variant", "kernel", "arch", "num_warps", "enable_fp_fusion", "registers", "stack", "shared", "spills", "wide_loads",
    "fused_multiply_adds", "instructions", "thread_instructions_a_token",
)  # fmt: skip
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass
class Launch:
    kernel: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]


class Recorder:
    """Stands in for a kernel and notes its launches."""

    def __init__(self, kernel: Any, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **keywords: self.launches.append(Launch(self.kernel, args, keywords))


def record(call: Callable[[], Any]) -> list[Launch]:
    launches: list[Launch] = []
    kept = {name: getattr(launch, name) for name in KERNELS}
    for name, kernel in kept.items():
        setattr(launch, name, Recorder(kernel, launches))
    try:
        call()
    finally:
        for name, kernel in kept.items():
            setattr(launch, name, kernel)
    return launches


def signature_of(value: Any, path: tuple[int, ...], constants: dict[tuple[int, ...], Any], aligned: dict[tuple[int, ...], Any]) -> Any:
    """Triton's type of an argument, as its own launcher would find it."""
    if isinstance(value, tuple):
        parts = [signature_of(item, (*path, i), constants, aligned) for i, item in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor):
        aligned[path] = [["tt.divisibility", 16]]
        return TYPES[value.dtype]
    if value % 16 == 0:
        aligned[path] = [["tt.divisibility", 16]]
    return "i32"


def compile_launch(item: Launch, arch: int) -> dict[str, Any]:
    keywords = dict(item.keywords)
    options = {name: keywords.pop(name) for name in ("num_warps", "maxnreg", "enable_fp_fusion") if name in keywords}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    signature = {}
    for i, name in enumerate(item.kernel.arg_names):
        if name in keywords:
            constants[i,] = keywords[name]
            signature[name] = "constexpr"
        elif item.kernel.params[i].do_not_specialize:
            signature[name] = "i32"
        else:
            signature[name] = signature_of(item.args[i], (i,), constants, aligned)
    compiled = triton.compile(ASTSource(item.kernel, signature, constants, aligned), target=GPUTarget("cuda", arch, 32), options=options)
    found, sass = inspect(compiled.asm["cubin"])
    name = item.kernel.__name__
    if name in STREAMING:
        issued = instructions_to_arrival(sass, ON_THE_WAY[name])
        found["thread_instructions_a_token"] = None if issued is None else round(issued * 32 * options["num_warps"] / keywords["TILE"], 1)
    return {"kernel": name, "arch": arch, **options, **found}


def inspect(cubin: bytes) -> tuple[dict[str, Any], str]:
    """Numbers of a compiled kernel, and its disassembly."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": int(re.search(r"SHARED:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "wide_loads": len(re.findall(r"\bLDG\S*\.128\b", code)),
        "fused_multiply_adds": len(re.findall(r"\bFFMA\b", code)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M)),
    }
    return numbers, code


def faults(found: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled variant; nothing, as it should be."""
    wrong = []
    if found["spills"] or found["stack"]:
        wrong.append(f"{found['spills']} spills, {found['stack']} bytes of stack")
    if found["registers"] > CEILINGS[found["kernel"]]:
        wrong.append(f"{found['registers']} registers, more than {CEILINGS[found['kernel']]}")
    if found["kernel"] in STREAMING and not found["wide_loads"]:
        wrong.append("logits aren't loaded 16 bytes at a time")
    return wrong


def variants() -> dict[str, Callable[[], Any]]:
    """Name -> a call of a launcher."""
    rows, vocabulary = 64, 131072
    found: dict[str, Callable[[], Any]] = {}

    def whole(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, vocabulary, dtype=dtype)

    def per_slot(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(rows, dtype=dtype)

    def mix(dtype: torch.dtype, *groups: int) -> dict[str, Any]:
        return {
            "sources": [whole(dtype) for _ in range(sum(groups))],
            "groups": list(groups),
            "weights": torch.empty(rows, sum(groups) + len(groups)),
        }

    noise = {"seed": per_slot(torch.int64), "position": per_slot(torch.int64)}
    warp = {"temperature": per_slot(), "top_k": per_slot(torch.int32), "top_p": per_slot(), "min_p": per_slot()}
    base = {"base_top_k": per_slot(torch.int32), "base_top_p": per_slot(), "base_min_p": per_slot()}
    low_rank = {"projection": torch.empty(16, vocabulary).t(), "coefficients": torch.empty(rows, 16)}
    candidates = {"candidate_ids": torch.empty(rows, 200, dtype=torch.int64), "candidate_bias": torch.empty(rows, 200)}
    slots = {"slots": per_slot(torch.int32)}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        attenuation = {
            "biased": [whole(dtype) for _ in range(6)],
            "decay_constant": per_slot(),
            "epsilon": per_slot(),
        }
        logits = whole(dtype)
        sample = partial(launch.sample_logits, logits, counterfactual=True, **noise)
        score = partial(launch.score_tokens, logits, per_slot(torch.int64))
        found |= {
            f"mix-{name}": partial(launch.rectify_logits, logits, **mix(dtype, 2)),
            f"guard-chain-{name}": partial(launch.sample_logits, logits, **noise, **warp, **base, **mix(dtype, 2), summary=False),
            f"chain-{name}": partial(sample, **warp, **base, **mix(dtype, 2)),
            f"dense-chain-{name}": partial(sample, **warp, **mix(dtype, 2, 2), **slots),
            f"nullspace-chain-{name}": partial(sample, **warp, **low_rank),
            f"self-debias-chain-{name}": partial(sample, **warp, **attenuation),
            f"candidates-chain-{name}": partial(sample, **warp, **base, **candidates, keep_rest=False),
            f"score-{name}": score,
            f"score-mix-{name}": partial(score, **mix(dtype, 2, 2), **slots),
            f"score-nullspace-{name}": partial(score, **low_rank),
            f"score-self-debias-{name}": partial(score, **attenuation),
            f"score-candidates-{name}": partial(score, **candidates, keep_rest=False),
        }
    everything = {**mix(torch.bfloat16, 2, 2), **low_rank, **attenuation, **base, **slots}
    found["everything"] = partial(launch.rectify_logits, whole(torch.bfloat16), **everything, **candidates)
    found["everything-score"] = partial(launch.score_tokens, whole(torch.bfloat16), per_slot(torch.int64), **everything, **candidates)
    found["everything-draw"] = partial(launch.sample_logits, whole(torch.bfloat16), **noise, **warp, **everything)
    found["free-draw"] = partial(launch.sample_logits, whole(torch.bfloat16), **noise, temperature=per_slot())
    found["noise"] = partial(launch.gumbel_noise, per_slot(torch.int64), per_slot(torch.int64), torch.empty(rows, 4096, dtype=torch.int64))
    return found


def main() -> None:
    """Exits with 1 where a variant is at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--out", type=Path, help="CSV file for the numbers")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with torch.device("meta"):  # shapes, types and strides are all that compiling needs
        calls = variants()
    for name, call in calls.items():
        if arguments.only is None or name in arguments.only:
            with torch.device("meta"):
                launches = record(call)
            for item in launches:
                for arch in arguments.arch:
                    found = {"variant": name, **compile_launch(item, arch)}
                    rows.append({**found, "faults": faults(found)})
                    print(json.dumps(rows[-1]), flush=True)
    if arguments.out is not None:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*COLUMNS, "triton"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows({**row, "triton": triton.__version__} for row in rows)
    if bad := sum(bool(row["faults"]) for row in rows):
        raise SystemExit(f"{bad} variants spill, take too many registers or load logits in small pieces")


if __name__ == "__main__":
    main()
