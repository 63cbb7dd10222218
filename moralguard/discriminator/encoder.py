"""The encoder's layers: a BERT (post-norm) whose lower layers are shared by a frozen and a tuned upper half.

Devlin et al. 2019 (arXiv 1810.04805) for the layer, MiniLM (arXiv 2002.10957) and sentence-transformers' all-MiniLM-L6-v2 for
the weights that training starts from.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moralguard.discriminator.encoder_config import EncoderConfig


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Softmax attention, all [B, heads, T, d / heads], where ``allowed`` is True."""
    if torch.is_grad_enabled() and query.requires_grad:
        # written out: the fused kernel's backward takes ten times as long on a CPU in bfloat16
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        return torch.softmax(scores.masked_fill(~allowed, -1e4), -1).to(value.dtype) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each with its residual and norm behind it."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(size, 3 * size)
        self.attention_out = nn.Linear(size, size)
        self.attention_norm = nn.LayerNorm(size, eps=1e-12)
        self.up = nn.Linear(size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, size)
        self.out_norm = nn.LayerNorm(size, eps=1e-12)

    def forward(self, states: Tensor, allowed: Tensor) -> Tensor:
        """States [B, T, d]; ``allowed`` bool, broadcastable to [B, heads, T, T], True where a position may be read."""
        batch, length, size = states.shape
        query, key, value = self.qkv(states).view(batch, length, 3, self.heads, size // self.heads).permute(2, 0, 3, 1, 4)
        context = attend(query, key, value, allowed)
        context = self.attention_out(context.transpose(1, 2).reshape(batch, length, size))
        states = self.attention_norm(states + context)
        return self.out_norm(states + self.down(F.gelu(self.up(states))))


class Encoder(nn.Module):
    """Embeddings, shared layers, and two upper halves: ``frozen`` as it was pre-trained and ``tuned``."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=1e-12)
        self.shared = nn.ModuleList(EncoderLayer(config) for _ in range(config.shared_layers))
        upper = config.layers - config.shared_layers
        self.frozen = nn.ModuleList(EncoderLayer(config) for _ in range(upper))
        self.tuned = nn.ModuleList(EncoderLayer(config) for _ in range(upper))

    def lower_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States behind the shared layers, [B, T, d], of token ids and their bool mask, both [B, T]."""
        places = torch.arange(ids.shape[1], device=ids.device)
        states = self.embedding_norm(self.words(ids) + self.positions(places))
        for layer in self.shared:
            states = layer(states, mask[:, None, None, :])
        return states

    def sentence_vectors(self, lower: Tensor, mask: Tensor) -> Tensor:
        """The pre-trained model's sentence vectors, [B, d], mean over the mask, of length 1."""
        states = lower
        for layer in self.frozen:
            states = layer(states, mask[:, None, None, :])
        weights = mask.to(states.dtype)[:, :, None]
        mean = (states * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        return F.normalize(mean.float(), dim=-1)

    def tuned_states(self, lower: Tensor, allowed: Tensor) -> Tensor:
        """States behind the tuned half, [B, T, d]; ``allowed`` as in ``EncoderLayer``."""
        states = lower
        for layer in self.tuned:
            states = layer(states, allowed)
        return states
