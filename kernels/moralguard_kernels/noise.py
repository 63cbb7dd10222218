"""The generator behind every draw, in NumPy: Philox4x32-10 words and the Gumbel noise made of them.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". A draw is a pure function of (key, counter), so noise for a token
can be made wherever and whenever it is needed, alone or in a batch. The layout follows Triton's ``tl.philox``: key = the 64-bit seed
(low word, high word), counter = four 32-bit words. NumPy, as a decode step makes noise for a few tokens only, where it starts an
operation several times faster than torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Floats = NDArray[np.float32]

_ROUND_A, _ROUND_B = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF
_HALF = np.uint64(32)
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


def philox_words(seed: NDArray[np.int64], counter: Sequence[NDArray[np.int64]], rounds: int = 10) -> tuple[Words, Words, Words, Words]:
    """Four 32-bit words of noise for each counter.

    Args:
        seed: i64, any shape that broadcasts with the counter; the 64-bit key (two's complement, negative seeds allowed).
        counter: four i64 arrays holding unsigned 32-bit words; they broadcast together.
        rounds: Philox rounds; 10 is the published generator.
    """
    shape = np.broadcast_shapes(seed.shape, *(word.shape for word in counter))
    step = np.arange(rounds, dtype=np.int64).reshape(-1, *(1,) * seed.ndim)
    keys_a = (((seed & _MASK32) + step * _KEY_A) & _MASK32).astype(np.uint32)
    keys_b = (((seed >> 32 & _MASK32) + step * _KEY_B) & _MASK32).astype(np.uint32)
    a, b, c, d = ((word & _MASK32).astype(np.uint32) for word in counter)
    for key_a, key_b in zip(keys_a, keys_b, strict=True):
        first, second = np.multiply(a, _ROUND_A, dtype=np.uint64), np.multiply(c, _ROUND_B, dtype=np.uint64)
        a, c = (second >> _HALF).astype(np.uint32) ^ (b ^ key_a), (first >> _HALF).astype(np.uint32) ^ (d ^ key_b)
        b, d = second.astype(np.uint32), first.astype(np.uint32)
    whole = [np.broadcast_to(word, shape) for word in (a, b, c, d)]
    return whole[0], whole[1], whole[2], whole[3]


def _near_one(f: Floats, exponent: Floats) -> Floats:
    """log((1 + f) * 2^exponent) for f in [sqrt(1/2) - 1, sqrt(2) - 1): the polynomial of Cephes' logf, in IEEE steps."""
    y = f * np.float32(_LOG_POLYNOMIAL[0])
    for coefficient in _LOG_POLYNOMIAL[1:-1]:
        y += np.float32(coefficient)
        y *= f
    y += np.float32(_LOG_POLYNOMIAL[-1])
    square = f * f
    y *= f
    y *= square
    y += exponent * np.float32(-2.12194440e-4)
    square *= np.float32(-0.5)
    y += square
    y += f
    y += exponent * np.float32(0.693359375)
    return y


def _mantissa_and_exponent(x: Floats) -> tuple[Floats, Floats]:
    """(m - 1, e) with x = m * 2^e and m in [sqrt(1/2), sqrt(2)), for positive normal f32 x."""
    bits = x.view(np.int32) + np.int32(0x3F800000 - 0x3F3504F3)
    mantissa = ((bits & np.int32(0x007FFFFF)) + np.int32(0x3F3504F3)).view(np.float32)
    return mantissa - np.float32(1.0), ((bits >> np.int32(23)) - np.int32(127)).astype(np.float32)


def uniform_of_words(words: Words) -> Floats:
    """u = (word + 1/2) / 2^32 in f32."""
    return (words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)


def gumbel_of_words(words: Words) -> Floats:
    """Standard Gumbel variates f32 of uniform 32-bit words [n]: -log(-log1p(-u)).

    Float32 throughout, in operations that IEEE 754 rounds one way only, so that the fused kernels give the same bits; within
    3e-7 (1 + |G|) of exact arithmetic. The winning tail (u near 0) keeps full resolution.
    """
    f, exponent = _mantissa_and_exponent(uniform_of_words(~words))
    f = np.where(exponent == 0, -uniform_of_words(words), f)  # what the rest, near 1, has lost
    f, exponent = _mantissa_and_exponent(-_near_one(f, exponent))
    return -_near_one(f, exponent)


def token_words(seed: Any, position: Any, token_ids: NDArray[np.int64]) -> Words:
    """The word of each token: four neighbouring tokens share a Philox call (counter = (token // 4, position, 0, 0), word = token % 4).

    Args:
        seed, position: i64, shapes that broadcast with the ids.
        token_ids: i64, vocabulary ids.
    """
    zero = np.zeros((1,) * token_ids.ndim, dtype=np.int64)
    words = philox_words(np.asarray(seed), (token_ids >> 2, np.asarray(position), zero, zero))
    return np.choose(token_ids & 3, words)


def vocabulary_words(seed: NDArray[np.int64], position: NDArray[np.int64], vocabulary: int) -> Words:
    """``token_words`` of every token 0..vocabulary - 1, u32[R, vocabulary], with a Philox call for every four; seed, position i64[R]."""
    zero = np.zeros((1, 1), dtype=np.int64)
    quads = np.arange((vocabulary + 3) // 4, dtype=np.int64)[None]
    words = philox_words(seed[:, None], (quads, position[:, None], zero, zero))
    return np.stack(words, -1).reshape(len(seed), -1)[:, :vocabulary]
