"""Auxiliary passes: what a control may ask for, and how they ride one batched forward.

Decoding a small batch is bound by reading the weights, so all passes on the same weights (the base's own rows, prompt prefixes,
LoRA adapters) are rows of one forward. A ``RowGroup`` is such a batch with its KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moralguard.backends.hf import LanguageModel
from moralguard.backends.kv_cache import KeyValue, drop_newest, drop_oldest, is_plain, key_values, select_rows
from moralguard.backends.lora import LoraAdapter, apply_adapters
from moralguard.backends.prompts import place_prefix
from moralguard.errors import PromptError


@dataclass(frozen=True, eq=False)
class Pass:
    """One auxiliary pass a request: which weights read which text.

    Attributes:
        lm: the weights; the base's own or another model's.
        prefix: token ids that stand before the request's text.
        literal: the prefix was given as ids and goes in front as it is; a text prefix respects chat templates.
        adapter: LoRA adapter on these weights, or None.
        states: the control also needs the sum of hidden states over all earlier positions.
    """

    lm: LanguageModel
    prefix: tuple[int, ...] = ()
    literal: bool = False
    adapter: LoraAdapter | None = None
    states: bool = False

    @property
    def key(self) -> tuple[int, tuple[int, ...], bool, int]:
        """Passes with one key give the same numbers and are run once."""
        return (id(self.lm.model), self.prefix, self.literal or not self.prefix, id(self.adapter))


def check_passes_fit(passes: Sequence[Pass], prompt: Sequence[int], where: str) -> None:
    """Raise before anything is generated where a prompt doesn't fit a pass's context with its prefix and one new token.

    Raises:
        PromptError: names the pass and the room there is.
    """
    for item in passes:
        limit = item.lm.context_length
        needed = len(place_prefix(item.lm, item.prefix, prompt, item.literal)) + 1
        if limit is not None and needed > limit:
            raise PromptError(
                f"{where} has {len(prompt)} tokens; a pass on {item.lm.name} with a prefix of {len(item.prefix)} tokens needs {needed}, "
                f"but its context holds {limit}. Shorten the prompt or the prefix"
            )


class RowGroup:
    """Rows that ride one batched forward of one model, left-padded, with their KV cache.

    Attributes:
        logits: f32[R, V] at the newest position of every row.
        hidden: f[R, d] last hidden state there, when captured; head_logits f[R, V] likewise.
        hidden_sum: f32[R, d] sum of the hidden states of all positions **before** the newest, when states are kept.
        mask: i64[R, W], 0 at padding.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[LoraAdapter | None],
        *,
        hidden: bool = False,
        states: bool = False,
    ):
        self.lm = lm
        self.adapters = list(adapters)
        self._capture_hidden, self._capture_states = hidden or states, states
        width = max(len(row) for row in rows)
        if lm.context_length is not None and width > lm.context_length:
            raise PromptError(
                f"a pass of {lm.name} needs {width} tokens with its prefix, but its context holds {lm.context_length}; "
                "shorten the prompt or the prefix"
            )
        self.lengths = [len(row) for row in rows]
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.as_tensor(row)
            mask[i, width - len(row) :] = 1
        self.mask = mask.to(lm.device)
        self.hidden: torch.Tensor | None = None
        self.hidden_sum: torch.Tensor | None = None
        self.cache = lm.new_cache()
        self._forward(ids.to(lm.device), first=True)

    @property
    def rewindable(self) -> bool:
        return is_plain(self.lm.model.config.get_text_config())

    def _forward(self, ids: torch.Tensor, first: bool = False) -> None:
        count = ids.shape[1]
        padded = min(self.lengths) < self.mask.shape[1]
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -count:]
        with apply_adapters(self.adapters):
            output = self.lm.forward(
                cache=self.cache,
                input_ids=ids,
                attention_mask=self.mask if padded else None,
                position_ids=positions,
                hidden=self._capture_hidden,
                states=self._capture_states,
            )
        self.logits, self.head_logits = output.logits, output.head_logits
        if self._capture_states and output.states is not None:
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
        self.lengths = [self.lengths[i] for i in rows.tolist()]
        self.mask = self.mask[index]
        self.logits = self.logits[index]
        for name in ("hidden", "head_logits", "hidden_sum"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[index])
        unused = self.mask.shape[1] - max(self.lengths)
        if unused and self.rewindable:
            drop_oldest(self.cache, unused)
            self.mask = self.mask[:, unused:]

    def rewind(self, tokens: int) -> None:
        """Forget the newest tokens of every row; the logits are those of the dropped position until the next ``advance``."""
        drop_newest(self.cache, tokens)
        self.mask = self.mask[:, :-tokens]
        self.lengths = [n - tokens for n in self.lengths]


