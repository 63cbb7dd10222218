"""RAD: a unidirectional reward model raises the candidates it rewards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field

from moralguard.controls.base import BoundControl
from moralguard.controls.conflicts import Thing
from moralguard.controls.reward_control import RewardControl
from moralguard.controls.rewards import bind_reward
from moralguard.decoding.step import Step
from moralguard.decoding.terms import Sparse, Terms
from moralguard.values import Value

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel


class RAD(RewardControl):
    """z' = z + beta * r on the base's k most probable candidates, the rest removed; r is the reward clamped to [0, 1].

    Deng & Raffel 2023 (arXiv 2310.09520), section 2 and algorithm 1: r_i is what the reward model says of the text with candidate i
    behind it. The reward is clamped first and turned round (1 - r) afterwards, as in the authors' code, whose beta (30) and topk
    (20) are the defaults here; the paper reports beta from 10 to 50 and more.

    Deviations: rewards that are NaN or infinite are errors, where the released code clamps infinite ones and lets NaN pass. A pack is
    a factored head on the base's own state instead of a second language model: the method's point, that scoring the candidates of a
    step reads no earlier token again, holds for it by construction (the cache is the base's). A reward model of another
    architecture comes as a callable, which keeps whatever cache it has to itself.

    Args:
        reward: a callable (token_ids i64[B, T], candidates i64[B, C], attention_mask=i64[B, T]) -> rewards f[B, C] with left-padded
            rows, 1 the best and 0 the worst; or a prefix head (``FactoredHead``, pack, or safetensors file), whose reward is
            P(v | text, candidate), the sigmoid of its logit.
        beta: strength, in logits; 0 deactivates.
        k: candidates that are scored.
        inverse: 1 - r, for a reward model that scores what is **not** wanted, such as toxicity.
    """

    control_name: ClassVar[str] = "rad"

    beta: Annotated[float, Field(ge=0)] = 30.0
    k: Annotated[int, Field(ge=1)] = 20
    inverse: bool = False

    @property
    def active(self) -> bool:
        return self.beta != 0

    def scaled(self, factor: float) -> Self:
        return self.replaced(beta=self.beta * factor)

    @property
    def seeks(self) -> tuple[Thing, ...]:
        return () if self.inverse else super().seeks

    @property
    def avoids(self) -> tuple[Thing, ...]:
        return super().seeks if self.inverse else ()

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundRAD:
        return BoundRAD(self, lm)


class BoundRAD(BoundControl[RAD]):
    def __init__(self, settings: RAD, lm: LanguageModel):
        super().__init__(settings, lm)
        self._reward = bind_reward(settings.reward, lm, "rad reward")

    def terms(self, step: Step) -> Terms:
        arrays = step.arrays
        _, ids = arrays.top_k(step.logits, min(self.settings.k, step.logits.shape[-1]))
        rewards = self._reward.of(step, ids)
        if self._reward.log_odds:  # the logistic function, in the one form that both kinds of arrays have
            rewards = 0.5 * (1 + arrays.tanh(0.5 * rewards))
        rewards = arrays.clamp(rewards, 0.0, 1.0)
        if self.settings.inverse:
            rewards = 1 - rewards
        return Terms((Sparse(ids, self.settings.beta * rewards, keep_rest=False),))
