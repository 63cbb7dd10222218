"""Decoding settings as arguments: few sets of them on a GPU, and the neutral ones change nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from typing import Any

import pytest
import torch

import moralguard_kernels as ops
from moralguard.decoding.settings import DecodingSettings
from moralguard.decoding.warp import NEUTRAL, given_arguments, warp_values

ALL = [
    DecodingSettings(do_sample=sampled, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for sampled, temperature, top_k, top_p, min_p in product((True, False), (0.0, 0.7, 1.0), (0, 5), (0.9, 1.0), (0.0, 0.1))
]
ENTRIES = [ops.sample_logits]
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    from moralguard_kernels.fused import launch

    ENTRIES.append(launch.sample_logits)


def test_a_gpu_sees_two_sets_of_arguments_however_requests_are_mixed() -> None:
    """Each set is a compilation of every kernel."""
    values = [warp_values(settings) for settings in ALL]
    batches = [[one] for one in values] + [[one, other] for one, other in product(values, values)]
    assert {given_arguments(batch, True) for batch in batches} == {("temperature",), tuple(NEUTRAL)}
    assert len({given_arguments(batch, False) for batch in batches}) > 8


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("settings", [s for s in ALL if s.temperature != 0.0 or s.do_sample][::3], ids=str)
def test_an_argument_that_is_neutral_in_every_row_changes_no_token(entry: Callable[..., Any], settings: DecodingSettings) -> None:
    generator = torch.Generator().manual_seed(3)
    logits, values = torch.randn(3, 200, generator=generator) * 3, warp_values(settings)
    seed, position = torch.tensor([5, 6, 7]), torch.tensor([0, 9, 2])

    def tokens(names: tuple[str, ...]) -> list[int]:
        warp = {name: torch.full((3,), values[name], dtype=torch.int32 if name == "top_k" else torch.float32) for name in names}
        return entry(logits, seed, position, **warp, summary=False)[0].tolist()

    assert tokens(given_arguments([values], True)) == tokens(given_arguments([values], False))