@dataclass(frozen=True)
class PassView:
    """The rows of one pass in a group, one a request, in the session's order.

    ``rows`` is where they stand in the group.
    """

    group: RowGroup
    rows: slice

    def row(self, i: int) -> PassView:
        """Row i alone."""
        return PassView(self.group, slice(self.rows.start + i, self.rows.start + i + 1))

    @property
    def logits(self) -> torch.Tensor:
        """f32[R, V] at the newest position."""
        return self.group.logits[self.rows]

    @property
    def hidden(self) -> torch.Tensor:
        """f[R, d]."""
        if self.group.hidden is None:
            raise RuntimeError("this pass keeps no hidden states; declare `needs = Capabilities(hidden=True)`")
        return self.group.hidden[self.rows]

    @property
    def head_logits(self) -> torch.Tensor:
        """f[R, V], the head's output before scale and soft cap."""
        if self.group.head_logits is None:
            raise RuntimeError("this pass keeps no hidden states; declare `needs = Capabilities(hidden=True)`")
        return self.group.head_logits[self.rows]

    @property
    def hidden_sum(self) -> torch.Tensor:
        """f32[R, d], sum of hidden states before the newest position."""
        if self.group.hidden_sum is None:
            raise RuntimeError("this pass keeps no sums of hidden states; ask for them with Pass(states=True)")
        return self.group.hidden_sum[self.rows]

    @property
    def mask(self) -> torch.Tensor:
        """i64[R, W]."""
        return self.group.mask[self.rows]

    def key_values(self) -> list[KeyValue]:
        """Keys and values [R, heads, W, head_dim] a layer, the newest position included; views, not to be written to."""
        return [(k[self.rows], v[self.rows]) for k, v in key_values(self.group.cache)]


class PassTable:
    """All passes of a batch of requests: deduplicated, grouped by weights, pass-major rows in each group.

    Every group is built from the requests' token ids. Where one of the groups is on ``hidden_for``, it keeps hidden states.
    """

    def __init__(self, passes: Sequence[Pass], prompts: Sequence[Sequence[int]], *, hidden_for: LanguageModel | None = None):
        unique: dict[tuple[int, tuple[int, ...], bool, int], Pass] = {}
        for item in passes:
            known = unique.get(item.key)
            if known is None or (item.states and not known.states):
                unique[item.key] = item
        self.requests = len(prompts)
        self._by_model: dict[int, list[Pass]] = {}
        for item in unique.values():
            self._by_model.setdefault(id(item.lm.model), []).append(item)
        self._hidden_for = hidden_for
        self._build(prompts)

    def _build(self, prompts: Sequence[Sequence[int]]) -> None:
        self.requests = len(prompts)
        self.groups: list[RowGroup] = []
        self._place: dict[tuple[int, tuple[int, ...], bool, int], tuple[int, int]] = {}
        for items in self._by_model.values():
            lm, rows, adapters = items[0].lm, [], []
            for order, item in enumerate(items):
                rows += [place_prefix(lm, item.prefix, prompt, item.literal) for prompt in prompts]
                adapters += [item.adapter] * len(prompts)
                self._place[item.key] = (len(self.groups), order)
            self.groups.append(
                RowGroup(
                    lm,
                    rows,
                    adapters,
                    hidden=self._hidden_for is not None and lm.model is self._hidden_for.model,
                    states=any(item.states for item in items),
                )
            )

    def view(self, item: Pass) -> PassView:
        group, order = self._place[item.key]
        return PassView(self.groups[group], slice(order * self.requests, (order + 1) * self.requests))

    def advance(self, tokens: torch.Tensor) -> None:
        """Append tokens i64[R, n], one row a request, to all passes of each."""
        for group in self.groups:
            group.advance(tokens.repeat(len(group.lengths) // self.requests, 1))

    def select(self, requests: torch.Tensor) -> None:
        """Keep and reorder requests (i64[n]; an index may repeat)."""
        for group in self.groups:
            passes = len(group.lengths) // self.requests
            group.select(torch.cat([requests + order * self.requests for order in range(passes)]))
        self.requests = len(requests)

    @property
    def rewindable(self) -> bool:
        return all(group.rewindable for group in self.groups)

    def rewind(self, tokens: int) -> None:
        for group in self.groups:
            group.rewind(tokens)

    def reread(self, histories: Sequence[Sequence[int]]) -> None:
        """Start over from these token ids."""
        self._build(histories)
