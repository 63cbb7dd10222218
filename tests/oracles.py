"""The methods again, written only from the formulas of their papers: float64, one row, no KV cache, everything afresh each step.

Nothing of moralguard is imported here. PPLM alone needs caches, because its state is one; it builds them layer by layer.

An oracle is a function from the token ids so far to the log-probabilities of the next token, f64[V]. PPLM's also needs to see the
positions one after the other; ``follow`` does that for all of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

Ids = Sequence[int]
Oracle = Callable[[list[int]], Tensor]
"""Token ids so far -> log-probabilities of the next token, f64[V]."""


class Reference:
    """A float64 copy of a causal LM that reads one text at a time, whole."""

    def __init__(self, model: Any):
        self.model = copy.deepcopy(model).double().eval().requires_grad_(False)

    @property
    def unembedding(self) -> Tensor:
        """E f64[V, d]."""
        return self.model.get_output_embeddings().weight

    def logits(self, ids: Ids) -> Tensor:
        """f64[V] after these tokens."""
        return self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]

    def states(self, ids: Ids) -> Tensor:
        """f64[T, d], hidden states after the final norm."""
        return self.model.base_model(input_ids=torch.tensor([list(ids)]), use_cache=False).last_hidden_state[0]

    def log_law(self, ids: Ids) -> Tensor:
        """The unguarded law, f64[V]."""
        return torch.log_softmax(self.logits(ids), -1)


def follow(oracle: Oracle, prompt: Ids, tokens: Ids) -> Tensor:
    """The oracle's laws along a given continuation, f64[n, V]: row i is the law from which tokens[i] was drawn."""
    return torch.stack([oracle([*prompt, *tokens[:i]]) for i in range(len(tokens))])


def greedy(oracle: Oracle, prompt: Ids, count: int) -> list[int]:
    """The oracle's own greedy continuation."""
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(int(oracle([*prompt, *tokens]).argmax()))
    return tokens


# --- Comparing ------------------------------------------------------------------------------------------------------------------

TOLERANCE = 1e-4
"""Largest difference of a probability that passes."""

PAD = 11  # a token like any other, so that reading padding changes the numbers


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch works in one thread: with models this small, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Run:
    """What a model's own ``generate`` gave while guarded.

    Attributes:
        tokens: continuations.
        laws: f64[R, n, V], guarded log-probabilities.
        scores: f32[R, n, V] as ``generate`` returned them.
        base: f32[R, n, V], the model's own logits.
    """

    tokens: list[list[int]]
    laws: Tensor
    scores: Tensor
    base: Tensor


def run_attached(guard: Any, model: Any, prompts: Sequence[Ids], count: int = 8, **settings: Any) -> Run:
    """``model.generate`` under ``guard.attach``, greedy unless told otherwise; prompts of different lengths are left-padded."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[PAD] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with guard.attach(model):
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=count,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            pad_token_id=0,
            **({"do_sample": False} | settings),
        )
    scores, base = (torch.stack(steps, 1) for steps in (out.scores, out.logits))
    return Run(out.sequences[:, width:].tolist(), torch.log_softmax(scores.double(), -1), scores, base)


def gap(left: Tensor, right: Tensor) -> float:
    """The largest difference of a probability between log-laws of one shape; nan if one of them isn't a law."""
    return float((left.exp() - right.exp()).abs().max())


def check_greedy(guard: Any, model: Any, oracle: Oracle, prompts: Sequence[Ids], count: int = 8) -> Run:
    """Compare a guard with an oracle, through the model's own ``generate`` and through ``guard.generate``.

    Raises:
        AssertionError: a probability differs by more than ``TOLERANCE``, or a greedy token differs.
    """
    run = run_attached(guard, model, prompts, count)
    for row, (prompt, tokens) in enumerate(zip(prompts, run.tokens, strict=True)):
        expected = follow(oracle, prompt, tokens)
        differences = [gap(a, b) for a, b in zip(run.laws[row], expected, strict=True)]
        assert max(differences) <= TOLERANCE, f"row {row}: probabilities differ by {differences}"
        assert tokens == expected.argmax(-1).tolist(), f"row {row}: {tokens} isn't greedy under the oracle"
    own = guard.generate([list(prompt) for prompt in prompts], max_new_tokens=count, do_sample=False).token_ids
    assert own == run.tokens, f"guard.generate gives {own}, model.generate under attach gives {run.tokens}"
    return run


