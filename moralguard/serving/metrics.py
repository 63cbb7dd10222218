"""Prometheus metrics under ``moralguard:``, labelled by policy ("none" is unguarded), never by request or text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from moralguard.serving.generation import Generation

_STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_REQUEST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """The metrics of one server, in a registry of its own. Safe to share between threads."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        by_policy = ("policy",)
        self._requests = Counter(
            "moralguard:requests", "Continuations that ended.", ("policy", "decision", "finish_reason"), registry=registry
        )
        self._tokens = Counter("moralguard:tokens", "Tokens drawn.", by_policy, registry=registry)
        self._intervened = Counter("moralguard:intervened_tokens", "Tokens at which a control acted.", by_policy, registry=registry)
        self._failed_open = Counter("moralguard:failed_open", "Control failures passed over.", by_policy, registry=registry)
        self._failed_closed = Counter("moralguard:failed_closed", "Continuations denied after a failure.", by_policy, registry=registry)
        self._rejected = Counter("moralguard:rejected", "Requests answered with an error.", ("status",), registry=registry)
        self._step = Histogram("moralguard:step_seconds", "Time of one step of all rows.", buckets=_STEP, registry=registry)
        self._rows = Histogram("moralguard:step_rows", "Rows of one step.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=registry)
        self._first = Histogram(
            "moralguard:time_to_first_token_seconds", "From arrival on.", by_policy, buckets=_REQUEST, registry=registry
        )
        self._whole = Histogram("moralguard:request_seconds", "From arrival to the end.", by_policy, buckets=_REQUEST, registry=registry)
        self._running = Gauge("moralguard:requests_running", "Continuations that hold a slot.", registry=registry)
        self._waiting = Gauge("moralguard:requests_waiting", "Continuations that wait for a slot.", registry=registry)

    def watch(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Where the gauges read what runs and waits."""
        self._running.set_function(running)
        self._waiting.set_function(waiting)

    def step(self, seconds: float, rows: int) -> None:
        self._step.observe(seconds)
        self._rows.observe(rows)

    def tokens(self, policy: str | None, drawn: int, intervened: int) -> None:
        label = policy or "none"
        self._tokens.labels(label).inc(drawn)
        self._intervened.labels(label).inc(intervened)

    def ended(self, generation: Generation) -> None:
        """A continuation is over."""
        label = generation.policy or "none"
        self._requests.labels(label, generation.decision, generation.finish_reason).inc()
        self._failed_open.labels(label).inc(generation.failed_open)
        self._failed_closed.labels(label).inc(int(generation.decision == "deny" and generation.reason != "review"))
        if generation.first_token:
            self._first.labels(label).observe(generation.first_token - generation.submitted)
        self._whole.labels(label).observe(generation.ended - generation.submitted)

    def rejected(self, status: int) -> None:
        """A request was answered with an error of this HTTP status."""
        self._rejected.labels(str(status)).inc()

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)
