"""Gating: where the base needs no help, rows pass through bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, field_validator, model_validator

from moralguard.backends.arrays import kind_of, namespace_for
from moralguard.backends.capabilities import Capabilities
from moralguard.backends.factored_head import FactoredHead
from moralguard.decoding.step import Step
from moralguard.errors import PolicyError
from moralguard.packs import read_pack
from moralguard.schema import StrictModel

if TYPE_CHECKING:
    import torch

    from moralguard.backends.hf import LanguageModel

_CANDIDATES = 50  # the base's most probable next tokens, over which a risk is averaged


class Gate(StrictModel):
    """When the controls act. Every condition that is given must hold; without any they always act.

    Attributes:
        min_entropy: entropy of the base's next-token law in nats, at least; confident steps pass through.
        first_tokens: only the first so many generated tokens.
        risk: prefix-head packs (folders or ``pack:NAME``) fitted for the model. A step's log-odds of a broken value are the base's
            own expectation of -logit P(v | y_<=t, w) over its 50 most probable next tokens w, the largest of the packs; the risk is
            the probability of their mean over the newest ``risk_window`` steps.
        risk_window: steps; a mean over a few tells text that is going wrong from a single odd token.
        min_risk: the least risk at which the controls act.
        stay_open: once open for a request, the gate stays open to its end.
    """

    min_entropy: Annotated[float, Field(ge=0)] | None = None
    first_tokens: Annotated[int, Field(ge=1)] | None = None
    risk: tuple[str, ...] = ()
    risk_window: Annotated[int, Field(ge=1)] = 1
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
        for name in () if self.risk else ("min_risk", "risk_window"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise PolicyError(f"a gate's {name} needs `risk`, the prefix-head packs that tell the risk")
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
            self._heads.append(FactoredHead.load(pack.folder, kind_of(lm)).project(lm.head, getattr(lm, "device", None)))

    @property
    def needs(self) -> Capabilities:
        return self.settings.needs

    @property
    def remembers(self) -> bool:
        """Whether what opens it depends on earlier steps."""
        return self.settings.stay_open or (bool(self.settings.risk) and self.settings.risk_window > 1)

    def open_rows(self, step: Step, log_odds: torch.Tensor | None) -> torch.Tensor | None:
        """bool[R], the rows whose conditions hold at this step; None where all do. The session keeps open what is to ``stay_open``.

        Args:
            log_odds: f32[R, n], those of the newest steps up to this one, the newest last; None without ``risk``.
        """
        rows: torch.Tensor | None = None
        if self.settings.first_tokens is not None:
            rows = step.generated < self.settings.first_tokens
        if self.settings.min_entropy is not None:
            uncertain = step.arrays.ops.entropy(step.logits) >= self.settings.min_entropy
            rows = uncertain if rows is None else rows & uncertain
        if log_odds is not None:
            risky = self.mean_log_odds(log_odds) >= math.log(self.settings.min_risk / (1 - self.settings.min_risk))
            rows = risky if rows is None else rows & risky
        return rows

    def mean_log_odds(self, log_odds: torch.Tensor) -> torch.Tensor:
        """f32[R]: over the window, of steps' log-odds f32[R, n], the newest last; the risk is its sigmoid."""
        # the mean of what is known: steps that were never looked at (tokens of a draft) are NaN
        mean: torch.Tensor = namespace_for(log_odds).mean_known(log_odds[:, -self.settings.risk_window :])
        return mean

    def log_odds(self, step: Step) -> torch.Tensor | None:
        """f32[R]: this step's log-odds that the value is broken, as the base expects over its most probable next tokens; the largest of
        the heads. None without ``risk``."""
        if not self._heads:
            return None
        if step.hidden is None:
            raise RuntimeError("a gate by risk needs hidden states")
        arrays = step.arrays
        values, ids = arrays.top_k(step.logits, min(_CANDIDATES, step.logits.shape[-1]))
        weights, hidden = arrays.softmax(values), arrays.as_float(step.hidden)
        broken = [arrays.ops.row_sums(weights * -head.scores(hidden, ids)) for head in self._heads]
        highest: torch.Tensor = arrays.largest(arrays.stack(broken), 0)
        return highest
