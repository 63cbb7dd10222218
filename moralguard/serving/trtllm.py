"""The guard in TensorRT-LLM: a logits processor for each request (PyTorch backend), or one for the whole batch (TensorRT backend).

A processor travels to the engine's worker processes, so it holds names only: the operator's file, and what its request asks for. Each
worker loads the guard's model when it is first called. TensorRT-LLM needs a GPU: this module was checked against stored sources and
documentation, not run in TensorRT-LLM.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from moralguard.errors import ModelError, PolicyError, UnsupportedPathError
from moralguard.guard import Guard
from moralguard.models import load_model
from moralguard.serving.config import ServingConfig
from moralguard.serving.guards import ServedGuards
from moralguard.serving.running_requests import RunningRequests, admitted, check_prompt, end_of_text

_MOST = 1024

_lock = threading.Lock()
_served: dict[str, EngineRequests] = {}


class EngineRequests:
    """The running requests of one engine, by its request ids.

    TensorRT-LLM doesn't say when a request is over, so the newest ``most`` are kept. One that comes back after that is read anew; only a
    gate that stays open would forget that it was.

    Args:
        guards: the served policies, or one guard.
        most: at least the engine's largest batch.

    Raises:
        PolicyError: the model has no end-of-text token, with which requests are ended. UnsupportedPathError: a policy has ``review``.
    """

    def __init__(self, guards: Guard | ServedGuards, most: int = _MOST):
        guards.refuse_review("TensorRT-LLM")
        self._guards, self._most = guards, most
        lm = guards.lm
        self._end_id = end_of_text(lm)
        self._running = RunningRequests(lm)
        self._slots: OrderedDict[int, tuple[int, list[int], str | None]] = OrderedDict()  # request id -> slot, prompt, what it asks
        self._next = 0

    def __len__(self) -> int:
        return len(self._slots)

    def step(
        self,
        req_ids: Sequence[int],
        logits: Sequence[torch.Tensor],
        token_ids: Sequence[Sequence[Sequence[int]]],
        asked: Sequence[str | None],
        temperature: Sequence[float],
    ) -> None:
        """Guard the next token of requests, in place.

        Args:
            logits: f[beams, 1, V] each. token_ids: all ids so far, one list a beam.
            asked: what each request says to the guard. temperature: what will be applied afterwards.
        """
        tokens: dict[int, Sequence[int]] = {}
        warmth: dict[int, float] = {}
        for req_id, beams, request_asks, heat in zip(req_ids, token_ids, asked, temperature, strict=True):
            ids = [int(token) for token in beams[0]]
            slot, prompt, _ = self._slot(req_id, ids, len(beams), request_asks)
            tokens[slot], warmth[slot] = ids[len(prompt) :], heat
        rows = torch.cat([view.reshape(-1, view.shape[-1])[:1] for view in logits])
        self._running.step(tokens, rows, warmth)
        for view, row in zip(logits, rows, strict=True):
            view.copy_(row.expand_as(view))  # several beams were refused: all of them end
        self._forget(len(tokens))

    def _slot(self, req_id: int, ids: list[int], beams: int, asked: str | None) -> tuple[int, list[int], str | None]:
        known = self._slots.get(req_id)
        if known is not None and ids[: len(known[1])] == known[1] and asked == known[2]:
            self._slots.move_to_end(req_id)
            return known
        if known is not None:
            self._running.remove(known[0])
        slot, self._next = self._next, self._next + 1
        self._slots[req_id] = (slot, ids, asked)
        self._slots.move_to_end(req_id)
        try:
            if beams != 1:
                raise UnsupportedPathError(f"the request has {beams} beams, which the guard can't follow in TensorRT-LLM; use one")
            guard = admitted(self._guards, asked)
            if guard is not None:
                check_prompt(guard.lm, ids)
                self._running.add(slot, guard, ids, self._end_id)
        except Exception as error:  # here an exception would end the neighbours, too
            self._running.refuse(slot, error, self._end_id)
        return slot, ids, asked

    def _forget(self, running: int) -> None:
        """Drop the oldest requests, of those that weren't in the newest step."""
        while len(self._slots) > max(self._most, running):
            _, (oldest, _, _) = self._slots.popitem(last=False)
            self._running.remove(oldest)


def _engine_requests(serving_file: str) -> EngineRequests:
    """Those of this process; the guard's model is loaded when they are first asked for."""
    with _lock:
        if serving_file not in _served:
            config = ServingConfig.load(serving_file)
            if config.model is None:
                raise PolicyError(_no_model(serving_file))
            _served[serving_file] = EngineRequests(ServedGuards(config, load_model(config.model), stack="TensorRT-LLM"))
        return _served[serving_file]


