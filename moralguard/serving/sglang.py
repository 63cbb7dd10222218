"""The guard in SGLang, as a sampling backend: ``--sampling-backend moralguard``.

SGLang loads ``register`` in each of its processes (entry-point group ``sglang.srt.plugins``). It does nothing unless ``MORALGUARD_SERVING``
names the operator's file. A sampler is handed rows of logits but not whose they are, so a hook notes the requests of each forward pass.
Requests name a policy in ``custom_params``: ``{"moralguard": {"policy": "strict", "strength": 1.5}}``, as data, so that SGLang's custom
logit processors (pickled code in requests) stay off.

SGLang itself is imported inside functions only. It needs a GPU: this module was checked against the released sources, not run in SGLang.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moralguard.errors import BypassError, UnsupportedPathError
from moralguard.guard import Guard
from moralguard.models import load_model
from moralguard.serving.config import ENVIRONMENT, ServingConfig
from moralguard.serving.guards import ServedGuards
from moralguard.serving.running_requests import RunningRequests, admitted, check_prompt, end_of_text

BACKEND = "moralguard"
"""The value of ``--sampling-backend``."""

ARGUMENT = "moralguard"
"""The key of ``custom_params`` with what a request says to the guard."""

PASS = "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new"
REQUEST = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"
"""What is hooked: where a forward pass is described, and where a request is checked."""

_NOTE = "moralguard_rows"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """Whose token a row of logits gives.

    Attributes:
        request: SGLang's ``Req``.
        length: tokens that the forward pass has read of it; None where SGLang doesn't say.
    """

    request: Any
    length: int | None


class RequestRows:
    """Guards rows of logits, told by SGLang's requests.

    Args:
        guards: the served policies, or one guard.

    Raises:
        PolicyError: the model has no end-of-text token, with which requests are ended. UnsupportedPathError: a policy has ``review``.
    """

    def __init__(self, guards: Guard | ServedGuards):
        guards.refuse_review("SGLang")
        self._guards, lm = guards, guards.lm
        self._end_id = end_of_text(lm)
        self._running = RunningRequests(lm)
        self._slots: dict[str, tuple[int, weakref.ref[Any]]] = {}
        self._next = 0

    def __len__(self) -> int:
        """Requests that run now."""
        return len(self._slots)

    def apply(self, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        """Guard the rows in place.

        Args:
            logits: f[n, V]. rows: whose they are, in order.

        Raises:
            UnsupportedPathError: there are more or fewer rows than requests.
        """
        if logits.shape[0] != len(rows):
            raise UnsupportedPathError(
                f"SGLang sampled {logits.shape[0]} rows for {len(rows)} requests; this way of decoding can't be guarded (speculative?)"
            )
        self._forget()
        tokens: dict[int, Sequence[int]] = {}
        temperature: dict[int, float] = {}
        for i, row in enumerate(rows):
            request = row.request
            known = len(request.origin_input_ids) + len(request.output_ids)
            slot = self._slot(request)
            if row.length is not None and row.length < known:  # a chunk of its prompt: SGLang discards the token
                tokens[-1 - i] = ()
                continue
            if row.length is not None and row.length > known and slot in self._running:
                self._running.miss(slot, BypassError("SGLang samples before it knows the last token (overlap schedule)"))
                if self._running.is_open(slot):
                    tokens[-1 - i] = ()
                    continue
            tokens[slot] = list(request.output_ids)
            temperature[slot] = float(request.sampling_params.temperature)
        self._running.step(tokens, logits, temperature)
        return logits

    def _slot(self, request: Any) -> int:
        slot, known = self._slots.get(request.rid, (-1, None))
        if known is not None and known() is request:
            return slot
        self._running.remove(slot)
        slot, self._next = self._next, self._next + 1
        self._slots[request.rid] = (slot, weakref.ref(request))
        end_id = min(request.eos_token_ids or (), default=self._end_id)
        try:
            guard = admitted(self._guards, asked(request.sampling_params.custom_params))
            if guard is not None:
                check_prompt(guard.lm, request.origin_input_ids)
                self._running.add(slot, guard, list(request.origin_input_ids), end_id)
        except Exception as error:  # here an exception would end the server; the request alone ends
            self._running.refuse(slot, error, end_id)
        return slot

    def _forget(self) -> None:
        """Drop requests that are over, or that nobody holds any more (aborted while they waited)."""
        for rid, (slot, known) in list(self._slots.items()):
            request = known()
            if request is None or request.finished():
                self._running.remove(slot)
                del self._slots[rid]


def asked(custom_params: Mapping[str, Any] | None) -> Any:
    """What a request says to the guard; None where it says nothing."""
    return custom_params.get(ARGUMENT) if isinstance(custom_params, Mapping) else None


def note_rows(result: Any, _kind: Any, batch: Any, *_args: Any, **_kwargs: Any) -> None:
    """After ``ForwardBatch.init_new``: whose rows its sampler will see, noted where the sampler finds it."""
    if getattr(result, "sampling_info", None) is None:
        return
    lengths = getattr(result, "seq_lens_cpu", None)
    known = [None] * len(batch.reqs) if lengths is None else [int(length) for length in lengths.tolist()]
    setattr(result.sampling_info, _NOTE, tuple(Row(request, length) for request, length in zip(batch.reqs, known, strict=False)))


def noted_rows(sampling_info: Any) -> tuple[Row, ...]:
    """What ``note_rows`` noted.

    Raises:
        UnsupportedPathError: nothing was, so that the rows can't be told.
    """
    rows: tuple[Row, ...] | None = getattr(sampling_info, _NOTE, None)
    if rows is None:
        raise UnsupportedPathError(
            "SGLang samples a batch that wasn't made by ForwardBatch.init_new; this way of decoding can't be guarded"
        )
    return rows


def check_request(_result: Any, _manager: Any, obj: Any, *_args: Any, **_kwargs: Any) -> None:
    """After SGLang's own check of a request, in the process that answers clients: an error here is the client's (HTTP 400).

    Raises:
        PolicyError: the request asks for what isn't served.
    """
    from sglang.srt.runtime_context import get_exec

    if get_exec().kernel.sampling_backend != BACKEND:
        return
    settings = getattr(obj, "sampling_params", None)
    if isinstance(settings, Mapping):
        _config().admit(asked(settings.get("custom_params")))


_known_configs: dict[str, ServingConfig] = {}


def _config() -> ServingConfig:
    path = os.environ[ENVIRONMENT]
    if path not in _known_configs:
        _known_configs[path] = ServingConfig.from_environment()
    return _known_configs[path]


def refuse_modes(settings: Mapping[str, Any]) -> None:
    """Raise on ways of running SGLang in which the guard would be passed over, or would see a token too late.

    Args:
        settings: SGLang's, by name; those that are missing are off.

    Raises:
        UnsupportedPathError: naming the setting, and what to do.
    """
    reasons = {
        "speculative_algorithm": "draft tokens are verified without the sampler; drop --speculative-algorithm",
        "overlap_schedule": "the sampler runs before the last token is known; add --disable-overlap-schedule, or set "
        "SGLANG_ENABLE_DELAY_SAMPLE=1",
        "pipeline_parallel": "the sampler's rank learns tokens late; use --pp-size 1",
        "dp_attention": "each rank samples a part of the batch; drop --enable-dp-attention",
        "disaggregation_mode": "a request's first token is sampled in another server; drop --disaggregation-mode",
        "dllm_algorithm": "diffusion models sample many positions at once; drop --dllm-algorithm",
    }
    found = [f"{name}: {reason}" for name, reason in reasons.items() if settings.get(name)]
    if found:
        raise UnsupportedPathError("SGLang can't be guarded with " + "; ".join(found))


def _settings() -> dict[str, Any]:
    """SGLang's resolved settings that decide whether it can be guarded."""
    from sglang.srt.environ import envs
    from sglang.srt.layers.dp_attention import is_dp_attention_enabled
    from sglang.srt.runtime_context import get_disagg, get_exec, get_parallel, get_schedule, get_spec

    mode = get_disagg().disaggregation_mode
    return {
        "speculative_algorithm": get_spec().speculative_algorithm,
        "overlap_schedule": not get_schedule().disable_overlap_schedule and not envs.SGLANG_ENABLE_DELAY_SAMPLE.get(),
        "pipeline_parallel": get_parallel().pp_size > 1,
        "dp_attention": is_dp_attention_enabled(),
        "disaggregation_mode": mode if mode != "null" else None,
        "dllm_algorithm": get_exec().dllm.dllm_algorithm,
    }


