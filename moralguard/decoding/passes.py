"""Auxiliary passes: what a control may ask for, and how they ride one batched forward.

Decoding a small batch is bound by reading the weights, so all passes on the same weights (the base's own rows, prompt prefixes,
LoRA adapters) are rows of one forward. A ``RowGroup`` is such a batch with its KV cache: ``torch_rows.RowGroup`` on a PyTorch model,
``numpy_rows.RowGroup`` on one that computes with NumPy arrays.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moralguard.backends.arrays import kind_of, namespace_for, namespace_of, weights_of
from moralguard.backends.prompts import place_prefix
from moralguard.errors import PromptError

if TYPE_CHECKING:
    import torch

    from moralguard.backends.edits import ModuleEdits
    from moralguard.backends.hf import LanguageModel
    from moralguard.backends.kv_cache import KeyValue
    from moralguard.backends.learned_prefix import LearnedPrefix
    from moralguard.backends.lora import LoraAdapter
    from moralguard.decoding.likelihood import Likelihood
    from moralguard.decoding.torch_rows import RowGroup


PassKey = tuple[int, tuple[int, ...], bool, int, int, int, bool]
"""Weights, prefix, whether it goes in front as it is, adapter, edits, learned prefix, whether it is unconditional."""


@dataclass(frozen=True, eq=False)
class Pass:
    """One auxiliary pass a request: which weights read which text.

    Attributes:
        lm: the weights; the base's own or another model's.
        prefix: token ids that stand before the request's text.
        literal: the prefix was given as ids and goes in front as it is; a text prefix respects chat templates.
        adapter: LoRA adapter on these weights, or None.
        edits: edits of hidden states on these weights, or None.
        states: the control also needs the sum of hidden states over all earlier positions.
        likelihood: the control also needs how probable the request's own tokens were, those of its prompt included.
        learned: a learned prefix on these weights, or None; it stands before everything, the beginning-of-text token too.
        unconditional: the text begins with the prompt's last token; no prefix stands before it.
    """

    lm: LanguageModel
    prefix: tuple[int, ...] = ()
    literal: bool = False
    adapter: LoraAdapter | None = None
    edits: ModuleEdits | None = None
    states: bool = False
    likelihood: bool = False
    learned: LearnedPrefix | None = None
    unconditional: bool = False

    @property
    def prefix_length(self) -> int:
        """Positions that the prefixes take up beside the request's own tokens."""
        return len(self.prefix) + (0 if self.learned is None else self.learned.length)

    @property
    def key(self) -> PassKey:
        """Passes with one key give the same numbers and are run once."""
        literal = self.literal or not self.prefix
        return (id(weights_of(self.lm)), self.prefix, literal, id(self.adapter), id(self.edits), id(self.learned), self.unconditional)


def check_passes_fit(passes: Sequence[Pass], prompt: Sequence[int], where: str) -> None:
    """Raise before anything is generated where a prompt doesn't fit a pass's context with its prefix and one new token.

    Raises:
        PromptError: names the pass and the room there is.
    """
    for item in passes:
        limit = item.lm.context_length
        needed = item.prefix_length + (1 if item.unconditional else len(prompt)) + 1
        if limit is not None and needed > limit:
            raise PromptError(
                f"{where} has {len(prompt)} tokens; a pass on {item.lm.name} with a prefix of {item.prefix_length} tokens needs {needed}, "
                f"but its context holds {limit}. Shorten the prompt or the prefix"
            )


