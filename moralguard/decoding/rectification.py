"""Assembles the controls' terms into the one rectification of a step, and runs it: fused kernels on CUDA, the reference elsewhere.

The terms of a model without torch are NumPy arrays and run in the kernels' NumPy form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moralguard.backends.arrays import namespace_for
from moralguard.decoding.settings import DecodingSettings
from moralguard.decoding.terms import Attenuation, Dense, Keep, LowRank, Mix, Only, Sparse, Term, Terms, taken
from moralguard.decoding.warp import given_arguments, warp_values

if TYPE_CHECKING:
    import torch

# What one launch of the kernels takes; anything beyond is added up into one more source before.
_LARGEST_RANK = 32
_MOST_SOURCES = 4


@dataclass(frozen=True)
class Drawn:
    """Tokens of a step.

    Attributes:
        tokens: i64[R].
        emptied: bool[R], rows whose every token was removed (their token is 0).
        counterfactual: i64[R], what the base alone would have drawn with the same noise; empty unless asked for.
    """

    tokens: torch.Tensor
    emptied: torch.Tensor
    counterfactual: torch.Tensor


@dataclass(frozen=True)
class Rectified:
    """The guarded law of a step.

    Attributes:
        base: f[R, V], the base's logits.
        touched: bool[R], rows in which a control acts.
        arguments: the terms, as the ops take them; empty where nothing acts.
        computed: f32[R, V], the guarded logits where they are known without the terms (rows that were rectified one by one, or hold a
            support that a control chose).
    """

    base: torch.Tensor
    touched: torch.Tensor
    arguments: dict[str, Any] = field(default_factory=dict)
    computed: torch.Tensor | None = None

    @cached_property
    def logits(self) -> torch.Tensor:
        """f32[R, V]; rows that no control touched are the base's own, bit for bit."""
        if self.computed is not None:
            return self.computed
        if not self.arguments:
            return self.base
        arrays = namespace_for(self.base)
        logits: torch.Tensor = arrays.ops.rectify_logits(self.base, **self.arguments)
        if bool(self.touched.all()):
            return logits
        mixed: torch.Tensor = arrays.where(self.touched[:, None], logits, self.base)
        return mixed

    def draw(self, settings: DecodingSettings, keys: torch.Tensor, positions: torch.Tensor, counterfactual: bool = False) -> Drawn:
        """One token a row: the most probable (lowest id on ties), or an exact draw from the warped law.

        On a GPU everything between the base's logits and the token is one chain of kernels; the rectified logits are never stored.
        """
        arrays = namespace_for(self.base)
        ops, warp = arrays.ops, _warp(settings, self.base)
        if arrays.on_gpu(self.base) and self.computed is None:
            tokens, _, _, flags, other = ops.sample_logits(
                self.base, keys, positions, **warp, **self.arguments, counterfactual=counterfactual, summary=False
            )
        else:
            tokens, _, _, flags, other = ops.sample_logits(self.logits, keys, positions, **warp, summary=False)
            if counterfactual:
                other = ops.sample_logits(self.base, keys, positions, **warp, summary=False)[0]
        return Drawn(tokens, (flags & ops.EMPTY) != 0, other)


def _warp(settings: DecodingSettings, base: torch.Tensor) -> dict[str, Any]:
    """The decoding settings as the ops take them, the same for every row."""
    arrays, values = namespace_for(base), warp_values(settings)
    return {
        name: arrays.full((base.shape[0],), values[name], arrays.int32 if name == "top_k" else arrays.float32, base)
        for name in given_arguments([values], arrays.on_gpu(base))
    }