def distance(run: Run, oracle: Oracle, prompts: Sequence[Ids]) -> float:
    """The largest difference of a probability between what was guarded and an oracle, for negative controls."""
    return max(gap(run.laws[row], follow(oracle, prompt, run.tokens[row])) for row, prompt in enumerate(prompts))


def nucleus(logits: Tensor, p: float) -> Tensor:
    """bool[V]: the most probable tokens up to and including the one that brings their mass over p."""
    if p >= 1:
        return torch.ones_like(logits, dtype=torch.bool)
    order = torch.argsort(logits, descending=True)
    mass = torch.softmax(logits, -1)[order].cumsum(0)
    inside = torch.zeros_like(logits, dtype=torch.bool)
    for rank, token in enumerate(order.tolist()):
        inside[token] = True
        if mass[rank] >= p:
            break
    return inside


# --- DExperts ---------------------------------------------------------------------------------------------------------------------


def dexperts(
    base: Reference,
    expert: tuple[Reference, Ids] | None,
    anti_expert: tuple[Reference, Ids] | None,
    *,
    alpha: float,
    filter_p: float,
) -> Oracle:
    """z' = nucleus(z, filter_p) + alpha (z+ - z-). An expert is (model, prefix); a missing one is the unfiltered base."""

    def law(ids: list[int]) -> Tensor:
        z = base.logits(ids)
        plus, minus = (z if side is None else side[0].logits([*side[1], *ids]) for side in (expert, anti_expert))
        filtered = torch.where(nucleus(z, filter_p), z, -math.inf)
        return torch.log_softmax(filtered + alpha * (plus - minus), -1)

    return law


# --- FUDGE ------------------------------------------------------------------------------------------------------------------------


def fudge(base: Reference, attributes: Sequence[tuple[Callable[[list[int]], Tensor], float, int]]) -> Oracle:
    """z + sum_i lambda_i log sigmoid(c_i) on the tokens that are among the precondition_topk base logits of every attribute.

    Args:
        base: the model.
        attributes: (c, lambda, precondition_topk), where c gives f64[V], the discriminator's logits for a prefix and every token.
    """

    def law(ids: list[int]) -> Tensor:
        z = base.logits(ids)
        ranking = sorted(range(len(z)), key=lambda v: -float(z[v]))
        kept = set(ranking).intersection(*(ranking[:top_k] for _, _, top_k in attributes))
        scores = [(c(ids).tolist(), strength) for c, strength, _ in attributes]
        guarded = torch.full_like(z, -math.inf)
        for token in kept:
            guarded[token] = z[token] + sum(strength * log_sigmoid(c[token]) for c, strength in scores)
        return torch.log_softmax(guarded, -1)

    return law


def log_sigmoid(c: float) -> float:
    """log(1 / (1 + e^-c)) without overflow."""
    return -math.log1p(math.exp(-c)) if c >= 0 else c - math.log1p(math.exp(c))


def factored_discriminator(base: Reference, query: Tensor, key: Tensor, linear: Tensor, bias: float) -> Callable[[list[int]], Tensor]:
    """c(prefix, w) = (query h_t) . (key e_w) + linear . e_w + bias, for all w."""

    def c(ids: list[int]) -> Tensor:
        q = query.double() @ base.states(ids)[-1]
        return torch.stack([q @ (key.double() @ e) + linear.double() @ e + bias for e in base.unembedding])

    return c


# --- Self-debiasing ---------------------------------------------------------------------------------------------------------------


