"""Requests as vLLM's V2 runner names them: by slots that stay, with their tokens in the runner's own buffers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from moralguard.errors import UnsupportedPathError
from moralguard.guard import Guard
from moralguard.serving.vllm_requests import admit
from moralguard.serving.vllm_worker import Worker


@dataclass
class _Request:
    guard: Guard
    temperature: float
    slot: int | None = None  # of the worker, once its prompt has been read
    generated: list[int] = field(default_factory=list)


class SlotRequests:
    """The guarded requests of a runner.

    Args:
        req_states: vLLM's ``LogitsProcRequestState``: prompt lengths and the tokens of every slot; only read.
    """

    def __init__(self, worker: Worker, req_states: Any):
        self.worker, self._states = worker, req_states
        self._requests: dict[int, _Request] = {}

    def add(self, req_idx: int, sampling_params: Any) -> bool:
        """A request in a slot; whoever held it before is gone, for good or until it is added again."""
        before = self._requests.pop(req_idx, None)
        if before is not None and before.slot is not None:
            self.worker.stop(before.slot, before.generated)
        policy_id, strength = admit(self.worker.config, sampling_params)
        if policy_id is None:
            return False
        self._requests[req_idx] = _Request(self.worker.guards.guard(policy_id, strength), sampling_params.temperature or 1.0)
        return True

    def apply(self, logits: torch.Tensor, ctx: Any) -> None:
        """Guard the rows of guarded requests in place; rows of prompts that are only half read stay as they are."""
        if logits.shape[0] != len(ctx.idx_mapping_np):
            raise UnsupportedPathError("vLLM gave several rows of logits a request, which the guard doesn't cover; no speculative decoding")
        rows: list[int] = []
        tokens: dict[int, list[int]] = {}
        temperature: dict[int, float] = {}
        scheduled = set(ctx.idx_mapping_np.tolist())
        for row, index in enumerate(ctx.idx_mapping_np.tolist()):
            request = self._requests.get(index)
            if request is None:
                continue
            prompt, total = int(self._states.prompt_len.np[index]), int(ctx.seq_lens_upper_bound_np[row])
            if total < prompt:
                continue
            self._read(request, index, prompt, total, scheduled)
            if request.slot is not None:
                rows.append(row)
                tokens[request.slot] = request.generated
                temperature[request.slot] = request.temperature
        if rows:
            self.worker.step(logits, rows, tokens, temperature)

    def _take_off(self, scheduled: set[int]) -> None:
        """Park requests that aren't scheduled: V2 doesn't say when one is preempted, and it may be back in another slot."""
        for index, request in self._requests.items():
            if index not in scheduled and request.slot is not None:
                self.worker.stop(request.slot, request.generated)
                request.slot = None

    def _read(self, request: _Request, index: int, prompt: int, total: int, scheduled: set[int]) -> None:
        """Bring the generated tokens up to date: what is new is copied from the device."""
        buffer = self._states.all_token_ids.gpu[index]
        if request.slot is None:
            ids = buffer[:total].tolist()
            request.generated = ids[prompt:]
            if request.generated:
                self._take_off(scheduled)
            request.slot = self.worker.start(request.guard, ids[:prompt], request.generated)
        else:
            known = prompt + len(request.generated)
            request.generated = [*request.generated, *buffer[known:total].tolist()] if total >= known else buffer[prompt:total].tolist()
