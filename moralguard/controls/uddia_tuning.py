"""UDDIA on a PyTorch model: every row's biases are tuned for the token to come, and the token done again with fewer layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moralguard.backends.hf import ForwardOutput, LanguageModel
from moralguard.backends.kv_cache import KeyValue, cache_from
from moralguard.controls.attribute_head import read_attribute_head
from moralguard.controls.base import BoundControl
from moralguard.controls.bias_offsets import BiasOffsets
from moralguard.controls.group_polarity import GroupPolarity
from moralguard.decoding.passes import Pass
from moralguard.decoding.step import Columns, Step
from moralguard.decoding.terms import Mix, Terms
from moralguard.errors import PolicyError

if TYPE_CHECKING:
    from moralguard.controls.uddia import UDDIA

_BETAS = (0.9, 0.999)  # Adam's own (Kingma & Ba 2015, arXiv 1412.6980)


@dataclass(frozen=True)
class _Text:
    """What is read at one step.

    Attributes:
        read: keys and values up to the newest token, which is last i64[R, 1]; mask i64[R, W], 0 at padding.
        states: f32[R, d], sum of the hidden states before the newest token; None without a head.
        context: f32[R, d], sum of the tokens' embeddings; None without pairs.
    """

    read: list[KeyValue]
    last: torch.Tensor
    mask: torch.Tensor
    states: torch.Tensor | None
    context: torch.Tensor | None


class BoundUDDIA(BoundControl["UDDIA"]):
    def __init__(self, settings: UDDIA, lm: LanguageModel):
        self.clean = Pass(lm, states=settings.head is not None)
        super().__init__(settings, lm, (self.clean,))
        if any(parameter.is_inference() for parameter in lm.model.parameters()):
            raise PolicyError(f"uddia needs gradients, but {lm.name} was built inside torch.inference_mode(); load it outside")
        self.biases = BiasOffsets(lm, settings.top_layers, self.name)
        self.head: tuple[torch.Tensor, torch.Tensor] | None = None
        self.groups = None
        if settings.pairs:
            self.groups = GroupPolarity(lm, settings.pairs, settings.token_frequencies(), settings.components, self.name)
        if settings.head is not None:
            weight, bias, self.target = read_attribute_head(settings.head, settings.target, self.name, lm)
            self.head = (weight, bias)

    def columns(self, step: Step) -> Columns:
        """Nats f32[R] and number f32[R] of the tokens generated so far, under the base: their perplexity."""
        return {"nats": step.weight(0.0), "tokens": step.weight(0.0)}

    def terms(self, step: Step) -> Terms:
        acts = None
        if self.head is None and self.groups is not None:
            acts = self.groups.gap(torch.softmax(step.of(self.clean).logits, -1)) > self.settings.hellinger
            if not bool(acts.any()):
                return Terms(rows=acts)
        gm = step.weight(self.settings.gm_scale)
        # so that division by the temperature gives softmax(z_tuned / T) ** gm * softmax(z) ** (1 - gm)
        return Terms((Mix((self._attempts(step, self._text(step), acts),), (gm,), step.temperature * (1 - gm) - 1),), rows=acts)

    def commit(self, step: Step, carry: Columns, tokens: torch.Tensor) -> Columns:
        told = torch.log_softmax(step.logits.float(), -1).gather(-1, tokens.to(step.logits.device)[:, None])[:, 0]
        return {"nats": step.columns["nats"] - told, "tokens": step.columns["tokens"] + 1}

    def _text(self, step: Step) -> _Text:
        view = step.of(self.clean)
        return _Text(
            view.key_values(),
            step.history[:, -1:],
            view.mask,
            None if self.head is None else view.hidden_sum,
            None if self.groups is None else self.groups.context(step.history, step.mask),
        )

    def _attempts(self, step: Step, text: _Text, acts: torch.Tensor | None) -> torch.Tensor:
        """Logits f32[R, V] of each row's best attempt: T0 layers, and fewer while the perplexity is too high."""
        settings = self.settings
        first = self._gradient(text, torch.zeros(step.rows, self.biases.count, device=self.lm.device))
        layers = torch.full((step.rows,), self.biases.layers, device=self.lm.device)
        best = self._tuned(text, layers, first)
        if settings.max_perplexity is None:
            return best
        least = self._expected_nats(step, best)
        # nats that the token to come may add, for the perplexity to stay where it should
        room = (step.columns["tokens"] + 1) * math.log(settings.max_perplexity) - step.columns["nats"]
        again = least > room if acts is None else (least > room) & acts
        while bool((again := again & (layers > settings.redo_step)).any()):
            layers = torch.where(again, layers - settings.redo_step, layers)
            logits = self._tuned(text, layers, first)
            nats = self._expected_nats(step, logits)
            better = again & (nats < least)
            best, least = torch.where(better[:, None], logits, best), torch.where(better, nats, least)
            again = again & (nats > room)
        return best

    def _tuned(self, text: _Text, layers: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """Logits f32[R, V] under biases that Adam has tuned in the top i64[R] layers; ``first`` is the gradient at the model's own."""
        tuned = self.biases.depth[None] < layers[:, None]
        offsets, mean, square = torch.zeros_like(first), torch.zeros_like(first), torch.zeros_like(first)
        for count in range(1, self.settings.steps + 1):
            gradient = (first if count == 1 else self._gradient(text, offsets)) * tuned
            mean = _BETAS[0] * mean + (1 - _BETAS[0]) * gradient
            square = _BETAS[1] * square + (1 - _BETAS[1]) * gradient * gradient
            unbiased = mean / (1 - _BETAS[0] ** count), square / (1 - _BETAS[1] ** count)
            offsets = offsets - self.settings.lr * unbiased[0] / (unbiased[1].sqrt() + self.settings.epsilon)
        with torch.no_grad(), self.biases.applied(offsets):
            return self._newest(text).logits

    def _gradient(self, text: _Text, offsets: torch.Tensor) -> torch.Tensor:
        """d loss / d biases, f32[R, D], each row of its own loss."""
        leaf = offsets.detach().requires_grad_()
        with torch.enable_grad(), self.biases.applied(leaf):
            loss = self._loss(text, self._newest(text)).sum()
            found: torch.Tensor = torch.autograd.grad(loss, leaf)[0].float()
        return found

    def _loss(self, text: _Text, output: ForwardOutput) -> torch.Tensor:
        """f32[R]; to be called under the biases, which the expected next token is read with, too."""
        law = torch.softmax(output.logits, -1)
        loss = law.new_zeros(law.shape[0])
        if self.head is not None and text.states is not None and output.hidden is not None:
            weight, bias = self.head
            embeddings = self.lm.model.get_input_embeddings().weight.detach()
            expected = (law.to(embeddings.dtype) @ embeddings[: law.shape[1]])[:, None]
            future = self._read(text.read, torch.cat([text.mask, text.mask.new_ones(text.mask.shape[0], 1)], -1), embeds=expected)
            if future.hidden is None:
                raise RuntimeError("the head needs hidden states")
            count = text.mask.sum(-1, keepdim=True) + 1
            mean = (text.states + output.hidden.detach().float() + future.hidden.float()) / count
            loss = loss - torch.log_softmax(mean @ weight.T + bias, -1)[:, self.target]
        if self.groups is not None and text.context is not None:
            biased = self.groups.gap(law.detach()) > self.settings.hellinger
            loss = loss + self.settings.bias_weight * biased * self.groups.loss(law, text.context)
        return loss

    def _newest(self, text: _Text) -> ForwardOutput:
        """The newest token read on the clean history before it."""
        return self._read([(keys[:, :, :-1], values[:, :, :-1]) for keys, values in text.read], text.mask, ids=text.last)

    def _read(
        self, past: list[KeyValue], mask: torch.Tensor, *, ids: torch.Tensor | None = None, embeds: torch.Tensor | None = None
    ) -> ForwardOutput:
        return self.lm.forward(
            cache=cache_from(past),
            input_ids=ids,
            inputs_embeds=embeds,
            attention_mask=None if bool(mask.all()) else mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
            hidden=self.head is not None,
        )

    def _expected_nats(self, step: Step, tuned: torch.Tensor) -> torch.Tensor:
        """-sum_x q(x) log p(x), f32[R]: how surprising the base p will find the token that is drawn from the law q with these logits."""
        gm, removed = self.settings.gm_scale, torch.isneginf(step.logits)
        fused = gm * tuned / step.temperature[:, None] + (1 - gm) * step.logits.masked_fill(removed, 0.0)
        told = torch.log_softmax(step.logits.float(), -1).masked_fill(removed, 0.0)
        return -(torch.softmax(fused.masked_fill(removed, float("-inf")), -1) * told).sum(-1)