def rectify(base: torch.Tensor, terms: Sequence[Terms]) -> Rectified:
    """z' = z + sum of deltas on the intersection of the keep-sets, f32[R, V].

    A control that acts on some rows only contributes nothing, and removes nothing, on the others: these get the bits that they get without
    it.

    Raises:
        ValueError: a term's tensors don't fit the base's logits.
    """
    packer = _Packer(base)
    arrays = namespace_for(base)
    touched = arrays.full((base.shape[0],), False, arrays.bool_, base)
    acting = [item for item in terms if item.terms and (item.rows is None or bool(item.rows.any()))]
    for item in acting:
        touched |= True if item.rows is None else item.rows
        for term in item.terms:
            packer.add(term, item.rows)
    if not packer.used:
        return Rectified(base, touched)
    arguments = packer.arguments()
    if packer.crowded and len(acting) > 1 and any(item.rows is not None and not bool(item.rows.all()) for item in acting):
        return Rectified(base, touched, computed=_by_pattern(base, acting))
    law = Rectified(base, touched, arguments)
    if packer.support is None:
        return law
    removed = touched[:, None] & ~packer.support
    return Rectified(base, touched, computed=arrays.masked_fill(law.logits, removed, float("-inf")))


def _by_pattern(base: torch.Tensor, acting: Sequence[Terms]) -> torch.Tensor:
    """f32[R, V], rows under the same controls together: what doesn't fit one op is added up in groups, and how it is grouped must not
    depend on controls that act in other rows only."""
    arrays, count = namespace_for(base), base.shape[0]
    acts = [[True] * count if item.rows is None else [bool(flag) for flag in item.rows.tolist()] for item in acting]
    patterns: dict[tuple[bool, ...], list[int]] = {}
    for row in range(count):
        patterns.setdefault(tuple(each[row] for each in acts), []).append(row)
    parts, order = [], []
    for pattern, members in patterns.items():
        rows = arrays.integers(members)
        mine = [item for item, here in zip(acting, pattern, strict=True) if here]
        parts.append(rectify(arrays.take_rows(base, rows), [Terms(taken(item.terms, rows)) for item in mine]).logits)
        order += members
    back = arrays.integers(sorted(range(count), key=order.__getitem__))
    logits: torch.Tensor = arrays.take_rows(arrays.cat(parts), back)
    return logits


