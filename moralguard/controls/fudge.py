"""FUDGE: a future discriminator re-weighs the base's most probable candidates."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, WithJsonSchema, field_validator

from moralguard.backends.arrays import kind_of
from moralguard.backends.capabilities import Capabilities
from moralguard.backends.factored_head import FactoredHead
from moralguard.controls.base import BoundControl, Control
from moralguard.controls.conflicts import Thing, things
from moralguard.decoding.step import Step
from moralguard.decoding.terms import Sparse, Terms
from moralguard.errors import PolicyError
from moralguard.packs import is_pack, read_pack
from moralguard.values import Value

if TYPE_CHECKING:
    import torch

    from moralguard.backends.hf import LanguageModel

_LARGEST_LOGIT = 1e4

FutureDiscriminator = Callable[..., "torch.Tensor"]
"""(token_ids i64[B, T], candidates i64[B, C], attention_mask=i64[B, T]) -> logits f[B, C] of P(v | prefix, candidate); torch tensors,
or NumPy arrays on an ONNX model."""

Discriminator = Annotated[
    Any, WithJsonSchema({"type": "string", "description": "pack folder, pack:NAME or safetensors file with a factored head"})
]


class Fudge(Control):
    """z' = z + strength * log sigmoid(c) on the base's top_k candidates, the rest removed.

    Yang & Klein 2021 (arXiv 2104.05218), equation 2; c is the future discriminator's logit for prefix and candidate. The authors'
    ``c - log(1 + e^c)`` is -inf for c > 88.7; ``logsigmoid`` isn't.

    Args:
        discriminator: a callable (token_ids i64[B, T], candidates i64[B, C], attention_mask=i64[B, T]) -> logits f[B, C] with
            left-padded rows (tensors, or NumPy arrays on an ONNX model), a ``FactoredHead``, a pack (folder or ``pack:NAME``), or the
            safetensors file of one.
        strength: lambda of the paper: 1.0, 4.0 for topics; 0 deactivates.
        top_k: candidates that are scored (the paper's precondition_topk).
    """

    control_name: ClassVar[str] = "fudge"
    any_arrays: ClassVar[bool] = True

    discriminator: Discriminator
    strength: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=1)] = 200

    @field_validator("discriminator")
    @classmethod
    def _read_discriminator(cls, discriminator: Any) -> Any:
        if isinstance(discriminator, (str, Path)):
            _load_head(str(discriminator))  # broken files are told here and not at the first use
            return str(discriminator)
        if isinstance(discriminator, FactoredHead) or callable(discriminator):
            return discriminator
        raise PolicyError(
            f"discriminator is a {type(discriminator).__name__}; expected a callable (token_ids, candidates, attention_mask=...) -> "
            "logits, a FactoredHead, or the pack or path of one"
        )

    @property
    def seeks(self) -> tuple[Thing, ...]:
        return things("reward", self.discriminator)

    @property
    def active(self) -> bool:
        return self.strength != 0

    def scaled(self, factor: float) -> Self:
        return self.replaced(strength=self.strength * factor)

    @property
    def needs(self) -> Capabilities:
        return Capabilities(hidden=isinstance(self.discriminator, (str, FactoredHead)), history=True)

    @property
    def own_states(self) -> bool:
        return isinstance(self.discriminator, str)

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundControl[Fudge]:
        if isinstance(self.discriminator, str):
            return FactoredFudge(self, lm, _load_head(self.discriminator, lm, kind_of(lm)))
        if isinstance(self.discriminator, FactoredHead):
            return FactoredFudge(self, lm, self.discriminator)
        return CallableFudge(self, lm)


class _BoundFudge(BoundControl[Fudge]):
    def terms(self, step: Step) -> Terms:
        # The released code takes exactly top_k candidates, whichever of tied ones comes first.
        arrays = step.arrays
        _, ids = arrays.top_k(step.logits, min(self.settings.top_k, step.logits.shape[-1]))
        scores = self.score(step, ids)
        if scores.shape != ids.shape:
            raise ValueError(f"the discriminator gave logits of shape {tuple(scores.shape)}; expected {tuple(ids.shape)}")
        if bool(arrays.isnan(scores).any()):
            raise ValueError("the discriminator gave NaN; its logits must be numbers")
        # a logit of -inf is a probability of 0: as good as removed, where a non-finite bias would count as none
        bias = self.settings.strength * arrays.log_sigmoid(arrays.clamp(arrays.as_float(scores), -_LARGEST_LOGIT, _LARGEST_LOGIT))
        return Terms((Sparse(ids, bias, keep_rest=False),))

    @abstractmethod
    def score(self, step: Step, candidates: torch.Tensor) -> torch.Tensor:
        """Discriminator logits f[R, C]."""


class CallableFudge(_BoundFudge):
    def __init__(self, settings: Fudge, lm: LanguageModel):
        super().__init__(settings, lm)
        self._mask_keyword = _mask_keyword(settings.discriminator)

    def score(self, step: Step, candidates: torch.Tensor) -> torch.Tensor:
        keywords = {self._mask_keyword: step.mask} if self._mask_keyword else {}
        scores: torch.Tensor = step.arrays.beside(self.settings.discriminator(step.history, candidates, **keywords), step.logits)
        return scores


class FactoredFudge(_BoundFudge):
    def __init__(self, settings: Fudge, lm: LanguageModel, head: FactoredHead):
        super().__init__(settings, lm)
        if lm.head is None:
            raise PolicyError(f"fudge needs the unembedding of {lm.name}, which has no head of a known form")
        width = lm.head.weight.shape[1]
        for name, matrix in (("query", head.query), ("key", head.key)):
            if matrix.ndim != 2 or matrix.shape[1] != width:
                raise PolicyError(
                    f"fudge {name} has shape {tuple(matrix.shape)}; {lm.name} has hidden states of {width}: expected [k, {width}]"
                )
        if head.query.shape[0] != head.key.shape[0]:
            shapes = f"{tuple(head.query.shape)} and key {tuple(head.key.shape)}"
            raise PolicyError(f"fudge query has shape {shapes}; expected [k, {width}] for both")
        self._head = head.project(lm.head, getattr(lm, "device", None))

    def score(self, step: Step, candidates: torch.Tensor) -> torch.Tensor:
        if step.hidden is None:
            raise RuntimeError("fudge with a factored head needs hidden states")
        return self._head.scores(step.arrays.as_float(step.hidden), candidates)


def _load_head(source: str, lm: LanguageModel | None = None, kind: str = "numpy") -> FactoredHead:
    """The head of a pack, checked against the model where one is given; or that of a bare file. ``kind`` of arrays: "torch", "numpy"."""
    if not is_pack(source):
        return FactoredHead.load(source, kind)
    pack = read_pack(source, "prefix-head")
    if lm is not None:
        pack.check(lm)
    return FactoredHead.load(pack.folder, kind)


def _mask_keyword(function: FutureDiscriminator) -> str | None:
    """The keyword by which a callable takes the mask, or None where it takes none."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return "attention_mask"
    if "attention_mask" in parameters:
        return "attention_mask"
    if "mask" in parameters:
        return "mask"
    return "attention_mask" if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else None