@dataclass(frozen=True)
class PassView:
    """The rows of one pass in a group, one a request, in the session's order.

    What controls combine with the base's numbers comes to where these are, as an expert may live on another device; mask, keys and
    values stay with the pass's weights.

    Attributes:
        rows: where they stand in the group.
        like: an array on the base's device; None leaves everything where it is.
    """

    group: RowGroup
    rows: slice
    like: torch.Tensor | None = None

    def row(self, i: int) -> PassView:
        """Row i alone."""
        return replace(self, rows=slice(self.rows.start + i, self.rows.start + i + 1))

    def beside(self, like: torch.Tensor) -> PassView:
        """The same rows, their numbers where ``like`` is."""
        return replace(self, like=like)

    def _own(self, values: torch.Tensor) -> torch.Tensor:
        """The view's rows of a group's values."""
        own = values[self.rows]
        if self.like is not None:
            own = namespace_for(self.like).beside(own, self.like)
        return own

    @property
    def logits(self) -> torch.Tensor:
        """f32[R, V] at the newest position."""
        return self._own(self.group.logits)

    @property
    def hidden(self) -> torch.Tensor:
        """f[R, d]."""
        if self.group.hidden is None:
            raise RuntimeError("this pass keeps no hidden states; declare `needs = Capabilities(hidden=True)`")
        return self._own(self.group.hidden)

    @property
    def head_logits(self) -> torch.Tensor | None:
        """f[R, V], the head's output before scale and soft cap; None on a backend that gives it only where there is a cap."""
        if self.group.hidden is None:
            raise RuntimeError("this pass keeps no hidden states; declare `needs = Capabilities(hidden=True)`")
        return None if self.group.head_logits is None else self._own(self.group.head_logits)

    @property
    def hidden_sum(self) -> torch.Tensor:
        """f32[R, d], sum of hidden states before the newest position."""
        if self.group.hidden_sum is None:
            raise RuntimeError("this pass keeps no sums of hidden states; ask for them with Pass(states=True)")
        return self._own(self.group.hidden_sum)

    @property
    def log_likelihood(self) -> torch.Tensor:
        """f64[R], nats: summed log-probabilities of the request's own tokens that stand behind the prefix, up to the newest.

        A first token that nothing stands before isn't counted, nor one right behind a learned prefix, which has no law. Follows its
        row through reordering, rewinding and leaving.
        """
        return self._own(self._likelihood.sums)

    @property
    def counted(self) -> torch.Tensor:
        """i64[R], how many tokens ``log_likelihood`` counts."""
        return self._own(self._likelihood.counts)

    @property
    def _likelihood(self) -> Likelihood:
        if self.group.likelihood is None:
            raise RuntimeError("this pass keeps no probabilities of its tokens; ask for them with Pass(likelihood=True)")
        return self.group.likelihood

    @property
    def mask(self) -> torch.Tensor:
        """i64[R, W]."""
        return self.group.mask[self.rows]

    def key_values(self) -> list[KeyValue]:
        """Keys and values [R, heads, W, head_dim] a layer, the newest position included; views, not to be written to."""
        return [(k[self.rows], v[self.rows]) for k, v in self.group.key_values()]


