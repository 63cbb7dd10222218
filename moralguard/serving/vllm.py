"""The guard in vLLM, under both interfaces of its logits processors.

    MORALGUARD_SERVING=serving.yaml python -m vllm.entrypoints.openai.api_server --model FOLDER \
        --logits-processors moralguard.serving.vllm:GuardProcessor

Policies come from the operator's file (``serving.config``); a request names one of them in ``extra_args`` (HTTP: ``vllm_xargs``) under
``moralguard``, as a JSON string. Auxiliary passes run in the worker, on the model that vLLM serves or the file's ``model``, loaded by
transformers or ONNX Runtime, with caches of their own. Which requests are running, and their tokens, each of vLLM's two interfaces says
in its own way: ``vllm_v1`` and ``vllm_v2`` translate.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from moralguard.errors import GuardError, UnsupportedPathError
from moralguard.serving.config import ServingConfig
from moralguard.serving.vllm_requests import admit

if TYPE_CHECKING:
    import torch

    from moralguard.serving.vllm_worker import Worker

_log = logging.getLogger(__name__)


def _interfaces() -> tuple[type, ...]:
    """vLLM's abstract classes; either interface may be missing in a version of vLLM."""
    found: list[type] = []
    try:
        from vllm.v1.sample.logits_processor.interface import LogitsProcessor as First

        found.append(First)
    except ImportError:
        _log.debug("this vLLM has no logits processors of the V1 runner")
    try:
        from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as Second

        found.append(Second)
    except ImportError:
        _log.debug("this vLLM has no logits processors of the V2 runner")
    if not found:
        raise UnsupportedPathError("this vLLM has neither of the interfaces that the guard knows (V1, since 0.10; V2, since 0.32)")
    return tuple(found)


class GuardProcessor(*_interfaces()):  # type: ignore[misc]
    """Loaded by vLLM (``--logits-processors``, ``LLM(logits_processors=[...])``), one in every worker.

    Raises:
        PolicyError: at start-up, where the operator's file can't be used or a policy needs what vLLM doesn't offer.
        UnsupportedPathError: at start-up, in a set-up that the guard can't cover (speculative decoding, pipeline parallelism).
    """

    def __init__(self, vllm_config: Any, *runner: Any):
        from moralguard.serving.vllm_worker import Worker

        worker = Worker(ServingConfig.from_environment(), vllm_config)
        self._running: Any
        if len(runner) == 1:  # (req_states,) of the V2 runner; V1 hands over (device, is_pin_memory)
            from moralguard.serving.vllm_v2 import SlotRequests

            self._running = SlotRequests(worker, runner[0])
        else:
            from moralguard.serving.vllm_v1 import BatchRequests

            self._running = BatchRequests(worker)

    @property
    def worker(self) -> Worker:
        """What this process guards with: its guards and their counters."""
        worker: Worker = self._running.worker
        return worker

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Check a request at its admission, in vLLM's front end.

        Raises:
            ValueError: an HTTP 400 that says what was wrong.
        """
        try:
            admit(ServingConfig.from_environment(), sampling_params)
        except GuardError as error:
            raise ValueError(str(error)) from None

    def is_argmax_invariant(self) -> bool:
        """Never: the guard changes which token is the most probable."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """V1: requests that came, left and moved."""
        self._running.update(batch_update)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request in a slot; whether it is guarded."""
        guarded: bool = self._running.add(req_idx, sampling_params)
        return guarded

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Guard the rows of guarded requests in f32[n, V] in place; V2 says in ``ctx`` which row is whose."""
        self._running.apply(logits, ctx)
        return logits
