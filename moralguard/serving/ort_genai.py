"""The guard in onnxruntime-genai's ``Generator``: each step's logits are read, guarded, and handed back before the token is drawn.

Torch is never imported. ``Engine`` (genai's continuous batching) shows nobody its logits, so it can't be guarded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np

from moralguard.backends.arrays import kind_of
from moralguard.backends.prompts import PromptLike, encode_prompt
from moralguard.errors import BypassError, ModelError, UnsupportedPathError
from moralguard.guard import Guard
from moralguard.numpy_processor import NumpyLogitsProcessor

_ALONE = ("num_beams", "num_return_sequences", "batch_size")


class GenaiGuard:
    """Guarded continuations of an ``onnxruntime_genai.Model``, one at a time.

    The passes that controls need are the guard's own, on its own session of the same graph. Where a control reads hidden states, that
    session reads the whole text beside genai's.

    Args:
        guard: bound to the model's folder, ``mg.Guard(policy, folder)``.
        model: the ``onnxruntime_genai.Model`` of that folder.

    Raises:
        ModelError: the guard's model isn't an ONNX model. UnsupportedPathError: the policy has ``review``.
    """

    def __init__(self, guard: Guard, model: Any):
        if kind_of(guard.lm) != "numpy":
            raise ModelError(f"{guard.lm.name} is a PyTorch model; build the guard with the model's ONNX folder, mg.Guard(policy, folder)")
        guard.refuse_review("onnxruntime-genai")
        self.guard, self._model = guard, model

    def generate(self, prompt: PromptLike, *, max_new_tokens: int, **search: Any) -> list[int]:
        """Token ids behind the prompt, the end-of-text token included; arguments and errors as ``stream``."""
        return list(self.stream(prompt, max_new_tokens=max_new_tokens, **search))

    def stream(self, prompt: PromptLike, *, max_new_tokens: int, **search: Any) -> Iterator[int]:
        """Token ids behind the prompt, as they are drawn, to the end of the text or ``max_new_tokens``.

        Args:
            prompt: a text, token ids, or a chat.
            search: genai's search options (do_sample, temperature, top_k, top_p, random_seed, repetition_penalty …), over those of the
                model's folder.

        Raises:
            PromptError: the prompt is empty, too long, or of a wrong type.
            UnsupportedPathError: search asks for beams or several sequences.
            ControlError: a control failed and the policy fails closed; the tokens yielded until then stand.
        """
        refused = [name for name in _ALONE if search.get(name, 1) != 1]
        if refused:
            raise UnsupportedPathError(
                f"{', '.join(refused)}: genai doesn't tell which beam a row of logits belongs to; generate one sequence after the other"
            )
        if max_new_tokens < 1:
            raise UnsupportedPathError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        ids = encode_prompt(self.guard.lm, prompt, "the prompt")
        generator, temperature = self._generator(ids, max_new_tokens, search)
        return self._tokens(generator, self._processor(temperature), ids, max_new_tokens)

    def _generator(self, ids: list[int], max_new_tokens: int, search: dict[str, Any]) -> tuple[Any, float]:
        import onnxruntime_genai as og

        parameters = og.GeneratorParams(self._model)
        alone = dict.fromkeys(_ALONE, 1)
        parameters.set_search_options(**{**search, **alone, "max_length": len(ids) + max_new_tokens})
        known = parameters.get_search_options()
        generator = og.Generator(self._model, parameters)
        generator.append_tokens(np.array(ids, np.int32))
        return generator, float(known.get("temperature", 1.0)) if known.get("do_sample") else 1.0

    def _processor(self, temperature: float) -> NumpyLogitsProcessor:
        """As ``Guard.logits_processor``, with hidden states from a pass of the guard's own."""
        guard = self.guard
        return NumpyLogitsProcessor(
            guard.lm,
            guard.controls,
            guard.gate,
            guard.policy.on_error == "open",
            guard.counters,
            temperature=temperature,
            attention_mask=np.ones((1, 1), np.int64),  # a prompt may begin with the token that elsewhere is padding
        )

    def _tokens(self, generator: Any, processor: NumpyLogitsProcessor, ids: list[int], most: int) -> Iterator[int]:
        history = list(ids)
        with closing(_Held(generator)) as held:
            while not held.generator.is_done() and len(history) < len(ids) + most:
                logits = held.generator.get_logits()  # f32[1, 1, V]
                held.generator.set_logits(processor(np.array([history]), logits[:, -1])[:, None])
                held.generator.generate_next_token()
                grown = len(held.generator.get_sequence(0)) - len(history)  # 0 at the end-of-text token, which genai leaves out
                if grown > 1:
                    raise BypassError(f"genai drew {grown} tokens in one step (speculative decoding?), and showed the logits of one")
                history.append(int(held.generator.get_next_tokens()[0]))
                yield history[-1]


class _Held:
    """A generator, let go of when its stream ends, however it ends: its caches are large."""

    def __init__(self, generator: Any):
        self.generator = generator

    def close(self) -> None:
        self.generator = None
