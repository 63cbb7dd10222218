"""Philox4x32-10, the counter-based generator behind every draw (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

A draw is a pure function of (key, counter), so noise for a token can be made wherever and whenever it is needed, alone or in a
batch. The layout follows Triton's ``tl.philox``: key = the 64-bit seed (low word, high word), counter = four 32-bit words.
"""

from __future__ import annotations

import torch

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF


def _mul_hi_lo(a: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32-bit words of a * constant; int64 arithmetic split so that no product exceeds 2**63."""
    low = a & 0xFFFF
    high = a >> 16
    low_product = low * constant  # < 2**48
    high_product = high * constant + (low_product >> 16)  # < 2**49
    return (high_product >> 16) & _MASK32, ((high_product & 0xFFFF) << 16) | (low_product & 0xFFFF)


def philox4x32(seed: torch.Tensor, counter: tuple[torch.Tensor, ...], rounds: int = 10) -> tuple[torch.Tensor, ...]:
    """Four 32-bit words of noise for each counter.

    Args:
        seed: i64, any shape that broadcasts with the counter; the 64-bit key (two's complement, negative seeds allowed).
        counter: four i64 tensors holding unsigned 32-bit words; they broadcast together.
        rounds: Philox rounds; 10 is the published generator.

    Returns:
        Four i64 tensors with values in [0, 2**32).
    """
    key_a, key_b = seed & _MASK32, (seed >> 32) & _MASK32
    c0, c1, c2, c3 = (c & _MASK32 for c in counter)
    for _ in range(rounds):
        high_a, low_a = _mul_hi_lo(c0, _ROUND_A)
        high_b, low_b = _mul_hi_lo(c2, _ROUND_B)
        c0, c1, c2, c3 = high_b ^ c1 ^ key_a, low_b, high_a ^ c3 ^ key_b, low_a
        key_a, key_b = (key_a + _KEY_A) & _MASK32, (key_b + _KEY_B) & _MASK32
    return c0, c1, c2, c3


def gumbel_noise(seed: torch.Tensor, position: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise for (seed, position, token), independent of which other tokens are asked for.

    Args:
        seed: i64[R], one key a row.
        position: i64[R], the unpadded position at which the token is drawn.
        token_ids: i64[R, C], vocabulary ids.

    Returns:
        f32[R, C]. Four neighbouring tokens share one Philox call (counter = (token // 4, position, 0, 0), word = token % 4).
        G = -log(-log1p(-u)) with u in (0, 1): the winning tail (u near 0) keeps full resolution.
    """
    zero = torch.zeros((), dtype=torch.int64, device=token_ids.device)
    words = philox4x32(seed[:, None], (token_ids >> 2, position[:, None], zero, zero))
    lane = token_ids & 3
    word = words[0]
    for i in (1, 2, 3):
        word = torch.where(lane == i, words[i], word)
    uniform = (word.to(torch.float64) + 0.5) * 2.0**-32
    return (-torch.log(-torch.log1p(-uniform))).to(torch.float32)
