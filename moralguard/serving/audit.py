"""An append-only audit log: JSON lines, each chained to the one before it by SHA-256.

A line's ``hash`` covers its own fields and, through ``previous``, every line before it, so that a line that was changed, removed, moved
or cut shows. What is missing from the end doesn't: keep the newest hash (``AuditLog.head``, ``moralguard audit verify``) elsewhere.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from moralguard.errors import DataError, GuardError

START = "0" * 64
"""What the first line names as the hash before it."""


class AuditError(GuardError):
    """An audit log can't be written or continued."""


@dataclass(frozen=True)
class Verified:
    """What a log turned out to be.

    Attributes:
        lines: lines that are sound, from the first on.
        head: hash of the last of them.
        problem: what is wrong with the next line, which it names; None where the whole log is sound.
    """

    lines: int
    head: str
    problem: str | None = None


class AuditLog:
    """A log that one process writes. Safe to share between threads.

    Args:
        path: the file; an existing log is continued, after its whole chain was checked.
        key: hashes of token ids are HMACs under it, so that nobody without it can tell a prompt by trying; plain SHA-256 without one.
        text: write prompts and outputs, too. Only where that is wanted.

    Raises:
        AuditError: another process writes it, it can't be opened, or it isn't sound.
    """

    def __init__(self, path: str | Path, *, key: bytes | None = None, text: bool = False):
        self.path, self.text = Path(path), text
        self._key, self._lock = key, threading.Lock()
        if not self.path.parent.is_dir():
            raise AuditError(f"the audit log {str(path)!r} can't be opened: its folder isn't there; make it first")
        self._owned = FileLock(f"{self.path}.lock")
        try:
            self._owned.acquire(timeout=0)
        except Timeout:
            raise AuditError(f"the audit log {str(path)!r} can't be continued: another process writes it; give another file") from None
        except OSError as error:
            raise AuditError(f"the audit log {str(path)!r} can't be locked: {error.strerror}") from None
        try:
            known = verify(self.path) if self.path.exists() else Verified(0, START)
            if known.problem is not None:
                raise AuditError(f"{path} can't be continued: {known.problem}. Keep it as evidence and give another file")
            self._file = self.path.open("ab")
        except OSError as error:
            self._owned.release()
            raise AuditError(f"the audit log {str(path)!r} can't be opened: {error.strerror}") from None
        except GuardError:
            self._owned.release()
            raise
        self._lines, self._head = known.lines, known.head

    @property
    def head(self) -> str:
        """Hash of the newest line."""
        return self._head

    def digest(self, ids: Sequence[int]) -> str:
        """Hash of token ids, 4 bytes each, little end first; an HMAC where the log has a key."""
        data = b"".join(int(i).to_bytes(4, "little") for i in ids)
        return hashlib.sha256(data).hexdigest() if self._key is None else hmac.new(self._key, data, hashlib.sha256).hexdigest()

    def write(self, fields: Mapping[str, Any]) -> None:
        """Append a line with these fields (JSON values) and the time.

        Raises:
            AuditError: the file can't be written.
        """
        with self._lock:
            line = {"line": self._lines + 1, "time": datetime.now(UTC).isoformat(timespec="microseconds"), **fields, "previous": self._head}
            line["hash"] = line_hash(line)
            try:
                self._file.write(canonical(line) + b"\n")
                self._file.flush()
            except (OSError, ValueError) as error:
                raise AuditError(f"the audit log {str(self.path)!r} can't be written: {type(error).__name__}") from None
            self._lines, self._head = self._lines + 1, line["hash"]

    def close(self) -> None:
        with self._lock:
            self._file.close()
            self._owned.release()


def canonical(line: Mapping[str, Any]) -> bytes:
    """The one JSON form that is hashed and written: keys sorted, no spaces, ASCII."""
    return json.dumps(line, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def line_hash(line: Mapping[str, Any]) -> str:
    """SHA-256 over the hash of the line before and this line's own JSON, without its hash."""
    own = {key: value for key, value in line.items() if key != "hash"}
    return hashlib.sha256(str(line.get("previous")).encode() + canonical(own)).hexdigest()


def verify(path: str | Path, *, head: str | None = None) -> Verified:
    """Check a log from its first line on.

    Args:
        head: a hash that was kept elsewhere; a log that doesn't hold it has lost its end.

    Raises:
        DataError: the file can't be read.
    """
    lines, known, found = 0, START, head is None
    try:
        with Path(path).open("rb") as file:
            for raw in _lines(file):
                problem = _problem(raw, lines + 1, known)
                if problem is not None:
                    return Verified(lines, known, f"line {lines + 1}: {problem}")
                lines, known = lines + 1, json.loads(raw)["hash"]
                found = found or known == head
    except OSError as error:
        raise DataError(f"the audit log {str(path)!r} can't be read: {error.strerror}") from None
    if not found:
        return Verified(lines, known, f"line {lines + 1}: missing: the log ends before the line whose hash is {head}")
    return Verified(lines, known)


def _lines(file: BinaryIO) -> Iterator[bytes]:
    yield from file


def _problem(raw: bytes, number: int, before: str) -> str | None:
    if not raw.endswith(b"\n"):
        return "it is cut off (no line break at its end)"
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return "it isn't JSON: it was cut off or changed"
    if not isinstance(line, dict) or not {"line", "previous", "hash"} <= line.keys():
        return "it isn't a line of an audit log (no line, previous and hash)"
    try:
        sound = raw == canonical(line) + b"\n" and line["hash"] == line_hash(line)
    except (ValueError, RecursionError):
        sound = False
    if not sound:
        return "it was changed: its hash isn't that of its fields"
    if line["line"] != number:
        return f"it says that it is line {line['line']}: lines were removed, added or moved"
    if line["previous"] != before:
        return "it doesn't follow the line before it: lines were removed, changed or moved"
    return None
