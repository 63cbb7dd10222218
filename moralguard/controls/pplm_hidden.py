"""PPLM(scope="hidden"): the last hidden state is moved along the gradient of PPLM's losses, worked out by hand.

A variant of Dathathri et al. 2020 (arXiv 1912.02164), who move the key-value history through the whole model. Here h is the last hidden
state, Delta starts at 0 for every token and z = g(E (h + Delta)) are the logits of the head. With p = softmax(z) and q the unmoved law:

    bag of words   -log sum_{w in bag} p_w       d/dz = p - p restricted to the bag
    head           CE(W mean(h_1 .. h_t + Delta) + b, target)     d/dDelta = W^T (softmax - one hot) / t
    KL             sum_v p'_v log(p'_v / q'_v)   d/dz_v = p_v (a_v - sum_u p_u a_u), a = log(p' / q')

and d/dDelta = E^T (g' d/dz). It takes no autograd and no pass through the model, so every backend has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moralguard.backends.arrays import Array, namespace_for
from moralguard.controls.base import BoundControl
from moralguard.decoding.passes import Pass
from moralguard.decoding.step import Columns, Step
from moralguard.decoding.terms import Mix, Terms
from moralguard.errors import PolicyError

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel
    from moralguard.controls.pplm import PPLM

_SMALL = 1e-15
# Of a vanishing gradient a step has no direction.
_NORM_FLOOR = 1e-8


def bag_gradient(logits: Array, law: Array, bag: Array) -> Array:
    """d/dz of -log sum_{w in bag} p_w, f32[R, V]; 0 in a row whose whole bag is removed, where the loss has no gradient.

    Args:
        logits: f32[R, V]; law: their softmax. bag: i64[n], token ids.
    """
    arrays = namespace_for(logits)
    members = logits[:, bag]
    inside = arrays.ops.finite_or_zero(arrays.softmax(members))  # p_w over the bag's mass, however small that is
    gone = arrays.isneginf(arrays.largest(members, -1))
    ids = arrays.repeat_rows(bag[None], logits.shape[0])
    restricted = arrays.scatter(arrays.full(tuple(logits.shape), 0.0, arrays.float32, logits), ids, inside)
    return arrays.masked_fill(law - restricted, gone[:, None], 0.0)


def kl_gradient(law: Array, unmoved: Array) -> Array:
    """d/dz of sum_v p'_v log(p'_v / q'_v), f32[R, V]; p' and q' are the laws with 1e-15 added where they are no more than that."""
    arrays = namespace_for(law)
    moved, base = (part + _SMALL * arrays.as_float(part <= _SMALL) for part in (law, unmoved))
    gain = arrays.log(moved / base)
    return law * (gain - arrays.ops.row_sums(law * gain)[:, None])


def head_gradient(mean: Array, weight: Array, bias: Array, target: int) -> Array:
    """d/dmean of the cross-entropy of the head (W f32[classes, d], b f32[classes]) on mean states f32[R, d], f32[R, d]."""
    arrays = namespace_for(mean)
    error = arrays.softmax(arrays.ops.row_products(weight, mean) + bias)
    sought = arrays.full(tuple(error.shape), 0.0, arrays.float32, error)
    sought[:, target] = 1.0
    return arrays.ops.row_products(arrays.transposed(weight), error - sought)


def pull_back(head: Any, weight: Array, before: Array | None, shift: Array, gradient: Array) -> Array:
    """d/dDelta f32[R, d] from d/dz f32[R, V], through z = g(E (h + Delta) + b).

    Args:
        head: the model's, with its scale and soft cap; weight: its E in f32[V, d].
        before: f32[R, V], E h + b; needed only where there is a soft cap. shift: f32[R, V], E Delta.
    """
    arrays = namespace_for(gradient)
    slope = head.scale if head.softcap is None else 1 - arrays.tanh((before + shift) / head.softcap) ** 2
    return arrays.ops.row_products(arrays.transposed(weight), gradient * slope)