def _no_model(serving_file: str) -> str:
    return f"{serving_file} names no `model`; the guard's passes can't run on TensorRT-LLM's, so say where the same weights are"


def _on_stream(stream_ptr: int | None) -> AbstractContextManager[Any]:
    """The PyTorch backend names no stream: its own is the current one."""
    return nullcontext() if stream_ptr is None else torch.cuda.stream(torch.cuda.ExternalStream(stream_ptr))


class RequestProcessor:
    """``SamplingParams(logits_processor=...)`` of one request, or of several under one policy. Made by ``request_processor``."""

    def __init__(self, serving_file: str, asked: str | None = None, temperature: float = 1.0):
        self.serving_file, self.asked, self.temperature = serving_file, asked, temperature

    def __call__(
        self, req_id: int, logits: torch.Tensor, token_ids: list[list[int]], stream_ptr: int | None, client_id: int | None
    ) -> None:
        """Guard f[beams, 1, V] logits in place."""
        with _on_stream(stream_ptr):
            _engine_requests(self.serving_file).step([req_id], [logits], [token_ids], [self.asked], [self.temperature])


class BatchProcessor:
    """``LLM(batched_logits_processor=...)``: every request under the default policy. Made by ``batch_processor``."""

    def __init__(self, serving_file: str):
        self.serving_file = serving_file

    def __call__(
        self,
        req_ids: list[int],
        logits: list[torch.Tensor],
        token_ids: list[list[list[int]]],
        stream_ptr: int | None,
        client_ids: list[int | None],
    ) -> None:
        """Guard a batch of f[beams, 1, V] logits in place."""
        if not req_ids:
            return
        with _on_stream(stream_ptr):
            count = len(req_ids)
            _engine_requests(self.serving_file).step(req_ids, logits, token_ids, [None] * count, [1.0] * count)


def request_processor(serving_file: str, llm_args: Any, asked: str | None = None, *, temperature: float | None = None) -> RequestProcessor:
    """A logits processor for requests to TensorRT-LLM's PyTorch backend.

    Args:
        serving_file: the operator's file, readable by the workers; it names a ``model``.
        llm_args: of the ``tensorrt_llm.LLM``, ``llm.args``.
        asked: what the request says to the guard, ``'{"policy": "strict"}'``.
        temperature: that of its SamplingParams (only PPLM asks).

    Raises:
        PolicyError: the file can't be used, or doesn't serve what is asked for.
        UnsupportedPathError: the engine runs in a way that can't be guarded.
    """
    check_engine(llm_args)
    config = ServingConfig.load(serving_file)
    if config.model is None:
        raise PolicyError(_no_model(serving_file))
    config.admit(asked)
    _approve(RequestProcessor)
    return RequestProcessor(str(serving_file), asked, temperature or 1.0)


def batch_processor(serving_file: str) -> BatchProcessor:
    """A logits processor for all requests to TensorRT-LLM's TensorRT backend; each needs ``apply_batched_logits_processor=True``.

    Raises:
        PolicyError: the file can't be used, or has no default policy.
    """
    config = ServingConfig.load(serving_file)
    if config.model is None or config.default is None:
        raise PolicyError(f"{serving_file} must name a `model` and a `default`: a batch processor isn't told what requests ask for")
    _approve(BatchProcessor)
    return BatchProcessor(str(serving_file))


def check_engine(llm_args: Any) -> None:
    """Raise on engines in which the guard would be passed over, or would see a token too late.

    Args:
        llm_args: an object with TensorRT-LLM's settings as attributes.

    Raises:
        UnsupportedPathError: naming the settings, and what to do.
        ModelError: they aren't there, so that it can't be told.
    """
    if not hasattr(llm_args, "disable_overlap_scheduler"):
        raise ModelError(f"{type(llm_args).__name__} has no disable_overlap_scheduler; expected the args of an LLM of the PyTorch backend")
    found = []
    if not llm_args.disable_overlap_scheduler:
        found.append("overlap scheduler: the processor runs before the last token is known; set disable_overlap_scheduler=True")
    if getattr(llm_args, "speculative_config", None) is not None:
        found.append("speculative_config: drafted tokens are drawn without the processor; leave it out")
    if (getattr(llm_args, "max_beam_width", None) or 1) > 1:
        found.append("max_beam_width: beams can't be followed; use 1")
    if found:
        raise UnsupportedPathError("TensorRT-LLM can't be guarded with " + "; ".join(found))


def _approve(processor: type) -> None:
    """TensorRT-LLM's workers unpickle classes of a list only; there is no list without TensorRT-LLM (as in tests)."""
    import sys

    if "tensorrt_llm" in sys.modules:
        from tensorrt_llm.serialization import register_approved_class

        register_approved_class(processor)
