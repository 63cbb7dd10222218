"""Guard: a policy bound to a model."""

from __future__ import annotations

import asyncio
import secrets
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moralguard.backends.arrays import kind_of
from moralguard.backends.prompts import PromptLike, as_batch, encode_continuation, encode_prompt, is_single
from moralguard.binding import bind_control, bind_gate
from moralguard.controls.base import BoundControl
from moralguard.controls.conflicts import check_conflicts
from moralguard.decoding.counters import Counters
from moralguard.decoding.gate import BoundGate
from moralguard.decoding.given import Given, score_given
from moralguard.decoding.loop import LoopContext, decode
from moralguard.decoding.passes import check_passes_fit
from moralguard.decoding.records import Completion, GenerationResult
from moralguard.decoding.settings import DecodingSettings
from moralguard.errors import ControlError, ModelError, PolicyError, PromptError, UnsupportedPathError
from moralguard.models import load_model
from moralguard.policy import Policy
from moralguard.review.base import ReviewMethod
from moralguard.review.registry import in_order
from moralguard.text_stream import TextStream

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel
    from moralguard.discriminator.base import BaseDiscriminator
    from moralguard.discriminator.review_judge import ReviewJudge
    from moralguard.numpy_processor import NumpyLogitsProcessor
    from moralguard.processor import GuardLogitsProcessor
    from moralguard.review.desk import LoopDesk


