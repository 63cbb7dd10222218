"""Proof of application: what the guard did, counted over all threads."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field


@dataclass
class Counters:
    """Counts since the guard was built.

    Attributes:
        requests: continuations started.
        tokens_emitted: tokens drawn from rows that the guard saw being drawn.
        rows_guarded: rows of logits that went through the rectification.
        rows_touched: of these, rows in which a control acted.
        failed_closed: requests ended because a control failed.
        failed_open: control failures passed over because the policy says ``on_error: open``.
        unguarded_tokens: tokens emitted that the guard never saw, passed over because the policy says ``on_error: open``.
    """

    requests: int = 0
    tokens_emitted: int = 0
    rows_guarded: int = 0
    rows_touched: int = 0
    failed_closed: int = 0
    failed_open: int = 0
    unguarded_tokens: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def as_dict(self) -> dict[str, int]:
        with self._lock:
            return {name: value for name, value in vars(self).items() if not name.startswith("_")}
