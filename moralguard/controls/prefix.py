"""Prefix: the model's own law behind a learned prefix, in place of its law without one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field, field_validator

from moralguard.backends.capabilities import Capabilities
from moralguard.controls.base import BoundControl, Control
from moralguard.controls.prefix_pack import prefix_pass
from moralguard.decoding.passes import Pass
from moralguard.decoding.step import Step
from moralguard.decoding.terms import Mix, Terms
from moralguard.packs import read_pack
from moralguard.values import Value

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel


class Prefix(Control):
    """z' = z + strength (z_prefixed - z), z_prefixed the logits of the same weights behind the prefix.

    The prefix is what a pack of kind ``prefix`` holds: keys and values of every layer (prefix-tuning, Li & Liang 2021, arXiv
    2101.00190; contrastive prefixes, Qian et al. 2022, arXiv 2202.13257, one a class), vectors in front of the embeddings (prompt tuning,
    Lester et al. 2021, arXiv 2104.08691), or tokens (a universal trigger, Wallace et al. 2019, arXiv 1908.07125). Strength 1 is the
    papers' law; between 0 and 1 the two laws are mixed geometrically, and over 1 the prefix counts for more than it does by itself. To
    set two prefixes against each other, name their packs in ``dexperts``, ``guidance`` or ``gedi``.

    Deviations: the request's own row stays without the prefix, so that the gate, other controls and the counterfactual have the
    unguarded model; a token that the base has removed stays removed.

    Args:
        prefix: the pack, a folder or ``pack:NAME``. On an ONNX model a pack of tokens.
        strength: 0 deactivates; a request's own strength multiplies it.
    """

    control_name: ClassVar[str] = "prefix"
    any_arrays: ClassVar[bool] = True
    sought: ClassVar[tuple[str, ...]] = ("prefix",)

    prefix: str | Path
    strength: Annotated[float, Field(ge=0)] = 1.0

    @field_validator("prefix")
    @classmethod
    def _is_pack(cls, prefix: str | Path) -> str | Path:
        read_pack(prefix, "prefix")  # a broken pack is told here and not at the first use
        return prefix

    @property
    def active(self) -> bool:
        return self.strength != 0

    def scaled(self, factor: float) -> Self:
        return self.replaced(strength=self.strength * factor)

    @property
    def needs(self) -> Capabilities:
        return Capabilities(auxiliary=True)

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundPrefix:
        return BoundPrefix(self, lm, prefix_pass(lm, read_pack(self.prefix, "prefix"), "prefix"))


class BoundPrefix(BoundControl[Prefix]):
    def __init__(self, settings: Prefix, lm: LanguageModel, prefixed: Pass):
        super().__init__(settings, lm, (prefixed,))
        self._prefixed = prefixed

    def terms(self, step: Step) -> Terms:
        strength = step.weight(self.settings.strength)
        return Terms((Mix((step.of(self._prefixed).logits,), (strength,), -strength),))