def create_sampler() -> Any:
    """SGLang's sampler with the guard in front of it; the factory of ``--sampling-backend moralguard``.

    Raises:
        UnsupportedPathError: SGLang runs in a way that can't be guarded, or the hook isn't in place.
        PolicyError: the operator's file, or a policy in it, can't be used.
    """
    from sglang.srt.layers.sampler import Sampler
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.runtime_context import get_model

    refuse_modes(_settings())
    if PASS not in HookRegistry._patched:
        raise UnsupportedPathError(f"SGLang didn't apply the guard's hook on {PASS} (its log says why); requests couldn't be told")
    config = _config()
    guards = ServedGuards(config, load_model(config.model or get_model().model_path), stack="SGLang")

    class GuardSampler(Sampler):
        def __init__(self) -> None:
            super().__init__()
            self._request_rows = RequestRows(guards)

        def _preprocess_logits(self, logits: torch.Tensor, sampling_info: Any) -> torch.Tensor:
            logits = super()._preprocess_logits(logits, sampling_info)
            return self._request_rows.apply(logits, noted_rows(sampling_info))

    return GuardSampler()


def register() -> None:
    """Entry point of SGLang's plug-in system."""
    if not os.environ.get(ENVIRONMENT):
        return
    from sglang.srt.layers.sampler import register_sampler_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    _config()  # a mistake in the file shows in the first process
    register_sampler_backend(BACKEND, create_sampler)
    HookRegistry.register(PASS, note_rows, HookType.AFTER)
    HookRegistry.register(REQUEST, check_request, HookType.AFTER)
    _log.info("moralguard is registered; it guards where SGLang is started with --sampling-backend %s", BACKEND)
