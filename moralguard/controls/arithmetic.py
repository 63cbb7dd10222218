"""Model arithmetic: the law is a formula over the laws of the base and of named passes."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from moralguard.backends.capabilities import Capabilities
from moralguard.controls.base import BoundControl, Control
from moralguard.controls.expert_setting import ExpertSetting
from moralguard.controls.experts import bind_expert
from moralguard.controls.formula import parse_formula
from moralguard.controls.log_law import log_law
from moralguard.decoding.passes import Pass
from moralguard.decoding.step import Step
from moralguard.decoding.terms import Dense, Mix, Terms
from moralguard.errors import PolicyError
from moralguard.schema import nearest
from moralguard.values import Value

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel

BASE = "base"
"""The name of the guarded model's own law in every formula."""


class ModelArithmetic(Control):
    """z' = z + strength (F - log p) with F = sum_i w_i log p_i / sum_i w_i, before temperature.

    Dekoninck et al. 2024 (arXiv 2311.14479), weighted KL-optimality: F is the law nearest to all p_i by their weighted KL divergences.
    max(a, b) and min(a, b) are the paper's union and intersection: token by token the larger or smaller of two sums of weighted
    log-probabilities takes part, **with its own sum of weights**, so that the divisor may differ from token to token (max(base, toxic)
    always counts 1; max(2*base, toxic) counts 2 where the base decides). Of two that are equal max counts the first, min the last.
    Classifiers as terms aren't formulas here: Fudge is a control of its own.

    A negative sum of weights turns the whole formula round (what is subtracted becomes more probable). That is the equation as
    published, and it warns.

    Args:
        formula: such as "base - 0.96*max(base, toxic)"; ``base`` is the guarded model.
        passes: name -> a Prompt, or anything else that DExperts takes as an expert; exactly the names in the formula but ``base``.
        strength: ours: the share of the way from the base to F. 0 deactivates; a request's own strength multiplies it.
    """

    control_name: ClassVar[str] = "arithmetic"
    any_arrays: ClassVar[bool] = True

    formula: str
    passes: dict[str, ExpertSetting] = {}
    strength: Annotated[float, Field(ge=0)] = 1.0

    @field_validator("formula")
    @classmethod
    def _read_formula(cls, formula: str) -> str:
        return str(parse_formula(formula))

    @model_validator(mode="after")
    def _names_fit(self) -> ModelArithmetic:
        formula = parse_formula(self.formula)
        if BASE in self.passes:
            raise PolicyError(f"arithmetic passes names {BASE!r}, which is the guarded model itself; choose another name")
        unknown = next((name for name in formula.names if name != BASE and name not in self.passes), None)
        if unknown is not None:
            known = nearest(unknown, [BASE, *self.passes])
            raise PolicyError(f"arithmetic formula {self.formula!r} has {unknown!r}, which isn't a pass; {known}")
        for name, expert in self.passes.items():
            if name not in formula.names:
                raise PolicyError(f"arithmetic pass {name!r} isn't in the formula {self.formula!r}; use it or leave it out")
            if expert is None:
                raise PolicyError(f"arithmetic pass {name!r} is empty; give a prompt, a pack or a model")
        if min(formula.norms) < 0:
            warnings.warn(
                f"the weights of arithmetic formula {self.formula!r} add up to less than 0, which turns it round: what it subtracts "
                "becomes more probable; subtract less than is added",
                stacklevel=2,
            )
        return self

    @property
    def active(self) -> bool:
        return self.strength != 0 and parse_formula(self.formula).names != (BASE,)

    def scaled(self, factor: float) -> Self:
        return self.replaced(strength=self.strength * factor)

    @property
    def needs(self) -> Capabilities:
        return Capabilities(auxiliary=True)

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundArithmetic:
        return BoundArithmetic(self, lm, {name: bind_expert(item, lm, f"arithmetic pass {name!r}") for name, item in self.passes.items()})


class BoundArithmetic(BoundControl[ModelArithmetic]):
    def __init__(self, settings: ModelArithmetic, lm: LanguageModel, passes: dict[str, Pass]):
        super().__init__(settings, lm, tuple(passes.values()))
        self._by_name, self._formula = passes, parse_formula(settings.formula)

    def terms(self, step: Step) -> Terms:
        strength, weights, arrays = self.settings.strength, self._formula.weights, step.arrays
        if weights is not None:  # normalising constants cancel, so that it is a mix of logits
            total = sum(weights.values())
            sources = tuple(step.of(item).logits for item in self._by_name.values())
            shares = tuple(step.weight(strength * weights[name] / total) for name in self._by_name)
            return Terms((Mix(sources, shares, step.weight(strength * (weights.get(BASE, 0.0) / total - 1))),))
        own = log_law(arrays, step.logits)
        laws = {BASE: own} | {name: log_law(arrays, step.of(item).logits) for name, item in self._by_name.items()}
        value, norm = self._formula.evaluate(laws, arrays)
        return Terms((Dense(arrays.as_float(strength * (value / norm - own))),))