def self_debias(base: Reference, prefixes: Sequence[Ids], *, decay_constant: float, epsilon: float) -> Oracle:
    """p' proportional to p max(exp(-decay max(q - p, 0)), epsilon), q the largest probability under a prefix."""

    def law(ids: list[int]) -> Tensor:
        p = torch.softmax(base.logits(ids), -1)
        q = torch.stack([torch.softmax(base.logits([*prefix, *ids]), -1) for prefix in prefixes]).amax(0)
        weighted = p * torch.exp(-decay_constant * (q - p).clamp(min=0)).clamp(min=epsilon)
        return (weighted / weighted.sum()).log()

    return law


# --- Nullspace projection ---------------------------------------------------------------------------------------------------------


def nullspace(base: Reference, project: Callable[[Tensor], Tensor], keep: float | Callable[[Tensor], float]) -> Oracle:
    """logits = E h' with h' = a h + (1 - a) P h.

    Args:
        base: a model whose head is a plain matrix.
        project: P, any map of f64[d] to f64[d].
        keep: a, or A-INLP's a as a function of the base logits.
    """

    def law(ids: list[int]) -> Tensor:
        h = base.states(ids)[-1]
        a = keep if isinstance(keep, float) else keep(base.unembedding @ h)
        return torch.log_softmax(base.unembedding @ (a * h + (1 - a) * project(h)), -1)

    return law


def bias_of_state(logits: Tensor, unembedding: Tensor, direction: Tensor) -> float:
    """A-INLP's b = sum over the .7 nucleus of p_v (e_v . g) / ||e_v||."""
    p, inside = torch.softmax(logits, -1), nucleus(logits, 0.7)
    return sum(float(p[v] * (unembedding[v] @ direction) / unembedding[v].norm()) for v in inside.nonzero().flatten().tolist())


def adaptive_keep(unembedding: Tensor, direction: Tensor) -> Callable[[Tensor], float]:
    """A-INLP's a: 1 inside the band [-.1, .15], else max(1 - |b|, .6)."""

    def keep(logits: Tensor) -> float:
        b = bias_of_state(logits, unembedding, direction)
        return 1.0 if -0.1 <= b <= 0.15 else max(1 - abs(b), 0.6)

    return keep


def row_space_projector(matrix: np.ndarray) -> np.ndarray:
    """orth(W^T) orth(W^T)^T, by Gram-Schmidt: the orthogonal projector on the span of the rows."""
    basis: list[np.ndarray] = []
    scale = np.abs(matrix).max()
    for row in matrix:
        rest = row.copy()
        for _ in range(2):  # twice is enough
            for b in basis:
                rest = rest - (b @ rest) * b
        if np.linalg.norm(rest) > 1e-8 * scale:
            basis.append(rest / np.linalg.norm(rest))
    q = np.stack(basis, 1)
    return q @ q.T


def inlp_projector(weights: Sequence[np.ndarray]) -> np.ndarray:
    """P = I - rowspace_projector(sum_i R_i), R_i the projector on the row space of W_i [classes, d]."""
    total = sum(row_space_projector(np.atleast_2d(np.asarray(w, dtype=np.float64))) for w in weights)
    return np.eye(total.shape[0]) - row_space_projector(total)


