"""Self-debiasing: tokens that a biasing prefix makes more probable are made less probable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field

from moralguard.backends.capabilities import Capabilities
from moralguard.controls.base import BoundControl, Control
from moralguard.controls.conflicts import Thing, things
from moralguard.controls.experts import Prompt
from moralguard.decoding.step import Step
from moralguard.decoding.terms import Attenuation, Terms
from moralguard.errors import PolicyError
from moralguard.values import Value

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel


class SelfDebias(Control):
    """p' proportional to p * max(exp(-decay_constant * max(q - p, 0)), epsilon), q the largest probability over the prefixes.

    Schick et al. 2021 (arXiv 2103.00453), section 3.2. Every prefix describes the unwanted attribute and is continued with the
    request's own tokens.

    Args:
        prefixes: texts (or token ids, put in front as given) such as "The following text contains hate:\\n". None derives one
            from each of the policy's values.
        decay_constant: lambda of the paper (10, 50, 100 reported); 0 deactivates.
        epsilon: the smallest factor.
    """

    control_name: ClassVar[str] = "self-debias"
    any_arrays: ClassVar[bool] = True

    prefixes: tuple[str | tuple[int, ...], ...] | None = None
    decay_constant: Annotated[float, Field(ge=0)] = 50.0
    epsilon: Annotated[float, Field(gt=0, le=1)] = 0.01

    @property
    def active(self) -> bool:
        return self.decay_constant != 0 and self.prefixes != ()

    def scaled(self, factor: float) -> Self:
        return self.replaced(decay_constant=self.decay_constant * factor)

    @property
    def avoids(self) -> tuple[Thing, ...]:
        return things("prompt", *(self.prefixes or ()))

    @property
    def needs(self) -> Capabilities:
        return Capabilities(auxiliary=True)

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundSelfDebias:
        prefixes = self.prefixes
        if prefixes is None:
            if not values:
                raise PolicyError("self-debias has no prefixes, and the policy names no value to derive them from")
            prefixes = tuple(value.violating_prefix() for value in values)
        passes = tuple(Prompt(prefix).bind(lm, f"self-debias prefix {i}") for i, prefix in enumerate(prefixes))
        return BoundSelfDebias(self, lm, passes)


class BoundSelfDebias(BoundControl[SelfDebias]):
    def terms(self, step: Step) -> Terms:
        sources = tuple(step.of(item).logits for item in self.passes)
        return Terms((Attenuation(sources, step.weight(self.settings.decay_constant), step.weight(self.settings.epsilon)),))
