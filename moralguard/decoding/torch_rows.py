"""Rows of one batched forward of a PyTorch model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import groupby

import torch

from moralguard.backends.edits import ModuleEdits, apply_edits
from moralguard.backends.hf import LanguageModel
from moralguard.backends.kv_cache import (
    KeyValue,
    cache_from,
    drop_newest,
    drop_oldest,
    is_plain,
    join_rows,
    key_values,
    select_rows,
)
from moralguard.backends.learned_prefix import LearnedPrefix
from moralguard.backends.lora import LoraAdapter, apply_adapters
from moralguard.backends.torch_arrays import pad_left
from moralguard.decoding.likelihood import Likelihood
from moralguard.decoding.torch_prefixes import first_cache, lengths_of, pads_first, reads_apart
from moralguard.errors import PromptError


class RowGroup:
    """Rows that ride one batched forward of one model, left-padded, with their KV cache.

    Attributes:
        logits: f32[R, V] at the newest position of every row.
        hidden: f[R, d] last hidden state there, when captured; head_logits f[R, V] likewise.
        hidden_sum: f32[R, d] sum of the hidden states of all positions **before** the newest, when states are kept.
        mask: i64[R, W], 0 at padding.
        likelihood: log-probabilities of the tokens read, when asked for.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[LoraAdapter | None],
        *,
        hidden: bool = False,
        states: bool = False,
        counted_from: Sequence[int] | None = None,
        edits: Sequence[ModuleEdits | None] = (),
        prefixes: Sequence[LearnedPrefix | None] | None = None,
    ):
        self.lm = lm
        self.adapters = list(adapters)
        self.edits = list(edits) or [None] * len(rows)
        self._sum_states, self._capture_states = states, states or counted_from is not None
        self._capture_hidden = hidden or self._capture_states
        width = max(len(row) for row in rows)
        before = [0] * len(rows) if prefixes is None else lengths_of(prefixes)
        self.lengths = [n + len(row) for n, row in zip(before, rows, strict=True)]
        if lm.context_length is not None and max(self.lengths) > lm.context_length:
            raise PromptError(
                f"a pass of {lm.name} needs {max(self.lengths)} tokens with its prefix, but its context holds {lm.context_length}; "
                "shorten the prompt or the prefix"
            )
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.as_tensor(row)
            mask[i, width - len(row) :] = 1
        self.mask = mask.to(lm.device)
        self.logits: torch.Tensor
        self.hidden: torch.Tensor | None = None
        self.hidden_sum: torch.Tensor | None = None
        self.likelihood = None if counted_from is None else Likelihood(lm, [len(row) for row in rows], counted_from)
        if prefixes is None:
            self.cache = lm.new_cache()
        else:
            self.cache, known = first_cache(prefixes)
            self.mask = torch.cat([known, self.mask], dim=-1)
        self._forward(ids.to(lm.device), first=True)
        if prefixes is not None:
            self.mask = pads_first(self.cache, self.mask)
            if self.likelihood is not None:
                self.likelihood = self.likelihood.widened(self.mask.shape[1])

    @property
    def rewindable(self) -> bool:
        return is_plain(self.lm.model.config.get_text_config())

    def _forward(self, ids: torch.Tensor, first: bool = False) -> None:
        count = ids.shape[1]
        padded = min(self.lengths) < self.mask.shape[1]
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -count:]
        with apply_adapters(self.adapters), apply_edits(self.edits):
            output = self.lm.forward(
                cache=self.cache,
                input_ids=ids,
                attention_mask=self.mask if padded else None,
                position_ids=positions,
                hidden=self._capture_hidden,
                states=self._capture_states,
            )
            if self.likelihood is not None and output.states is not None:
                self.likelihood.read(ids, None if first else self.logits, output.states)
        self.logits, self.head_logits = output.logits, output.head_logits
        if self._sum_states and output.states is not None:
            seen = (output.states.float() * self.mask[:, -count:, None]).sum(1) - output.states[:, -1].float()
            if first or self.hidden_sum is None or self.hidden is None:
                self.hidden_sum = seen
            else:
                self.hidden_sum = self.hidden_sum + self.hidden.float() + seen
        self.hidden = output.hidden

    def advance(self, tokens: torch.Tensor) -> None:
        """Append tokens i64[R, n] to every row and read them."""
        tokens = tokens.to(self.lm.device)
        self.mask = torch.cat([self.mask, self.mask.new_ones(tokens.shape)], dim=-1)
        self.lengths = [n + tokens.shape[1] for n in self.lengths]
        if self.lm.context_length is not None and max(self.lengths) > self.lm.context_length:
            raise PromptError(f"a pass of {self.lm.name} has outgrown its context of {self.lm.context_length} tokens")
        self._forward(tokens)

    def select(self, rows: torch.Tensor) -> None:
        """Keep and reorder rows (i64[n]; an index may repeat), and drop columns that only held padding of rows gone."""
        index = rows.to(self.mask.device)
        select_rows(self.cache, index)
        self.adapters = [self.adapters[i] for i in rows.tolist()]
        self.edits = [self.edits[i] for i in rows.tolist()]
        self.lengths = [self.lengths[i] for i in rows.tolist()]
        self.mask = self.mask[index]
        self.logits = self.logits[index]
        for name in ("hidden", "head_logits", "hidden_sum"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[index])
        if self.likelihood is not None:
            self.likelihood = self.likelihood.select(index)
        unused = self.mask.shape[1] - max(self.lengths)
        if unused and self.rewindable:
            drop_oldest(self.cache, unused)
            self.mask = self.mask[:, unused:]
            if self.likelihood is not None:
                self.likelihood = self.likelihood.without_oldest(unused)

    def fork(self, rows: torch.Tensor) -> RowGroup:
        """A group of its own of these rows (i64[n]); this one stays as it is. Only where the group is ``rewindable``."""
        twin = copy.copy(self)
        twin.cache = cache_from(key_values(self.cache))
        twin.select(rows)
        return twin

    def join(self, other: RowGroup) -> None:
        """Rows of another group of the same model behind one's own, which may be of another width. Only where ``rewindable``."""
        join_rows(self.cache, other.cache)
        width = max(self.mask.shape[1], other.mask.shape[1])
        self.mask = torch.cat([pad_left(group.mask, width, 0) for group in (self, other)])
        self.adapters, self.lengths = self.adapters + other.adapters, self.lengths + other.lengths
        self.edits = self.edits + other.edits
        self.logits = torch.cat([self.logits, other.logits])
        for name in ("hidden", "head_logits", "hidden_sum"):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, None if mine is None or theirs is None else torch.cat([mine, theirs]))
        if self.likelihood is not None and other.likelihood is not None:
            self.likelihood = self.likelihood.joined(other.likelihood)

    def rewind(self, tokens: int) -> None:
        """Forget the newest tokens of every row; the logits are those of the dropped position until the next ``advance``."""
        known = None if self.likelihood is None else self.likelihood.without_newest(tokens)
        tokens += known is not None  # the law after the last token that stays isn't known any more: that token is read again
        drop_newest(self.cache, tokens)
        self.mask = self.mask[:, :-tokens]
        self.lengths = [n - tokens for n in self.lengths]
        if known is not None:
            self.likelihood = None
            self.advance(known.ids[:, -1:])
            self.likelihood = known

    def key_values(self) -> list[KeyValue]:
        """Keys and values [R, heads, W, head_dim] a layer, the newest position included; views, not to be written to."""
        return key_values(self.cache)


