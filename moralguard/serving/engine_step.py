"""One rectified step of the engine: what is drawn or scored for each of its rows, and when a continuation is over."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING

from moralguard.backends.arrays import namespace_of
from moralguard.decoding.rectification import rectify
from moralguard.decoding.slots import SlotStep
from moralguard.serving.generation import Generation, Piece
from moralguard.serving.sampling import draw, log_probabilities, token_logprob
from moralguard.serving.stop_strings import StoppedText
from moralguard.trace.records import TokenTrace

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel
    from moralguard.serving.engine import Observer


_log = logging.getLogger(__name__)


def whereabouts(error: Exception) -> str:
    """Type and place of an error for the log: its message may hold somebody's text."""
    frames = traceback.extract_tb(error.__traceback__)
    return type(error).__name__ + (f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else "")


class Drawer:
    """Draws, scores and ends; it keeps nothing between steps but the log-probabilities that no piece of text has carried yet."""

    def __init__(self, lm: LanguageModel, observer: Observer | None):
        self.lm, self._observer = lm, observer
        self._arrays = namespace_of(lm)
        self._told: dict[Generation, int] = {}

    def draw(self, step: SlotStep, running: Mapping[int, Generation], texts: Mapping[int, StoppedText], unguarded: Set[int]) -> None:
        """The next token of every row; continuations that are over have a finish_reason afterwards."""
        rows = [running[slot] for slot in step.slots]
        touched = step.outcome.touched.tolist()
        tokens, emptied, records = self._next_tokens(step, rows, unguarded)
        for row, (slot, generation) in enumerate(zip(step.slots, rows, strict=True)):
            guard = None if slot in unguarded else generation.guard
            if guard is not None:
                guard.counters.add(rows_guarded=1, rows_touched=int(touched[row]))
                generation.rows_guarded += 1
            if generation.finish_reason:
                continue
            if emptied[row] and not generation.open_on_error:
                if guard is not None:
                    guard.counters.add(failed_closed=1)
                generation.deny("guard_error", "rectification", step.outcome.why_emptied(row))
                continue
            if emptied[row] and guard is not None:
                guard.counters.add(failed_open=1)
                generation.failed_open += 1
            generation.interventions += int(touched[row])
            if records and generation.trace and guard is not None:
                generation.traces.append(records[row])
            if generation.logprobs is not None:
                law = log_probabilities(step.outcome.logits[row])
                generation.scores.append(token_logprob(law, tokens[row], generation.logprobs))
            if generation.given is None and generation.guard is not None:
                generation.guard.counters.add(tokens_emitted=1, unguarded_tokens=int(guard is None))
            if self._observer is not None:
                self._observer.tokens(generation.policy, int(generation.given is None), int(touched[row]))
            self._take(generation, tokens[row], texts[slot])

    def _next_tokens(self, step: SlotStep, rows: list[Generation], unguarded: Set[int]) -> tuple[list[int], list[bool], list[TokenTrace]]:
        """(token, whether every token was removed, record) of each row; no records where nobody asked for any."""
        arrays, outcome = self._arrays, step.outcome
        traced = next(
            (g for slot, g in zip(step.slots, rows, strict=True) if g.trace and g.guard is not None and slot not in unguarded), None
        )
        given = [g.forced for g in rows]
        if traced is None and all(token is not None for token in given):
            return [int(token) for token in given if token is not None], [False] * len(rows), []
        keys = arrays.integers([generation.key for generation in rows], self.lm)
        positions = arrays.integers([generation.position for generation in rows], self.lm)
        settings = [generation.settings for generation in rows]
        drawn = draw(outcome.law, settings, keys, positions, counterfactual=traced is not None)
        tokens = drawn.tokens
        emptied = [bool(flag) and token is None for flag, token in zip(drawn.emptied.tolist(), given, strict=True)]
        for row, (generation, token) in enumerate(zip(rows, given, strict=True)):
            if token is not None:
                tokens[row] = token
            elif emptied[row] and generation.open_on_error:
                one = slice(row, row + 1)
                base = rectify(outcome.base[one], ())
                tokens[row] = draw(base, settings[one], keys[one], positions[one]).tokens[0]
        records: list[TokenTrace] = []
        if traced is not None and traced.guard is not None:
            from moralguard.trace.attribution import trace_step

            names = [control.name for control in traced.guard.controls]
            ids = [value.id for value in traced.guard.policy.values]
            values = dict.fromkeys(names, ids)
            records = trace_step(outcome, tokens, drawn.counterfactual, positions, names, values, self.lm.spell)
        return [int(token) for token in tokens.tolist()], emptied, records

    def _take(self, generation: Generation, token: int, text: StoppedText) -> None:
        """Note a token, tell the text that is certain with it, and see whether it was the last one."""
        generation.token_ids.append(token)
        if generation.told is not None:
            generation.told(generation, token)
        if generation.given is not None:
            if len(generation.token_ids) == len(generation.given):
                generation.end("length")
            return
        if not generation.first_token:
            generation.first_token = time.monotonic()
        if generation.stream or generation.stop:
            piece = text.push(token)
            if generation.stream and piece:
                self._tell(generation, piece)
        if token in self.lm.eos_token_ids or token in generation.stop_ids or text.stopped:
            generation.end("stop")
        elif len(generation.token_ids) >= generation.settings.max_new_tokens:
            generation.end("length")

    def _tell(self, generation: Generation, piece: str) -> None:
        told = self._told.get(generation, 0)
        self._told[generation] = len(generation.scores)
        generation.notify(generation, Piece(piece, tuple(generation.scores[told:])))

    def close(self, generation: Generation, text: StoppedText) -> None:
        """Complete the text of a continuation that is over, and tell its owner."""
        try:
            if generation.given is None and generation.decision != "deny":
                self._complete(generation, text)
        except Exception as error:  # a tokenizer that can't decode what was drawn
            _log.error("a continuation couldn't be decoded: %s", whereabouts(error))
            generation.finish_reason = ""
            generation.deny("engine_error", None, type(error).__name__)
        self._told.pop(generation, None)
        generation.notify(generation, None)

    def _complete(self, generation: Generation, text: StoppedText) -> None:
        if not (generation.stream or generation.stop):
            generation.text = "" if self.lm.tokenizer is None else self.lm.tokenizer.decode(generation.token_ids, skip_special_tokens=True)
            return
        piece = text.flush()
        generation.text = text.text
        if text.stopped and generation.finish_reason == "length":  # a stop string in what was held back
            generation.finish_reason = "stop"
        if generation.stream and (piece or len(generation.scores) > self._told.get(generation, 0)):
            self._tell(generation, piece)
