"""ARGS: alignment as reward-guided search, a reward added to the scores of the top candidates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field

from moralguard.controls.base import BoundControl
from moralguard.controls.reward_control import RewardControl
from moralguard.controls.rewards import bind_reward
from moralguard.decoding.step import Step
from moralguard.decoding.terms import Sparse, Terms
from moralguard.values import Value

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel


class ARGS(RewardControl):
    """z' = z + w * r on the base's k most probable candidates, the rest removed.

    Khanov, Burapacheep & Li 2024 (arXiv 2402.01694), equation 2 and algorithm 1. The reward is on its own scale and isn't clamped.
    ARGS-greedy is greedy decoding of z' (``do_sample`` off); ARGS-stochastic is sampling from softmax(z' / tau), tau = 0.7 in the
    paper: the decoding setting ``temperature``.

    Deviations: the scores are the model's raw logits, as in the authors' code (the paper's LM(v | x) leaves open whether they are
    normalised; the law on the candidates is the same). Rewards that are NaN or infinite are errors.

    Args:
        reward: a callable (token_ids i64[B, T], candidates i64[B, C], attention_mask=i64[B, T]) -> rewards f[B, C] with left-padded
            rows; or a prefix head (``FactoredHead``, pack, or safetensors file), whose reward is its logit, the log-odds of
            P(v | text, candidate).
        w: weight of the reward, 1 in the paper; 0 deactivates.
        k: candidates that are scored, 10 in the paper.
    """

    control_name: ClassVar[str] = "args"

    w: Annotated[float, Field(ge=0)] = 1.0
    k: Annotated[int, Field(ge=1)] = 10

    @property
    def active(self) -> bool:
        return self.w != 0

    def scaled(self, factor: float) -> Self:
        return self.replaced(w=self.w * factor)

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundARGS:
        return BoundARGS(self, lm)


class BoundARGS(BoundControl[ARGS]):
    def __init__(self, settings: ARGS, lm: LanguageModel):
        super().__init__(settings, lm)
        self._reward = bind_reward(settings.reward, lm, "args reward")

    def terms(self, step: Step) -> Terms:
        _, ids = step.arrays.top_k(step.logits, min(self.settings.k, step.logits.shape[-1]))
        return Terms((Sparse(ids, self.settings.w * self._reward.of(step, ids), keep_rest=False),))
