"""``noise`` for torch tensors: what the kernels' noise is compared with, and what the reference draws with."""

from __future__ import annotations

import torch

from .arguments import check_noise_arguments
from .noise import gumbel_of_words, philox_words, token_words


def philox4x32(seed: torch.Tensor, counter: tuple[torch.Tensor, ...], rounds: int = 10) -> tuple[torch.Tensor, ...]:
    """Four 32-bit words of noise for each counter: i64 tensors with values in [0, 2**32). See ``noise.philox_words``."""
    words = philox_words(seed.cpu().numpy(), [word.cpu().numpy() for word in counter], rounds)
    return tuple(torch.as_tensor(word.astype("int64"), device=seed.device) for word in words)


def gumbel_noise(seed: torch.Tensor, position: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise for (seed, position, token), independent of which other tokens are asked for.

    Args:
        seed: i64[R], one key a row.
        position: i64[R], the unpadded position at which the token is drawn.
        token_ids: i64[R, C], vocabulary ids.

    Returns:
        f32[R, C].

    Raises:
        ValueError: the shapes or devices don't fit.
    """
    check_noise_arguments(seed, position, token_ids)
    words = token_words(seed[:, None].cpu().numpy(), position[:, None].cpu().numpy(), token_ids.cpu().numpy())
    return torch.as_tensor(gumbel_of_words(words), device=token_ids.device)
