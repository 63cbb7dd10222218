"""DExperts: contrast of an expert and an anti-expert on the base's nucleus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field

from moralguard.backends.capabilities import Capabilities
from moralguard.controls.base import BoundControl, Control
from moralguard.controls.expert_setting import ExpertSetting
from moralguard.controls.experts import Prompt, bind_expert
from moralguard.decoding.passes import Pass
from moralguard.decoding.step import Step
from moralguard.decoding.terms import Keep, Mix, Terms
from moralguard.errors import PolicyError
from moralguard.values import Value

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel


class DExperts(Control):
    """z' = nucleus(z, filter_p) + alpha (z+ - z-), on raw logits, before temperature.

    Liu et al. 2021 (arXiv 2105.03023), equation 1 and section 2; defaults of the toxicity experiments. Only the base is filtered.
    Without an expert (anti-only) z+ is the unfiltered base: (1 + alpha) z - alpha z-. Without an anti-expert z- is the unfiltered
    base: the authors' code gives NaN there (the filter runs in place on the logits it later subtracts); this follows the paper.

    Args:
        expert: z+; a Prompt on the base's own weights, a model, a pack (folder or ``pack:NAME``), a LoRA adapter folder, a folder,
            GGUF file or hub id, or None. On an ONNX model a Prompt or another ONNX model (folder or file).
        anti_expert: z-; likewise. With both None the prompts are derived from the policy's values.
        alpha: strength; 0 deactivates.
        filter_p: nucleus of the base that stays, in (0, 1]; 1 keeps everything.
    """

    control_name: ClassVar[str] = "dexperts"
    any_arrays: ClassVar[bool] = True
    sought: ClassVar[tuple[str, ...]] = ("expert",)
    avoided: ClassVar[tuple[str, ...]] = ("anti_expert",)

    expert: ExpertSetting = None
    anti_expert: ExpertSetting = None
    alpha: Annotated[float, Field(ge=0)] = 2.0
    filter_p: Annotated[float, Field(gt=0, le=1)] = 0.9

    @property
    def active(self) -> bool:
        return self.alpha != 0

    def scaled(self, factor: float) -> Self:
        return self.replaced(alpha=self.alpha * factor)

    @property
    def needs(self) -> Capabilities:
        return Capabilities(auxiliary=True)

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundDExperts:
        expert, anti_expert = self.expert, self.anti_expert
        if expert is None and anti_expert is None:
            if not values:
                raise PolicyError("dexperts has neither an expert nor an anti-expert, and the policy names no value to derive them from")
            expert = Prompt("".join(value.keeping_prefix() for value in values))
            anti_expert = Prompt("".join(value.violating_prefix() for value in values))
        return BoundDExperts(
            self,
            lm,
            None if expert is None else bind_expert(expert, lm, "dexperts expert"),
            None if anti_expert is None else bind_expert(anti_expert, lm, "dexperts anti_expert"),
        )


class BoundDExperts(BoundControl[DExperts]):
    def __init__(self, settings: DExperts, lm: LanguageModel, expert: Pass | None, anti_expert: Pass | None):
        super().__init__(settings, lm, tuple(p for p in (expert, anti_expert) if p is not None))
        self.expert, self.anti_expert = expert, anti_expert

    def terms(self, step: Step) -> Terms:
        alpha = step.weight(self.settings.alpha)
        keep = Keep(top_p=self.settings.filter_p)
        sources, weights = [], []
        if self.expert is not None:
            sources.append(step.of(self.expert).logits)
            weights.append(alpha)
        if self.anti_expert is not None:
            sources.append(step.of(self.anti_expert).logits)
            weights.append(-alpha)
        base_weight = None
        if self.expert is None:
            base_weight = alpha
        elif self.anti_expert is None:
            base_weight = -alpha
        return Terms((keep, Mix(tuple(sources), tuple(weights), base_weight)))