def leace(x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """LEACE of concepts z [n, k] from states x [n, d]: (A, U_in, U_out, mu) with r(x) = x - A (x - mu) and A = U_out U_in^T.

    W = S_xx^(-1/2); U the left singular vectors of W S_xz; A = W^+ U U^T W.
    """
    mu = x.mean(0)
    centred = x - mu
    s_xx, s_xz = centred.T @ centred / len(x), centred.T @ (z - z.mean(0)) / len(x)
    values, vectors = np.linalg.eigh(s_xx)
    inside = values > 1e-10 * values.max()  # a layer norm makes states of rank d - 1
    values, vectors = values[inside], vectors[:, inside]
    w = vectors @ np.diag(values**-0.5) @ vectors.T
    w_inverse = vectors @ np.diag(values**0.5) @ vectors.T
    u, singular, _ = np.linalg.svd(w @ s_xz, full_matrices=False)
    u = u[:, singular > 1e-8 * singular.max()]
    return w_inverse @ u @ u.T @ w, w @ u, w_inverse @ u, mu


# --- PPLM -------------------------------------------------------------------------------------------------------------------------

Past = list[tuple[Tensor, Tensor]]
"""Keys and values of every layer, f64[1, heads, T, head_dim] each."""


class PPLMOracle:
    """Plug and Play Language Models as its paper and released code state it, one text, one position after the other.

    Args:
        base: the model.
        bags: bags of token ids.
        head: (W f[classes, d], b f[classes]) on the mean last hidden state, or None.
        wrong: a deliberate mistake, for negative controls: "oldest window", "fresh norm", "running norm", "forget perturbation",
            "fusion without temperature", "norm per key and value", "keys only".
    """

    def __init__(
        self,
        base: Reference,
        *,
        bags: Sequence[Ids] = (),
        head: tuple[Tensor, Tensor] | None = None,
        target: int = 1,
        stepsize: float = 0.02,
        num_iterations: int = 3,
        gamma: float = 1.5,
        kl_scale: float = 0.01,
        gm_scale: float = 0.9,
        window_length: int = 0,
        decay: bool = False,
        horizon_length: int = 1,
        grad_length: int = 10000,
        temperature: float = 1.0,
        wrong: str = "",
    ):
        self.base, self.bags, self.wrong = base, [list(bag) for bag in bags], wrong
        self.head = None if head is None else (head[0].double(), head[1].double())
        self.target, self.stepsize, self.num_iterations, self.gamma = target, stepsize, num_iterations, gamma
        self.kl_scale, self.gm_scale, self.temperature = kl_scale, gm_scale, temperature
        self.window_length, self.decay, self.horizon_length, self.grad_length = window_length, decay, horizon_length, grad_length
        self.start()

    def start(self) -> None:
        """Forget the text."""
        self.seen: list[int] = []
        self.generated = 0
        self.past: Past | None = None  # perturbed keys and values of all tokens but the last
        self.norms: list[Tensor] | None = None

    def __call__(self, ids: list[int]) -> Tensor:
        """The law after these ids. A call with anything but one token more than the call before starts afresh with a prompt."""
        if not self.seen or ids[:-1] != self.seen:
            self.start()
        law = self._step(list(ids))
        self.seen = list(ids)
        self.generated += 1
        return law

    def _step(self, ids: list[int]) -> Tensor:
        last = torch.tensor([ids[-1:]])
        states, clean = self._read_whole(ids)
        q = torch.softmax(self.base.unembedding @ states[-1], -1)
        if self.past is None and len(ids) > 1:
            _, self.past = self._read_whole(ids[:-1])
        if self.past is None:  # a single token has no past: nothing to perturb
            logits, self.past = self._extend([], last)
        else:
            delta = self._perturbation(last, states, clean, q)
            perturbed = [(k + dk, v + dv) for (k, v), (dk, dv) in zip(self.past, delta, strict=True)]
            logits, extended = self._extend(perturbed, last)
            if self.wrong == "forget perturbation":
                _, extended = self._extend(self.past, last)
            self.past = extended
        temperature = 1.0 if self.wrong == "fusion without temperature" else self.temperature
        fused = torch.softmax(logits / temperature, -1) ** self.gm_scale * q ** (1 - self.gm_scale)
        if self.wrong == "fusion without temperature":
            fused = fused ** (1 / self.temperature)
        return (fused / fused.sum()).log()

    def _read_whole(self, ids: Ids) -> tuple[Tensor, Past]:
        """Hidden states f64[T, d] of a text, and its clean past."""
        cache = DynamicCache()
        output = self.base.model.base_model(input_ids=torch.tensor([list(ids)]), past_key_values=cache, use_cache=True)
        return output.last_hidden_state[0], [(layer.keys, layer.values) for layer in cache.layers]

    def _extend(self, past: Past, tokens: Tensor | None, embeddings: Tensor | None = None) -> tuple[Tensor, Past]:
        logits, _, extended = self._extend_with_state(past, tokens, embeddings)
        return logits, extended

    def _extend_with_state(self, past: Past, tokens: Tensor | None, embeddings: Tensor | None = None) -> tuple[Tensor, Tensor, Past]:
        """Read one token (or one embedding) behind this past: logits f64[V], last hidden state f64[d], the longer past."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        length = past[0][0].shape[2] if past else 0
        arguments = {"input_ids": tokens} if embeddings is None else {"inputs_embeds": embeddings}
        position = torch.tensor([[length]])
        output = self.base.model.base_model(**arguments, past_key_values=cache, use_cache=True, position_ids=position)
        hidden = output.last_hidden_state[0, -1]
        return self.base.unembedding @ hidden, hidden, [(layer.keys, layer.values) for layer in cache.layers]

    def _perturbation(self, last: Tensor, states: Tensor, clean: Past, q: Tensor) -> Past:
        """Delta after num_iterations steps."""
        assert self.past is not None
        weights = self._window(len(states) - 1)
        delta = [(torch.zeros_like(k), torch.zeros_like(v)) for k, v in self.past]
        for _ in range(self.num_iterations):
            leaves = [(dk.clone().requires_grad_(), dv.clone().requires_grad_()) for dk, dv in delta]
            moved = [(k + dk, v + dv) for (k, v), (dk, dv) in zip(self.past, leaves, strict=True)]
            logits, hidden, _ = self._extend_with_state(moved, last)
            loss = self._loss(torch.softmax(logits, -1), hidden, states[:-1], clean, q)
            flat = torch.autograd.grad(loss, [leaf for pair in leaves for leaf in pair])
            gradients = [(flat[2 * i] * weights, flat[2 * i + 1] * weights) for i in range(len(delta))]
            norms = [torch.sqrt((gk**2).sum() + (gv**2).sum()) for gk, gv in gradients]
            running = not self.head
            if self.wrong == "fresh norm":
                running = False
            if self.wrong == "running norm":
                running = True
            if running and self.norms is not None:
                self.norms = [torch.maximum(old, new) for old, new in zip(self.norms, norms, strict=True)]
            else:
                self.norms = [norm + 1e-15 for norm in norms]
            stepsize = self.stepsize if self.generated < self.grad_length else 0.0
            moved_on = []
            for (dk, dv), (gk, gv), norm in zip(delta, gradients, self.norms, strict=True):
                nk = gk.norm() if self.wrong == "norm per key and value" else norm
                nv = gv.norm() if self.wrong == "norm per key and value" else norm
                keys_only = self.wrong == "keys only"
                moved_on.append((dk - stepsize * gk / nk**self.gamma, dv if keys_only else dv - stepsize * gv / nv**self.gamma))
            delta = moved_on
        return delta

    def _loss(self, p: Tensor, hidden: Tensor, earlier: Tensor, clean: Past, q: Tensor) -> Tensor:
        """Of the perturbed p f64[V] and hidden state of the last token; the states of the tokens before it are unperturbed."""
        loss = p.new_zeros(())
        for bag in self.bags:
            loss = loss - torch.log(p[bag].sum())
        if self.head is not None:
            weight, bias = self.head
            total = earlier.sum(0) + hidden.detach()
            expected = (p @ self.base.model.get_input_embeddings().weight)[None, None]
            past = clean
            for _ in range(self.horizon_length):
                _, future, past = self._extend_with_state(past, None, expected)
                total = total + future
            mean = total / (len(earlier) + 1 + self.horizon_length)
            loss = loss + F.cross_entropy((weight @ mean + bias)[None], torch.tensor([self.target]))
        if self.kl_scale > 0:
            p, q = (x + 1e-15 * (x <= 1e-15) for x in (p, q))
            loss = loss + self.kl_scale * (p * torch.log(p / q)).sum()
        return loss

    def _window(self, length: int) -> Tensor:
        """Weights of the positions of the past, f64[1, 1, T, 1]."""
        w = self.window_length
        weights = torch.ones(length, dtype=torch.float64)
        if 0 < w < length:
            ramp = torch.arange(1, w + 1, dtype=torch.float64) / w if self.decay else torch.ones(w, dtype=torch.float64)
            weights = torch.cat([torch.zeros(length - w, dtype=torch.float64), ramp])
            if self.wrong == "oldest window":
                weights = torch.cat([ramp, torch.zeros(length - w, dtype=torch.float64)])
        return weights[None, None, :, None]
