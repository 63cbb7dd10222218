"""Device code of the noise: Philox words and the Gumbel variate made of them, bit for bit as ``moralguard_kernels.philox``.

Only operations that IEEE 754 rounds one way are used (no log instruction, no fused multiply-add: kernels are compiled with
``enable_fp_fusion=False``), so the CPU, the interpreter and every GPU give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _log_near(f, exponent):
    """log((1 + f) * 2^exponent) for f in [sqrt(1/2) - 1, sqrt(2) - 1); polynomial of Cephes' logf."""
    square = f * f
    y = f * 7.0376836292e-2 + -1.1514610310e-1
    y = y * f + 1.1676998740e-1
    y = y * f + -1.2420140846e-1
    y = y * f + 1.4249322787e-1
    y = y * f + -1.6668057665e-1
    y = y * f + 2.0000714765e-1
    y = y * f + -2.4999993993e-1
    y = y * f + 3.3333331174e-1
    y = (y * f) * square
    y = y + exponent * -2.12194440e-4
    y = y + square * -0.5
    return (f + y) + exponent * 0.693359375


@triton.jit
def _split(x):
    """(m - 1, e) with x = m * 2^e and m in [sqrt(1/2), sqrt(2)), for positive normal x."""
    bits = x.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    mantissa = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    return mantissa - 1.0, ((bits >> 23) - 127).to(tl.float32)


@triton.jit
def gumbel_of(word):
    """Gumbel variate f32 of a uniform u32 word: -log(-log1p(-u)), u = (word + 1/2) / 2^32."""
    word = word.to(tl.uint32)
    uniform = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    f, exponent = _split(rest)
    # near 1 the rest has lost what u still knows: the winning tail keeps its full resolution
    f = tl.where(exponent == 0.0, 0.0 - uniform, f)
    exponential = 0.0 - _log_near(f, exponent)
    f, exponent = _split(exponential)
    return 0.0 - _log_near(f, exponent)


@triton.jit
def _words(seed, position, quads):
    zero = quads * 0
    return tl.philox(seed, quads.to(tl.uint32), (zero + position.to(tl.int32)).to(tl.uint32), zero.to(tl.uint32), zero.to(tl.uint32))


@triton.jit
def gumbel_at(seed, position, ids):
    """Noise f32 of any token ids i32; four neighbouring tokens share a Philox call."""
    w0, w1, w2, w3 = _words(seed, position, ids >> 2)
    lane = ids & 3
    return gumbel_of(tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3)))


@triton.jit
def gumbel_of_tile(seed, position, first, TILE: tl.constexpr):
    """Noise f32[TILE] of the tokens first, first + 1, ...; first is a multiple of 4."""
    w0, w1, w2, w3 = _words(seed, position, (first >> 2) + tl.arange(0, TILE // 4))
    return gumbel_of(tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [TILE]))
