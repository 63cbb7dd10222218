"""The discriminator's Chinese path: a small character model that judges (text, value) pairs.

Texts are read as characters with hashed character n-grams (``characters``). Shapes: B texts, N values, L positions, G = n-gram
orders. ``numpy_characters`` runs the same network without torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from moralguard.discriminator.characters import BAG_ORDERS, CharacterConfig, hash_ngrams, normalise, pad_hashes


@dataclass(frozen=True, slots=True)
class CharacterBatch:
    """Texts as tensors: ``ids`` [B, L, G] raw n-gram hashes (0 for none), ``mask`` [B, L] (True where a position is real) and
    ``offsets``: for each text the (start, end) slice of the ORIGINAL string behind each real position."""

    ids: Tensor
    mask: Tensor
    offsets: tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True, slots=True)
class TextStates:
    """What `CharacterPath.encode_text` yields: ``hidden`` [B, L, width], ``keys`` [B, L, lexical_width], ``bag`` [B, bag_width] and
    ``mask`` [B, L]."""

    hidden: Tensor
    keys: Tensor
    bag: Tensor
    mask: Tensor


def character_batch(texts: Sequence[str], max_characters: int = 256) -> CharacterBatch:
    """Texts as one padded batch; what lies beyond ``max_characters`` of a text is left out (callers slide a window over longer ones)."""
    arrays: list[np.ndarray] = []
    offsets: list[tuple[tuple[int, int], ...]] = []
    for text in texts:
        normal, places = normalise(text, max_characters)
        arrays.append(hash_ngrams(normal))
        offsets.append(((0, 0), *places))
    return CharacterBatch(*pad(arrays), tuple(offsets))


def pad(arrays: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Hash arrays [L_i, G] as ``ids`` [B, L, G] and ``mask`` [B, L]."""
    ids, mask = pad_hashes(arrays)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def buckets(ids: Tensor, size: int) -> Tensor:
    """Raw hashes as rows of a table with ``size`` buckets; row 0 is kept for "no n-gram here"."""
    return torch.where(ids == 0, 0, 1 + ids % (size - 1))


