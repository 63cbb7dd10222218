"""Rows of one batched forward of a model that computes with NumPy arrays (ONNX Runtime)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from moralguard.backends.numpy_arrays import Array, left_padded, pad_left
from moralguard.decoding.likelihood import Likelihood
from moralguard.errors import PromptError


class RowGroup:
    """``torch_rows.RowGroup`` on NumPy arrays: rows that ride one forward, left-padded, with their KV cache.

    Attributes:
        logits: f32[R, V] at the newest position of every row.
        hidden: f32[R, d] last hidden state there, when captured; head_logits f32[R, V] where the head bends its logits.
        hidden_sum: f32[R, d] sum of the hidden states of all positions **before** the newest, when states are kept.
        mask: i64[R, W], 0 at padding.
        likelihood: log-probabilities of the tokens read, when asked for.
    """

    def __init__(
        self,
        lm: Any,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[None],
        *,
        hidden: bool = False,
        states: bool = False,
        counted_from: Sequence[int] | None = None,
    ):
        self.lm = lm
        self._sum_states, self._capture_states = states, states or counted_from is not None
        self._capture_hidden = hidden or self._capture_states
        self.lengths = [len(row) for row in rows]
        self._check_room("needs")
        ids, self.mask = left_padded(rows, lm)
        self.logits: Array
        self.hidden: Array | None = None
        self.hidden_sum: Array | None = None
        self.likelihood = None if counted_from is None else Likelihood(lm, self.lengths, counted_from)
        self.cache = lm.new_cache()
        self._forward(ids, first=True)

    @property
    def rewindable(self) -> bool:
        """Always: a graph's cache holds keys and values only."""
        return True

    def _check_room(self, verb: str) -> None:
        limit = self.lm.context_length
        if limit is not None and max(self.lengths) > limit:
            raise PromptError(
                f"a pass of {self.lm.name} {verb} {max(self.lengths)} tokens with its prefix, but its context holds {limit}; "
                "shorten the prompt or the prefix"
            )

    def _forward(self, ids: Array, first: bool = False) -> None:
        count = ids.shape[1]
        padded = min(self.lengths) < self.mask.shape[1]
        output = self.lm.forward(
            cache=self.cache,
            input_ids=ids,
            attention_mask=self.mask if padded else None,
            position_ids=np.maximum(self.mask.cumsum(-1) - 1, 0)[:, -count:],
            hidden=self._capture_hidden,
            states=self._capture_states,
        )
        if self.likelihood is not None:
            self.likelihood.read(ids, None if first else self.logits, output.states)
        self.logits, self.head_logits = output.logits, output.head_logits
        if self._sum_states:
            states = output.states.astype(np.float32, copy=False)
            seen = (states * self.mask[:, -count:, None].astype(np.float32)).sum(1) - states[:, -1]
            if first or self.hidden_sum is None or self.hidden is None:
                self.hidden_sum = seen
            else:
                self.hidden_sum = self.hidden_sum + self.hidden.astype(np.float32) + seen
        self.hidden = output.hidden

    def advance(self, tokens: Array) -> None:
        """Append tokens i64[R, n] to every row and read them."""
        self.mask = np.concatenate([self.mask, np.ones_like(tokens)], axis=-1)
        self.lengths = [n + tokens.shape[1] for n in self.lengths]
        self._check_room("would read")
        self._forward(tokens)

    def select(self, rows: Array) -> None:
        """Keep and reorder rows (i64[n]; an index may repeat), and drop columns that only held padding of rows gone."""
        self.cache.select_rows(rows)
        self.lengths = [self.lengths[i] for i in rows.tolist()]
        self.mask, self.logits = self.mask[rows], self.logits[rows]
        for name in ("hidden", "head_logits", "hidden_sum"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[rows])
        if self.likelihood is not None:
            self.likelihood = self.likelihood.select(rows)
        unused = self.mask.shape[1] - max(self.lengths)
        if unused:
            self.cache.drop_oldest(unused)
            self.mask = self.mask[:, unused:]
            if self.likelihood is not None:
                self.likelihood = self.likelihood.without_oldest(unused)

    def fork(self, rows: Array) -> RowGroup:
        """A group of its own of these rows (i64[n]); this one stays as it is."""
        twin = copy.copy(self)
        twin.cache = self.cache.twin()
        twin.select(rows)
        return twin

    def join(self, other: RowGroup) -> None:
        """Rows of another group of the same model behind one's own, which may be of another width."""
        self.cache.join(other.cache)
        width = max(self.mask.shape[1], other.mask.shape[1])
        self.mask = np.concatenate([pad_left(group.mask, width, 0) for group in (self, other)])
        self.lengths = self.lengths + other.lengths
        self.logits = np.concatenate([self.logits, other.logits])
        for name in ("hidden", "head_logits", "hidden_sum"):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, None if mine is None or theirs is None else np.concatenate([mine, theirs]))
        if self.likelihood is not None and other.likelihood is not None:
            self.likelihood = self.likelihood.joined(other.likelihood)

    def rewind(self, tokens: int) -> None:
        """Forget the newest tokens of every row; the logits are those of the dropped position until the next ``advance``."""
        known = None if self.likelihood is None else self.likelihood.without_newest(tokens)
        tokens += known is not None  # the law after the last token that stays isn't known any more: that token is read again
        self.cache.drop_newest(tokens)
        self.mask = self.mask[:, :-tokens]
        self.lengths = [n - tokens for n in self.lengths]
        if known is not None:
            self.likelihood = None
            self.advance(known.ids[:, -1:])
            self.likelihood = known

    def key_values(self) -> list[tuple[Array, Array]]:
        """Keys and values [R, heads, W, head_dim] a layer, the newest position included."""
        pairs: list[tuple[Array, Array]] = self.cache.key_values()
        return pairs


