"""PPLM as published: the key-value history of a PyTorch model is moved along the gradient, before each token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moralguard.backends.hf import ForwardOutput, LanguageModel
from moralguard.backends.kv_cache import KeyValue, cache_from, key_values
from moralguard.controls.base import BoundControl
from moralguard.decoding.passes import Pass, PassView
from moralguard.decoding.step import Columns, Step
from moralguard.decoding.terms import Mix, Terms
from moralguard.errors import PolicyError

if TYPE_CHECKING:
    from moralguard.controls.pplm import PPLM


_SMALL = 1e-15
# With gamma > 1 and a fresh norm a step has the length stepsize * ||g|| ** (1 - gamma), unbounded as g vanishes: norms are
# floored, which bounds it (at gamma 1.5 by 10,000 stepsize) and leaves every gradient larger than the floor as published (a tiny
# random Llama's are 1e-5 to 1e-1).
_NORM_FLOOR = 1e-8


class BoundPPLM(BoundControl["PPLM"]):
    def __init__(self, settings: PPLM, lm: LanguageModel):
        # The clean pass: the request's own text on the base's weights, which in the own loop is the base row itself.
        self.clean = Pass(lm, states=settings.head is not None)
        super().__init__(settings, lm, (self.clean,))
        if any(parameter.is_inference() for parameter in lm.model.parameters()):
            raise PolicyError(f"pplm needs gradients, but {lm.name} was built inside torch.inference_mode(); load it outside")
        self.bags = settings.bags(lm)
        self.head: tuple[torch.Tensor, torch.Tensor] | None = None
        attribute = settings.attribute(lm)
        if attribute is not None:
            weight, bias, self.target = attribute
            self.head = (weight, bias)

    def columns(self, step: Step) -> Columns:
        view = step.of(self.clean)
        columns = {"mask": view.mask[:, :-1], "norm": torch.zeros(step.rows, 0, device=self.lm.device)}
        pairs = [(keys[:, :, :-1], values[:, :, :-1]) for keys, values in view.key_values()]
        return columns | _pack(pairs)

    def terms(self, step: Step) -> Terms:
        view = step.of(self.clean)
        past, mask = _unpack(step.columns), step.columns["mask"]
        last = step.history[:, -1:]
        norm = step.columns["norm"]
        if mask.shape[1]:
            past, norm = self._perturb(step, view, past, mask, last, norm)
        with torch.no_grad():
            output, extended = self._read(past, mask, last)
        gm = step.weight(self.settings.gm_scale)
        # so that division by the temperature gives softmax(z_p / T) ** gm * softmax(z) ** (1 - gm)
        base_weight = step.temperature * (1 - gm) - 1
        carry = {"norm": norm} | _pack(extended)
        return Terms((Mix((output.logits,), (gm,), base_weight),), carry=carry)

    def commit(self, step: Step, carry: Columns, tokens: torch.Tensor) -> Columns:
        mask = step.columns["mask"]
        return carry | {"mask": torch.cat([mask, mask.new_ones(mask.shape[0], 1)], -1)}

    def _read(self, past: list[KeyValue], mask: torch.Tensor, last: torch.Tensor) -> tuple[ForwardOutput, list[KeyValue]]:
        """The last token read with this past: logits at it, and the past extended by it."""
        cache = cache_from(past)
        whole = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], -1)
        output = self.lm.forward(
            cache=cache,
            input_ids=last,
            attention_mask=None if bool(whole.all()) else whole,
            position_ids=mask.sum(-1, keepdim=True),
            hidden=self.head is not None,
        )
        return output, key_values(cache)

    def _perturb(
        self,
        step: Step,
        view: PassView,
        past: list[KeyValue],
        mask: torch.Tensor,
        last: torch.Tensor,
        norm: torch.Tensor,
    ) -> tuple[list[KeyValue], torch.Tensor]:
        """past + Delta, and the norms to keep."""
        settings = self.settings
        weights = self._position_weights(mask)
        stepsize = torch.where(step.generated < settings.grad_length, settings.stepsize, 0.0).float()
        running = self.head is None  # bag of words alone: the norm is a running maximum
        delta = [(torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)) for k, v in past]
        for _ in range(settings.num_iterations):
            leaves = [part.detach().requires_grad_() for pair in delta for part in pair]
            with torch.enable_grad():
                moved = [(k + leaves[2 * i].to(k.dtype), v + leaves[2 * i + 1].to(v.dtype)) for i, (k, v) in enumerate(past)]
                output, _ = self._read(moved, mask, last)
                loss = self._loss(output, view, mask).sum()
            gradients = torch.autograd.grad(loss, leaves)
            weighted = [g.float() * weights for g in gradients]
            square = [(g * g).sum(dim=(1, 2, 3)) for g in weighted]
            fresh = torch.stack([square[2 * i] + square[2 * i + 1] for i in range(len(past))], dim=-1).sqrt()  # [R, layers]
            norm = torch.maximum(norm, fresh) if running and norm.shape[1] else fresh + _SMALL
            divisor = norm.clamp_min(_NORM_FLOOR) if settings.gamma > 1 else norm
            step_of = stepsize[:, None] / divisor**settings.gamma
            delta = [
                (
                    dk - step_of[:, i, None, None, None] * weighted[2 * i],
                    dv - step_of[:, i, None, None, None] * weighted[2 * i + 1],
                )
                for i, (dk, dv) in enumerate(delta)
            ]
        perturbed = [(k + dk.to(k.dtype), v + dv.to(v.dtype)) for (k, v), (dk, dv) in zip(past, delta, strict=True)]
        return perturbed, norm

    def _loss(self, output: ForwardOutput, view: PassView, mask: torch.Tensor) -> torch.Tensor:
        """Attribute loss plus KL of each row, f32[R]."""
        settings = self.settings
        p = torch.softmax(output.logits, -1)
        loss = p.new_zeros(p.shape[0])
        for bag in self.bags:
            loss = loss - torch.log(p[:, bag].sum(-1))
        if self.head is not None:
            weight, bias = self.head
            logits = self._mean_state(output, p, view, mask) @ weight.T + bias
            loss = loss - torch.log_softmax(logits, -1)[:, self.target]
        if settings.kl_scale > 0:
            q = torch.softmax(view.logits, -1)
            q = q + _SMALL * (q <= _SMALL)
            corrected = p + _SMALL * (p <= _SMALL)
            loss = loss + settings.kl_scale * (corrected * (corrected / q).log()).sum(-1)
        return loss

    def _mean_state(self, output: ForwardOutput, p: torch.Tensor, view: PassView, mask: torch.Tensor) -> torch.Tensor:
        """h_bar f32[R, d]: mean of the last hidden states so far and of ``horizon_length`` expected next ones.

        Only the expected tokens carry gradient, through p; they are read on the clean cache.
        """
        if output.hidden is None:
            raise RuntimeError("the head needs hidden states")
        length = mask.sum(-1)
        total = view.hidden_sum + output.hidden.detach().float()
        embeddings = self.lm.model.get_input_embeddings().weight
        expected = (p.to(embeddings.dtype) @ embeddings)[:, None]
        cache, seen = cache_from(view.key_values()), view.mask
        for ahead in range(self.settings.horizon_length):
            seen = torch.cat([seen, seen.new_ones(seen.shape[0], 1)], -1)
            future = self.lm.forward(
                cache=cache,
                inputs_embeds=expected,
                attention_mask=None if bool(seen.all()) else seen,
                position_ids=length[:, None] + 1 + ahead,
                hidden=True,
            )
            if future.hidden is not None:
                total = total + future.hidden.float()
        return total / (length + 1 + self.settings.horizon_length)[:, None]

    def _position_weights(self, mask: torch.Tensor) -> torch.Tensor:
        """Weight of every past position, f32[R, 1, W, 1]: 0 at padding and outside the window."""
        width, window = mask.shape[1], self.settings.window_length
        weights = mask.float()
        if 0 < window < width:
            age = torch.arange(width - 1, -1, -1, device=mask.device)  # 0 is the newest
            recent = (age < window).float()
            if self.settings.decay:
                recent = recent * (window - age).clamp(min=0) / window
            # rows no longer than the window change everywhere
            weights = torch.where((mask.sum(-1) > window)[:, None], weights * recent, weights)
        return weights[:, None, :, None]


def _pack(pairs: list[KeyValue]) -> Columns:
    return {f"{side}.{i}": tensor for i, pair in enumerate(pairs) for side, tensor in zip(("key", "value"), pair, strict=True)}


def _unpack(columns: Columns) -> list[KeyValue]:
    layers = sum(name.startswith("key.") for name in columns)
    return [(columns[f"key.{i}"], columns[f"value.{i}"]) for i in range(layers)]