class Guard:
    """Binds a policy to a model; immutable and safe to share between threads.

    Args:
        policy: a Policy, a built-in name, the path of a YAML or JSON file, or a dict.
        model: what ``load_model`` returns or takes: a causal LM, (model, tokenizer), a folder, a GGUF or ONNX file, an id. The
            tokenizer may be None where prompts are token ids and no control needs text.
        discriminator: judges ``result.scores`` and what the policy's ``review`` asks about, such as one that was adapted; the shipped one
            where none is given.

    Attributes:
        policy: the policy as given.
        lm: the model as the guard sees it.
        fitted: the model's name in the policy's ``fitted`` entry whose controls and gate act; None where the general ones do.
        gate: when the controls act on this model; None is always.
        controls: the bound controls that act (strength not 0).
        review: the review methods that act, in the order in which they run.
        counters: what was emitted, guarded and passed over since the guard was built.

    Raises:
        PolicyError: the policy can't be used, or a control needs what the model lacks (both are named).
        ModelError: a model can't be loaded or guarded.
    """

    def __init__(self, policy: Policy | str | Path | dict[str, Any], model: Any, *, discriminator: BaseDiscriminator | None = None):
        self.policy = Policy.load(policy)
        self._discriminator = discriminator
        self.lm: LanguageModel = load_model(model)
        if getattr(getattr(self.lm, "model", None), "training", False):
            warnings.warn(f"{self.lm.name} is in training mode: its dropout makes every pass differ; call model.eval() first", stacklevel=2)
        self.counters = Counters()
        entry = self.policy.fitted_for(self.lm)
        self.fitted: str | None = None if entry is None else entry.model
        acting = self.policy.for_model(self.lm)
        self.gate: BoundGate | None = None if acting.gate is None else bind_gate(acting.gate, self.lm, acting)
        self.controls: tuple[BoundControl, ...] = tuple(
            bind_control(control, self.lm, acting) for control in acting.effective_controls() if control.active
        )
        check_conflicts(acting.name, self.controls)
        self.review: tuple[ReviewMethod, ...] = tuple(method for method in in_order(self.policy.review) if method.active)
        if self.review and self.lm.tokenizer is None:
            raise PolicyError(
                f"policy {self.policy.name!r} reviews texts, but {self.lm.name} was given without a tokenizer; pass (model, tokenizer), or "
                "use policy.replaced(review=())"
            )

    def __repr__(self) -> str:
        names = ", ".join(control.name for control in self.controls) or "no control"
        return f"Guard(policy={self.policy.name!r}, model={self.lm.name!r}, controls=[{names}])"

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        *,
        seed: int | None = None,
        trace: bool = False,
        progress: Callable[[int, int], None] | None = None,
        **settings: Any,
    ) -> GenerationResult:
        """Continue prompts under the guard.

        Args:
            prompts: one prompt or a list of them: texts, token ids, or chats ``[{"role": ..., "content": ...}]``.
            seed: of the noise; with the same seed a prompt gives the same text, alone or in any batch. None draws one.
            trace: record what happened at every token.
            progress: called with (continuations done, continuations in all).
            settings: max_new_tokens, do_sample, temperature, top_k, top_p, min_p, num_return_sequences, batch_size; what isn't
                given comes from the policy's decoding defaults.

        Raises:
            PromptError: a prompt is empty, too long, or of a wrong type. Nothing was generated.
            ControlError: a control failed and the policy fails closed. Other requests were finished; ``.result`` holds everything.
        """
        decoding = self._decoding_settings(settings)
        requests = self._requests(prompts, decoding)
        seed = _seed(seed)
        context = self._context(decoding, seed, trace)
        for start in range(0, len(requests), decoding.batch_size):
            chunk = requests[start : start + decoding.batch_size]
            for _ in self._desk(context).review(chunk) if self.review else decode(context, chunk):
                pass
            if progress is not None:
                progress(min(start + decoding.batch_size, len(requests)), len(requests))
        result = self._result(requests, seed, trace)
        failed = next((request for request in requests if request.error is not None), None)
        if failed is not None:
            raise self._control_error(failed, result) from failed.cause
        return result

    def log_probabilities(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        continuations: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        batch_size: int = 32,
    ) -> list[tuple[list[int], np.ndarray]]:
        """How probable given text is under the guard: the law that ``generate`` draws from at temperature 1, before top-k, top-p, min-p.

        Args:
            prompts: as for ``generate``. continuations: one a prompt, a text (tokenized apart from its prompt, without special tokens)
                or token ids.

        Returns:
            (token ids, float64[tokens] log-probabilities in nats) of each continuation; -inf where the guard removed the token.

        Raises:
            PromptError: a prompt or continuation is empty, of a wrong type, or doesn't fit. ControlError: as for ``generate``.
        """
        batch = as_batch(prompts)
        texts: list[Any] = [continuations] if isinstance(continuations, str) else list(continuations)
        if len(batch) != len(texts):
            raise PromptError(f"there are {len(batch)} prompts and {len(texts)} continuations; give one a prompt")
        context = self._context(self._decoding_settings({}), 0, False)
        passes = [item for control in self.controls for item in control.passes]
        requests = []
        for i, (prompt, text) in enumerate(zip(batch, texts, strict=True)):
            ids = encode_prompt(self.lm, prompt, f"prompt {i}")
            check_passes_fit(passes, ids, f"prompt {i}")
            requests.append(Given(ids, encode_continuation(self.lm, text, f"continuation {i}"), f"continuation {i}"))
        # continuations of one prompt stand together, so that it is read once; then those of a length, which end together
        order = sorted(
            range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), requests[i].prompt_ids, len(requests[i].token_ids))
        )
        found: dict[int, np.ndarray] = {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            found.update(zip(chosen, score_given(context, [requests[i] for i in chosen]), strict=True))
        return [(list(requests[i].token_ids), found[i]) for i in range(len(requests))]

    async def agenerate(self, prompts: PromptLike | Sequence[PromptLike], **arguments: Any) -> GenerationResult:
        """``generate`` without blocking the event loop: the same arguments, the same text."""
        return await asyncio.to_thread(self.generate, prompts, **arguments)

    def stream(self, prompt: PromptLike, *, seed: int | None = None, **settings: Any) -> Iterator[str]:
        """Pieces of one continuation's text as they come; joined, they are the text that ``generate`` gives.

        Under a policy with ``review`` no piece is yielded that could still be taken back: ``rollback`` holds back ``max_rollback`` tokens,
        every other method the whole text. Where ``rollback`` refuses, its refusal stands in a paragraph of its own behind what was yielded.

        Raises:
            PromptError, ControlError: as ``generate``; the pieces yielded until then stand.
        """
        decoding = self._decoding_settings({**settings, "num_return_sequences": 1})
        if not is_single(prompt):
            raise PolicyError("stream takes one prompt; use generate for several")
        if self.lm.tokenizer is None:
            raise PolicyError(f"stream yields text, but {self.lm.name} was given without a tokenizer; use generate and its token_ids")
        requests = self._requests(prompt, decoding)
        context = self._context(decoding, _seed(seed), False)
        return self._pieces(context, requests[0])

    def _pieces(self, context: LoopContext, request: Completion) -> Iterator[str]:
        text, told = TextStream(self.lm.tokenizer), False
        whole = any(method.whole_text for method in self.review)
        for _, token in self._desk(context).review([request]) if self.review else decode(context, [request]):
            if not whole and (piece := text.push(token)):
                yield piece
                told = True
        if request.text is not None:  # a refusal, or a revision
            yield ("\n\n" if told else "") + request.text
        elif piece := self.lm.tokenizer.decode(request.token_ids, skip_special_tokens=True) if whole else text.flush():
            yield piece
        if request.error is not None:
            raise self._control_error(request, self._result([request], context.seed, False)) from request.cause

    async def astream(self, prompt: PromptLike, **arguments: Any) -> AsyncIterator[str]:
        """``stream`` for async code: the same pieces."""
        pieces = self.stream(prompt, **arguments)
        done = object()
        while (piece := await asyncio.to_thread(next, pieces, done)) is not done:
            yield str(piece)

    def logits_processor(self, attention_mask: Any = None) -> GuardLogitsProcessor | NumpyLogitsProcessor:
        """A logits processor for any transformers ``generate()``: greedy, sampling, beams, several return sequences, assisted.

        On an ONNX model it is one for loops over such a model: optimum's ``generate``, onnxruntime-genai's Generator, one's own.

        Args:
            attention_mask: i64[B, T] of the prompts, for loops of your own. Under transformers' ``generate`` the mask is found
                without it; elsewhere left padding is told by leading pad tokens.

        Raises:
            UnsupportedPathError: a control needs hidden states or gradients, which transformers doesn't hand to processors (use
                ``attach``), or the policy has ``review``.
        """
        self.refuse_review("a logits processor")
        torch_model = kind_of(self.lm) == "torch"
        instead = "`with guard.attach(model): model.generate(...)` or guard.generate(...)" if torch_model else "guard.generate(...)"
        for control in self.controls:
            needs = control.settings.needs
            missing = [
                name
                for name in ("hidden", "grad", "cache")
                if getattr(needs, name) and not (name == "hidden" and control.settings.own_states)
            ]
            if missing:
                raise UnsupportedPathError(
                    f"control {control.name!r} needs {', '.join(missing)}, which a logits processor doesn't get; use {instead}"
                )
        if not torch_model:
            from moralguard.numpy_processor import NumpyLogitsProcessor

            return NumpyLogitsProcessor(self.lm, self.controls, self.gate, self._open, self.counters, attention_mask=attention_mask)
        from moralguard.processor import GuardLogitsProcessor

        return GuardLogitsProcessor(self.lm, self.controls, self.gate, self._open, self.counters, attention_mask=attention_mask)

    def attach(self, model: Any = None) -> AbstractContextManager[Any]:
        """Inside, ``model.generate`` is guarded by every control; afterwards the model is exactly as before.

        Args:
            model: the guard's own model (the default).

        Raises:
            UnsupportedPathError: another model, one that is already attached, one that isn't transformers', or a way of generating that
                the guard can't cover; a policy with ``review``.
        """
        self.refuse_review("attach")
        if kind_of(self.lm) != "torch":
            raise UnsupportedPathError(
                f"attach guards a transformers model's own generate, and {self.lm.name} runs on ONNX Runtime; use guard.generate(...)"
            )
        from moralguard.attachment import attach

        return attach(self.lm, self.controls, self.gate, self._open, self.counters, model)

    def refuse_review(self, path: str) -> None:
        """For paths that see tokens and no whole texts.

        Args:
            path: how the message names it.

        Raises:
            UnsupportedPathError: the policy has review methods that act.
        """
        if self.review:
            names = ", ".join(method.versioned_name() for method in self.review)
            raise UnsupportedPathError(
                f"policy {self.policy.name!r} reviews whole texts ({names}), which {path} never sees; use guard.generate(...), "
                "`moralguard serve`, or a guard of policy.replaced(review=()), which leaves the review out"
            )

    @property
    def review_judge(self) -> ReviewJudge:
        """What the review methods ask for P(v|y)."""
        from moralguard.discriminator.review_judge import ReviewJudge

        return ReviewJudge(self.policy.values, self._discriminator, onnx=kind_of(self.lm) == "numpy")

    def _desk(self, context: LoopContext) -> LoopDesk:
        from moralguard.review.desk import LoopDesk

        statements = {value.id: value.statement for value in self.policy.values}
        return LoopDesk(self.lm, statements, self.review_judge, context.settings, self.review, context=context)

    @property
    def _open(self) -> bool:
        return self.policy.on_error == "open"

    def _decoding_settings(self, settings: dict[str, Any]) -> DecodingSettings:
        defaults = self.policy.decoding.model_dump(exclude_none=True)
        return DecodingSettings(**{**defaults, **settings})

    def _requests(self, prompts: Any, decoding: DecodingSettings) -> list[Completion]:
        batch = as_batch(prompts)
        places = [f"prompt {i}" if len(batch) > 1 else "the prompt" for i in range(len(batch))]
        encoded = [encode_prompt(self.lm, prompt, place) for prompt, place in zip(batch, places, strict=True)]
        passes = [item for control in self.controls for item in control.passes]
        for ids, place in zip(encoded, places, strict=True):
            check_passes_fit(passes, ids, place)
        number = range(decoding.num_return_sequences)
        return [Completion(ids, index, source=prompt) for ids, prompt in zip(encoded, batch, strict=True) for index in number]

    def _control_error(self, failed: Completion, result: GenerationResult) -> ControlError:
        return ControlError(
            f"control {failed.failed_control!r} failed after {len(failed.token_ids)} tokens and policy {self.policy.name!r} fails closed: "
            f"{failed.error}. What was generated is in this error's .result; `on_error: open` would go on without the control",
            failed.failed_control or "",
            result,
        )

    def _context(self, decoding: DecodingSettings, seed: int, trace: bool) -> LoopContext:
        ids = [value.id for value in self.policy.values]
        return LoopContext(
            lm=self.lm,
            controls=self.controls,
            settings=decoding,
            gate=self.gate,
            open_on_error=self._open,
            counters=self.counters,
            values={control.name: ids for control in self.controls},
            trace=trace,
            seed=seed,
        )

    def _result(self, requests: Sequence[Completion], seed: int, trace: bool) -> GenerationResult:
        tokenizer = self.lm.tokenizer
        texts = [
            r.text if r.text is not None else "" if tokenizer is None else tokenizer.decode(r.token_ids, skip_special_tokens=True)
            for r in requests
        ]

        def score() -> np.ndarray:
            if tokenizer is None:
                raise ModelError(f"{self.lm.name} was given without a tokenizer, so there is no text to judge; pass (model, tokenizer)")
            if not self.policy.values or not texts:
                return np.zeros((len(texts), len(self.policy.values)))
            return self.review_judge.discriminator.score(texts, self.policy.values)

        return GenerationResult(
            texts=texts,
            token_ids=[r.token_ids for r in requests],
            prompt_ids=[r.prompt_ids for r in requests],
            finish_reasons=[r.finish_reason for r in requests],
            errors=[r.error for r in requests],
            traces=[r.trace for r in requests] if trace else None,
            seed=seed,
            _score=score,
            reviews=[r.review for r in requests if r.review is not None] if self.review else None,
        )


def _seed(seed: int | None) -> int:
    if seed is None:
        return secrets.randbits(63)
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not -(2**127) <= seed < 2**127:
        raise PolicyError(f"seed is {seed!r}; expected an integer, or None for a new one")
    return int(seed)
