"""ONNX causal language models as the guard sees them: forward passes, caches, head and identity, in NumPy arrays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from moralguard.backends.capabilities import Capabilities
from moralguard.backends.onnx import passes
from moralguard.backends.onnx.cache import GrowingCache, OnnxCache, SharedCache
from moralguard.backends.onnx.description import Description
from moralguard.backends.onnx.head import Head
from moralguard.backends.onnx.head_weight import read_head
from moralguard.backends.onnx.runner import HEAD_HINT, Runner
from moralguard.errors import ModelError


@dataclass(frozen=True)
class OnnxForward:
    """One forward pass, at the last position of every row.

    Attributes:
        logits: f32[R, V].
        hidden: f32[R, d], last hidden state, when asked for.
        head_logits: f32[R, V] before scale and soft cap, when asked for.
        states: f32[R, T, d], all positions of this pass, when asked for.
    """

    logits: np.ndarray
    hidden: np.ndarray | None = None
    head_logits: np.ndarray | None = None
    states: np.ndarray | None = None


class OnnxLanguageModel:
    """A causal LM on onnxruntime; ``load_onnx`` makes it. The user's files are never changed.

    Attributes:
        arrays: "numpy": the kind of its arrays (``backends.hf.LanguageModel`` has torch's).
        name: how messages name it. path: the graph's file.
        tokenizer: its tokenizer, or None where prompts are token ids.
        vocab_size: V. width: d, of the last hidden state. context_length: None where nothing states a limit.
        rewindable: whether its caches can be cut and reordered; always true here.
    """

    arrays: ClassVar[str] = "numpy"
    rewindable: ClassVar[bool] = True

    def __init__(
        self,
        runner: Runner,
        description: Description,
        tokenizer: Any = None,
        *,
        first: Runner | None = None,
        project: Callable[[np.ndarray], OnnxLanguageModel] | None = None,
        projected: bool = False,
    ):
        """Put a model together.

        Args:
            runner: the graph that reads a cache.
            description: what the files beside the graph say.
            tokenizer: its tokenizer, or None.
            first: the graph that starts a text, where the other can't.
            project: makes this model again with a projection in front of its head.
            projected: the graph has such a projection.
        """
        self.runner, self.first, self.description, self.tokenizer = runner, first, description, tokenizer
        self._project, self._projected = project, projected
        self.name, self.path = description.name, runner.path
        self.context_length = description.context_length
        self.eos_token_ids = description.eos_token_ids
        vocabulary = runner.ports.vocabulary or description.vocab_size
        if vocabulary is None:
            vocabulary = None if self.head is None else self.head.weight.shape[0]
        if vocabulary is None:
            raise ModelError(f"{self.path} doesn't state the size of its vocabulary; put the model's config.json beside it")
        self.vocab_size = int(vocabulary)

    @property
    def takes_padding(self) -> bool:
        """Whether rows of different lengths can share a pass: the graph has an attention mask."""
        return self.runner.ports.mask is not None

    @property
    def pad_token_id(self) -> int | None:
        """As transformers chooses it: the model's own, the tokenizer's, or the first end-of-text token."""
        for pad in (self.description.pad_token_id, getattr(self.tokenizer, "pad_token_id", None)):
            if pad is not None:
                return int(pad)
        return min(self.eos_token_ids) if self.eos_token_ids else None

    @cached_property
    def head(self) -> Head | None:
        """The head, read from the graph; None where it isn't found or its weight has no known form."""
        return read_head(self.runner.places[0], self.path.parent) if self.runner.places else None

    @cached_property
    def width(self) -> int:
        """d, the width of the states that the head reads.

        Raises:
            ModelError: neither the graph nor ``config.json`` tells.
        """
        if self.head is not None:
            return int(self.head.weight.shape[1])
        if self.description.width is None:
            raise ModelError(f"the head of {self.path} isn't found and no config.json states its hidden size. {HEAD_HINT}")
        return self.description.width

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits: those of the model it was exported from where ``moralguard.json`` names them, else of the weights."""
        return self.description.fingerprint or self.description.hash_weights(self.path)

    @cached_property
    def tokenizer_hash(self) -> str | None:
        """Short hash of the tokenizer's vocabulary, as ``LanguageModel.tokenizer_hash``; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        entries = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(entries.encode()).hexdigest()[:16]

    def spell(self, token_id: int) -> str:
        """The text of one token; its id in angle brackets where there is no tokenizer."""
        return f"<{token_id}>" if self.tokenizer is None else self.tokenizer.decode([token_id])

    def missing(self, needs: Capabilities) -> list[str]:
        """Names of the capabilities in ``needs`` that this model lacks: gradients and writing to the cache always."""
        hidden = needs.hidden and self.runner.hidden is not None and self.head is not None
        return needs.missing_from(Capabilities(hidden=hidden, history=True, auxiliary=True))

    def new_cache(self) -> OnnxCache:
        ports, device = self.runner.ports, self.runner.device
        return SharedCache(ports.slots, device) if ports.grouped else GrowingCache(ports.slots, device)

    @cached_property
    def _head_bias(self) -> np.ndarray:
        """b of E h + b, f32[V]: what one token's logits hold beside E h."""
        if self.head is None:
            raise ModelError(f"the head of {self.path} isn't found, so the probabilities of given tokens can't be read. {HEAD_HINT}")
        found = self.forward(cache=self.new_cache(), input_ids=np.zeros((1, 1), np.int64), hidden=True)
        if found.hidden is None or found.head_logits is None:
            raise ModelError(f"{self.path} gives no hidden states, so the probabilities of given tokens can't be read")
        bias: np.ndarray = found.head_logits[0] - self.head.weight @ found.hidden[0]
        return bias

    def logits_of(self, states: np.ndarray) -> np.ndarray:
        """f32[..., V] of last hidden states f32[..., d].

        Raises:
            ModelError: the head isn't found.
        """
        bias = self._head_bias
        if self.head is None:
            raise ModelError(f"the head of {self.path} isn't found. {HEAD_HINT}")
        return self.head.bend(states @ self.head.weight.T + bias)

    def forward(
        self,
        *,
        cache: OnnxCache,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        position_ids: np.ndarray | None = None,
        hidden: bool = False,
        states: bool = False,
        strength: np.ndarray | float | None = None,
    ) -> OnnxForward:
        """One pass that extends ``cache`` in place.

        Args:
            cache: of ``new_cache``, with W columns.
            input_ids: i64[R, T].
            attention_mask: i64[R, W + T], 0 at padding, which stands on the left; None where there is none.
            position_ids: i64[R, T]; counted from the mask where not given.
            hidden: return the last hidden state and the head's raw output.
            states: return the states of every position of this pass.
            strength: f32[R] or one number, of the projection of ``with_projection``; only on such a model.

        Raises:
            ModelError: hidden states are asked for and the head wasn't found; rows are padded and the graph takes no mask; padding stands
                behind a token where the graph's attention can't skip it.
        """
        wants = hidden or states
        if wants and self.runner.hidden is None:
            raise ModelError(f"the head of {self.path} isn't found, so its hidden states can't be read. {HEAD_HINT}")
        rows, tokens = input_ids.shape
        if attention_mask is None:
            attention_mask = np.ones((rows, cache.length + tokens), np.int64)
        elif not self.takes_padding and not np.all(attention_mask):
            raise ModelError(
                f"{self.path} takes no attention mask, so rows of different lengths can't share a pass; give prompts one at a time, or "
                "export it with a padded sample (`moralguard export` does)"
            )
        request = passes.Request(np.asarray(input_ids), np.asarray(attention_mask), position_ids, self._strength(strength, rows), wants)
        if isinstance(cache, SharedCache):
            found = passes.run_shared(self.runner, cache, request)
        elif isinstance(cache, GrowingCache):
            runner = self.first if self.first is not None and cache.length == 0 else self.runner
            found = passes.run_growing(runner, cache, request)
        else:
            raise ModelError(f"the cache of a pass of {self.name} is a {type(cache).__name__}; start with the model's own new_cache()")
        if not wants:
            return OnnxForward(found.logits)
        return OnnxForward(found.logits, found.hidden, self._head_logits(found), found.states if states else None)

    def _head_logits(self, found: passes.Found) -> np.ndarray:
        if found.before is not None:
            return found.before
        scale = self.runner.places[0].scale
        return found.logits if scale == 1.0 else found.logits / np.float32(scale)

    def _strength(self, strength: np.ndarray | float | None, rows: int) -> np.ndarray | None:
        if not self._projected:
            if strength is not None:
                raise ModelError(f"{self.name} has no projection in its graph; make one with with_projection(basis)")
            return None
        given = np.asarray(0.0 if strength is None else strength, np.float32)
        return np.ascontiguousarray(np.broadcast_to(given, (rows,)).reshape(rows, 1, 1))

    def with_projection(self, basis: np.ndarray) -> OnnxLanguageModel:
        """This model with h - strength * (h U) U^T in front of its head, ``strength`` given to ``forward`` for each row.

        Hidden states that ``forward`` returns stay those before the projection.

        Args:
            basis: U, f32[d, r], orthonormal columns.

        Raises:
            ModelError: the basis has another width than the model's states, or the head isn't found.
        """
        basis = np.ascontiguousarray(basis, np.float32)
        if self._project is None or basis.ndim != 2 or basis.shape[0] != self.width:
            raise ModelError(f"a projection of {self.name} needs a basis f32[{self.width}, r]; got {list(basis.shape)}")
        return self._project(basis)
