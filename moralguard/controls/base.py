"""What a control is: settings (a frozen pydantic model) and, once bound to a model, pure functions of a step.

Arrays are torch tensors, or NumPy arrays on a model without torch; ``step.arrays`` has the functions for either, under the same names.

A control keeps no state between steps. What it must remember of a request it declares as columns, tensors with one row a
request, which the session moves, forks and drops with the request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from moralguard.backends.capabilities import Capabilities
from moralguard.controls.conflicts import Thing, things
from moralguard.controls.order import place_of
from moralguard.decoding.passes import Pass
from moralguard.decoding.step import Columns, Step
from moralguard.decoding.terms import Terms
from moralguard.decoding.when import When
from moralguard.errors import PolicyError
from moralguard.schema import StrictModel
from moralguard.values import Value

if TYPE_CHECKING:
    import torch

    from moralguard.backends.hf import LanguageModel


class Control(StrictModel, ABC):
    """Settings of one method. Subclasses are pydantic models; policies name them as ``name@version``.

    Class attributes:
        control_name: the name in policies.
        version: grows when the meaning of saved settings changes.
        any_arrays: the bound control computes with ``step.arrays`` alone, so that it runs on models of NumPy arrays (ONNX), too.
        sought, avoided: the settings that name an expert or a pack which the text is drawn to, or kept from.

    Attributes:
        when: when this control acts, beside the policy's gate; always, without one. It is the framework's: no control looks at it.
    """

    control_name: ClassVar[str]
    version: ClassVar[int] = 1
    any_arrays: ClassVar[bool] = False

    sought: ClassVar[tuple[str, ...]] = ()
    avoided: ClassVar[tuple[str, ...]] = ()

    when: When | None = None

    @classmethod
    def versioned_name(cls) -> str:
        return f"{cls.control_name}@{cls.version}"

    @property
    @abstractmethod
    def active(self) -> bool:
        """False at strength 0: the control, its filter and its passes are left out entirely."""

    def scaled(self, factor: float) -> Self:
        """The same control, ``factor`` times as strong: what a request's own strength means.

        Raises:
            PolicyError: the control doesn't say which of its settings is its strength.
        """
        raise PolicyError(f"control {self.versioned_name()} has no strength that a request could scale; leave strength at 1")

    @property
    def needs(self) -> Capabilities:
        """What it asks of the backend."""
        return Capabilities()

    @property
    def seeks(self) -> tuple[Thing, ...]:
        """What the text is drawn to (``conflicts.things``). Controls of one policy conflict where one seeks what another avoids."""
        return things("source", *(getattr(self, name) for name in self.sought))

    @property
    def avoids(self) -> tuple[Thing, ...]:
        """What the text is kept from, as ``seeks``."""
        return things("source", *(getattr(self, name) for name in self.avoided))

    @property
    def own_states(self) -> bool:
        """Whether a logits processor, which gets no hidden states, may run the base's rows once more to read them.

        Packs do, so that a fitted policy runs wherever a prompted one does; a control given its arrays is refused there, because
        ``attach`` has the states for nothing.
        """
        return False

    def instead(self, missing: Sequence[str]) -> str:
        """What to do where the model lacks these capabilities, for the end of an error message."""
        return "drop the control or use another model"

    @abstractmethod
    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundControl[Any]:
        """Check the settings against a model and prepare everything that doesn't depend on a request.

        Args:
            lm: the base model.
            values: the policy's values, for controls that derive their prompts from them.

        Raises:
            PolicyError: the settings don't fit this model.
            ModelError: an expert can't be loaded or doesn't fit.
        """


SettingsT = TypeVar("SettingsT", bound=Control)


class BoundControl(ABC, Generic[SettingsT]):
    """A control bound to a model: immutable, shared by all requests and threads.

    Attributes:
        settings: the control's settings.
        lm: the base model.
        passes: the auxiliary passes that every request needs.
        when: the settings' ``when`` for this model.

    Raises:
        PolicyError, ModelError: the model's prompts or states can't tell what ``when`` asks for.
    """

    def __init__(self, settings: SettingsT, lm: LanguageModel, passes: tuple[Pass, ...] = ()):
        self.settings = settings
        self.lm = lm
        self.passes = passes
        self.when = None if settings.when is None else settings.when.bind(lm)

    @property
    def name(self) -> str:
        return self.settings.control_name

    @cached_property
    def place(self) -> tuple[str, str]:
        """Where it stands in the canonical order of a policy's controls (``order.in_order``)."""
        return place_of(self.settings)

    def columns(self, step: Step) -> Columns:
        """State of fresh requests at their first step, tensors [R, ...]; nothing by default."""
        return {}

    @property
    def allowed(self) -> frozenset[int] | None:
        """The only token ids that this control ever lets through, whatever the text; None where that depends on the text.

        A policy whose controls allow no token together is refused when the guard is built.
        """
        return None

    @abstractmethod
    def terms(self, step: Step) -> Terms:
        """This control's terms; a pure function: the same step gives the same terms."""

    def commit(self, step: Step, carry: Columns, tokens: torch.Tensor) -> Columns:
        """The state after tokens i64[R] were drawn; the only place where state advances. Unchanged by default.

        Args:
            step: the step the tokens were drawn at; its passes still stand there.
            carry: ``terms(step).carry``.
            tokens: i64[R].
        """
        return step.columns
