"""The guard in transformers' continuous batching: ``generate_batch``, ``init_continuous_batching`` and what stands on them.

Continuous batching takes no logits processor of the user and drops those it doesn't know. What it does take is a processor of its own kind
behind a class that it maps, so for the duration of ``guarded_batching`` the model's ``_get_logits_processor`` adds such a class. The
manager hands that processor one int32 a request and, on the host, the requests themselves: the int32 is a slot, and the tokens come from
the requests.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.continuous_batching import cb_logits_processors
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from moralguard.backends.arrays import kind_of, weights_of
from moralguard.errors import UnsupportedPathError
from moralguard.guard import Guard
from moralguard.serving.guards import ServedGuards
from moralguard.serving.running_requests import RunningRequests, admitted, check_prompt

ARGUMENT = "moralguard"
"""The keyword of ``manager.add_request`` with a request's own policy: a JSON string, ``'{"policy": "strict"}'``."""

_UNGUARDED = -1
_OLDEST = Version("5.19")  # what was tried; 5.16 leaves the guard out without a word
_guarded_models: set[int] = set()
_lock = threading.Lock()


class _Place(LogitsProcessor):
    """Stands for the guard in transformers' list of processors; continuous batching replaces it."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise UnsupportedPathError(
            "continuous batching left the guard's place in the list of processors; this transformers isn't supported"
        )


class BatchingProcessor(ContinuousBatchingLogitsProcessor):
    """The guard of one manager; its slots are the manager's running requests."""

    supported_kwargs = {ARGUMENT: str}
    ignored_kwargs = ()

    def __init__(self, guards: Guard | ServedGuards, temperature: float):
        self._guards, self._temperature = guards, temperature
        self._running = RunningRequests(guards.lm)
        self._slots: dict[str, int] = {}
        self._asked: dict[int, tuple[list[int], Any]] = {}  # slot -> prompt, and what the request says to the guard
        self._states: dict[int, Any] = {}  # newest batch: slot -> transformers' RequestState
        self._next = 0
        self.manager: Any = None

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Padding rows belong to no request."""
        int32_tensor.fill_(_UNGUARDED)

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> torch.Tensor:
        """i32[n], the slot of each request that gets a token in this batch."""
        self._forget()
        self._states = {}
        for request in requests_with_new_token:
            self._states[self._slot(request.state)] = request.state
        return torch.tensor(list(self._states), dtype=torch.int32)

    def _forget(self) -> None:
        """Drop the slots of requests that finished, failed or were cancelled."""
        processor = getattr(self.manager, "batch_processor", None)
        if processor is None:
            return
        for request_id in [known for known in self._slots if processor.scheduler.request_is_cancelled(known)]:
            self._drop(request_id)

    def _drop(self, request_id: str) -> None:
        slot = self._slots.pop(request_id)
        self._running.remove(slot)
        del self._asked[slot]

    def _slot(self, state: Any) -> int:
        prompt, asked = _prompt(state), state.logit_processor_kwargs.get(ARGUMENT)
        known = self._slots.get(state.request_id)
        if known is not None and self._asked[known] != (prompt, asked):  # a name that is used again
            self._drop(state.request_id)
        if state.request_id not in self._slots:
            slot, self._next = self._next, (self._next + 1) % 2**31
            self._slots[state.request_id], self._asked[slot] = slot, (prompt, asked)
            guard = admitted(self._guards, asked)
            if guard is not None:
                self._running.add(slot, guard, prompt, end_id=None)
        return self._slots[state.request_id]

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Guarded scores f32[m, V]; a request whose policy fails closed ends before the token that is drawn from them.

        The first n rows belong to the requests prepared last; those behind, of prompts that are half read, are drawn from and discarded.
        """
        slots = tensor_arg[: len(self._states)].tolist()
        if slots != list(self._states) or len(slots) > len(scores):
            prepared = list(self._states)
            raise UnsupportedPathError(f"the batch holds slots {slots}, prepared were {prepared}; this transformers isn't supported")
        tokens = {slot: _generated(self._states[slot]) for slot in slots}
        temperature = {slot: self._temperature_of(self._states[slot]) for slot in slots}
        for slot, error in self._running.step(tokens, scores[: len(slots)], temperature).items():
            state = self._states[slot]
            state.error = str(error)
            state._new_tokens_limit = state.generated_len()
        return scores

    def _temperature_of(self, state: Any) -> float:
        return float(state.logit_processor_kwargs.get("temperature", self._temperature))


def _prompt(state: Any) -> list[int]:
    """A preempted request comes back with what it had generated behind its prompt."""
    ids: list[int] = state.initial_tokens
    return ids[: state._true_initial_tokens] if state._true_initial_tokens else ids


def _generated(state: Any) -> list[int]:
    back: list[int] = state.initial_tokens[state._true_initial_tokens :] if state._true_initial_tokens else []
    return back + state.generated_tokens


