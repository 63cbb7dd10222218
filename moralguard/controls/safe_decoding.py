"""SafeDecoding: the first tokens are drawn where base and a safe expert agree, and moved towards the expert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field

from moralguard.backends.capabilities import Capabilities
from moralguard.controls.base import BoundControl, Control
from moralguard.controls.expert_setting import ExpertSetting
from moralguard.controls.experts import Prompt, bind_expert
from moralguard.decoding.passes import Pass
from moralguard.decoding.step import Step
from moralguard.decoding.terms import Dense, Only, Terms
from moralguard.errors import PolicyError
from moralguard.values import Value

if TYPE_CHECKING:
    import torch

    from moralguard.backends.hf import LanguageModel

_LEAST = 1e-8


class SafeDecoding(Control):
    """P'(v) proportional to p(v) + alpha (p_e(v) - p(v)) on the tokens common to both top-k, for the first tokens of a text.

    Xu et al. 2024 (arXiv 2402.08983): k is the smallest for which the top k of base and expert have at least
    ``num_common_tokens`` in common. Where alpha > 1 the combination may be negative; as in the authors' code it is at least 1e-8.
    Both laws are taken at temperature 1.

    Args:
        expert: p_e; a model, adapter or pack tuned to refuse, or a Prompt on the base's own weights. None derives a prompt from the
            policy's values.
        alpha: weight of the difference; 0 deactivates, the choice of tokens, too.
        first_m: m, how many tokens of a text it acts on; 0 deactivates.
        num_common_tokens: c, the least size of the sample space.
    """

    control_name: ClassVar[str] = "safe-decoding"
    any_arrays: ClassVar[bool] = True
    sought: ClassVar[tuple[str, ...]] = ("expert",)

    expert: ExpertSetting = None
    alpha: Annotated[float, Field(ge=0)] = 3.0
    first_m: Annotated[int, Field(ge=0)] = 2
    num_common_tokens: Annotated[int, Field(ge=1)] = 5

    @property
    def active(self) -> bool:
        return self.alpha != 0 and self.first_m != 0

    def scaled(self, factor: float) -> Self:
        return self.replaced(alpha=self.alpha * factor)

    @property
    def needs(self) -> Capabilities:
        return Capabilities(auxiliary=True)

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundSafeDecoding:
        expert = self.expert
        if expert is None:
            if not values:
                raise PolicyError("safe-decoding has no expert, and the policy names no value to derive a prompt from")
            expert = Prompt("".join(value.keeping_prefix() for value in values))
        if self.num_common_tokens >= lm.vocab_size:
            raise PolicyError(
                f"safe-decoding num_common_tokens is {self.num_common_tokens}, but {lm.name} has {lm.vocab_size} tokens; give fewer (5)"
            )
        return BoundSafeDecoding(self, lm, bind_expert(expert, lm, "safe-decoding expert"))


class BoundSafeDecoding(BoundControl[SafeDecoding]):
    def __init__(self, settings: SafeDecoding, lm: LanguageModel, expert: Pass):
        super().__init__(settings, lm, (expert,))

    def terms(self, step: Step) -> Terms:
        arrays, own = step.arrays, self.settings
        acts = step.generated < own.first_m
        if not bool(acts.any()):
            return Terms()
        expert = step.of(self.passes[0]).logits
        # the k from which a token is in both top k
        place = arrays.maximum(_ranks(arrays, step.logits), _ranks(arrays, expert))
        nearest, _ = arrays.top_k(-place, own.num_common_tokens)
        base, safe = (arrays.softmax(arrays.as_double(logits)) for logits in (step.logits, expert))
        moved = arrays.log(arrays.clamp(base + own.alpha * (safe - base), _LEAST))
        delta = Dense(arrays.as_float(moved - arrays.as_double(step.logits)))
        return Terms((delta, Only(-place >= nearest[:, -1:])), rows=acts)


def _ranks(arrays: Any, logits: torch.Tensor) -> torch.Tensor:
    """f32[R, V], the place of every token in the order of its logit, from 1 (exact: a vocabulary is far smaller than 2^24)."""
    _, order = arrays.top_k(logits, logits.shape[-1])
    places = arrays.as_float((order * 0 + 1).cumsum(-1))
    ranks: torch.Tensor = arrays.scatter(places * 0, order, places)
    return ranks
