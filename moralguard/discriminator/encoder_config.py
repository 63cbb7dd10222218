"""Sizes of the English encoder, apart from its layers so that they can be read without torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class EncoderConfig(BaseModel):
    """Sizes of the encoder.

    Attributes:
        shared_layers: layers that the frozen and the tuned half have in common; they stay frozen.
        layers: depth of either half, shared layers included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = 30522
    hidden_size: int = 384
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_positions: int = 512
    layers: int = 6
    shared_layers: int = 3
    head_size: int = 256
    dropout: float = 0.1
