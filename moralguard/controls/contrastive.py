"""Contrastive decoding: what an amateur finds likely, too, is worth less, among the tokens that the base finds plausible."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field

from moralguard.backends.capabilities import Capabilities
from moralguard.controls.base import BoundControl, Control
from moralguard.controls.expert_setting import ExpertSetting
from moralguard.controls.experts import Prompt, bind_expert
from moralguard.decoding.passes import Pass
from moralguard.decoding.step import Step
from moralguard.decoding.terms import Keep, Mix, Term, Terms
from moralguard.errors import PolicyError
from moralguard.values import Value

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel


class ContrastiveDecoding(Control):
    """z' = z - coef z_a / amateur_temperature on {v : p(v) >= alpha max p}, on raw logits, before temperature.

    Li et al. 2022 (arXiv 2210.15097), with the base as the expert: log p(v) - coef log p_a(v), whose normalising
    constants cancel. The paper searches this score with beams; here it is the law that is decoded, greedily, sampled or with beams.
    Plausibility is judged on the base at temperature 1.

    Args:
        amateur: a Prompt on the base's own weights, or anything else that DExperts takes as an expert. None derives a prompt that
            breaks the policy's values.
        coef: weight of the amateur's log-probabilities; the paper's difference has 1. 0 deactivates, the filter, too.
        amateur_temperature: of the amateur alone (tau); 0.5 sharpens it.
        alpha: the plausibility constraint, in [0, 1]; 0 keeps every token.
    """

    control_name: ClassVar[str] = "contrastive"
    any_arrays: ClassVar[bool] = True
    avoided: ClassVar[tuple[str, ...]] = ("amateur",)

    amateur: ExpertSetting = None
    coef: Annotated[float, Field(ge=0)] = 1.0
    amateur_temperature: Annotated[float, Field(gt=0)] = 0.5
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.1

    @property
    def active(self) -> bool:
        return self.coef != 0

    def scaled(self, factor: float) -> Self:
        return self.replaced(coef=self.coef * factor)

    @property
    def needs(self) -> Capabilities:
        return Capabilities(auxiliary=True)

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundContrastive:
        amateur = self.amateur
        if amateur is None:
            if not values:
                raise PolicyError("contrastive has no amateur, and the policy names no value to derive a prompt from")
            amateur = Prompt("".join(value.violating_prefix() for value in values))
        return BoundContrastive(self, lm, bind_expert(amateur, lm, "contrastive amateur"))


class BoundContrastive(BoundControl[ContrastiveDecoding]):
    def __init__(self, settings: ContrastiveDecoding, lm: LanguageModel, amateur: Pass):
        super().__init__(settings, lm, (amateur,))

    def terms(self, step: Step) -> Terms:
        own = self.settings
        amateur = step.of(self.passes[0]).logits
        terms: tuple[Term, ...] = (Mix((amateur,), (step.weight(-own.coef / own.amateur_temperature),)),)
        return Terms((*terms, Keep(min_p=own.alpha)) if own.alpha > 0 else terms)