class SeparateRows:
    """A ``RowGroup`` for a graph that takes no attention mask, where padding would be read as text: rows of one length share a pass.

    Attributes: as ``RowGroup``.
    """

    def __init__(
        self,
        lm: Any,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[None],
        *,
        hidden: bool = False,
        states: bool = False,
        counted_from: Sequence[int] | None = None,
    ):
        self.lm = lm
        lengths = sorted({len(row) for row in rows})
        self._groups = []
        for length in lengths:
            own = [index for index, row in enumerate(rows) if len(row) == length]
            start = None if counted_from is None else [counted_from[index] for index in own]
            group = RowGroup(lm, [rows[i] for i in own], [None] * len(own), hidden=hidden, states=states, counted_from=start)
            self._groups.append(group)
        self._lay_out([lengths.index(len(row)) for row in rows])

    def _lay_out(self, groups: Sequence[int]) -> None:
        """Take note of the group of each row; in its group a row stands behind those named before it."""
        self._place = [(group, list(groups[:row]).count(group)) for row, group in enumerate(groups)]

    @property
    def rewindable(self) -> bool:
        """Always, as ``RowGroup``."""
        return True

    @property
    def lengths(self) -> list[int]:
        return [self._groups[group].lengths[row] for group, row in self._place]

    @property
    def mask(self) -> Array:
        return left_padded([[0] * length for length in self.lengths], self.lm)[1]

    def _gathered(self, name: str) -> Array | None:
        parts = [getattr(group, name) for group in self._groups]
        return None if any(part is None for part in parts) else np.stack([parts[group][row] for group, row in self._place])

    @property
    def logits(self) -> Array | None:
        return self._gathered("logits")

    @property
    def hidden(self) -> Array | None:
        return self._gathered("hidden")

    @property
    def head_logits(self) -> Array | None:
        return self._gathered("head_logits")

    @property
    def hidden_sum(self) -> Array | None:
        return self._gathered("hidden_sum")

    @property
    def likelihood(self) -> Likelihood | None:
        found = self._groups[0].likelihood
        for group in self._groups[1:]:
            if found is None or group.likelihood is None:
                return None
            found = found.joined(group.likelihood)
        starts = np.cumsum([0, *(len(group.lengths) for group in self._groups)])
        return None if found is None else found.select(np.array([starts[group] + row for group, row in self._place]))

    def advance(self, tokens: Array) -> None:
        """Append tokens i64[R, n] to every row and read them."""
        for index, group in enumerate(self._groups):
            group.advance(tokens[[row for row, (own, _) in enumerate(self._place) if own == index]])

    def select(self, rows: Array) -> None:
        """Keep and reorder rows (i64[n]; an index may repeat)."""
        chosen = [self._place[row] for row in rows.tolist()]
        kept = sorted({group for group, _ in chosen})
        for index in kept:
            self._groups[index].select(np.array([row for group, row in chosen if group == index], dtype=np.int64))
        self._groups = [self._groups[index] for index in kept]
        self._lay_out([kept.index(group) for group, _ in chosen])

    def fork(self, rows: Array) -> SeparateRows:
        """A group of its own of these rows (i64[n]); this one stays as it is."""
        chosen = [self._place[row] for row in rows.tolist()]
        kept = sorted({group for group, _ in chosen})
        twin = copy.copy(self)
        twin._groups = [self._groups[index].fork(np.array([row for group, row in chosen if group == index])) for index in kept]
        twin._lay_out([kept.index(group) for group, _ in chosen])
        return twin

    def join(self, other: SeparateRows) -> None:
        """Rows of another group of the same model behind one's own; those of one length share a pass from now on."""
        by_length = {group.lengths[0]: index for index, group in enumerate(self._groups)}
        places = [group for group, _ in self._place]
        moved: dict[int, int] = {}
        for index, group in enumerate(other._groups):
            known = by_length.get(group.lengths[0])
            if known is None:
                self._groups.append(group)
                moved[index] = len(self._groups) - 1
            else:
                self._groups[known].join(group)
                moved[index] = known
        self._lay_out([*places, *(moved[group] for group, _ in other._place)])

    def rewind(self, tokens: int) -> None:
        """Forget the newest tokens of every row."""
        for group in self._groups:
            group.rewind(tokens)


def row_group_of(lm: Any) -> type[RowGroup] | type[SeparateRows]:
    """The class of a model's row groups."""
    return RowGroup if getattr(lm, "takes_padding", True) else SeparateRows
