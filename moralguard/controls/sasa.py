"""SASA: candidates behind which the model's own state lies further on the wanted side of a linear probe are raised."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, WithJsonSchema, field_validator

from moralguard.backends.capabilities import Capabilities
from moralguard.backends.factored_head import FactoredHead
from moralguard.controls.base import BoundControl, Control
from moralguard.controls.conflicts import Thing, things
from moralguard.controls.linear_probe import LinearProbe, Pooling, probe_from, probe_of_pack
from moralguard.controls.rewards import bind_reward, checked_reward
from moralguard.decoding.passes import Pass
from moralguard.decoding.step import Step
from moralguard.decoding.terms import Sparse, Terms
from moralguard.packs import is_pack, read_pack
from moralguard.values import Value

if TYPE_CHECKING:
    import torch

    from moralguard.backends.hf import LanguageModel

Probe = Annotated[
    Any,
    WithJsonSchema(
        {"type": "string", "description": "attribute-head or prefix-head pack (folder or pack:NAME); (W [d], b) from Python only"}
    ),
]


class SASA(Control):
    """z' = z + beta * softmax over the candidates of m, on the base's k most probable candidates, the rest removed.

    Self-disciplined autoregressive sampling, Ko et al. 2024 (arXiv 2410.03818): m(w) is the margin of the text with candidate w behind
    it, W . s + b, where s is the model's own last hidden state at w (``pooling`` "last") and (W, b) a linear classifier of such states
    whose positive side is wanted. Each candidate is read as one more token behind the request's own cache, in one forward a row.

    The softmax is over the candidates, so the bonuses of a step sum to beta: where no candidate is better than another, nothing changes.

    Deviations: the candidates are a fixed number of the base's most probable tokens, where the paper takes those that its sampler
    leaves (top-p), which can be thousands of rows; the closed-form probe of the paper is one way to get (W, b) among others (a
    Gaussian one has W = S^-1 (mu_1 - mu_2) / 2, scaled to length 1, and b = -W . (mu_1 + mu_2) / 2). The paper's rule has no one
    beta, so there is no default.

    A prefix head (a pack, or ``FactoredHead``) gives the margin without a forward: its logit (query h_t) . (key e_w) + linear . e_w +
    state . h_t + bias is computed from the state h_t **before** the candidate and the candidate's unembedding e_w. That isn't the
    paper's margin but an estimate of it, fitted for just this; it costs a product a step, and runs on every backend.

    Args:
        probe: (W f[d], b), margins of the model's last hidden states, positive where wanted; an attribute-head pack (two classes, on
            the last layer, its target's side is wanted, pooled as it was fitted); or a prefix head (``FactoredHead``, pack, or file).
        beta: strength, in logits; 0 deactivates.
        k: candidates.
        pooling: what W reads, with (W, b): the state at the candidate ("last", as in the paper), or the mean over all tokens ("mean").
    """

    control_name: ClassVar[str] = "sasa"
    any_arrays: ClassVar[bool] = True

    probe: Probe
    beta: Annotated[float, Field(ge=0)]
    k: Annotated[int, Field(ge=1)] = 20
    pooling: Pooling = "last"

    @field_validator("probe", mode="before")
    @classmethod
    def _read_probe(cls, probe: Any) -> Any:
        if isinstance(probe, FactoredHead):
            return probe
        if not isinstance(probe, (str, Path)):
            checked = probe_from(probe, "last", "sasa probe")
            return (checked.weight, checked.bias)
        if _is_attribute_head(str(probe)):
            probe_of_pack(str(probe), "sasa probe")
            return str(probe)
        return checked_reward(probe, "sasa probe")

    def linear(self, lm: LanguageModel | None = None) -> LinearProbe | None:
        """The linear probe; None where a prefix head gives the margins.

        Raises:
            ModelError: its pack can't be read, or is of another model than ``lm``.
        """
        if isinstance(self.probe, tuple):
            return probe_from(self.probe, self.pooling, "sasa probe")
        return None if self._factored else probe_of_pack(self.probe, "sasa probe", lm)

    @property
    def _factored(self) -> bool:
        """Whether a prefix head gives the margins."""
        return not isinstance(self.probe, tuple) and not (isinstance(self.probe, str) and _is_attribute_head(self.probe))

    @property
    def seeks(self) -> tuple[Thing, ...]:
        return things("reward", self.probe) if self._factored else ()

    @property
    def active(self) -> bool:
        return self.beta != 0

    def scaled(self, factor: float) -> Self:
        return self.replaced(beta=self.beta * factor)

    @property
    def needs(self) -> Capabilities:
        if self._factored:
            return Capabilities(hidden=True, history=True)
        return Capabilities(hidden=True, cache=True, auxiliary=True)

    @property
    def own_states(self) -> bool:
        return isinstance(self.probe, str) and self._factored

    def instead(self, missing: Sequence[str]) -> str:
        if self._factored:
            return super().instead(missing)
        return "a linear probe reads every candidate behind a PyTorch model's plain cache; a prefix-head pack runs on every backend"

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundControl[SASA]:
        probe = self.linear(lm)
        return FactoredSASA(self, lm) if probe is None else LookaheadSASA(self, lm, probe)


class _BoundSASA(BoundControl[SASA]):
    def terms(self, step: Step) -> Terms:
        arrays = step.arrays
        logits, ids = arrays.top_k(step.logits, min(self.settings.k, step.logits.shape[-1]))
        # a token that the base has removed takes no share of the bonus from the others
        margins = arrays.masked_fill(self.margins(step, ids), arrays.isneginf(logits), float("-inf"))
        return Terms((Sparse(ids, self.settings.beta * arrays.softmax(margins), keep_rest=False),))

    @abstractmethod
    def margins(self, step: Step, candidates: torch.Tensor) -> torch.Tensor:
        """f32[R, C]."""


class FactoredSASA(_BoundSASA):
    def __init__(self, settings: SASA, lm: LanguageModel):
        super().__init__(settings, lm)
        self._head = bind_reward(settings.probe, lm, "sasa probe")

    def margins(self, step: Step, candidates: torch.Tensor) -> torch.Tensor:
        return self._head.of(step, candidates)


class LookaheadSASA(_BoundSASA):
    def __init__(self, settings: SASA, lm: LanguageModel, probe: LinearProbe):
        probe.check(lm, "sasa probe")
        # the request's own text on the base's weights, which in the own loop is the base row itself
        self._own = Pass(lm, states=probe.pooling == "mean")
        super().__init__(settings, lm, (self._own,))
        self._probe = probe

    def margins(self, step: Step, candidates: torch.Tensor) -> torch.Tensor:
        from moralguard.controls.lookahead import candidate_states

        view, arrays = step.of(self._own), step.arrays
        states = candidate_states(self.lm, view, candidates)
        if self._probe.pooling == "mean":
            before = view.hidden_sum + arrays.as_float(view.hidden)
            states = (before[:, None] + states) / (view.mask.sum(-1)[:, None, None] + 1)
        weight = arrays.float_array(self._probe.weight, self.lm)
        margins: torch.Tensor = (states * weight).sum(-1) + self._probe.bias
        return margins


@lru_cache(maxsize=64)  # asked at every session, and reading a pack hashes it
def _is_attribute_head(source: str) -> bool:
    return is_pack(source) and read_pack(source).card.kind == "attribute-head"