class GatedBlock(nn.Module):
    """A residual gated convolution; padding is zeroed before it, so a text's result doesn't depend on how far it was padded."""

    def __init__(self, width: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.convolution = nn.Conv1d(width, 2 * width, 3, padding=dilation, dilation=dilation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        inner = self.norm(states) * mask[..., None]
        return states + self.dropout(F.glu(self.convolution(inner.transpose(1, 2)).transpose(1, 2), dim=-1))


class CharacterPath(nn.Module):
    """Judges texts against value statements: relevance r and broken b, with P(kept) = 1 - sigmoid(r) * sigmoid(b)."""

    calibration: Tensor

    def __init__(self, config: CharacterConfig) -> None:
        super().__init__()
        self.config = config
        width, lexical = config.width, config.lexical_width
        self.characters = nn.Embedding(config.characters, config.character_width, padding_idx=0)
        self.bigrams = nn.Embedding(config.bigrams, config.bigram_width, padding_idx=0)
        self.bag = nn.Embedding(config.bag, config.bag_width, padding_idx=0)
        nn.init.normal_(self.characters.weight, std=0.3)
        nn.init.normal_(self.bigrams.weight, std=0.3)
        nn.init.normal_(self.bag.weight, std=0.02)
        with torch.no_grad():
            for table in (self.characters, self.bigrams, self.bag):
                table.weight[0].zero_()
        grams = config.character_width + config.bigram_width
        self.entry = nn.Linear(grams, width)
        self.keys = nn.Linear(grams, lexical, bias=False)
        self.blocks = nn.ModuleList(GatedBlock(width, 2**depth, config.dropout) for depth in range(config.blocks))
        self.exit = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        # The value side has its own read-out of the shared character states.
        self.value_gate = nn.Linear(width, 1)
        self.value_vector = nn.Linear(width, width)
        self.lexical_gate = nn.Linear(width, 1)
        self.sentence = nn.Linear(config.sentence_width, width + lexical)
        self.attention_key = nn.Linear(width, width, bias=False)
        self.attention_query = nn.Linear(width, width)
        self.attended = nn.Linear(width, width)
        self.interaction = nn.Sequential(nn.Linear(4 * width + 2, width), nn.GELU(), nn.Dropout(config.dropout))
        self.gates = nn.Linear(width, 2)
        self.bag_weights = nn.Linear(width, 2 * config.bag_width)
        with torch.no_grad():
            # Relevance starts near 1, so that at first b decides: the product of two half-open gates learns slowly.
            self.gates.bias[0] = 2.0
        self.register_buffer("calibration", torch.tensor([1.0, 0.0]))  # scale and shift of b, fitted after training

    @property
    def value_width(self) -> int:
        """The width d of a value vector."""
        return self.config.width + self.config.lexical_width

    def encode_text(self, ids: Tensor, mask: Tensor) -> TextStates:
        """Encode texts. ``ids``: raw hashes [B, L, G]; ``mask``: [B, L]."""
        grams = torch.cat(
            [
                self.characters(buckets(ids[..., 0], self.config.characters)),
                self.bigrams(buckets(ids[..., 1], self.config.bigrams)),  # of this character and the next
            ],
            dim=-1,
        )
        hidden = self.dropout(self.entry(grams))
        for block in self.blocks:
            hidden = block(hidden, mask)
        features = buckets(ids[..., :BAG_ORDERS], self.config.bag)
        total = self.bag(features).float().sum(dim=(1, 2))
        count = (features != 0).sum(dim=(1, 2)).clamp(min=1)
        keys = F.normalize(self.keys(grams).float(), dim=-1, eps=1e-6)
        return TextStates(self.exit(hidden), keys, total / count.sqrt()[:, None], mask)

    def encode_values(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode value statements in Chinese: ``ids`` [N, L, G] and ``mask`` [N, L] to vectors [N, d]."""
        states = self.encode_text(ids, mask)
        hidden = states.hidden.float()
        weights = masked_softmax(self.value_gate(hidden).squeeze(-1).float(), mask)
        vector = self.value_vector((weights[..., None] * hidden).sum(1))
        gate = masked_softmax(self.lexical_gate(hidden).squeeze(-1).float(), mask)
        lexical = (gate[..., None] * states.keys).sum(1)
        return torch.cat([vector.float(), lexical], dim=-1)

    def encode_sentences(self, vectors: Tensor) -> Tensor:
        """Value statements in English, given as L2-normalised MiniLM sentence vectors [N, 384], to vectors [N, d]."""
        return self.sentence(vectors).float()

    def logits(self, states: TextStates, values: Tensor) -> tuple[Tensor, Tensor]:
        """Relevance r and broken b, each [B, N]. ``values``: [N, d], or [B, N, d] for values of each text's own."""
        vector, lexical = values.split([self.config.width, self.config.lexical_width], dim=-1)
        if values.dim() == 2:
            vector = vector[None].expand(len(states.mask), -1, -1)
            lexical = lexical[None].expand(len(states.mask), -1, -1)
        weights = self._attention(states, vector)
        pooled = self.attended(torch.bmm(weights, states.hidden.float())).float()
        matches = torch.bmm(lexical.float(), states.keys.transpose(1, 2))  # [B, N, L]
        best = matches.masked_fill(~states.mask[:, None], -1e4).amax(-1)
        real = states.mask[:, None].float()
        average = (matches * real).sum(-1) / real.sum(-1)
        # Max pooling lets one rude word weigh as much in a long text as in a short one.
        peak = states.hidden.float().masked_fill(~states.mask[..., None], -1e4).amax(1)[:, None].expand_as(pooled)
        features = torch.cat([pooled, pooled * vector, peak, vector, best[..., None] * 4, average[..., None] * 4], dim=-1)
        interaction = self.gates(self.interaction(features)).float()
        bag = self.bag_weights(vector).float().unflatten(-1, (2, self.config.bag_width))
        both = interaction + torch.einsum("bnck,bk->bnc", bag, states.bag)
        scale, shift = self.calibration.float()
        return both[..., 0], both[..., 1] * scale + shift

    def attention(self, states: TextStates, values: Tensor) -> Tensor:
        """Where each value ([N, d]) looks in each text: weights [B, N, L] that sum to 1 over a text's real positions."""
        vector = values[:, : self.config.width]
        return self._attention(states, vector[None].expand(len(states.mask), -1, -1))

    def probability_kept(self, states: TextStates, values: Tensor) -> Tensor:
        """P(kept) [B, N] in [0, 1]."""
        relevance, broken = self.logits(states, values)
        return 1 - torch.sigmoid(relevance) * torch.sigmoid(broken)

    def _attention(self, states: TextStates, vector: Tensor) -> Tensor:
        keys = self.attention_key(states.hidden).float()
        scores = torch.bmm(self.attention_query(vector).float(), keys.transpose(1, 2)) / math.sqrt(self.config.width)
        return masked_softmax(scores, states.mask[:, None])


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis where ``mask`` (broadcast) is True; exactly 0 elsewhere."""
    return torch.softmax(scores.masked_fill(~mask, -1e9), dim=-1) * mask


def save_character_path(model: CharacterPath, weights: Path, config: Path) -> None:
    """Write the weights (safetensors, float16) and the config (JSON)."""
    save_file({name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}, str(weights))
    config.write_text(json.dumps(asdict(model.config), indent=1) + "\n", encoding="utf-8")


def load_character_path(weights: Path, config: Path) -> CharacterPath:
    """Read what `save_character_path` wrote, as float32 and in eval mode."""
    model = CharacterPath(CharacterConfig(**json.loads(config.read_text(encoding="utf-8"))))
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(str(weights)).items()})
    return model.eval()