class PassTable:
    """All passes of a batch of requests: deduplicated, grouped by weights, pass-major rows in each group.

    Every group is built from the requests' token ids. Where one of the groups is on ``hidden_for``, it keeps hidden states.

    Args:
        asked: how many tokens of each of ``prompts`` are its prompt's, where it ends in what has been generated; all where None.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        prompts: Sequence[Sequence[int]],
        *,
        hidden_for: LanguageModel | None = None,
        asked: Sequence[int] | None = None,
    ):
        unique: dict[PassKey, Pass] = {}
        for item in passes:
            known = unique.get(item.key, item)
            unique[item.key] = replace(item, states=item.states or known.states, likelihood=item.likelihood or known.likelihood)
        self.requests = len(prompts)
        self._by_model: dict[int, list[Pass]] = {}
        for item in unique.values():
            self._by_model.setdefault(id(weights_of(item.lm)), []).append(item)
        self._hidden_for = hidden_for
        self._asked = [len(prompt) for prompt in prompts] if asked is None else list(asked)
        self._build(prompts)

    def _build(self, prompts: Sequence[Sequence[int]]) -> None:
        self.requests = len(prompts)
        self.groups: list[RowGroup] = []
        self._place: dict[PassKey, tuple[int, int]] = {}
        for items in self._by_model.values():
            lm, rows, adapters, edits, behind = items[0].lm, [], [], [], []
            prefixes = [item.learned for item in items for _ in prompts]
            for order, item in enumerate(items):
                if item.unconditional:
                    rows += [list(prompt[asked - 1 :]) for prompt, asked in zip(prompts, self._asked, strict=True)]
                else:
                    rows += [place_prefix(lm, item.prefix, prompt, item.literal) for prompt in prompts]
                behind += [_behind_prefix(item, prompt) for prompt in prompts]
                adapters += [item.adapter] * len(prompts)
                edits += [item.edits] * len(prompts)
                self._place[item.key] = (len(self.groups), order)
            self.groups.append(
                _row_group_of(lm)(
                    lm,
                    rows,
                    adapters,
                    hidden=self._hidden_for is not None and weights_of(lm) is weights_of(self._hidden_for),
                    states=any(item.states for item in items),
                    counted_from=behind if any(item.likelihood for item in items) else None,
                    # only a PyTorch model has modules to edit, or takes a learned prefix
                    **({"edits": edits} if any(edits) else {}),
                    **({"prefixes": prefixes} if any(prefixes) else {}),
                )
            )

    def view(self, item: Pass) -> PassView:
        group, order = self._place[item.key]
        return PassView(self.groups[group], slice(order * self.requests, (order + 1) * self.requests))

    def advance(self, tokens: torch.Tensor) -> None:
        """Append tokens i64[R, n], one row a request, to all passes of each."""
        for group in self.groups:
            group.advance(namespace_of(group.lm).repeat_rows(tokens, len(group.lengths) // self.requests))

    def select(self, requests: torch.Tensor) -> None:
        """Keep and reorder requests (i64[n]; an index may repeat)."""
        for group in self.groups:
            group.select(self._rows_of(group, requests))
        self.requests, self._asked = len(requests), [self._asked[i] for i in requests.tolist()]

    def fork(self, requests: torch.Tensor) -> PassTable:
        """A table of its own of these requests (i64[n]); this one stays as it is. Only where it is ``rewindable``."""
        twin = copy.copy(self)
        twin.groups = [group.fork(self._rows_of(group, requests)) for group in self.groups]
        twin.requests, twin._asked = len(requests), [self._asked[i] for i in requests.tolist()]
        return twin

    def join(self, other: PassTable) -> None:
        """Requests of another table of the same passes behind one's own. Only where both are ``rewindable``."""
        mine, theirs = self.requests, other.requests
        for group, more in zip(self.groups, other.groups, strict=True):
            passes = len(group.lengths) // mine
            group.join(more)
            if passes > 1:  # pass-major again
                first, second = range(passes * mine), range(passes * mine, passes * (mine + theirs))
                order = [
                    row
                    for index in range(passes)
                    for row in (*first[index * mine : (index + 1) * mine], *second[index * theirs : (index + 1) * theirs])
                ]
                group.select(namespace_of(group.lm).integers(order))
        self.requests, self._asked = mine + theirs, self._asked + other._asked

    def _rows_of(self, group: RowGroup, requests: torch.Tensor) -> torch.Tensor:
        passes = len(group.lengths) // self.requests
        rows: torch.Tensor = namespace_of(group.lm).cat([requests + order * self.requests for order in range(passes)])
        return rows

    @property
    def rewindable(self) -> bool:
        return all(group.rewindable for group in self.groups)

    @property
    def sums_states(self) -> bool:
        """Whether a pass keeps sums over states it has read, from which dropped positions can't be taken away."""
        return any(item.states for items in self._by_model.values() for item in items)

    def rewind(self, tokens: int) -> None:
        for group in self.groups:
            group.rewind(tokens)

    def reread(self, histories: Sequence[Sequence[int]]) -> None:
        """Start over from these token ids."""
        self._build(histories)


def _behind_prefix(item: Pass, prompt: Sequence[int]) -> int:
    """The place in a pass's row of the first token behind its prefix; 0 without a prefix."""
    if not item.prefix:
        return 0
    marker = -1  # no token's id, so that it tells where the prefix goes
    return place_prefix(item.lm, (marker,), prompt, item.literal).index(marker) + len(item.prefix)


def _row_group_of(lm: LanguageModel) -> Any:
    """What makes a model's row groups."""
    if kind_of(lm) == "numpy":
        from moralguard.decoding import numpy_rows

        return numpy_rows.row_group_of(lm)
    from moralguard.decoding import torch_rows

    return torch_rows.read_rows
