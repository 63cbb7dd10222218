"""The output head of an ONNX causal LM in NumPy: z = g(E h + b), g the identity, a scale, or a soft cap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Head:
    """How the last hidden state becomes logits; the NumPy twin of ``backends.head.Head``.

    Attributes:
        weight: E, f32[V, d], the unembedding; dequantised where the graph keeps it packed. Often a view of the file: read-only.
        scale: s of z = s (E h + b).
        softcap: c of z = c tanh((E h + b) / c), or None.
    """

    weight: np.ndarray
    scale: float = 1.0
    softcap: float | None = None

    def project(self, directions: np.ndarray) -> np.ndarray:
        """E @ directions: f32[V, r] for f32[d, r]."""
        return self.weight @ np.asarray(directions, np.float32)

    def bend(self, before: np.ndarray) -> np.ndarray:
        """g(before), f32[..., V], for ``before`` = E h + b."""
        if self.softcap is None:
            return before * np.float32(self.scale)
        return np.float32(self.softcap) * np.tanh(before / np.float32(self.softcap))

    def delta(self, before: np.ndarray, shift: np.ndarray) -> np.ndarray:
        """g(before + shift) - g(before), f32[R, V]; ``before`` = E h + b is needed only where there is a soft cap."""
        if self.softcap is None:
            return shift * np.float32(self.scale)
        cap = np.float32(self.softcap)
        return cap * (np.tanh((before + shift) / cap) - np.tanh(before / cap))
