"""Classifier-free guidance: away from what the model says under one prompt, towards what it says under another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field

from moralguard.backends.capabilities import Capabilities
from moralguard.controls.base import BoundControl, Control
from moralguard.controls.expert_setting import ExpertSetting
from moralguard.controls.experts import Prompt, bind_expert
from moralguard.decoding.passes import Pass
from moralguard.decoding.step import Step
from moralguard.decoding.terms import Mix, Terms
from moralguard.errors import PolicyError
from moralguard.values import Value

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel


class Guidance(Control):
    """z' = z + strength (g - z) with g = z- + gamma (z+ - z-), on raw logits, before temperature.

    Sanchez et al. 2023 (arXiv 2306.17806), classifier-free guidance and negative prompting: log p(x | c-) + gamma (log p(x | c) -
    log p(x | c-)), whose normalising constants cancel. ``negative=Unconditional()`` is the paper's classifier-free form, which emphasises
    the request's own prompt: z- reads no prompt at all. With a positive prompt alone z- is the base without that prompt, so that what
    is emphasised is that prompt (context contrast), and the request itself stays in both.

    Args:
        positive: c, in front of the request: a Prompt, or anything else that DExperts takes as an expert. None is the base itself.
        negative: c-; likewise, or ``Unconditional()``. With both None they are derived from the policy's values.
        gamma: the paper's guidance strength; 1.5 is its choice for completion, 0 gives z- and 1 gives z+.
        strength: ours: the share of the way from the base to g. 0 deactivates, as does a gamma at which g is the base (0 without a
            negative prompt, 1 without a positive one); a request's own strength multiplies it.
    """

    control_name: ClassVar[str] = "guidance"
    any_arrays: ClassVar[bool] = True
    sought: ClassVar[tuple[str, ...]] = ("positive",)
    avoided: ClassVar[tuple[str, ...]] = ("negative",)

    positive: ExpertSetting = None
    negative: ExpertSetting = None
    gamma: Annotated[float, Field(ge=0)] = 1.5
    strength: Annotated[float, Field(ge=0)] = 1.0

    @property
    def active(self) -> bool:
        if self.positive is not None and self.negative is None:
            return self.strength != 0 and self.gamma != 0
        if self.positive is None and self.negative is not None:
            return self.strength != 0 and self.gamma != 1
        return self.strength != 0

    def scaled(self, factor: float) -> Self:
        return self.replaced(strength=self.strength * factor)

    @property
    def needs(self) -> Capabilities:
        return Capabilities(auxiliary=True)

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundGuidance:
        positive, negative = self.positive, self.negative
        if positive is None and negative is None:
            if not values:
                raise PolicyError(
                    "guidance has neither a positive nor a negative prompt, and the policy names no value to derive them from"
                )
            positive = Prompt("".join(value.keeping_prefix() for value in values))
            negative = Prompt("".join(value.violating_prefix() for value in values))
        return BoundGuidance(
            self,
            lm,
            None if positive is None else bind_expert(positive, lm, "guidance positive"),
            None if negative is None else bind_expert(negative, lm, "guidance negative"),
        )


class BoundGuidance(BoundControl[Guidance]):
    def __init__(self, settings: Guidance, lm: LanguageModel, positive: Pass | None, negative: Pass | None):
        super().__init__(settings, lm, tuple(item for item in (positive, negative) if item is not None))
        gamma, strength = settings.gamma, settings.strength
        sides = ((positive, strength * gamma), (negative, strength * (1 - gamma)))
        self._weights = tuple(weight for item, weight in sides if item is not None)
        self._base_weight = sum((weight for item, weight in sides if item is None), -strength)

    def terms(self, step: Step) -> Terms:
        sources = tuple(step.of(item).logits for item in self.passes)
        return Terms((Mix(sources, tuple(step.weight(weight) for weight in self._weights), step.weight(self._base_weight)),))
