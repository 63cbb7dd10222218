"""GeDi: tokens are re-weighed by the class that class-conditional passes read into the text with them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field

from moralguard.backends.capabilities import Capabilities
from moralguard.controls.base import BoundControl, Control
from moralguard.controls.expert_setting import ExpertSetting
from moralguard.controls.experts import Prompt, bind_expert
from moralguard.controls.log_law import log_law
from moralguard.decoding.passes import Pass
from moralguard.decoding.step import Step
from moralguard.decoding.terms import Dense, Only, Term, Terms
from moralguard.errors import ModelError, PolicyError
from moralguard.values import Value

if TYPE_CHECKING:
    import torch

    from moralguard.backends.hf import LanguageModel


class GeDi(Control):
    """z' = z + disc_weight log P(desired | text, v), the least desired tokens removed.

    Krause et al. 2021 (arXiv 2009.06367). The class of text and candidate v is told by one pass a class, G_c[v] = (log p_c(v | text) +
    log p_c(text)) / (number of tokens with v), and P(c | text, v) is the softmax of logit_scale G over the classes. In the order of
    P(desired) the lowest tokens are removed up to the mass filter_p (1 - rho) of the re-weighed law p(v) P(desired)^disc_weight, as in
    paper and released code, unless their P(desired) is target_p (tau) or more.

    Deviations from the released code: the posterior may be over more than two classes; a removed token is gone, where the code takes
    10000 from its logit; ``class_bias`` moves no other setting. The text is what stands behind a class's prompt (behind its control
    code there, too), from its second token on where the class has no prompt.

    Args:
        code_desired: the desired class; a Prompt (the control code), or anything else that DExperts takes as an expert: a
            class-conditional model, a pack. With ``code_undesired`` None as well it is derived from the policy's values.
        code_undesired: the undesired class; likewise.
        other_codes: further classes that aren't desired.
        disc_weight: omega; 0 deactivates, the filter, too.
        filter_p: largest mass that is removed, in [0, 1); 0 removes nothing.
        target_p: a token whose P(desired) is at least this stays, in [0, 1].
        logit_scale: alpha, learned with a GeDi; 1 for prompts.
        class_bias: added to the desired class's G (nats); the authors' detoxifier has 2, and then a target_p of 0.967.
    """

    control_name: ClassVar[str] = "gedi"
    any_arrays: ClassVar[bool] = True
    sought: ClassVar[tuple[str, ...]] = ("code_desired",)
    avoided: ClassVar[tuple[str, ...]] = ("code_undesired",)

    code_desired: ExpertSetting = None
    code_undesired: ExpertSetting = None
    other_codes: tuple[ExpertSetting, ...] = ()
    disc_weight: Annotated[float, Field(ge=0)] = 30.0
    filter_p: Annotated[float, Field(ge=0, lt=1)] = 0.8
    target_p: Annotated[float, Field(ge=0, le=1)] = 0.8
    logit_scale: Annotated[float, Field(gt=0)] = 1.0
    class_bias: float = 0.0

    @property
    def active(self) -> bool:
        return self.disc_weight != 0

    def scaled(self, factor: float) -> Self:
        return self.replaced(disc_weight=self.disc_weight * factor)

    @property
    def needs(self) -> Capabilities:
        return Capabilities(auxiliary=True)

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundGeDi:
        desired, undesired = self.code_desired, self.code_undesired
        if desired is None and undesired is None and values:
            desired = Prompt("".join(value.keeping_prefix() for value in values))
            undesired = Prompt("".join(value.violating_prefix() for value in values))
        codes = {"code_desired": desired, "code_undesired": undesired}
        codes |= {f"other_codes[{i}]": code for i, code in enumerate(self.other_codes)}
        missing = next((name for name, code in codes.items() if code is None), None)
        if missing is not None:
            raise PolicyError(f"gedi has no {missing}; give a prompt or a model a class, or leave both codes to the policy's values")
        return BoundGeDi(self, lm, tuple(_class_pass(code, lm, f"gedi {name}") for name, code in codes.items()))


def _class_pass(code: object, lm: LanguageModel, where: str) -> Pass:
    found = bind_expert(code, lm, where)
    if found.unconditional:
        raise PolicyError(f"{where} is unconditional, but a class needs something that names it; give a prompt, a model or a pack")
    if found.lm.head is None:
        raise ModelError(f"{where}: the head of {found.lm.name} has no known form, so the probability of a prompt under it can't be read")
    return replace(found, likelihood=True)


class BoundGeDi(BoundControl[GeDi]):
    """The sums over the text so far are the passes' own (``PassView.log_likelihood``), so there is no column to move on."""

    def terms(self, step: Step) -> Terms:
        own, arrays = self.settings, step.arrays
        log_desired = self._log_desired(step)
        bias = own.disc_weight * log_desired
        delta: tuple[Term, ...] = (Dense(arrays.as_float(bias)),)
        if own.filter_p == 0 or own.target_p == 0:
            return Terms(delta)
        _, ascending = arrays.top_k(-log_desired, bias.shape[-1])
        mass = arrays.gather(arrays.softmax(arrays.as_double(step.logits) + bias), ascending).cumsum(-1)
        stays = (mass >= own.filter_p) | (arrays.gather(log_desired, ascending) >= math.log(own.target_p))
        nowhere = arrays.full(tuple(stays.shape), False, arrays.bool_, stays)
        return Terms((*delta, Only(arrays.scatter(nowhere, ascending, stays))))

    def _log_desired(self, step: Step) -> torch.Tensor:
        """log P(desired | text, v), f64[R, V]."""
        arrays, found = step.arrays, []
        for index, item in enumerate(self.passes):
            view = step.of(item)
            total = log_law(arrays, view.logits) + view.log_likelihood[:, None]
            found.append(
                self.settings.logit_scale * total / (view.counted + 1)[:, None] + (self.settings.class_bias if index == 0 else 0.0)
            )
        posterior = log_law(arrays, arrays.stack(found, -1))[..., 0]
        # what every class excludes says nothing of the class
        unknown: torch.Tensor = arrays.masked_fill(posterior, arrays.isnan(posterior), -math.log(len(found)))
        return unknown