class _Packer:
    """Collects terms of several controls as the arguments of one op.

    Beyond one term of a kind (two subspaces, two sets of prefixes, …) the op takes no more, so the rest is computed here and added
    as one more source.
    """

    def __init__(self, base: torch.Tensor):
        self.base = base
        self.arrays = namespace_for(base)
        self.used = False
        self.support: torch.Tensor | None = None  # bool[R, V], the intersection of the supports that controls chose
        self._mixes: list[tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]] = []
        self._extra: list[torch.Tensor] = []
        self._low_rank: tuple[torch.Tensor, torch.Tensor] | None = None
        self._attenuation: tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor] | None = None
        self._sparse: list[tuple[Sparse, torch.Tensor | None]] = []
        self._filters: dict[str, torch.Tensor] = {}

    def add(self, term: Term, rows: torch.Tensor | None) -> None:
        """A control's term; rows bool[R] where it acts, None for all."""
        arrays, ops = self.arrays, self.arrays.ops
        self.used = True
        _check(term, self.base)
        if isinstance(term, Keep):
            self._keep(term, rows)
        elif isinstance(term, Only):
            mask = term.mask if rows is None else term.mask | ~rows[:, None]
            self.support = mask if self.support is None else self.support & mask
        elif isinstance(term, Mix):
            self._mix(term.sources, [self._zeros() if term.base_weight is None else term.base_weight, *term.weights], rows)
        elif isinstance(term, Dense):
            self._mix((term.delta,), [self._zeros(), self._zeros() + 1.0], rows)
        elif isinstance(term, LowRank):
            coefficients = term.coefficients if rows is None else arrays.masked_fill(term.coefficients, ~rows[:, None], 0.0)
            if self._low_rank is None and term.projection.shape[1] <= _LARGEST_RANK:
                self._low_rank = (term.projection, coefficients)
            else:
                self._extra.append(ops.finite_or_zero(ops.low_rank_delta(term.projection, coefficients)))
        elif isinstance(term, Attenuation):
            decay_constant, epsilon = term.decay_constant, term.epsilon
            if rows is not None:
                decay_constant = arrays.masked_fill(decay_constant, ~rows, 0.0)
                epsilon = arrays.masked_fill(epsilon, ~rows, 1.0)
            if self._attenuation is None:
                self._attenuation = (term.sources, decay_constant, epsilon)
            else:
                self._extra.append(ops.attenuation_delta(ops.sanitize_logits(self.base), term.sources, decay_constant, epsilon))
        else:
            self._sparse.append((term, rows))

    @property
    def crowded(self) -> bool:
        """Whether something was added up here, because the op takes no more; once ``arguments`` was asked for."""
        return bool(self._extra)

    def _zeros(self) -> torch.Tensor:
        zeros: torch.Tensor = self.arrays.full((self.base.shape[0],), 0.0, self.arrays.float32, self.base)
        return zeros

    def _mix(self, sources: tuple[torch.Tensor, ...], weights: list[torch.Tensor], rows: torch.Tensor | None) -> None:
        if rows is not None:
            weights = [self.arrays.masked_fill(weight, ~rows, 0.0) for weight in weights]
        if sum(len(mix[0]) for mix in self._mixes) + len(sources) <= _MOST_SOURCES:
            self._mixes.append((sources, weights))
        else:
            ops = self.arrays.ops
            self._extra.append(ops.mix_delta(ops.sanitize_logits(self.base), sources, weights[1:], weights[0]))

    def _keep(self, keep: Keep, rows: torch.Tensor | None) -> None:
        """Filters intersect, so of several the tightest counts."""
        arrays = self.arrays

        def each(value: float, neutral: float, dtype: Any) -> Any:
            found = arrays.full((self.base.shape[0],), value, dtype, self.base)
            return found if rows is None else arrays.masked_fill(found, ~rows, neutral)

        if keep.top_k is not None and keep.top_k < self.base.shape[1]:
            top_k = each(keep.top_k, 0, arrays.int32)
            known = self._filters.get("base_top_k", top_k)
            both = arrays.minimum(known, top_k)
            self._filters["base_top_k"] = arrays.where(both == 0, arrays.maximum(known, top_k), both)
        if keep.top_p is not None and keep.top_p < 1:
            top_p = each(keep.top_p, 1.0, arrays.float32)
            self._filters["base_top_p"] = arrays.minimum(self._filters.get("base_top_p", top_p), top_p)
        if keep.min_p is not None and keep.min_p > 0:
            min_p = each(keep.min_p, 0.0, arrays.float32)
            self._filters["base_min_p"] = arrays.maximum(self._filters.get("base_min_p", min_p), min_p)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``ops.rectify_logits`` and ``ops.sample_logits``."""
        found: dict[str, Any] = dict(self._filters)
        found |= self._candidates()
        mixes = list(self._mixes)
        if self._extra:
            mixes.append(((self.arrays.stack(self._extra).sum(0),), [self._zeros(), self._zeros() + 1.0]))
        if mixes:
            found["sources"] = [source for sources, _ in mixes for source in sources]
            found["groups"] = [len(sources) for sources, _ in mixes]
            weights = [self.arrays.as_float(weight) for _, weights in mixes for weight in weights]
            found["weights"] = self.arrays.stack(weights, -1)
        if self._low_rank is not None:
            found["projection"], found["coefficients"] = self._low_rank
        if self._attenuation is not None:
            found["biased"], found["decay_constant"], found["epsilon"] = list(self._attenuation[0]), *self._attenuation[1:]
        return found

    def _candidates(self) -> dict[str, Any]:
        """The candidates of one sparse term; of several, those that remove tokens intersect and the others become dense."""
        removing = [(term, rows) for term, rows in self._sparse if not term.keep_rest]
        biasing = [(term, rows) for term, rows in self._sparse if term.keep_rest]
        if len(self._sparse) > 1:
            self._extra += [self._dense_bias(term, rows) for term, rows in biasing]
        if len(removing) > 1:
            return self._intersection(removing)
        if not removing and len(biasing) != 1:
            return {}
        term, rows = removing[0] if removing else biasing[0]
        count = None
        if rows is not None:
            count = self.arrays.cast(self.arrays.where(rows, term.ids.shape[1], -1), self.arrays.int32)
        return {"candidate_ids": term.ids, "candidate_bias": term.bias, "candidate_count": count, "keep_rest": term.keep_rest}

    def _dense_bias(self, term: Sparse, rows: torch.Tensor | None) -> torch.Tensor:
        arrays = self.arrays
        bias = arrays.ops.finite_or_zero(arrays.as_float(term.bias))
        if rows is not None:
            bias = arrays.masked_fill(bias, ~rows[:, None], 0.0)
        dense: torch.Tensor = arrays.scatter(arrays.full(tuple(self.base.shape), 0.0, arrays.float32, self.base), term.ids, bias)
        return dense

    def _intersection(self, removing: list[tuple[Sparse, torch.Tensor | None]]) -> dict[str, Any]:
        arrays, shape = self.arrays, tuple(self.base.shape)
        allowed = arrays.full(shape, True, arrays.bool_, self.base)
        limited = arrays.full(shape[:1], False, arrays.bool_, self.base)
        for term, rows in removing:
            members = arrays.scatter(arrays.full(shape, False, arrays.bool_, self.base), term.ids, True)
            acts = arrays.full(shape[:1], True, arrays.bool_, self.base) if rows is None else rows
            allowed &= members | ~acts[:, None]
            limited |= acts
        bias = arrays.stack([self._dense_bias(term, rows) for term, rows in removing]).sum(0)
        self._extra.append(bias)  # for rows that aren't limited it is 0
        count = arrays.where(limited, allowed.sum(-1), -1)
        _, ids = arrays.top_k(arrays.cast(allowed, arrays.int32), max(1, int(count.max())))
        return {
            "candidate_ids": ids,
            "candidate_bias": arrays.full(tuple(ids.shape), 0.0, arrays.float32, ids),
            "candidate_count": arrays.cast(count, arrays.int32),
            "keep_rest": False,
        }


def _check(term: Term, base: torch.Tensor) -> None:
    """A term whose tensors don't fit the base is an error here, where its control can be told, not a kernel's stray read."""
    rows, vocabulary = base.shape
    wanted: list[tuple[str, torch.Tensor, tuple[int, ...]]] = []
    if isinstance(term, Mix):
        if len(term.sources) != len(term.weights):
            raise ValueError(f"a mix of {len(term.sources)} sources has {len(term.weights)} weights; expected one a source")
        wanted += [("mix source", source, (rows, vocabulary)) for source in term.sources]
        wanted += [("mix weight", weight, (rows,)) for weight in term.weights]
    elif isinstance(term, Attenuation):
        wanted += [("attenuation source", source, (rows, vocabulary)) for source in term.sources]
        wanted += [("decay_constant", term.decay_constant, (rows,)), ("epsilon", term.epsilon, (rows,))]
    elif isinstance(term, LowRank):
        rank = term.projection.shape[-1]
        wanted += [("projection", term.projection, (vocabulary, rank)), ("coefficients", term.coefficients, (rows, rank))]
    elif isinstance(term, Sparse):
        wanted += [("candidate bias", term.bias, tuple(term.ids.shape)), ("candidate ids", term.ids[:, :0], (rows, 0))]
    elif isinstance(term, Dense):
        wanted += [("dense delta", term.delta, (rows, vocabulary))]
    elif isinstance(term, Only):
        wanted += [("mask of the tokens that stay", term.mask, (rows, vocabulary))]
    for name, tensor, shape in wanted:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
