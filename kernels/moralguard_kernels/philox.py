"""Philox4x32-10, the counter-based generator behind every draw (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

A draw is a pure function of (key, counter), so noise for a token can be made wherever and whenever it is needed, alone or in a
batch. The layout follows Triton's ``tl.philox``: key = the 64-bit seed (low word, high word), counter = four 32-bit words.
"""

from __future__ import annotations

import torch

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF
_LOG_POLYNOMIAL = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)


def philox4x32(seed: torch.Tensor, counter: tuple[torch.Tensor, ...], rounds: int = 10) -> tuple[torch.Tensor, ...]:
    """Four 32-bit words of noise for each counter.

    Args:
        seed: i64, any shape that broadcasts with the counter; the 64-bit key (two's complement, negative seeds allowed).
        counter: four i64 tensors holding unsigned 32-bit words; they broadcast together.
        rounds: Philox rounds; 10 is the published generator.

    Returns:
        Four i64 tensors with values in [0, 2**32).
    """
    seed, *words = torch.broadcast_tensors(seed, *counter)
    ones = (1,) * seed.ndim
    multipliers = torch.tensor([_ROUND_A, _ROUND_B], device=seed.device).view(2, *ones)
    steps = torch.tensor([_KEY_A, _KEY_B], device=seed.device).view(2, *ones)
    # Both halves of a round at once: words 0 and 2 are multiplied, 1 and 3 are mixed in.
    key = torch.stack([seed & _MASK32, (seed >> 32) & _MASK32])
    multiplied, mixed = (torch.stack([words[i] & _MASK32, words[i + 2] & _MASK32]) for i in (0, 1))
    for index in range(rounds):
        # an int64 product wraps around, which leaves all of its 64 bits as they should be
        product = multiplied * multipliers
        high = (product >> 32).bitwise_and_(_MASK32).flip(0)
        multiplied = high.bitwise_xor_(mixed).bitwise_xor_((key + steps * index) & _MASK32)
        mixed = product.bitwise_and_(_MASK32).flip(0)
    return multiplied[0], mixed[0], multiplied[1], mixed[1]


def _near_one(f: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """log((1 + f) * 2^exponent) for f in [sqrt(1/2) - 1, sqrt(2) - 1): the polynomial of Cephes' logf, in IEEE steps."""
    y = f * _LOG_POLYNOMIAL[0]
    for coefficient in _LOG_POLYNOMIAL[1:-1]:
        y.add_(coefficient).mul_(f)
    y.add_(_LOG_POLYNOMIAL[-1])
    square = f * f
    y.mul_(f).mul_(square)
    y.add_(exponent * -2.12194440e-4)
    y.add_(square.mul_(-0.5))
    return y.add_(f).add_(exponent * 0.693359375)


def _mantissa_and_exponent(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(m - 1, e) with x = m * 2^e and m in [sqrt(1/2), sqrt(2)), for positive normal f32 x."""
    bits = x.view(torch.int32) + (0x3F800000 - 0x3F3504F3)
    mantissa = ((bits & 0x007FFFFF) + 0x3F3504F3).view(torch.float32)
    return mantissa - 1.0, ((bits >> 23) - 127).to(torch.float32)


def gumbel_of_words(words: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel variates f32 of uniform 32-bit words (i64): -log(-log1p(-u)), u = (word + 1/2) / 2^32.

    Float32 throughout, in operations that IEEE 754 rounds one way only, so that the fused kernels give the same bits; within
    3e-7 (1 + |G|) of exact arithmetic. The winning tail (u near 0) keeps full resolution.
    """
    uniform = (words.to(torch.float32) + 0.5) * 2.0**-32
    rest = ((words ^ _MASK32).to(torch.float32) + 0.5) * 2.0**-32
    f, exponent = _mantissa_and_exponent(rest)
    f = torch.where(exponent == 0, -uniform, f)  # what the rest, near 1, has lost
    f, exponent = _mantissa_and_exponent(-_near_one(f, exponent))
    return -_near_one(f, exponent)


def gumbel_noise(seed: torch.Tensor, position: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise for (seed, position, token), independent of which other tokens are asked for.

    Args:
        seed: i64[R], one key a row.
        position: i64[R], the unpadded position at which the token is drawn.
        token_ids: i64[R, C], vocabulary ids.

    Returns:
        f32[R, C]. Four neighbouring tokens share one Philox call (counter = (token // 4, position, 0, 0), word = token % 4).
    """
    zero = torch.zeros((), dtype=torch.int64, device=token_ids.device)
    words = philox4x32(seed[:, None], (token_ids >> 2, position[:, None], zero, zero))
    lane = token_ids & 3
    word = words[0]
    for i in (1, 2, 3):
        word = torch.where(lane == i, words[i], word)
    return gumbel_of_words(word)


def vocabulary_noise(seed: torch.Tensor, position: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """``gumbel_noise`` of every token 0..vocabulary - 1, f32[R, vocabulary], with a Philox call for every four."""
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    quads = torch.arange((vocabulary + 3) // 4, device=seed.device)[None]
    words = torch.stack(philox4x32(seed[:, None], (quads, position[:, None], zero, zero)), -1)
    return gumbel_of_words(words.flatten(1)[:, :vocabulary].contiguous())
