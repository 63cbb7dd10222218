"""Judging a text while it is being written: P(v | y_<=t), and P(v | y_<=t, w) for every next token w at once.

Two forms. ``PrefixScorer`` reads the base model's own last hidden state through a factored head that was fitted for that model;
scoring the whole vocabulary is one thin product. ``TextPrefixScorer`` needs no fit and no model: it reads the text written so far,
keeps what it found in the part that is done, and reads only the open end again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moralguard.discriminator.base import BaseDiscriminator
from moralguard.discriminator.inputs import as_context, as_texts, as_values
from moralguard.errors import DataError, ModelError
from moralguard.values import Value

if TYPE_CHECKING:  # a TextPrefixScorer needs neither
    from torch import Tensor

    from moralguard.backends.factored_head import FactoredHead
    from moralguard.backends.hf import LanguageModel


class PrefixScorer:
    """P(v | y_<=t, w) = sigmoid(u(h_t) . g(E_w) + b), from a model's last hidden state h_t and unembedding E.

    Args:
        lm: the model that writes. head: fitted for it (``moralguard.fitting.prefix_head``).

    Raises:
        ModelError: the model's head has no known form, or the fitted head has other sizes.
    """

    def __init__(self, lm: LanguageModel, head: FactoredHead):
        if lm.head is None:
            raise ModelError(f"{lm.name} has no head of a known form, so its next tokens can't be scored from its hidden state")
        width = lm.head.weight.shape[1]
        for name, matrix in (("query", head.query), ("key", head.key)):
            if matrix.ndim != 2 or matrix.shape[1] != width:
                raise ModelError(f"the prefix head's {name} is {tuple(matrix.shape)}; {lm.name} needs [k, {width}]: fit a head for it")
        self.lm = lm
        self._head = head.project(lm.head, lm.device)

    def next_token_logits(self, hidden: Tensor) -> Tensor:
        """Log-odds that v is kept, float32 [..., V], for every next token after last hidden states [..., d]."""
        hidden, head = hidden.float(), self._head
        logits = (hidden @ head.query.T) @ head.keys.T + head.offset
        return logits if head.state is None else logits + (hidden @ head.state)[..., None]

    def score_prefixes(self, token_ids: Sequence[int]) -> np.ndarray:
        """P(v | y_<=t) for t = 2 .. T of one text's token ids, float64 [T - 1]: each token judged from the state before it.

        Raises:
            DataError: fewer than two tokens.
        """
        import torch

        if len(token_ids) < 2:
            raise DataError(f"a prefix score needs at least two tokens, got {len(token_ids)}")
        ids = torch.tensor([list(token_ids)], device=self.lm.device)
        with torch.inference_mode(), self.lm.capture(states=True) as captured:
            self.lm.model(input_ids=ids, use_cache=False)
        if captured.states is None:
            raise ModelError(f"{self.lm.name} shows no hidden states")
        states, head, following = captured.states[0, :-1].float(), self._head, ids[0, 1:]
        logits = ((states @ head.query.T) * head.keys[following]).sum(-1) + head.offset[following]
        if head.state is not None:
            logits = logits + states @ head.state
        return torch.sigmoid(logits.double()).cpu().numpy()


@dataclass(frozen=True)
class PrefixState:
    """What a ``TextPrefixScorer`` knows of a text so far; immutable, so a state can be kept and gone back to.

    Attributes:
        open: the end of the text that is read again at the next piece.
        done: P(v | y) of the part before it, float64 [n_values]; the least over its windows.
        probability: P(v | y_<=t), float64 [n_values].
        below: at how many positions in a row each value was under its threshold, int64 [n_values].
        flagged: values that were under it at ``consecutive`` positions in a row once, bool [n_values].
    """

    open: str
    done: np.ndarray
    probability: np.ndarray
    below: np.ndarray
    flagged: np.ndarray


@dataclass(frozen=True)
class TextPrefixScorer:
    """P(v | y_<=t) from text alone.

    A position costs one reading of at most ``window`` characters, however long the text has become.

    Args:
        discriminator: what judges. values: statements, ids, ``Value`` objects or a policy.
        consecutive: a value is flagged when this many positions in a row fall under its threshold: half-written words and
            phrases look worse than they turn out, and two that agree raise far fewer false alarms than one.
    """

    discriminator: BaseDiscriminator
    values: Any
    context: str | None = None
    consecutive: int = 2
    window: int = 400
    overlap: int = 120
    _values: list[Value] = field(init=False)

    def __post_init__(self) -> None:
        if self.consecutive < 1:
            raise DataError(f"consecutive is {self.consecutive}; expected at least 1")
        if not 0 <= self.overlap < self.window:
            raise DataError(f"overlap is {self.overlap}; expected at least 0 and less than the window of {self.window} characters")
        object.__setattr__(self, "_values", as_values(self.values))

    def start(self) -> PrefixState:
        """The state of an empty text."""
        count = len(self._values)
        return PrefixState("", np.ones(count), np.ones(count), np.zeros(count, dtype=np.int64), np.zeros(count, dtype=bool))

    def extend(self, state: PrefixState, piece: str) -> PrefixState:
        """The state with ``piece`` (a token's text, or more) behind the text."""
        return self.extend_all([state], [piece])[0]

    def extend_all(self, states: Sequence[PrefixState], pieces: Sequence[str]) -> list[PrefixState]:
        """``extend`` of several texts in one batch."""
        if len(states) != len(pieces):
            raise DataError(f"got {len(states)} states and {len(pieces)} pieces; expected one piece a state")
        texts = [state.open + piece for state, piece in zip(states, as_texts(list(pieces)), strict=True)]
        found = self.discriminator.read(texts, self._values, as_context(self.context)).probability
        thresholds = np.array([value.threshold for value in self._values])
        extended = []
        for state, text, now in zip(states, texts, found, strict=True):
            probability = np.minimum(state.done, now)
            below = np.where(now < thresholds, state.below + 1, 0)
            done = state.done
            if len(text) > self.window:
                done, text = probability, text[len(text) - self.overlap :]
            extended.append(PrefixState(text, done, probability, below, state.flagged | (below >= self.consecutive)))
        return extended
