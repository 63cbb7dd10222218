"""The Chinese path's network in NumPy, in float32: ``character_path.CharacterPath`` where there is no torch.

Shapes: B texts, N values, L positions, G n-gram orders, d width of a value vector.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moralguard.discriminator.characters import BAG_ORDERS, CharacterConfig, hash_texts
from moralguard.discriminator.stored_weights import load_arrays
from moralguard.errors import ModelError

_LOW = np.float32(-1e4)


@dataclass(frozen=True, slots=True)
class _States:
    hidden: np.ndarray  # [B, L, width]
    keys: np.ndarray  # [B, L, lexical_width]
    bag: np.ndarray  # [B, bag_width]
    mask: np.ndarray  # [B, L]


class NumpyCharacters:
    """Reads Chinese texts and statements; safe to share between threads."""

    def __init__(self, config: CharacterConfig, weights: dict[str, np.ndarray]):
        """Args: weights: float32, by the names of ``CharacterPath``."""
        self.config = config
        self.limit = config.max_characters
        self._weights = weights
        # the taps of each convolution as matrices [width, 2 * width], so that a tap is one product
        self._taps = [
            [np.ascontiguousarray(weights[f"blocks.{depth}.convolution.weight"][:, :, tap].T) for tap in range(3)]
            for depth in range(config.blocks)
        ]

    def statement(self, worded: str) -> np.ndarray:
        """The vector [1, d] of a statement in Chinese."""
        states = self._encode([worded])
        weights = _masked_softmax(self._linear(states.hidden, "value_gate")[..., 0], states.mask)
        vector = self._linear((weights[..., None] * states.hidden).sum(1), "value_vector")
        gate = _masked_softmax(self._linear(states.hidden, "lexical_gate")[..., 0], states.mask)
        return np.concatenate([vector, (gate[..., None] * states.keys).sum(1)], -1)

    def sentence(self, vectors: np.ndarray) -> np.ndarray:
        """The vectors [n, d] of statements in other scripts, given as the encoder's sentence vectors float32 [n, 384]."""
        return self._linear(vectors, "sentence")

    def logits(self, texts: Sequence[str], vectors: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Relevance and broken logits, float64 [B, N], of texts against values given as ``statement`` or ``sentence`` returned them."""
        states = self._encode(texts)
        vector, lexical = np.split(np.concatenate(vectors), [self.config.width], axis=-1)
        keys = self._linear(states.hidden, "attention_key")
        scores = self._linear(vector, "attention_query") @ keys.transpose(0, 2, 1) / np.float32(math.sqrt(self.config.width))
        weights = _masked_softmax(scores, states.mask[:, None])
        pooled = self._linear(weights @ states.hidden, "attended")  # [B, N, width]
        matches = lexical @ states.keys.transpose(0, 2, 1)  # [B, N, L]
        best = np.where(states.mask[:, None], matches, _LOW).max(-1)
        real = states.mask[:, None].astype(np.float32)
        average = (matches * real).sum(-1) / real.sum(-1)
        peak = np.where(states.mask[..., None], states.hidden, _LOW).max(1)
        shape = pooled.shape
        features = [
            pooled,
            pooled * vector,
            np.broadcast_to(peak[:, None], shape),
            np.broadcast_to(vector, shape),
            best[..., None] * 4,
            average[..., None] * 4,
        ]
        hidden = _gelu(self._linear(np.concatenate(features, -1), "interaction.0"))
        bag = self._linear(vector, "bag_weights").reshape(len(vector), 2, self.config.bag_width)
        both = self._linear(hidden, "gates") + np.einsum("nck,bk->bnc", bag, states.bag)
        scale, shift = self._weights["calibration"]
        return both[..., 0].astype(np.float64), (both[..., 1] * scale + shift).astype(np.float64)

    def features(self, texts: Sequence[str]) -> np.ndarray:
        """What an adaptation reads of texts, float64 [B, width + bag_width]."""
        states = self._encode(texts)
        real = states.mask[..., None].astype(np.float32)
        mean = (states.hidden * real).sum(1) / real.sum(1)
        return np.concatenate([_normalised(mean, 1e-12), _normalised(states.bag, 1e-12)], -1).astype(np.float64)

    def _encode(self, texts: Sequence[str]) -> _States:
        ids, mask = hash_texts(texts, self.limit)
        config, weights = self.config, self._weights
        grams = np.concatenate(
            [
                weights["characters.weight"][_buckets(ids[..., 0], config.characters)],
                weights["bigrams.weight"][_buckets(ids[..., 1], config.bigrams)],
            ],
            -1,
        )
        hidden = self._linear(grams, "entry")
        for depth in range(config.blocks):
            hidden = self._block(hidden, mask, depth)
        features = _buckets(ids[..., :BAG_ORDERS], config.bag)
        count = np.maximum((features != 0).sum((1, 2)), 1).astype(np.float32)
        bag = weights["bag.weight"][features].sum((1, 2)) / np.sqrt(count)[:, None]
        return _States(self._norm(hidden, "exit"), _normalised(self._linear(grams, "keys"), 1e-6), bag, mask)

    def _block(self, states: np.ndarray, mask: np.ndarray, depth: int) -> np.ndarray:
        """A residual gated convolution of three taps, 2**depth apart."""
        step, length = 2**depth, states.shape[1]
        inner = self._norm(states, f"blocks.{depth}.norm") * mask[..., None]
        padded = np.pad(inner, ((0, 0), (step, step), (0, 0)))
        found = sum(padded[:, tap * step : tap * step + length] @ matrix for tap, matrix in enumerate(self._taps[depth]))
        value, gate = np.split(found + self._weights[f"blocks.{depth}.convolution.bias"], 2, axis=-1)
        return states + value / (1 + np.exp(-gate))

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        found = x @ self._weights[f"{name}.weight"].T
        bias = self._weights.get(f"{name}.bias")
        return found if bias is None else found + bias

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred * centred).mean(-1, keepdims=True) + np.float32(1e-5))
        return centred / scale * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]


def _buckets(ids: np.ndarray, size: int) -> np.ndarray:
    """As ``character_path.buckets``."""
    return np.where(ids == 0, 0, 1 + ids % (size - 1))


def _masked_softmax(scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Softmax over the last axis where ``mask`` (broadcast) is True; exactly 0 elsewhere."""
    held = np.where(mask, scores, np.float32(-1e9))
    found = np.exp(held - held.max(-1, keepdims=True))
    return found / found.sum(-1, keepdims=True) * mask


def _normalised(x: np.ndarray, least: float) -> np.ndarray:
    return x / np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), np.float32(least))


def _gelu(x: np.ndarray) -> np.ndarray:
    """x * Phi(x), with erf to 1.5e-7: Abramowitz and Stegun 1964, formula 7.1.26 (NumPy has none of its own)."""
    z = np.abs(x) * np.float32(math.sqrt(0.5))
    t = 1 / (1 + np.float32(0.3275911) * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * np.float32(1.061405429)))))
    erf = np.copysign(1 - series * np.exp(-z * z), x)
    return x * np.float32(0.5) * (1 + erf)


def load_numpy_characters(weights: Path, config: Path) -> NumpyCharacters:
    """Read what ``character_path.save_character_path`` wrote.

    Raises:
        ModelError: a file is broken, or isn't of such a network.
    """
    try:
        sizes = CharacterConfig(**json.loads(config.read_text(encoding="utf-8")))
        return NumpyCharacters(sizes, {name: array.astype(np.float32) for name, array in load_arrays(weights).items()})
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{weights} with {config.name} isn't a character network ({str(error)[:300]}); fit it again") from error
