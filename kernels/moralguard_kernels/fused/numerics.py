"""Device helpers: order-preserving keys, sanitised loads, fixed-point mass, arithmetic that torch repeats bit for bit."""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Selection mass is counted in units of 2^-36 of the largest token's, so that sums of up to 4,096 of them fit 48 bits exactly, in
# any order; the number of tokens rides in the bits above.
MASS_SCALE = tl.constexpr(68719476736.0)
COUNT_SHIFT = tl.constexpr(49)
ONE_TOKEN = tl.constexpr(1 << 49)
MASS_MASK = tl.constexpr((1 << 49) - 1)
NO_TARGET = tl.constexpr(1 << 61)
NO_LIMIT = tl.constexpr(1 << 30)
# key of -inf: no token that a base allows has a smaller one
LOWEST_KEY = tl.constexpr(-2139095041)


@triton.jit
def sanitized(z):
    """f32 with NaN -> -inf and +inf -> the largest finite value."""
    return tl.minimum(tl.where(z != z, float("-inf"), z), LARGEST)


@triton.jit
def ordered_key(z):
    """i32 whose order is that of f32 (no NaN); -0.0 and 0.0 share a key."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def finite_or_zero(delta):
    return tl.where(tl.abs(delta) <= LARGEST, delta, 0.0)


@triton.jit
def relative_mass(y, largest):
    """exp(y - largest), 0 for -inf."""
    return tl.where(y > float("-inf"), tl.exp2((y - largest) * LOG2E), 0.0)


@triton.jit
def tempered(logits, temperature):
    """logits / temperature, rounded as IEEE division; unchanged at 1. An overflow stays the largest number."""
    y = logits
    if temperature != 1.0:
        y = tl.minimum(tl.div_rn(logits, tl.zeros_like(logits) + temperature), LARGEST)
    return y


@triton.jit
def merged_mass(maxima, totals, largest):
    """Sum of totals that are relative to their own maxima, relative to the largest; -inf maxima count nothing."""
    return tl.sum(tl.where(maxima > float("-inf"), totals * tl.exp2((maxima - largest) * LOG2E), 0.0))


@triton.jit
def threshold_key(keys, mass, valid, limit, target, lowest, highest):
    """Smallest key t with count{key > t} < limit and mass{key > t} < target, among (lowest, highest].

    ``mass`` i64 in units of 1 / MASS_SCALE. Bisection over keys; it stops as soon as no token lies between the ends.
    """
    low = lowest.to(tl.int64)
    high = highest.to(tl.int64)
    packed = tl.where(valid, mass + ONE_TOKEN, 0)
    above_low = tl.zeros_like(low) - 1
    above_high = tl.zeros_like(low)
    while (high - low > 1) & (above_low != above_high):
        middle = low + (high - low) // 2
        found = tl.sum(tl.where(keys > middle.to(tl.int32), packed, 0))
        count = found >> COUNT_SHIFT
        inside = (count < limit) & ((found & MASS_MASK) < target)
        high = tl.where(inside, middle, high)
        above_high = tl.where(inside, count, above_high)
        low = tl.where(inside, low, middle)
        above_low = tl.where(inside, above_low, count)
    return high.to(tl.int32)


@triton.jit
def mass_target(p, total):
    """p * total as a bound on fixed-point mass; p >= 1 bounds nothing, decided before any sum can round."""
    return tl.where(p < 1.0, tl.maximum((p * total).to(tl.int64), 1), NO_TARGET)


@triton.jit
def best_of(scores, ids):
    """Largest score and its token, the lowest id among equals."""
    best = tl.max(scores)
    return best, tl.min(tl.where(scores == best, ids, 0x7FFFFFFF))