def read_rows(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    adapters: Sequence[LoraAdapter | None],
    *,
    prefixes: Sequence[LearnedPrefix | None] | None = None,
    counted_from: Sequence[int] | None = None,
    edits: Sequence[ModuleEdits | None] = (),
    **kept: bool,
) -> RowGroup:
    """The group of these rows, read in one forward; one a length where a window would count padding behind a prefix as text.

    Args: as ``RowGroup``; ``prefixes`` holds what each row begins behind.
    """
    if prefixes is None or not reads_apart(lm, rows, prefixes):
        return RowGroup(lm, rows, adapters, prefixes=prefixes, counted_from=counted_from, edits=edits, **kept)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    groups = []
    for _, same in groupby(order, key=lambda i: len(rows[i])):
        own = list(same)
        mine = [prefixes[i] for i in own]
        group = RowGroup(
            lm,
            [rows[i] for i in own],
            [adapters[i] for i in own],
            prefixes=mine if any(mine) else None,
            counted_from=None if counted_from is None else [counted_from[i] for i in own],
            edits=[edits[i] for i in own] if edits else (),
            **kept,
        )
        groups.append(group)
    for other in groups[1:]:
        groups[0].join(other)
    groups[0].select(torch.tensor([order.index(row) for row in range(len(rows))]))
    return groups[0]