@contextmanager
def guarded_batching(model: Any, guards: Guard | ServedGuards) -> Iterator[Any]:
    """Inside, the model's continuous batching is guarded; afterwards the model is exactly as before.

    With ``ServedGuards``, ``manager.add_request(ids, moralguard='{"policy": "strict"}')`` names a request's policy; requests that name none
    have the default. A request whose policy fails closed comes back with ``error`` set and the tokens that it had. Hidden states are read
    by the guard's own pass over the text. CUDA graphs, compilation and asynchronous batching are switched off, as the guard reads each
    drawn token on the host, and so is the switch to another attention, as its passes run on the same modules.

    Args:
        model: the transformers model that the guards are bound to.
        guards: one guard for all requests, or the policies that requests may name.

    Raises:
        UnsupportedPathError: a transformers before 5.19, another model, one that is already guarded, settings that keep tokens from
            the host, or a policy with ``review``.
        PolicyError: a request (``add_request``) names a policy that isn't served. PromptError: it has no tokens, or ids that are none.
    """
    guards.refuse_review("continuous batching")
    if Version(transformers.__version__) < _OLDEST:
        raise UnsupportedPathError(
            f"the continuous batching of transformers {transformers.__version__} draws tokens past the guard; it is covered from "
            f"{_OLDEST} on"
        )
    target: Any = model  # the analyser takes the comparison below for a proof of its type
    if kind_of(guards.lm) != "torch" or weights_of(guards.lm) is not target:
        raise UnsupportedPathError("guarded_batching got another model than the guard was built with; build a Guard for it")
    if getattr(model, "_cached_continuous_batching_manager", None) is not None:
        raise UnsupportedPathError(
            "the model keeps a manager from before, which knows no guard; call model.destroy_cached_continuous_batching_manager() first"
        )
    with _lock:
        if id(model) in _guarded_models:
            raise UnsupportedPathError("the model's continuous batching is already guarded; leave that `with` block first")
        _guarded_models.add(id(model))
    own: dict[str, Any] = {name: vars(model)[name] for name in ("init_continuous_batching",) if name in vars(model)}
    place = type("GuardPlace", (_Place,), {})  # one a call: the map below is shared by all models
    try:
        vars(model)["init_continuous_batching"] = _initialiser(model, guards, place)
        yield model
    finally:
        vars(model).pop("init_continuous_batching", None)
        vars(model).update(own)
        model.destroy_cached_continuous_batching_manager()
        with _lock:
            _guarded_models.discard(id(model))


def _initialiser(model: Any, guards: Guard | ServedGuards, place: type[_Place]) -> Callable[..., Any]:
    inherited = model.init_continuous_batching

    def init_continuous_batching(
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: Any = None,
    ) -> Any:
        if getattr(model, "_cached_continuous_batching_manager", None) is not None:  # made inside this block, so it is guarded
            return inherited(generation_config, continuous_batching_config, workload_hints)
        config = generation_config if generation_config is not None else model.generation_config
        _refuse(model, config)
        temperature = config.temperature if config.do_sample and config.temperature else 1.0
        processor = BatchingProcessor(guards, float(temperature))
        with _place_in(model, place, processor):
            manager = inherited(config, _synchronous(continuous_batching_config), workload_hints)
        if processor not in manager.logit_processor.logits_processor:
            raise UnsupportedPathError("continuous batching dropped the guard; this transformers isn't supported, use guard.generate")
        processor.manager = manager
        _check_requests(manager, guards)
        return manager

    return init_continuous_batching


@contextmanager
def _place_in(model: Any, place: type[_Place], processor: BatchingProcessor) -> Iterator[None]:
    """While a manager is made: where transformers puts processors of the user stands one that it replaces by the guard."""
    inherited = model._get_logits_processor
    own = vars(model).get("_get_logits_processor")
    known: dict[Any, Any] = cb_logits_processors.CLASSIC_TO_CB_PROCESSORS_MAP

    def with_guard(generation_config: Any, **others: Any) -> Any:
        return inherited(generation_config, **{**others, "logits_processor": LogitsProcessorList([place()])})

    vars(model)["_get_logits_processor"] = with_guard
    known[place] = lambda _place: processor
    try:
        yield
    finally:
        del known[place]
        vars(model).pop("_get_logits_processor")
        if own is not None:
            vars(model)["_get_logits_processor"] = own


def _refuse(model: Any, config: Any) -> None:
    if model.config._attn_implementation == "eager":
        raise UnsupportedPathError(
            "continuous batching gives a model with eager attention another one, in which the guard's own passes can't run; load it with "
            'attn_implementation="sdpa"'
        )
    if config.num_beams not in (None, 1):
        raise UnsupportedPathError(f"num_beams is {config.num_beams}; continuous batching has no beams")
    if getattr(config, "compile_config", None) is not None:
        raise UnsupportedPathError("compile_config compiles the guard's step into the model's, which can't be done; leave it out")


def _synchronous(given: ContinuousBatchingConfig | None) -> ContinuousBatchingConfig:
    """The settings with one step after the other, each token known to the host before the next.

    Raises:
        UnsupportedPathError: they ask for something else.
    """
    config = copy.deepcopy(given) if given is not None else ContinuousBatchingConfig()
    graphs = config.use_cuda_graph if isinstance(config.use_cuda_graph, tuple) else (config.use_cuda_graph,)
    asked = {
        "use_async_batching": bool(config.use_async_batching),
        "use_cuda_graph": any(graphs),
        "q_padding_interval_size": bool(config.q_padding_interval_size),
        "kv_padding_interval_size": bool(config.kv_padding_interval_size),
        "varlen_compile_config": config.varlen_compile_config is not None,
        "decode_compile_config": config.decode_compile_config is not None,
        "default_compile_level": bool(config.default_compile_level),
    }
    refused = [name for name, on in asked.items() if on]
    if refused:
        raise UnsupportedPathError(
            f"{', '.join(refused)}: the guard reads every drawn token on the host before the next step, which this prevents; leave it out"
        )
    config.use_async_batching, config.use_cuda_graph, config.per_request_processors = False, False, True
    config.auto_switch_to_flash = False  # the guard's own passes run on the same modules
    return config


def _check_requests(manager: Any, guards: Guard | ServedGuards) -> None:
    """A request that can't be admitted is refused to its caller: later, its error would end all others."""
    inherited = manager.add_request

    def add_request(input_ids: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        check_prompt(guards.lm, input_ids)
        admitted(guards, kwargs.get(ARGUMENT))
        return inherited(input_ids, *args, **kwargs)

    vars(manager)["add_request"] = add_request
