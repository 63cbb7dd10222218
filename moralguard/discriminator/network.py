"""The English network: one encoder, read in two ways.

**Cached**: text and value are encoded apart; the value's vector asks the text's states. A value is encoded once, however many texts
follow. **Cross**: the tuned layers read value and text together, so that each word sees the other side; the shared lower layers
still run apart (MacAvaney et al. 2020, arXiv 2004.14255, and Cao et al. 2020, arXiv 2005.00697), so a value's lower states are
cached too. Both use the same weights; the attention mask tells them apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moralguard.discriminator.encoder import Encoder
from moralguard.discriminator.encoder_config import EncoderConfig
from moralguard.discriminator.heads import PairHead, ValueAttention


@dataclass(frozen=True, slots=True)
class Encoded:
    """Texts or values behind the encoder.

    Attributes:
        mask: bool [B, T], True at tokens.
        lower: states behind the shared layers, [B, T, d].
        sentence: frozen sentence vectors, [B, d], length 1.
        states: states behind the tuned layers read alone, [B, T, d]; None where only the cross reading is wanted.
    """

    mask: Tensor
    lower: Tensor
    sentence: Tensor
    states: Tensor | None

    def rows(self, places: Tensor) -> Encoded:
        """The rows at ``places`` i64[N], which may repeat."""
        states = None if self.states is None else self.states[places]
        return Encoded(self.mask[places], self.lower[places], self.sentence[places], states)


class Network(nn.Module):
    """Relevance and broken logits of English texts and values."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.encoder = Encoder(config)
        self.sides = nn.Embedding(2, size)  # value, text
        nn.init.normal_(self.sides.weight, std=0.02)
        self.attention = ValueAttention(config)
        self.cached_head = PairHead(config, 4 * size)
        self.cross_head = PairHead(config, 2 * size)

    def encode(self, ids: Tensor, mask: Tensor, side: int, alone: bool = True) -> Encoded:
        """Token ids and bool mask [B, T] of values (``side`` 0) or texts (1)."""
        lower = self.encoder.lower_states(ids, mask)
        sentence = self.encoder.sentence_vectors(lower, mask)
        states = self.encoder.tuned_states(lower + self.sides.weight[side], mask[:, None, None, :]) if alone else None
        return Encoded(mask, lower, sentence, states)

    def cached_logits(self, texts: Encoded, value_vectors: Tensor, value_sentences: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, N] of B texts against N values: ``value_vectors`` [N, d] or [B, N, d] are their first states."""
        states = texts.states
        if states is None:
            raise ValueError("the texts were encoded for the cross reading only")
        if value_vectors.dim() == 2:
            value_vectors = value_vectors.expand(len(states), *value_vectors.shape)
            value_sentences = value_sentences.expand(len(states), *value_sentences.shape)
        found = self.attention(states, texts.mask, value_vectors)
        first = states[:, :1].expand_as(found)
        read = torch.cat([first, found, value_vectors, found * value_vectors], -1)
        return self.cached_head(read, texts.sentence[:, None].expand_as(value_sentences), value_sentences)

    def cross_logits(self, texts: Encoded, values: Encoded) -> tuple[Tensor, Tensor]:
        """Logits [B] of pairs: text b with value b."""
        lower = torch.cat([values.lower + self.sides.weight[0], texts.lower + self.sides.weight[1]], 1)
        mask = torch.cat([values.mask, texts.mask], 1)
        states = self.encoder.tuned_states(lower, mask[:, None, None, :])
        read = torch.cat([states[:, 0], states[:, values.mask.shape[1]]], -1)
        return self.cross_head(read, texts.sentence, values.sentence)
