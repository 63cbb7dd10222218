"""Running requests of a stack that hands over one tensor of logits a step and can't be told to end a request.

What every torch stack's adapter does once it knows its requests' tokens: their guarded logits, their counts, and their failures.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moralguard.backends.arrays import Array, kind_of, namespace_of
from moralguard.decoding.grad import plain_no_grad
from moralguard.decoding.outcome import Outcome, RequestState
from moralguard.decoding.slots import SlotFailure, Slots, SlotStep
from moralguard.errors import BypassError, ControlError, ModelError, PolicyError, PromptError
from moralguard.guard import Guard
from moralguard.serving.guards import ServedGuards

_log = logging.getLogger(__name__)


@dataclass
class _Running:
    guard: Guard | None  # None: it was never admitted
    prompt: tuple[int, ...]
    end_id: int | None
    seen: int | None = None  # generated tokens at its last step
    ended: bool = False

    @property
    def open(self) -> bool:
        return self.guard is not None and self.guard.policy.on_error == "open"

    def count(self, **counts: int) -> None:
        if self.guard is not None:
            self.guard.counters.add(**counts)


class RunningRequests:
    """Requests by slot, each under a guard of its own; all guards are bound to one model.

    A request whose guard fails is passed through and counted (``on_error: open``), or ends (closed): its rows then hold nothing but the
    end-of-text token. No exception leaves ``step``, because in a stack it would end every request.

    Args:
        lm: the model that the guards were bound to.
        given_hidden: each step is given the base's hidden states.
    """

    def __init__(self, lm: object, *, given_hidden: bool = False):
        self.lm, self._given_hidden = lm, given_hidden
        self._slots = self._fresh()
        self._requests: dict[int, _Running] = {}

    def _fresh(self) -> Slots:
        return Slots(self.lm, own_base=False, given_hidden=self._given_hidden)  # type: ignore[arg-type]  # any model the guard knows

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, slot: int) -> bool:
        return slot in self._requests

    def add(
        self,
        slot: int,
        guard: Guard,
        prompt_ids: Sequence[int],
        end_id: int | None,
        *,
        state: RequestState | None = None,
        resumed: bool = False,
        ended: bool = False,
    ) -> None:
        """A request in a slot, whoever held it before.

        Args:
            end_id: the token that ends it where the policy fails closed; None where the caller ends requests itself (see ``step``).
            state: what ``park`` gave. resumed: it has been counted before. ended: it failed closed before.

        Raises:
            PromptError: the prompt is empty.
            ModelError: the guard is bound to another model.
        """
        if guard.lm is not self.lm:
            raise ModelError(f"the guard of slot {slot} is bound to {guard.lm.name}, not to the model that these requests share")
        self.remove(slot)
        if guard.controls and not ended:
            self._slots.add(slot, guard.controls, guard.gate, prompt_ids, state)
        self._requests[slot] = _Running(guard, tuple(prompt_ids), end_id, ended=ended)
        guard.counters.add(requests=0 if resumed else 1)

    def refuse(self, slot: int, error: Exception, end_id: int) -> None:
        """A request that can't be admitted, where only its tokens can say so: its first one ends it."""
        self.remove(slot)
        self._requests[slot] = _Running(None, (), end_id)
        self._end(slot, "admission", error)

    def miss(self, slot: int, error: Exception) -> None:
        """The next token of a request can't be guarded: it ends (closed), or the token is counted as unguarded (open).

        A step is still given its row where it is closed; where it is open, the row is left out of it.
        """
        request = self._requests[slot]
        if request.open:
            request.count(unguarded_tokens=1)
            request.seen = None
        elif not request.ended:
            self._end(slot, "bypass", error)

    def is_open(self, slot: int) -> bool:
        """Whether the policy of the request in a slot fails open."""
        return self._requests[slot].open

    def remove(self, slot: int) -> None:
        """Forget a request; nothing happens where there is none."""
        self._slots.remove(slot)
        self._requests.pop(slot, None)

    def park(self, slot: int, generated: Sequence[int]) -> RequestState | None:
        """Remove a request that may come back: what its guard remembers, for ``add``; None where it ended or never ran.

        Args:
            generated: ids generated so far, with the newest where it is known.
        """
        request = self._requests.get(slot)
        state = None if request is None or request.ended else self._slots.park(slot, generated)
        self.remove(slot)
        return state

    def has_ended(self, slot: int) -> bool:
        """Whether its guard failed and its policy fails closed."""
        return slot in self._requests and self._requests[slot].ended

    def fail(self, slot: int, control: str, error: Exception) -> None:
        """A failure that the stack's adapter found: the request ends, or goes on unguarded, as its policy says."""
        self._failed(slot, control, error, {})
        if slot in self._slots:
            self._slots.remove(slot)

    def step(
        self,
        tokens: Mapping[int, Sequence[int]],
        logits: torch.Tensor,
        temperature: Mapping[int, float] | None = None,
        *,
        hidden: torch.Tensor | None = None,
        head_logits: torch.Tensor | None = None,
    ) -> dict[int, ControlError | BypassError]:
        """Guard the next token of requests, in place: rows in which a control acted become normalised log-probabilities.

        Args:
            tokens: slot -> ids generated so far, in the order of the rows; slots that hold no request are left as they are.
            logits: f[n, V], on any device.
            temperature: slot -> what the stack will apply afterwards; 1 where it isn't said.
            hidden, head_logits: f[n, d] and f[n, V] of the base, where ``given_hidden``.

        Returns:
            slot -> why it ended, for requests that end with this step. Those with an ``end_id`` end by themselves.
        """
        acting = {slot: list(ids) for slot, ids in tokens.items() if slot in self._requests}
        row_of = {slot: row for row, slot in enumerate(tokens)}
        errors = self._count(acting)
        asked = {slot: ids for slot, ids in acting.items() if not self._requests[slot].ended and slot in self._slots}
        written: list[tuple[int, torch.Tensor]] = []
        if asked:
            rows = [row_of[slot] for slot in asked]
            states = {name: value[rows].clone() for name, value in (("hidden", hidden), ("head_logits", head_logits)) if value is not None}
            steps, failures = self._guarded(asked, logits, rows, temperature, states)
            for failure in failures:
                self._failed(failure.slot, failure.control, failure.error, errors)
            for step in steps:
                self._finish(step, written, errors)
        for slot, row in written:  # outside: a tensor of the stack's inference mode can only be written in it
            logits[row_of[slot]] = row.to(logits)
        for slot in acting:
            request = self._requests[slot]
            if request.ended and request.end_id is not None:
                logits[row_of[slot]] = float("-inf")
                logits[row_of[slot], request.end_id] = 0.0
        return errors

    def _count(self, acting: Mapping[int, Sequence[int]]) -> dict[int, ControlError | BypassError]:
        """Count rows, and look for tokens that were emitted since a request's last step without the guard."""
        errors: dict[int, ControlError | BypassError] = {}
        for slot, ids in acting.items():
            request = self._requests[slot]
            missing = 0 if request.seen is None else len(ids) - request.seen - 1
            # a row whose token was thrown away (of a prompt that is only half read) is done again
            request.count(rows_guarded=1, tokens_emitted=0 if request.seen == len(ids) else 1)
            request.seen = len(ids)
            if missing <= 0 or request.ended:
                continue
            if request.open:
                request.count(unguarded_tokens=missing)
                continue
            errors[slot] = BypassError(f"{missing} tokens of the request in slot {slot} were emitted without the guard")
            self._end(slot, "bypass", errors[slot])
        return errors

    def _guarded(
        self,
        asked: Mapping[int, Sequence[int]],
        logits: torch.Tensor,
        rows: Sequence[int],
        temperature: Mapping[int, float] | None,
        states: Mapping[str, torch.Tensor],
    ) -> tuple[list[SlotStep], list[SlotFailure]]:
        width = self.lm.vocab_size  # type: ignore[attr-defined]
        try:
            if logits.shape[-1] != width:
                raise ModelError(
                    f"the stack's logits have {logits.shape[-1]} columns, those of the guard's model {width}; name the same model"
                )
            with plain_no_grad():
                return self._slots.step(asked, self._base(logits[list(rows)]), temperature=temperature, **states)
        except Exception as error:
            # whose fault it was can't be told, and what the slots hold may be half done
            self._slots = self._fresh()
            for slot, request in self._requests.items():
                if request.guard is not None and request.guard.controls and not request.ended:
                    self._slots.add(slot, request.guard.controls, request.guard.gate, request.prompt)
            return [], [SlotFailure(slot, "guard", error) for slot in asked]

    def _base(self, rows: torch.Tensor) -> Array:
        """f32[n, V] where the guard computes, in memory of their own."""
        if kind_of(self.lm) == "torch":
            return rows.detach().to(self.lm.device, torch.float32, copy=True)  # type: ignore[attr-defined]
        return namespace_of(self.lm).copy_of(rows.detach().float().cpu().numpy())

    def _finish(self, step: SlotStep, written: list[tuple[int, torch.Tensor]], errors: dict[int, ControlError | BypassError]) -> None:
        outcome = step.outcome
        logits, touched, emptied = _on_torch(outcome)
        for i, slot in enumerate(step.slots):
            request = self._requests[slot]
            if emptied[i]:
                error = ControlError(outcome.why_emptied(i), "rectification")
                self._failed(slot, "rectification", error, errors)
            elif touched[i]:
                request.count(rows_touched=1)
                written.append((slot, torch.log_softmax(logits[i], -1)))

    def _failed(self, slot: int, control: str, error: Exception, errors: dict[int, ControlError | BypassError]) -> None:
        request = self._requests[slot]
        if request.open:
            request.count(failed_open=1)
            _log.warning("control %r failed in slot %d (%s) and was passed over", control, slot, type(error).__name__)
        elif not request.ended:
            found = ControlError(f"control {control!r} failed and the policy fails closed: {type(error).__name__}: {error}", control)
            found.__cause__ = error
            errors[slot] = found
            self._end(slot, control, error)

    def _end(self, slot: int, control: str, error: Exception) -> None:
        request = self._requests[slot]
        request.ended = True
        request.count(failed_closed=1)
        self._slots.remove(slot)
        _log.error("control %r failed in slot %d (%s); the request ends, as its policy fails closed", control, slot, type(error).__name__)