class HiddenPPLM(BoundControl["PPLM"]):
    """PPLM on the last hidden state."""

    def __init__(self, settings: PPLM, lm: LanguageModel):
        # the head reads the mean of all states so far, which only a pass that keeps their sum has
        self.sums = Pass(lm, states=True) if settings.head is not None else None
        super().__init__(settings, lm, () if self.sums is None else (self.sums,))
        if lm.head is None:
            raise PolicyError(f"pplm needs the unembedding of {lm.name}, which has no head of a known form")
        self.unembedding: Any = lm.head  # of the model's kind of arrays
        self.weight: Array = namespace_for(lm.head.weight).as_float(lm.head.weight)
        self.bags: Sequence[Array] = settings.bags(lm)
        self.attribute = settings.attribute(lm)

    def columns(self, step: Step) -> Columns:
        return {"norm": step.arrays.full((step.rows, 0), 0.0, step.arrays.float32, step.logits)}

    def terms(self, step: Step) -> Terms:
        if step.hidden is None or (step.head_logits is None and self.unembedding.softcap is not None):
            raise RuntimeError("pplm needs hidden states")
        base = step.arrays.ops.sanitize_logits(step.logits)
        moved, norm = self._move(step, base)
        gm = step.weight(self.settings.gm_scale)
        # so that division by the temperature gives softmax(z_moved / T) ** gm * softmax(z) ** (1 - gm)
        return Terms((Mix((moved,), (gm,), step.temperature * (1 - gm) - 1),), carry={"norm": norm})

    def commit(self, step: Step, carry: Columns, tokens: Any) -> Columns:
        return carry

    def _move(self, step: Step, base: Array) -> tuple[Array, Array]:
        """Logits f32[R, V] of the moved state, and the norm f32[R, 1] to keep."""
        arrays, settings = step.arrays, self.settings
        hidden = arrays.as_float(step.hidden)
        before = None if self.unembedding.softcap is None else arrays.as_float(step.head_logits)
        unmoved, norm = arrays.softmax(base), step.columns["norm"]
        stepsize = arrays.as_float(arrays.where(step.generated < settings.grad_length, settings.stepsize, 0.0))
        delta, logits = 0 * hidden, base
        shift = 0 * base[:, :1]
        for _ in range(settings.num_iterations):
            gradient = self._gradient(step, logits, unmoved, hidden + delta, before, shift)
            fresh = arrays.ops.row_sums(gradient * gradient)[:, None] ** 0.5
            # as published: bags alone keep the largest norm over iterations and tokens, a head takes each iteration's own
            running = self.attribute is None and norm.shape[1]
            norm = arrays.maximum(norm, fresh) if running else fresh + _SMALL
            delta = delta - (stepsize[:, None] / arrays.clamp(norm, _NORM_FLOOR) ** settings.gamma) * gradient
            shift = arrays.ops.row_products(self.weight, delta)
            logits = base + self.unembedding.delta(before, shift)
        return logits, norm

    def _gradient(self, step: Step, logits: Array, unmoved: Array, state: Array, before: Array | None, shift: Array) -> Array:
        """d loss / d Delta f32[R, d] at logits f32[R, V] of the moved state f32[R, d]."""
        law = step.arrays.softmax(logits)
        gradient = 0 * law
        for bag in self.bags:
            gradient = gradient + bag_gradient(logits, law, bag)
        if self.settings.kl_scale > 0:
            gradient = gradient + self.settings.kl_scale * kl_gradient(law, unmoved)
        found = pull_back(self.unembedding, self.weight, before, shift, gradient)
        if self.attribute is not None and self.sums is not None:
            weight, bias, target = self.attribute
            count = step.arrays.as_float(step.mask.sum(-1))[:, None]
            mean = (step.of(self.sums).hidden_sum + state) / count
            found = found + head_gradient(mean, weight, bias, target) / count
        return found
