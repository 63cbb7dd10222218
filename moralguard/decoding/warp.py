"""Decoding settings as the ops' arguments: temperature, top-k, top-p, min-p, one value a row."""

from __future__ import annotations

from collections.abc import Sequence

from moralguard.decoding.settings import DecodingSettings

NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""What changes nothing, as does leaving the argument out."""


def warp_values(settings: DecodingSettings) -> dict[str, float]:
    """The arguments of a row. A greedy row has no filter."""
    if settings.greedy:
        return NEUTRAL | {"temperature": 0.0}
    return {name: getattr(settings, name) for name in NEUTRAL}


def given_arguments(rows: Sequence[dict[str, float]], on_gpu: bool) -> tuple[str, ...]:
    """Names of the arguments that the op is given: on the CPU those that act in some row.

    A kernel is compiled anew for every set of arguments, which takes seconds, and requests with other settings come at any time: on a GPU
    it is temperature alone, or all of them.
    """
    acting = tuple(name for name, neutral in NEUTRAL.items() if any(row[name] != neutral for row in rows))
    if not on_gpu:
        return acting
    return tuple(NEUTRAL) if any(name != "temperature" for name in acting) else ("temperature",)
