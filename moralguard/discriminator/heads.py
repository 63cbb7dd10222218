"""From states to the two judgements, relevance and broken, as logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moralguard.discriminator.encoder import attend
from moralguard.discriminator.encoder_config import EncoderConfig

_PRODUCT = 64


class PairHead(nn.Module):
    """Two logits of a text and a value: from what is read in both, and from the frozen similarity beside it."""

    def __init__(self, config: EncoderConfig, inputs: int):
        super().__init__()
        size = config.hidden_size
        self.product = nn.Linear(size, _PRODUCT)
        self.hidden = nn.Linear(inputs + _PRODUCT + 1, config.head_size)
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(config.head_size, 2)
        # a text that the pre-trained model finds close to the statement starts out as relevant
        self.similarity = nn.Parameter(torch.tensor([4.0, 0.0]))

    def forward(self, read: Tensor, text_vectors: Tensor, value_vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Relevance and broken logits [...]; ``read`` [..., inputs], sentence vectors [..., d] of length 1."""
        product = text_vectors * value_vectors
        similarity = product.sum(-1, keepdim=True)
        kind = self.product.weight.dtype
        features = torch.cat([read, self.product((product * 16.0).to(kind)), similarity.to(read.dtype)], -1)
        logits = self.out(self.dropout(nn.functional.gelu(self.hidden(features)))).float() + self.similarity * (similarity - 0.2)
        return logits[..., 0], logits[..., 1]


class ValueAttention(nn.Module):
    """A value's vector asks a text's states: per head, a softmax over the text's positions."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key_value = nn.Linear(config.hidden_size, 2 * config.hidden_size)

    def forward(self, states: Tensor, mask: Tensor, values: Tensor) -> Tensor:
        """What each of ``values`` [B, N, d] finds in the states [B, T, d]: [B, N, d]."""
        batch, length, size = states.shape
        each = size // self.heads
        query = self.query(values).view(batch, -1, self.heads, each).transpose(1, 2)
        key, value = self.key_value(states).view(batch, length, 2, self.heads, each).permute(2, 0, 3, 1, 4)
        found = attend(query, key, value, mask[:, None, None, :])
        return found.transpose(1, 2).reshape(batch, -1, size)
