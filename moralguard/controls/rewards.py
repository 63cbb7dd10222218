"""Rewards of a step's candidates, whoever gives them: a callable, a pack, or a factored head."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import WithJsonSchema

from moralguard.backends.arrays import kind_of
from moralguard.backends.factored_head import FactoredHead
from moralguard.decoding.step import Step
from moralguard.errors import PolicyError
from moralguard.packs import is_pack, read_pack

if TYPE_CHECKING:
    import torch

    from moralguard.backends.hf import LanguageModel

RewardFunction = Callable[..., "torch.Tensor"]
"""(token_ids i64[B, T], candidates i64[B, C], attention_mask=i64[B, T]) -> rewards f[B, C] of the text with each candidate behind it;
rows are left-padded; torch tensors, or NumPy arrays on an ONNX model. The mask is passed by keyword (``attention_mask`` or ``mask``)
where the function has one."""

Reward = Annotated[
    Any, WithJsonSchema({"type": "string", "description": "pack folder, pack:NAME or safetensors file with a factored prefix head"})
]


def checked_reward(source: Any, where: str) -> Any:
    """A reward as a setting holds it: a path is read once, so that a broken file is told here and not at the first use.

    Raises:
        PolicyError: it is no callable, head or path, or nothing lies at the path. ModelError: the pack or file can't be read.
    """
    if isinstance(source, (str, Path)):
        _load(str(source), where)
        return str(source)
    if isinstance(source, FactoredHead) or callable(source):
        return source
    raise PolicyError(
        f"{where} is a {type(source).__name__}; expected a callable (token_ids, candidates, attention_mask=...) -> rewards, a "
        "FactoredHead, or the pack or path of one"
    )


class CandidateReward(ABC):
    """A reward bound to a model.

    Class attributes:
        log_odds: what it gives are log-odds of P(v | text, candidate), not a reward on a scale of its own.
    """

    log_odds: ClassVar[bool]

    def __init__(self, where: str):
        self.where = where

    def of(self, step: Step, candidates: torch.Tensor, *, infinite: bool = False) -> torch.Tensor:
        """f32[R, C] of candidates i64[R, C].

        Args:
            infinite: infinite numbers are let pass.

        Raises:
            ValueError: the shape is another, or a number is NaN, or infinite where that isn't let pass.
        """
        found = self._of(step, candidates)
        if tuple(found.shape) != tuple(candidates.shape):
            raise ValueError(f"{self.where} gave rewards of shape {tuple(found.shape)}; expected {tuple(candidates.shape)}")
        rewards: torch.Tensor = step.arrays.as_float(found)
        arrays = step.arrays
        if infinite and bool(arrays.isnan(rewards).any()):
            raise ValueError(f"{self.where} gave NaN; expected numbers")
        if not infinite and not bool(arrays.isfinite(rewards).all()):
            raise ValueError(f"{self.where} gave a reward that is NaN or infinite; rewards must be finite numbers")
        return rewards

    @abstractmethod
    def _of(self, step: Step, candidates: torch.Tensor) -> torch.Tensor: ...


class CalledReward(CandidateReward):
    """A user's function, on its own scale."""

    log_odds = False

    def __init__(self, function: RewardFunction, where: str):
        super().__init__(where)
        self._function = function
        self._mask_keyword = _mask_keyword(function)

    def _of(self, step: Step, candidates: torch.Tensor) -> torch.Tensor:
        keywords = {self._mask_keyword: step.mask} if self._mask_keyword else {}
        rewards: torch.Tensor = step.arrays.beside(self._function(step.history, candidates, **keywords), step.logits)
        return rewards


class HeadReward(CandidateReward):
    """A factored head on the base's own last hidden state: unidirectional, and its cache is the base's."""

    log_odds = True

    def __init__(self, head: FactoredHead, lm: LanguageModel, where: str):
        super().__init__(where)
        if lm.head is None:
            raise PolicyError(f"{where} is a factored head, which needs the unembedding of {lm.name}; that has no head of a known form")
        width, shapes = lm.head.weight.shape[1], (tuple(head.query.shape), tuple(head.key.shape))
        if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][1] != width:
            raise PolicyError(
                f"{where} has a query of shape {shapes[0]} and a key of shape {shapes[1]}; hidden states of {lm.name} are {width} wide: "
                f"expected [k, {width}] for both. Fit one for this model with `moralguard fit head --kind prefix`"
            )
        self._head = head.project(lm.head, getattr(lm, "device", None))

    def _of(self, step: Step, candidates: torch.Tensor) -> torch.Tensor:
        if step.hidden is None:
            raise RuntimeError(f"{self.where} needs hidden states")
        return self._head.scores(step.arrays.as_float(step.hidden), candidates)


def reads_states(source: Any) -> bool:
    """Whether a reward reads the base's last hidden state."""
    return isinstance(source, (str, FactoredHead))


def bind_reward(source: Any, lm: LanguageModel, where: str) -> CandidateReward:
    """What ``checked_reward`` let pass, for one model.

    Raises:
        ModelError: the pack is of another model. PolicyError: the head doesn't fit the model.
    """
    if isinstance(source, str):
        return HeadReward(_load(source, where, lm, kind_of(lm)), lm, where)
    return HeadReward(source, lm, where) if isinstance(source, FactoredHead) else CalledReward(source, where)


def _load(source: str, where: str, lm: LanguageModel | None = None, kind: str = "numpy") -> FactoredHead:
    """The head of a pack, checked against the model where one is given, or that of a bare file, as arrays of a kind."""
    if is_pack(source):
        pack = read_pack(source, "prefix-head")
        if lm is not None:
            pack.check(lm)
        return FactoredHead.load(pack.folder, kind)
    if not Path(source).exists():
        raise PolicyError(f"{where} {source!r} isn't there; expected a prefix-head pack (folder or pack:NAME) or a safetensors file")
    return FactoredHead.load(source, kind)


def _mask_keyword(function: RewardFunction) -> str | None:
    """The keyword by which a callable takes the mask, or None where it takes none."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin tells no signature
        return "attention_mask"
    for name in ("attention_mask", "mask"):
        if name in parameters:
            return name
    return "attention_mask" if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else None
