"""The GPU's share of tests and benchmarks, for a machine that holds a GPU, torch, Triton and transformers but reaches no network.

``pack`` runs where there is one, and writes into a folder what such a machine lacks: wheels, the demo model's tokenizer and a few of
its logits (the model itself is too large to carry). ``run`` needs nothing but Python's own library to begin with. Each part writes
its log and its results into OUT, and ends at its time limit with what it has.

    python benchmarks/on_gpu.py pack .gpu [--python 3.12]
    python benchmarks/on_gpu.py run .gpu OUT tests kernels-small kernels-large decode-1b decode-8b [--limit 550]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ("annotated-types", "platformdirs", "pydantic", "pydantic-core", "typing-inspection")
"""Of the package's requirements, those that don't come with torch, Triton and transformers."""
POSITIONS = 24  # of the demo model's logits: 2.3 MB in bfloat16

DECODE = ["benchmarks/decode.py", "--device", "cuda", "--dtype", "bfloat16", "--batch", "1", "8", "64", "--graphs", "--rounds", "5"]
PARTS = {
    "tests": ["-m", "pytest", "-q", "-m", "gpu", "tests/kernels", "tests/test_devices.py"],
    "kernels-quick": ["benchmarks/kernels.py", "--quick", "--real", "{pack}/logits.safetensors", "--out", "{out}"],
    "kernels-small": ["benchmarks/kernels.py", "--batch", "1", "8", "--real", "{pack}/logits.safetensors", "--out", "{out}"],
    "kernels-large": ["benchmarks/kernels.py", "--batch", "64", "256", "--real", "{pack}/logits.safetensors", "--out", "{out}"],
    "decode-1b": [*DECODE, "--shape", "1b", "--tokenizer", "{pack}/tokenizer", "--out", "{out}/decode-cuda-1b.json"],
    "decode-8b": [*DECODE, "--shape", "8b", "--tokenizer", "{pack}/tokenizer", "--out", "{out}/decode-cuda-8b.json"],
}


def digest() -> str:
    """Of the code that is tested and timed, so that a pack made earlier doesn't lend its commit to other code."""
    found = hashlib.sha256()
    for path in sorted(path for name in ("moralguard", "kernels", "benchmarks") for path in (ROOT / name).rglob("*.py")):
        found.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


def pack(folder: Path, python: str) -> None:
    """Fill the folder; needs the package and its constraints."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from moralguard.demo_model import demo_model_folder
    from moralguard.evaluation.environment import environment

    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "--python-version", python]
    command += ["--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64", "-d", str(folder / "wheels")]
    subprocess.run([*command, "-c", str(ROOT / "constraints.txt"), *WHEELS], check=True)
    AutoTokenizer.from_pretrained(demo_model_folder()).save_pretrained(folder / "tokenizer")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from kernels import real_logits

    logits = real_logits(None)
    chosen = logits[torch.linspace(8, len(logits) - 1, POSITIONS).long()]
    save_file({"logits": chosen.to(torch.bfloat16).contiguous()}, folder / "logits.safetensors")
    (folder / "commit").write_text(f"{environment().get('commit', 'unknown')} {digest()}")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB")


def run(folder: Path, out: Path, parts: list[str], limit: float) -> int:
    """How many parts failed, or were stopped."""
    if not (folder / "commit").is_file():
        raise SystemExit(f"{folder} is no pack; make one with: python benchmarks/on_gpu.py pack {folder.name}")
    commit, packed = (folder / "commit").read_text().split()
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    with tempfile.TemporaryDirectory() as packages:
        for wheel in sorted((folder / "wheels").glob("*.whl")):
            zipfile.ZipFile(wheel).extractall(packages)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), packages]),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "MORALGUARD_COMMIT": commit if packed == digest() else f"{commit}+changed",
        }
        environment.pop("TRITON_INTERPRET", None)
        for name in parts:
            command = [sys.executable, *(word.format(pack=folder, out=out) for word in PARTS[name])]
            start = time.monotonic()
            with (out / f"{name}.log").open("w") as log:
                try:
                    code: int | str = subprocess.run(
                        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit, check=False
                    ).returncode
                except subprocess.TimeoutExpired:
                    code = "stopped at its limit"
            failed += code != 0
            print(f"== {name}: {code}, {time.monotonic() - start:.0f} s\n" + (out / f"{name}.log").read_text()[-3000:], flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="gather what the machine lacks")
    packing.add_argument("folder", type=Path)
    packing.add_argument("--python", default="3.12", help="the machine's Python")
    running = commands.add_parser("run", help="tests and benchmarks, on the machine")
    running.add_argument("folder", type=Path)
    running.add_argument("out", type=Path)
    running.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    running.add_argument("--limit", type=float, default=550, help="seconds a part")
    arguments = parser.parse_args()
    if arguments.command == "pack":
        pack(arguments.folder, arguments.python)
    else:
        raise SystemExit(min(run(arguments.folder.resolve(), arguments.out.resolve(), arguments.parts, arguments.limit), 1))


if __name__ == "__main__":
    main()
