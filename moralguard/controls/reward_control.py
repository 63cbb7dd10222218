"""What controls by a reward of the base's most probable candidates have in common."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from moralguard.backends.capabilities import Capabilities
from moralguard.controls.base import Control
from moralguard.controls.conflicts import Thing, things
from moralguard.controls.rewards import Reward, checked_reward, reads_states


class RewardControl(Control):
    """A control by ``reward``, which scores the ``k`` most probable candidates of a step; it draws the text to what the reward likes.

    Raises:
        PolicyError, ModelError: ``reward`` is no callable, head or path, or can't be read.
    """

    any_arrays: ClassVar[bool] = True

    reward: Reward
    k: Annotated[int, Field(ge=1)]

    @field_validator("reward")
    @classmethod
    def _read_reward(cls, reward: Any) -> Any:
        return checked_reward(reward, f"{cls.control_name} reward")

    @property
    def seeks(self) -> tuple[Thing, ...]:
        return things("reward", self.reward)

    @property
    def needs(self) -> Capabilities:
        return Capabilities(hidden=reads_states(self.reward), history=True)

    @property
    def own_states(self) -> bool:
        return isinstance(self.reward, str)
