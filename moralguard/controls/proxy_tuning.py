"""Proxy-tuning: a large base moves as a small model moved when it was tuned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from moralguard.backends.arrays import is_language_model, kind_of
from moralguard.backends.capabilities import Capabilities
from moralguard.backends.lora_folder import is_adapter_folder
from moralguard.controls.base import BoundControl, Control
from moralguard.controls.expert_setting import ExpertSetting
from moralguard.controls.experts import Prompt, Unconditional, as_language_model, bind_expert, is_expert_pack
from moralguard.decoding.passes import Pass
from moralguard.decoding.step import Step
from moralguard.decoding.terms import Mix, Terms
from moralguard.errors import ModelError, PolicyError
from moralguard.values import Value

if TYPE_CHECKING:
    import torch

    from moralguard.backends.hf import LanguageModel


class ProxyTuning(Control):
    """z' = z + alpha (z+ - z-) on raw logits, without a filter, before temperature.

    Liu et al. 2024 (arXiv 2401.08565): DExperts with alpha 1 and every token kept. Models of a family often differ in the
    padding of their vocabulary, so logits of a wider expert are cut to the base's, as in the authors' code; unlike there, it is
    checked that the ids that stay are the same tokens.

    Args:
        expert: z+, the tuned small model; or anything else that DExperts takes as an expert.
        anti_expert: z-, the same model untuned.
        alpha: strength; 0 deactivates.
    """

    control_name: ClassVar[str] = "proxy-tuning"
    any_arrays: ClassVar[bool] = True
    sought: ClassVar[tuple[str, ...]] = ("expert",)
    avoided: ClassVar[tuple[str, ...]] = ("anti_expert",)

    expert: ExpertSetting
    anti_expert: ExpertSetting
    alpha: Annotated[float, Field(ge=0)] = 1.0

    @model_validator(mode="after")
    def _has_both(self) -> ProxyTuning:
        for name, what in (("expert", "tuned"), ("anti_expert", "before it was tuned")):
            if getattr(self, name) is None:
                raise PolicyError(f"proxy-tuning has no {name}; give the small model {what}")
        return self

    @property
    def active(self) -> bool:
        return self.alpha != 0

    def scaled(self, factor: float) -> Self:
        return self.replaced(alpha=self.alpha * factor)

    @property
    def needs(self) -> Capabilities:
        return Capabilities(auxiliary=True)

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundProxyTuning:
        passes = tuple(_bind(getattr(self, name), lm, f"proxy-tuning {name}") for name in ("expert", "anti_expert"))
        return BoundProxyTuning(self, lm, passes)


class BoundProxyTuning(BoundControl[ProxyTuning]):
    def terms(self, step: Step) -> Terms:
        expert, anti_expert = (self._cut(step, step.of(item).logits) for item in self.passes)
        return Terms((Mix((expert, anti_expert), (step.weight(self.settings.alpha), step.weight(-self.settings.alpha))),))

    def _cut(self, step: Step, logits: torch.Tensor) -> torch.Tensor:
        """f32[R, V] of logits f32[R, at least V]."""
        width = step.logits.shape[-1]
        cut: torch.Tensor = logits if logits.shape[-1] == width else step.arrays.copy_of(logits[:, :width])  # rows without gaps
        return cut


def _bind(expert: Any, lm: LanguageModel, where: str) -> Pass:
    """``bind_expert`` for a model whose vocabulary may be wider than the base's."""
    if (
        isinstance(expert, (Prompt, Unconditional))
        or is_expert_pack(expert)
        or (isinstance(expert, (str, Path)) and is_adapter_folder(expert))
    ):
        return bind_expert(expert, lm, where)
    if isinstance(expert, (str, Path)) and kind_of(lm) != "torch":
        return bind_expert(expert, lm, where)  # tells a backend that doesn't fit before the model is loaded
    other = expert if is_language_model(expert) else as_language_model(expert, where, lm)
    if kind_of(other) != kind_of(lm) or other.vocab_size <= lm.vocab_size:
        return bind_expert(other, lm, where)
    if lm.tokenizer is not None and other.tokenizer is not None:
        theirs = other.tokenizer.get_vocab()
        differing = next((token for token, i in lm.tokenizer.get_vocab().items() if theirs.get(token) != i), None)
        if differing is not None:
            raise ModelError(
                f"{where} ({other.name}) has {other.vocab_size} vocabulary entries, more than the {lm.vocab_size} of {lm.name}, and the "
                f"token {differing!r} has another id there; only entries behind the base's own can be cut, so use a model of its family"
            )
    return Pass(other)
