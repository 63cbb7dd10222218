"""The output head of a causal LM: z = g(E h + b), g the identity, a scale, or a soft cap."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Head:
    """How the last hidden state becomes logits.

    Attributes:
        weight: E, f[V, d], the unembedding in the model's dtype.
        scale: s of z = s (E h + b) (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``).
        softcap: c of z = c tanh((E h + b) / c) (Gemma 2), or None.
    """

    weight: torch.Tensor
    scale: float = 1.0
    softcap: float | None = None

    def project(self, directions: torch.Tensor) -> torch.Tensor:
        """E @ directions in float32: [V, r] for directions [d, r]."""
        return self.weight.to(torch.float32) @ directions.to(device=self.weight.device, dtype=torch.float32)

    def bend(self, before: torch.Tensor) -> torch.Tensor:
        """g(before), f[..., V] of the same kind, for ``before`` = E h + b."""
        return before * self.scale if self.softcap is None else self.softcap * torch.tanh(before / self.softcap)

    def delta(self, before: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """g(before + shift) - g(before), [R, V]; ``before`` = E h + b is needed only where there is a soft cap."""
        if self.softcap is None:
            return shift * self.scale
        return self.softcap * (torch.tanh((before + shift) / self.softcap) - torch.tanh(before / self.softcap))


def fit_head(weight: torch.Tensor, before: torch.Tensor, logits: torch.Tensor, config_softcap: float | None) -> Head | None:
    """The head that turns ``before`` = E h + b [R, V] into ``logits`` [R, V], or None where it has no known form."""
    x, z = before.double(), logits.double()
    tolerance = 1e-2 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-4

    def matches(candidate: torch.Tensor) -> bool:
        return bool((candidate - z).abs().max() <= tolerance * (1 + z.abs().max()))

    # the cap first: where it hardly bends the probe's logits they look linear too
    if config_softcap and matches(config_softcap * torch.tanh(x / config_softcap)):
        return Head(weight, softcap=float(config_softcap))
    scale = float((x * z).sum() / (x * x).sum().clamp_min(1e-30))
    if matches(scale * x):
        return Head(weight, 1.0 if abs(scale - 1.0) < tolerance else scale)
    return None