def _on_torch(outcome: Outcome) -> tuple[torch.Tensor, list[bool], list[bool]]:
    """f32[n, V] guarded logits, and which rows were touched and emptied."""
    return torch.as_tensor(outcome.logits), outcome.touched.tolist(), outcome.emptied.tolist()


def check_prompt(lm: Any, prompt_ids: Sequence[int]) -> None:
    """Raise on ids that the guard's passes can't read: a GPU would stop the whole process at one outside the vocabulary.

    Raises:
        PromptError: the prompt is empty, or holds ids that aren't tokens (stacks put such in the place of images).
    """
    if not prompt_ids:
        raise PromptError("a request has no tokens; give at least one")
    bad = next((token for token in prompt_ids if not 0 <= token < lm.vocab_size), None)
    if bad is not None:
        raise PromptError(f"a prompt holds id {bad}, which is no token of {lm.name} (0 to {lm.vocab_size - 1}); images can't be guarded")


def end_of_text(lm: Any) -> int:
    """The token that ends a request whose control fails.

    Raises:
        PolicyError: the model has none.
    """
    if not lm.eos_token_ids:
        raise PolicyError(
            f"{lm.name} has no end-of-text token, with which a request is ended when a control fails; set eos_token_id in its "
            "generation_config.json"
        )
    end_id: int = min(lm.eos_token_ids)
    return end_id


def admitted(guards: Guard | ServedGuards, asked: object) -> Guard | None:
    """The guard of a request; None leaves it unguarded.

    Args:
        asked: what the request says to the guard (``ServingConfig.admit``); a single guard takes no options.

    Raises:
        PolicyError: it asks for what isn't served.
    """
    if isinstance(guards, Guard):
        if asked is not None:
            raise PolicyError("this stack is guarded by one policy, and requests may not choose; serve several with ServedGuards")
        return guards
    policy_id, strength = guards.config.admit(asked)
    return None if policy_id is None else guards.guard(policy_id, strength)
