"""The guard inside a vLLM worker: guards, running requests and their memory, whichever interface vLLM drives it through."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moralguard.decoding.outcome import RequestState
from moralguard.errors import PolicyError, PromptError, UnsupportedPathError
from moralguard.guard import Guard
from moralguard.models import load_model
from moralguard.serving.config import ServingConfig
from moralguard.serving.guards import ServedGuards
from moralguard.serving.running_requests import RunningRequests, check_prompt, end_of_text
from moralguard.serving.vllm_head import SWITCH, is_registered, newest

_log = logging.getLogger(__name__)
_PARKED = 1024  # requests off the batch whose guard is remembered; a few numbers each


def check_setup(vllm_config: Any) -> None:
    """Refuse set-ups in which tokens would be drawn past the guard.

    Raises:
        UnsupportedPathError: names the setting.
    """
    if getattr(vllm_config, "speculative_config", None) is not None:
        raise UnsupportedPathError(
            "speculative decoding proposes several tokens a step, of which the guard's passes have read none; start vLLM without "
            "speculative_config"
        )
    parallel = getattr(vllm_config, "parallel_config", None)
    if getattr(parallel, "pipeline_parallel_size", 1) > 1:
        raise UnsupportedPathError(
            "pipeline parallelism: only the last stage sees logits, and requests come and go on all of them; use tensor parallelism"
        )
    if is_registered() and getattr(parallel, "tensor_parallel_size", 1) > 1:
        raise UnsupportedPathError(f"with tensor parallelism each worker's head has a share of the vocabulary; leave {SWITCH} unset")


class Worker:
    """Guards and running requests of one worker.

    Args:
        config: the operator's file.
        vllm_config: vLLM's configuration.

    Raises:
        PolicyError, UnsupportedPathError, ModelError: nothing is served then.
    """

    def __init__(self, config: ServingConfig, vllm_config: Any):
        check_setup(vllm_config)
        self.config = config
        served = vllm_config.model_config
        device = str(getattr(vllm_config.device_config, "device_type", "cpu"))
        lm = load_model(served.model, dtype=served.dtype, device=device) if config.model is None else load_model(config.model)
        self.guards = ServedGuards(config, lm, lacks=("grad", "cache"), stack="vLLM")
        self.guards.refuse_review("vLLM")
        if lm.vocab_size > served.get_vocab_size():
            raise PolicyError(
                f"the guard's model {lm.name} has {lm.vocab_size} tokens, vLLM's {served.get_vocab_size()}; name the same model"
            )
        if str(getattr(served, "logprobs_mode", "")).startswith("raw"):
            _log.warning("vLLM returns log-probabilities from before the guard; --logprobs-mode processed_logprobs gives the guarded ones")
        self.states_given = is_registered()
        self.running = RunningRequests(lm, given_hidden=self.states_given)
        self._end_id = end_of_text(lm)
        self._parked: OrderedDict[tuple[Any, ...], tuple[bool, RequestState | None]] = OrderedDict()
        self._next = 0
        self._key: dict[int, tuple[Guard, tuple[int, ...]]] = {}

    def start(self, guard: Guard, prompt: Sequence[int], generated: Sequence[int]) -> int:
        """A request of the batch; its slot."""
        slot, self._next = self._next, self._next + 1
        self._key[slot] = (guard, tuple(prompt))
        ended, state = self._remembered(guard, tuple(prompt), list(generated)) if generated else (False, None)
        unreadable = None
        try:
            check_prompt(self.running.lm, prompt)
        except PromptError as error:  # raised here it would end every request
            unreadable = error
        readable = prompt if unreadable is None else [self._end_id]
        self.running.add(slot, guard, readable, self._end_id, state=state, resumed=bool(generated), ended=ended)
        if unreadable is not None:
            self.running.fail(slot, "prompt", unreadable)
        return slot

    def stop(self, slot: int, generated: Sequence[int]) -> None:
        """A request left the batch: it is over, or was preempted and comes back. What its guard saw depends on nothing but its tokens."""
        guard, prompt = self._key.pop(slot)
        ended = self.running.has_ended(slot)
        state = self.running.park(slot, generated)
        if not ended and state is None:
            return
        self._parked[(guard, prompt, tuple(generated))] = (ended, state)
        if len(self._parked) > _PARKED:
            self._parked.popitem(last=False)

    def _remembered(self, guard: Guard, prompt: tuple[int, ...], generated: list[int]) -> tuple[bool, RequestState | None]:
        """(whether it had ended, what its guard remembers)."""
        # the newest token may not have been known when the request was taken off
        for known in (generated, generated[:-1]):
            found = self._parked.get((guard, prompt, tuple(known)))
            if found is not None:
                return found
        return False, None

    def step(
        self, logits: torch.Tensor, rows: Sequence[int], tokens: Mapping[int, Sequence[int]], temperature: Mapping[int, float]
    ) -> None:
        """Guard these rows of f32[n, V], of requests ``tokens`` in the same order, in place."""
        states = newest.take(logits.shape[0]) if self.states_given else None
        if self.states_given and states is None:
            for slot in tokens:
                self.running.fail(slot, "head", UnsupportedPathError("the head gave no hidden states for this step"))
        index = torch.tensor(list(rows), device=logits.device)
        mine = logits[index, : self.running.lm.vocab_size]  # type: ignore[attr-defined]
        hidden, head_logits = (None, None) if states is None else (state[index] for state in states)
        if head_logits is not None:
            head_logits = head_logits[:, : mine.shape[1]]
        self.running.step(tokens, mine, temperature, hidden=hidden, head_logits=head_logits)
        logits[index, : mine.shape[1]] = mine
        if mine.shape[1] < logits.shape[1]:  # columns that pad the vocabulary
            logits[index, mine.shape[1] :] = float("-inf")
