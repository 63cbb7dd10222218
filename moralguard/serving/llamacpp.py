"""The guard in llama-cpp-python: completions of a ``Llama`` under a policy, one at a time.

llama.cpp calls a logits processor through ctypes, which prints an exception and goes on with the unguarded logits. So nothing is raised
there: a completion that fails closed is given the end-of-text token, and the error is raised where Python is in charge again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from moralguard.backends.arrays import kind_of
from moralguard.errors import BypassError, ControlError, ModelError, UnsupportedPathError
from moralguard.guard import Guard
from moralguard.step_processor import StepProcessor


class LlamaGuard:
    """Guards the completions of a ``llama_cpp.Llama``.

    The passes that controls need are the guard's own, on its own model: the same GGUF file, or an export of the same model. Where a control
    reads hidden states, that model reads the whole text beside llama.cpp.

    Args:
        guard: bound to a model with the vocabulary of ``llama``.
        llama: a ``llama_cpp.Llama``.

    Raises:
        ModelError: their vocabularies differ.
        UnsupportedPathError: llama has a draft model, or the policy has ``review``.
    """

    def __init__(self, guard: Guard, llama: Any):
        guard.refuse_review("llama.cpp")
        if llama.n_vocab() != guard.lm.vocab_size:
            raise ModelError(
                f"llama.cpp's model has {llama.n_vocab()} tokens, {guard.lm.name} has {guard.lm.vocab_size}; build the guard with the same "
                "model"
            )
        if getattr(llama, "draft_model", None) is not None:
            raise UnsupportedPathError("llama has a draft model, and shows a logits processor drafted tokens as if drawn; leave it out")
        self.guard, self._llama = guard, llama

    def completion(self, temperature: float = 1.0) -> CompletionProcessor:
        """A logits processor for one completion.

        Args:
            temperature: what llama.cpp will apply afterwards (only PPLM asks).
        """
        return CompletionProcessor(self.guard, int(self._llama.token_eos()), temperature)

    def create_completion(self, prompt: str | list[int], **settings: Any) -> Any:
        """``Llama.create_completion`` under the guard: its settings, its result (an iterator with ``stream=True``).

        Raises:
            ControlError: a control failed and the policy fails closed.
            BypassError: tokens were drawn without the guard, and the policy fails closed.
        """
        processor = self.completion(_temperature(settings, 0.8))
        given = settings.pop("stopping_criteria", None)
        settings["stopping_criteria"] = lambda ids, logits: processor.check(ids, logits) or (given is not None and given(ids, logits))
        return self._checked(self._llama.create_completion(prompt, **self._with(processor, settings)), processor)

    def create_chat_completion(self, messages: list[Any], **settings: Any) -> Any:
        """``Llama.create_chat_completion`` under the guard; as ``create_completion``."""
        processor = self.completion(_temperature(settings, 0.2))
        return self._checked(self._llama.create_chat_completion(messages, **self._with(processor, settings)), processor)

    def _with(self, processor: CompletionProcessor, settings: dict[str, Any]) -> dict[str, Any]:
        return {**settings, "logits_processor": _Processors([*(settings.get("logits_processor") or []), processor])}

    def _checked(self, found: Any, processor: CompletionProcessor) -> Any:
        if not isinstance(found, dict):
            return self._pieces(found, processor)
        processor.check()
        usage = found.get("usage")
        if usage is not None:
            processor.verify(usage["completion_tokens"])
        return found

    def _pieces(self, found: Iterator[Any], processor: CompletionProcessor) -> Iterator[Any]:
        for piece in found:
            processor.check()
            yield piece
        processor.check()


class CompletionProcessor:
    """A llama-cpp-python logits processor for one completion: ``f(input_ids, scores) -> scores``.

    Attributes:
        error: what ended the guarding; None while all is well.
        positions: tokens that were guarded.
    """

    def __init__(self, guard: Guard, end_id: int, temperature: float = 1.0):
        guard.refuse_review("llama.cpp")
        self._guard, self._end_id = guard, end_id
        self._open = guard.policy.on_error == "open"
        self._torch = kind_of(guard.lm) == "torch"
        self._inner = _step_processor(guard, temperature)
        self.error: Exception | None = None

    @property
    def positions(self) -> int:
        return self._inner.positions

    def __call__(self, input_ids: Any, scores: Any) -> np.ndarray:
        """Guarded scores f32[V] in memory of their own, for ids i32[T] and scores f32[V], views that llama.cpp overwrites."""
        own = np.array(scores, np.float32)
        if self.error is None:
            try:
                return self._guarded(np.array(input_ids, np.int64)[None], own[None])[0]
            except Exception as error:  # ctypes would print it and draw from the unguarded scores
                self.error = error
                self._guard.counters.add(**self._count(error))
        if self._open:
            self._guard.counters.add(unguarded_tokens=1)
            return own
        own[:] = -np.inf
        own[self._end_id] = 0.0
        return own

    def _guarded(self, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        if not self._torch:
            return np.asarray(self._inner(ids, scores))  # type: ignore[operator]
        import torch

        guarded: np.ndarray = self._inner(torch.from_numpy(ids), torch.from_numpy(scores)).numpy()  # type: ignore[operator]
        return guarded

    def _count(self, error: Exception) -> dict[str, int]:
        if self._open:
            return {"failed_open": 1}
        return {} if isinstance(error, ControlError) else {"failed_closed": 1}  # a control's failure was counted where it happened

    def check(self, _ids: Any = None, _logits: Any = None) -> bool:
        """Raise what ended the guarding, where the policy fails closed; as a stopping criterion, before the next token is given out.

        Raises:
            ControlError, BypassError, PromptError: as ``Guard.generate``.
        """
        if self.error is not None and not self._open:
            raise self.error
        return False

    def verify(self, tokens: int) -> None:
        """Compare the tokens that a completion reports with those that were guarded.

        Raises:
            BypassError: there are more of them, and the policy fails closed.
        """
        missing = tokens - self.positions
        if missing <= 0 or self.error is not None:
            return
        if self._open:
            self._guard.counters.add(unguarded_tokens=missing)
            return
        raise BypassError(f"{missing} of {tokens} tokens were drawn without the guard; llama.cpp dropped its logits processor")


class _Processors(list[Any]):
    """A list of logits processors that survives ``logit_bias``: llama-cpp-python goes on with what ``extend`` returns."""

    def extend(self, more: Any) -> _Processors:  # type: ignore[override]
        super().extend(more)
        return self

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


def _step_processor(guard: Guard, temperature: float) -> StepProcessor:
    """As ``Guard.logits_processor``, with hidden states from a pass of the guard's own."""
    given = (guard.lm, guard.controls, guard.gate, guard.policy.on_error == "open", guard.counters)
    # no padding, though a prompt may begin with the token that elsewhere is padding
    if kind_of(guard.lm) == "torch":
        import torch

        from moralguard.processor import GuardLogitsProcessor

        return GuardLogitsProcessor(*given, temperature=temperature, attention_mask=torch.ones(1, 1))
    from moralguard.numpy_processor import NumpyLogitsProcessor

    return NumpyLogitsProcessor(*given, temperature=temperature, attention_mask=np.ones((1, 1)))


def _temperature(settings: dict[str, Any], default: float) -> float:
    return float(settings.get("temperature", default)) or 1.0
