"""Gating: where the base needs no help, rows pass through bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, field_validator, model_validator

import moralguard_kernels as ops
from moralguard.backends.capabilities import Capabilities
from moralguard.backends.factored_head import FactoredHead
from moralguard.backends.hf import LanguageModel
from moralguard.decoding.step import Step
from moralguard.errors import PolicyError
from moralguard.packs import read_pack
from moralguard.schema import StrictModel

_CANDIDATES = 50  # the base's most probable next tokens, over which a risk is averaged


class Gate(StrictModel):
    """When the controls act. Every condition that is given must hold; without any they always act.

    Attributes:
        min_entropy: entropy of the base's next-token law in nats, at least; confident steps pass through.
        first_tokens: only the first so many generated tokens.
        risk: prefix-head packs (folders or ``pack:NAME``) fitted for the model; a step's risk is the base's own expectation of
            1 - P(v | y_<=t, w) over its 50 most probable next tokens w, the largest of the packs.
        min_risk: the least risk at which the controls act.
        stay_open: once open for a request, the gate stays open to its end.
    """

    min_entropy: Annotated[float, Field(ge=0)] | None = None
    first_tokens: Annotated[int, Field(ge=1)] | None = None
    risk: tuple[str, ...] = ()
    min_risk: Annotated[float, Field(gt=0, lt=1)] = 0.5
    stay_open: bool = False

    @field_validator("risk", mode="before")
    @classmethod
    def _one_or_several(cls, risk: object) -> object:
        return (str(risk),) if isinstance(risk, (str, Path)) else risk

    @model_validator(mode="after")
    def _packs_are_whole(self) -> Gate:
        for source in self.risk:
            read_pack(source, "prefix-head")
        if not self.risk and self.min_risk != type(self).model_fields["min_risk"].default:
            raise PolicyError("a gate's min_risk needs `risk`, the prefix-head packs that tell the risk")
        return self

    @property
    def needs(self) -> Capabilities:
        return Capabilities(hidden=bool(self.risk))

    def bind(self, lm: LanguageModel) -> BoundGate:
        """The gate for a model.

        Raises:
            ModelError: a pack is of another model. PolicyError: the model's head has no known form.
        """
        return BoundGate(self, lm)


class BoundGate:
    """A gate bound to a model: immutable, a pure function of a step."""

    def __init__(self, settings: Gate, lm: LanguageModel):
        self.settings = settings
        self._heads = []
        for source in settings.risk:
            pack = read_pack(source, "prefix-head")
            pack.check(lm)
            if lm.head is None:
                raise PolicyError(f"a gate by risk needs the unembedding of {lm.name}, which has no head of a known form")
            self._heads.append(FactoredHead.load(pack.folder).project(lm.head, lm.device))

    @property
    def needs(self) -> Capabilities:
        return self.settings.needs

    def open_rows(self, step: Step) -> torch.Tensor | None:
        """bool[R], the rows whose conditions hold at this step; None where all do. The session keeps open what is to ``stay_open``."""
        rows: torch.Tensor | None = None
        if self.settings.first_tokens is not None:
            rows = step.generated < self.settings.first_tokens
        if self.settings.min_entropy is not None:
            uncertain = ops.entropy(step.logits) >= self.settings.min_entropy
            rows = uncertain if rows is None else rows & uncertain
        if self._heads:
            risky = self.risk(step) >= self.settings.min_risk
            rows = risky if rows is None else rows & risky
        return rows

    def risk(self, step: Step) -> torch.Tensor:
        """f32[R]: the base's expectation of 1 - P(v | y_<=t, w), over its most probable next tokens w; the largest of the heads."""
        if step.hidden is None:
            raise RuntimeError("a gate by risk needs hidden states")
        top = torch.topk(step.logits, min(_CANDIDATES, step.logits.shape[-1]), dim=-1)
        weights = torch.softmax(top.values, -1)
        risks = []
        for head in self._heads:
            broken = torch.sigmoid(-head.scores(step.hidden.float(), top.indices))
            risks.append(ops.row_sums(weights * broken))
        return torch.stack(risks).amax(0)
