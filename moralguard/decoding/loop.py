"""The guard's own decode loop: base rows and auxiliary passes in one forward, noise that is a pure function of the request."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moralguard.backends.arrays import kind_of, namespace_of
from moralguard.controls.base import BoundControl
from moralguard.decoding.counters import Counters
from moralguard.decoding.gate import BoundGate
from moralguard.decoding.outcome import Failure, Outcome
from moralguard.decoding.records import Completion
from moralguard.decoding.rectification import rectify
from moralguard.decoding.session import Session
from moralguard.decoding.settings import DecodingSettings

if TYPE_CHECKING:
    import torch

    from moralguard.backends.hf import LanguageModel


@dataclass(frozen=True)
class LoopContext:
    """What stays the same over a call of ``generate``.

    Attributes:
        open_on_error: a failed control is passed over (and counted) instead of ending its request.
        values: control -> ids of the values it acts for, for the trace.
        trace: whether to record every token.
    """

    lm: LanguageModel
    controls: tuple[BoundControl, ...]
    settings: DecodingSettings
    gate: BoundGate | None
    open_on_error: bool
    counters: Counters
    values: dict[str, list[str]]
    trace: bool
    seed: int


FLAGGED = "flagged"
"""The finish_reason of a request that a watch stopped; whoever watches sees to it that nobody else meets it."""

Watch = Callable[[Sequence[tuple[int, int]]], set[int]]
"""[(index of the request, its newest token id)] of a step -> indices of the requests that stop there."""


def noise_key(seed: int, prompt: Sequence[int], return_index: int, attempt: int = 0, retry: int = 0) -> int:
    """64-bit key of a request's noise: it depends on nothing else, so a text is the same alone and in any batch.

    Args:
        attempt, retry: tell drafts of one continuation apart; 0 and 0 is the first.
    """
    digest = hashlib.blake2b(digest_size=8, salt=attempt.to_bytes(8, "little") + retry.to_bytes(8, "little"))
    digest.update(seed.to_bytes(16, "little", signed=True))
    digest.update(return_index.to_bytes(8, "little"))
    digest.update(b"".join(int(i).to_bytes(4, "little") for i in prompt))
    return int.from_bytes(digest.digest(), "little", signed=True)


def grad_mode(controls: Sequence[BoundControl]) -> AbstractContextManager[None]:
    """Inference mode, unless a control needs tensors that autograd can use."""
    import torch

    from moralguard.decoding.grad import plain_no_grad

    needs_grad = any(control.settings.needs.grad for control in controls)
    return plain_no_grad() if needs_grad else torch.inference_mode()


def loop_mode(context: LoopContext) -> AbstractContextManager[None]:
    """How a session of this context is to be run."""
    return grad_mode(context.controls) if kind_of(context.lm) == "torch" else nullcontext()


def decode(context: LoopContext, requests: Sequence[Completion], watch: Watch | None = None) -> Iterator[tuple[int, int]]:
    """Run requests to their end, filling them in; yields (index of the request, token id) as tokens come.

    Args:
        watch: told of every step's tokens before they are yielded; the requests that it names end with finish_reason ``FLAGGED``.
    """
    context.counters.add(requests=len(requests))
    arrays = namespace_of(context.lm)
    unique = {tuple(request.prompt_ids): None for request in requests}
    order = {prompt: i for i, prompt in enumerate(unique)}
    # Gradient modes are entered anew for every piece of work: a generator must not leak them into its caller between yields.
    with loop_mode(context):
        session = Session(context.lm, context.controls, list(unique), own_base=True, gate=context.gate)
        if len(unique) < len(requests) or len(requests) > 1:
            session.select(arrays.integers([order[tuple(request.prompt_ids)] for request in requests]))
    running = list(range(len(requests)))
    keys = arrays.integers([noise_key(context.seed, r.prompt_ids, r.return_index, r.attempt, r.retry) for r in requests], context.lm)
    while running:
        with loop_mode(context):
            ended, drawn = _step(context, session, [requests[i] for i in running], keys)
        if watch is not None:
            stopped = watch([(running[slot], token) for slot, token in drawn])
            for slot in (slot for slot, _ in drawn if running[slot] in stopped):
                requests[running[slot]].finish_reason = FLAGGED
                ended.add(slot)
        for slot, token in drawn:
            yield running[slot], token
        for slot, room in enumerate(session.rooms):
            if room < 1 and slot not in ended:
                requests[running[slot]].finish_reason = "length"
                ended.add(slot)
        with loop_mode(context):
            stay = arrays.integers([slot for slot in range(len(running)) if slot not in ended])
            running = [running[int(slot)] for slot in stay]
            if not running:
                return
            if ended:
                session.select(stay)
                keys = arrays.take_rows(keys, stay)
            session.advance()


def _step(
    context: LoopContext, session: Session, requests: Sequence[Completion], keys: torch.Tensor
) -> tuple[set[int], list[tuple[int, int]]]:
    """Draw one token for every request: (slots that ended, (slot, token) of the tokens drawn)."""
    settings = context.settings
    outcome = session.step(temperature=1.0 if settings.greedy else settings.temperature)
    ended = _handle_failures(context, outcome.failures, requests)
    positions = namespace_of(context.lm).integers([len(r.prompt_ids) + len(r.token_ids) for r in requests], context.lm)
    drawn_now = outcome.law.draw(settings, keys, positions, counterfactual=context.trace)
    tokens = drawn_now.tokens
    if bool(drawn_now.emptied.any()):
        ended |= _handle_emptied(context, outcome, requests, drawn_now.emptied, tokens, keys, positions)
    for slot, request in enumerate(requests):
        if len(request.token_ids) < len(request.kept):
            tokens[slot] = request.kept[len(request.token_ids)]
    records = []
    if context.trace:
        from moralguard.trace.attribution import trace_step

        names = [control.name for control in session.controls]
        records = trace_step(outcome, tokens, drawn_now.counterfactual, positions, names, context.values, context.lm.spell)
    late = session.commit(tokens)
    drawn = []
    for slot, (request, token) in enumerate(zip(requests, tokens.tolist(), strict=True)):
        if slot in ended:
            continue
        request.token_ids.append(token)
        drawn.append((slot, token))
        if records:
            request.trace.append(records[slot])
        if token in context.lm.eos_token_ids:
            request.finish_reason = "stop"
            ended.add(slot)
        elif len(request.token_ids) >= settings.max_new_tokens:
            request.finish_reason = "length"
            ended.add(slot)
    ended |= _handle_failures(context, [failure for failure in late if failure.row not in ended], requests)
    context.counters.add(tokens_emitted=len(drawn), rows_guarded=session.rows, rows_touched=int(outcome.touched.sum()))
    return ended, drawn


def _handle_failures(context: LoopContext, failures: Sequence[Failure], requests: Sequence[Completion]) -> set[int]:
    """Slots that end because a control failed; none where the policy fails open."""
    if context.open_on_error:
        context.counters.add(failed_open=len(failures))
        return set()
    for failure in failures:
        message = f"{type(failure.error).__name__}: {failure.error}"
        _end_with_error(requests[failure.row], failure.control, message, failure.error)
    ended = {failure.row for failure in failures}
    context.counters.add(failed_closed=len(ended))
    return ended


def _handle_emptied(
    context: LoopContext,
    outcome: Outcome,
    requests: Sequence[Completion],
    emptied: torch.Tensor,
    tokens: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
) -> set[int]:
    """Rows in which the controls removed every token: an error, or the base's own token where the policy fails open."""
    rows = namespace_of(context.lm).flat_nonzero(emptied)
    if context.open_on_error:
        unguarded = rectify(outcome.base[rows], ())
        tokens[rows] = unguarded.draw(context.settings, keys[rows], positions[rows]).tokens
        context.counters.add(failed_open=len(rows))
        return set()
    for row in rows.tolist():
        _end_with_error(requests[row], "rectification", outcome.why_emptied(row))
    context.counters.add(failed_closed=len(rows))
    return set(rows.tolist())


def _end_with_error(request: Completion, control: str, message: str, cause: Exception | None = None) -> None:
    request.finish_reason, request.failed_control, request.error, request.cause = "guard_error", control, message, cause
