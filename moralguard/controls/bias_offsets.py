"""Biases of a model's top layers as offsets, each row of a forward with its own; the model's weights stay as they are.

A bias that grows by delta is the module's output plus delta, so one forward serves rows with different biases.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.pytorch_utils import Conv1D

from moralguard.backends.edits import layer_modules
from moralguard.errors import PolicyError

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel


class BiasOffsets:
    """The biases of the top layers: of every linear module, and of every other module that has one (LayerNorm).

    Args:
        lm: the model. top_layers: how many; all where it has fewer.

    Attributes:
        layers: how many layers are tuned at most.
        depth: i64[D], for every bias in turn how far below the top its layer is, 0 for the last.

    Raises:
        ModelError: the model's layers can't be told.
        PolicyError: a module's output hasn't one row a request (experts that are routed to), so rows can't have biases of their own.
    """

    def __init__(self, lm: LanguageModel, top_layers: int, name: str):
        names = layer_modules(lm)
        modules = dict(lm.model.named_modules())
        self.layers = min(top_layers, len(names))
        found = [
            (depth, place, module)
            for depth in range(self.layers)
            for place, module in modules[names[len(names) - depth]].named_modules()
            if _has_bias(module)
        ]
        widths = _widths(lm, [module for _, _, module in found])
        self._spots: list[tuple[torch.nn.Module, slice]] = []
        start, depths = 0, []
        for depth, place, module in found:
            shape = widths.get(module)
            if shape is None:  # not part of the forward
                continue
            if len(shape) != 3 or shape[:2] != _PROBE:
                raise PolicyError(
                    f"{name} gives each row biases of its own, but {place!r} of {names[len(names) - depth]} of {lm.name} gives {shape} for "
                    f"{_PROBE[0]} rows of {_PROBE[1]} tokens; use a model without routed experts, or pplm"
                )
            self._spots.append((module, slice(start, start + shape[2])))
            depths.append(torch.full((shape[2],), depth))
            start += shape[2]
        if not self._spots:
            raise PolicyError(f"{name} found no linear module in the top layers of {lm.name}; use another model, or pplm")
        self.depth = torch.cat(depths).to(lm.device)

    @property
    def count(self) -> int:
        """D, how many biases there are."""
        return int(self.depth.shape[0])

    @contextmanager
    def applied(self, offsets: torch.Tensor) -> Iterator[None]:
        """Inside, row i of this thread's forward passes has biases larger by offsets[i], f32[R, D]; outside, the model is as before."""
        owner, handles = threading.get_ident(), []

        def hook_for(spot: slice) -> Any:
            def add(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor | None:
                return output + offsets[:, None, spot].to(output.dtype) if threading.get_ident() == owner else None

            return add

        try:
            for module, spot in self._spots:
                handles.append(module.register_forward_hook(hook_for(spot)))
            yield
        finally:
            for handle in handles:
                handle.remove()


_PROBE = (2, 3)  # rows and tokens, unlike each other and anything a model would have


def _has_bias(module: torch.nn.Module) -> bool:
    if isinstance(module, (torch.nn.Linear, Conv1D)):
        return True
    return isinstance(getattr(module, "bias", None), torch.nn.Parameter)


def _widths(lm: LanguageModel, modules: list[torch.nn.Module]) -> dict[torch.nn.Module, tuple[int, ...]]:
    """The shapes of what the modules give for ``_PROBE`` tokens."""
    shapes: dict[torch.nn.Module, tuple[int, ...]] = {}
    owner = threading.get_ident()

    def note(module: torch.nn.Module, _args: Any, output: torch.Tensor) -> None:
        if threading.get_ident() == owner:
            shapes[module] = tuple(output.shape)

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        with torch.no_grad():
            lm.model(input_ids=torch.zeros(_PROBE, dtype=torch.int64, device=lm.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return shapes
