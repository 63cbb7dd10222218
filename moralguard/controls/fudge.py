"""FUDGE: a future discriminator re-weighs the base's most probable candidates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, field_validator

from moralguard.backends.capabilities import Capabilities
from moralguard.controls.base import BoundControl, Control
from moralguard.controls.conflicts import Thing, things
from moralguard.controls.rewards import Reward, bind_reward, checked_reward, reads_states
from moralguard.decoding.step import Step
from moralguard.decoding.terms import Sparse, Terms
from moralguard.values import Value

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel

_LARGEST_LOGIT = 1e4
_WHERE = "fudge discriminator"


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

    discriminator: Reward
    strength: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=1)] = 200

    @field_validator("discriminator")
    @classmethod
    def _read_discriminator(cls, discriminator: Any) -> Any:
        return checked_reward(discriminator, _WHERE)

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
        return Capabilities(hidden=reads_states(self.discriminator), history=True)

    @property
    def own_states(self) -> bool:
        return isinstance(self.discriminator, str)

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundFudge:
        return BoundFudge(self, lm)


class BoundFudge(BoundControl[Fudge]):
    def __init__(self, settings: Fudge, lm: LanguageModel):
        super().__init__(settings, lm)
        self._future = bind_reward(settings.discriminator, lm, _WHERE)

    def terms(self, step: Step) -> Terms:
        # The released code takes exactly top_k candidates, whichever of tied ones comes first.
        arrays = step.arrays
        _, ids = arrays.top_k(step.logits, min(self.settings.top_k, step.logits.shape[-1]))
        # a logit of -inf is a probability of 0: as good as removed, where a non-finite bias would count as none
        logits = arrays.clamp(self._future.of(step, ids, infinite=True), -_LARGEST_LOGIT, _LARGEST_LOGIT)
        return Terms((Sparse(ids, self.settings.strength * arrays.log_sigmoid(logits), keep_rest=False),))
