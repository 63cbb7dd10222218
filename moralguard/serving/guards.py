"""The guards of a server: one a served policy and strength, bound once and shared by all requests."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any

from moralguard.errors import PolicyError
from moralguard.guard import Guard
from moralguard.serving.config import ServingConfig

_MOST = 64  # guards of strengths of their own that stay bound


class ServedGuards:
    """Guards by policy id and strength. Safe to share between threads.

    Args:
        config: the operator's file.
        lm: the model that controls are bound to.
        lacks: capabilities that the stack doesn't have ("grad", "cache", "hidden"); a policy that needs one is refused here.
        stack: how messages name the stack.

    Raises:
        PolicyError: a policy can't be bound, or needs what the stack lacks.
    """

    def __init__(self, config: ServingConfig, lm: Any, *, lacks: Sequence[str] = (), stack: str = "this server"):
        self.config, self.lm = config, lm
        self._lacks, self._stack = tuple(lacks), stack
        self._lock = threading.Lock()
        self._served = {served.id: self._bind(served.id, 1.0) for served in config.policies}
        self._scaled: OrderedDict[tuple[str, float], Guard] = OrderedDict()
        self._unbound: Counter[tuple[str, str]] = Counter()  # what guards counted that are no longer bound

    def _bind(self, policy_id: str, strength: float) -> Guard:
        guard = Guard(self.config.policy(policy_id).scaled(strength), self.lm)
        for control in guard.controls:
            missing = [name for name in self._lacks if getattr(control.settings.needs, name)]
            if missing:
                raise PolicyError(
                    f"served policy {policy_id!r}: control {control.name!r} needs {', '.join(missing)}, which {self._stack} doesn't offer; "
                    "drop the control, or serve the policy with `moralguard serve`"
                )
        return guard

    def guard(self, policy_id: str, strength: float = 1.0) -> Guard:
        """The guard of a served policy.

        Raises:
            PolicyError: no such policy, or it can't be bound at this strength.
        """
        if strength == 1:
            if policy_id not in self._served:
                raise PolicyError(f"no policy {policy_id!r} is served")
            return self._served[policy_id]
        with self._lock:
            key = (policy_id, strength)
            if key not in self._scaled:
                self._scaled[key] = self._bind(policy_id, strength)
                if len(self._scaled) > _MOST:
                    (gone, _), oldest = self._scaled.popitem(last=False)
                    self._unbound.update({(gone, name): count for name, count in oldest.counters.as_dict().items()})
            self._scaled.move_to_end(key)
            return self._scaled[key]

    def refuse_review(self, path: str) -> None:
        """For stacks that see tokens and no whole texts; as ``Guard.refuse_review``.

        Raises:
            UnsupportedPathError: a served policy has review methods that act.
        """
        for guard in self._served.values():
            guard.refuse_review(path)

    def counters(self) -> dict[str, dict[str, int]]:
        """What was guarded so far, by policy id; strengths of one policy are added up."""
        totals = {policy_id: guard.counters.as_dict() for policy_id, guard in self._served.items()}
        with self._lock:
            for (policy_id, _), guard in self._scaled.items():
                for name, count in guard.counters.as_dict().items():
                    totals[policy_id][name] += count
            for (policy_id, name), count in self._unbound.items():
                totals[policy_id][name] += count
        return totals
