"""Edits of hidden states as reversible hooks: what a module gives is changed on its way, for all rows of a forward or for some.

The model's weights and modules stay as they are. Inside a guard an edit rides rows of the one batched forward, as a LoRA adapter does
(``Pass.edits``); outside, ``edited`` puts it on any torch module, such as the text encoder of an image generator.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moralguard.backends.edit_rules import Edit
from moralguard.backends.lora import row_spans
from moralguard.errors import ModelError
from moralguard.schema import nearest

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel


@dataclass(frozen=True, eq=False)
class ModuleEdits:
    """Edits of one model's modules, found and checked.

    Attributes:
        edits: (name of the module, module, its edit).
    """

    edits: tuple[tuple[str, torch.nn.Module, Edit], ...]


def find_modules(model: torch.nn.Module, edits: Mapping[str, Edit]) -> ModuleEdits:
    """The modules that the edits name, as in ``model.named_modules()``.

    Raises:
        ModelError: there is no such module, or nothing is to be edited.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    unknown = next((name for name in edits if name not in modules), None)
    if unknown is not None:
        raise ModelError(f"{type(model).__name__} has no module {unknown!r}; {_near(unknown, modules)}")
    if not edits:
        raise ModelError("no module is named; give {module name: edit}, names as in model.named_modules()")
    return ModuleEdits(tuple((name, modules[name], edit) for name, edit in edits.items()))


def bind_edits(lm: LanguageModel, edits: Mapping[str, Edit]) -> ModuleEdits:
    """The same for a language model, once two tokens have gone through it under the edits.

    Raises:
        ModelError: as above; a module that its forward doesn't call; or one whose output an edit doesn't fit.
    """
    found, called = find_modules(lm.model, edits), set()
    here = [module.register_forward_hook(lambda *_, name=name: called.add(name)) for name, module, _ in found.edits]
    ids = torch.tensor([[0, min(1, lm.vocab_size - 1)]], device=lm.device)
    try:
        with torch.no_grad(), apply_edits([found]):
            lm.model(input_ids=ids, use_cache=False)
    finally:
        for handle in here:
            handle.remove()
    idle = [name for name, _, _ in found.edits if name not in called]
    if idle:
        raise ModelError(f"{lm.name} doesn't call module {idle[0]!r} in its forward pass, so its output can't be edited; name another")
    return found


def layer_modules(lm: LanguageModel) -> dict[int, str]:
    """Layer -> name of the module whose output is the state behind so many layers: 1 is the first block, L the last.

    Raises:
        ModelError: the model keeps its blocks in no list that can be told.
    """
    count = int(getattr(lm.model.config.get_text_config(), "num_hidden_layers", 0))
    for name, module in lm.model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return {index + 1: f"{name}.{index}" for index in range(count)}
    raise ModelError(f"{lm.name} keeps its {count} layers in no list of modules, so they can't be told by number; name the modules instead")


@contextmanager
def apply_edits(rows: Sequence[ModuleEdits | None]) -> Iterator[None]:
    """Inside, row i of this thread's forward passes goes through rows[i]; outside, the model is as before."""
    plans: dict[torch.nn.Module, tuple[str, list[tuple[slice, Edit]]]] = {}
    for span, edits in row_spans(rows):
        for name, module, edit in edits.edits:
            plans.setdefault(module, (name, []))[1].append((span, edit))
    owner = threading.get_ident()
    with _hooks([(module, _hook(name, plan, lambda: threading.get_ident() == owner)) for module, (name, plan) in plans.items()]):
        yield


@contextmanager
def edited(model: torch.nn.Module, edits: Mapping[str, Edit]) -> Iterator[torch.nn.Module]:
    """Inside, every forward pass of the model is edited; afterwards, on an exception too, it is exactly as before.

    May be nested: inner edits come after outer ones. ``output_hidden_states`` of transformers gives a module's states as they were
    before the edit of that very module; everything behind it sees the edited ones.

    Args:
        model: any module; it is what the context gives.
        edits: {module name: edit}, names as in ``model.named_modules()``. The module's output, or the first of several, is
            f[..., d] with rows first: the states of a transformer's block [R, T, d].

    Raises:
        ModelError: an unknown module; from the forward pass, an output that the edit doesn't fit.
    """
    found = find_modules(model, edits)
    with _hooks([(module, _hook(name, [(slice(None), edit)], lambda: True)) for name, module, edit in found.edits]):
        yield model


@contextmanager
def _hooks(hooks: Sequence[tuple[torch.nn.Module, Any]]) -> Iterator[None]:
    handles = []
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, plan: Sequence[tuple[slice, Edit]], applies: Callable[[], bool]) -> Any:
    def edit_output(_module: Any, _args: Any, output: Any) -> Any:
        if not applies():
            return None
        states = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(states, Tensor) or not states.is_floating_point() or states.ndim < 2:
            raise ModelError(f"module {name!r} gives a {type(states).__name__} and no hidden states [R, T, d]; name a module that does")
        states = states.clone()
        for span, edit in plan:
            if edit.width != states.shape[-1]:
                raise ModelError(f"module {name!r} gives states of {states.shape[-1]} numbers, but its edit is for {edit.width}")
            # in float32 at least: a long sum in half precision would move every state a little
            states[span] = edit(states[span].to(torch.promote_types(states.dtype, torch.float32))).to(states.dtype)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    return edit_output


def _near(name: str, modules: Mapping[str, Any]) -> str:
    """The nearest names; of a large model at most a few."""
    phrase = nearest(name, modules)
    if phrase.startswith("did you mean"):
        return phrase
    return f"it begins with {', '.join(list(modules)[:8])}; see model.named_modules()"
