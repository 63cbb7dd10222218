"""Gating: where the base needs no help, rows pass through bit for bit."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

import moralguard_kernels as ops
from moralguard.decoding.step import Step
from moralguard.schema import StrictModel


class Gate(StrictModel):
    """When the controls act. Every condition that is given must hold; without any they always act.

    Attributes:
        min_entropy: entropy of the base's next-token law in nats, at least; confident steps pass through.
        first_tokens: only the first so many generated tokens.
    """

    min_entropy: Annotated[float, Field(ge=0)] | None = None
    first_tokens: Annotated[int, Field(ge=1)] | None = None

    def open_rows(self, step: Step) -> torch.Tensor | None:
        """bool[R], the rows in which controls act; None where all do."""
        rows: torch.Tensor | None = None
        if self.first_tokens is not None:
            rows = step.generated < self.first_tokens
        if self.min_entropy is not None:
            uncertain = ops.entropy(step.logits) >= self.min_entropy
            rows = uncertain if rows is None else rows & uncertain
        return rows
