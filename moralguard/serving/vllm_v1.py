"""Requests as vLLM's V1 runner names them: by their place in the batch, with changes told before each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moralguard.errors import BypassError
from moralguard.serving.vllm_requests import admit
from moralguard.serving.vllm_worker import Worker


@dataclass
class _Row:
    slot: int
    output: list[int]  # vLLM's own list, which grows
    temperature: float

    @property
    def generated(self) -> list[int]:
        """Without the placeholders (-1) of tokens that asynchronous scheduling hasn't brought back yet."""
        return [token for token in self.output if token >= 0]


class BatchRequests:
    """The guarded rows of the persistent batch."""

    def __init__(self, worker: Worker):
        self.worker = worker
        self._rows: dict[int, _Row] = {}

    def update(self, batch_update: Any) -> None:
        """Follow what was removed, added and moved, in this order."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._leave(index)
        for index, sampling_params, prompt_ids, output_ids in batch_update.added:
            self._leave(index)  # an added request may replace another
            policy_id, strength = admit(self.worker.config, sampling_params)
            if policy_id is None:
                continue
            guard = self.worker.guards.guard(policy_id, strength)
            row = _Row(-1, output_ids, sampling_params.temperature or 1.0)
            row.slot = self.worker.start(guard, prompt_ids or [], row.generated)
            self._rows[index] = row
        for one, other, direction in batch_update.moved:
            mine, theirs = self._rows.pop(one, None), self._rows.pop(other, None)
            if mine is not None:
                self._rows[other] = mine
            if direction.name == "SWAP" and theirs is not None:
                self._rows[one] = theirs
            elif theirs is not None:
                self.worker.stop(theirs.slot, theirs.generated)

    def _leave(self, index: int) -> None:
        row = self._rows.pop(index, None)
        if row is not None:
            self.worker.stop(row.slot, row.generated)

    def apply(self, logits: torch.Tensor, _: Any) -> None:
        """Guard the rows of guarded requests in place; nothing is done where there are none."""
        if not self._rows:
            return
        rows = sorted(self._rows)
        tokens = {}
        for index in rows:
            row = self._rows[index]
            tokens[row.slot] = row.generated
            if row.output and row.output[-1] < 0:
                self.worker.running.fail(row.slot, "guard", BypassError("vLLM didn't say which token was drawn last"))
        self.worker.step(logits, rows, tokens, {self._rows[index].slot: self._rows[index].temperature for index in rows})
