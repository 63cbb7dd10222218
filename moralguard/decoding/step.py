"""What a control sees of one decoding step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moralguard.backends.arrays import namespace_for
from moralguard.decoding.passes import Pass, PassView

if TYPE_CHECKING:
    import torch

Columns = dict[str, "torch.Tensor"]
"""Per-request state of a control: name -> tensor [R, ...], one row a request. The session selects, forks and drops rows."""


@dataclass(frozen=True)
class Step:
    """One row of logits for each of R running requests. On a model without torch every tensor is a NumPy array.

    Attributes:
        logits: f32[R, V], the base: what the model (and transformers' own processors, where they run first) gave.
        temperature: f32[R], the temperature that will be applied after the rectification; 1 where unknown.
        history: i64[R, T], the request's own tokens, left-padded; mask i64[R, T], 0 at padding.
        generated: i64[R], tokens generated so far: the index of the token about to be drawn.
        hidden: f[R, d], the base's last hidden state, or None where the path offers none.
        head_logits: f[R, V], the head's output before scale and soft cap, or None.
        columns: this control's state.
        view: how to get at the rows of a pass that the control declared.
    """

    logits: torch.Tensor
    temperature: torch.Tensor
    history: torch.Tensor
    mask: torch.Tensor
    generated: torch.Tensor
    hidden: torch.Tensor | None = None
    head_logits: torch.Tensor | None = None
    columns: Columns = field(default_factory=dict)
    view: Callable[[Pass], PassView] | None = None

    def select(self, rows: torch.Tensor) -> Step:
        """These rows (i64[n], an index may repeat) of everything but the passes, which the session moves itself."""
        take = self.arrays.take_rows
        tensors = {
            name: take(value, rows)
            for name in ("logits", "temperature", "history", "mask", "generated", "hidden", "head_logits")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **tensors, columns={k: take(v, rows) for k, v in self.columns.items()})

    def row(self, i: int) -> Step:
        """Row i alone, its passes too."""
        view = self.view
        single = None if view is None else (lambda item: view(item).row(i))
        return replace(self.select(self.arrays.integers([i])), view=single)

    @cached_property
    def arrays(self) -> Any:
        """The functions for this step's arrays: ``backends.torch_arrays`` or ``backends.numpy_arrays``."""
        return namespace_for(self.logits)

    @property
    def rows(self) -> int:
        return self.logits.shape[0]

    @cached_property
    def probabilities(self) -> torch.Tensor:
        """f32[R, V], softmax of the base logits."""
        law: torch.Tensor = self.arrays.softmax(self.logits)
        return law

    def of(self, item: Pass) -> PassView:
        """The rows of a declared pass."""
        if self.view is None:
            raise RuntimeError("this step was built without auxiliary passes")
        return self.view(item).beside(self.logits)

    def weight(self, value: float) -> torch.Tensor:
        """f32[R] filled with one value: a per-row weight."""
        weights: torch.Tensor = self.arrays.full((self.rows,), value, self.arrays.float32, self.logits)
        return weights
