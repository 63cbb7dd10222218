"""``attach``: a model's own ``generate`` under the guard, and the model exactly as it was afterwards."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import LogitsProcessorList

from moralguard.backends.hf import LanguageModel
from moralguard.controls.base import BoundControl
from moralguard.decoding.counters import Counters
from moralguard.decoding.gate import Gate
from moralguard.errors import UnsupportedPathError
from moralguard.processor import GuardLogitsProcessor

_attached: weakref.WeakSet[Any] = weakref.WeakSet()
_lock = threading.Lock()

_UNCOVERED = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


@contextmanager
def attach(
    lm: LanguageModel,
    controls: Sequence[BoundControl],
    gate: Gate | None,
    open_on_error: bool,
    counters: Counters,
    model: Any = None,
) -> Iterator[Any]:
    """See ``Guard.attach``."""
    target = lm.model
    if model is not None and getattr(model, "_orig_mod", model) is not target:
        raise UnsupportedPathError("attach got another model than the guard was built with; build a Guard for it")
    with _lock:
        if target in _attached:
            raise UnsupportedPathError(
                f"{lm.name} is already attached to a guard; leave that `with` block first, or put all controls in one policy"
            )
        _attached.add(target)
    inherited = target.generate
    own = {name: vars(target)[name] for name in ("generate", *_UNCOVERED) if name in vars(target)}

    def generate(*args: Any, **kwargs: Any) -> Any:
        return _guarded_generate(lm, controls, gate, open_on_error, counters, inherited, args, kwargs)

    try:
        vars(target)["generate"] = generate
        for name in _UNCOVERED:
            if hasattr(target, name):
                vars(target)[name] = _refusal(name)
        yield target
    finally:
        for name in ("generate", *_UNCOVERED):
            vars(target).pop(name, None)
        vars(target).update(own)
        with _lock:
            _attached.discard(target)


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise UnsupportedPathError(
            f"{name} never calls logits processors of the user, so it would run unguarded; use model.generate or guard.generate"
        )

    return refuse


def _guarded_generate(
    lm: LanguageModel,
    controls: Sequence[BoundControl],
    gate: Gate | None,
    open_on_error: bool,
    counters: Counters,
    inherited: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    bound = inspect.signature(inherited).bind_partial(*args, **kwargs)
    named = {k: v for k, v in bound.arguments.items() if k not in ("args", "kwargs")} | bound.arguments.get("kwargs", {})
    config = named.get("generation_config") or lm.model.generation_config
    _refuse_uncovered(lm, controls, named, config)
    ids = _input_ids(named)
    temperature = _setting(named, config, "temperature") or 1.0
    if not _setting(named, config, "do_sample"):
        temperature = 1.0
    hidden = any(control.settings.needs.hidden for control in controls)
    with lm.capture() if hidden else nullcontext() as captured:
        processor = GuardLogitsProcessor(
            lm,
            controls,
            gate,
            open_on_error,
            counters,
            attention_mask=_attention_mask(lm, named, ids),
            temperature=float(temperature),
            captured=captured,
        )
        named["logits_processor"] = LogitsProcessorList([*(named.get("logits_processor") or []), processor])
        output = inherited(**named)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    processor.verify(sequences, 1 if ids is None else ids.shape[1])
    return output


def _refuse_uncovered(lm: LanguageModel, controls: Sequence[BoundControl], named: dict[str, Any], config: Any) -> None:
    """Raise on ways of generating that would bypass the guard or mislead a control."""
    if named.get("custom_generate") is not None:
        raise UnsupportedPathError("custom_generate brings a decode loop of its own, which may skip logits processors; use guard.generate")
    if _setting(named, config, "cache_implementation") == "paged":
        raise UnsupportedPathError("cache_implementation='paged' switches to continuous batching, which never calls logits processors")
    if named.get("inputs_embeds") is not None and _input_ids(named) is None:
        raise UnsupportedPathError("inputs_embeds without input_ids hides the prompt's tokens from the guard; pass both")
    stateful = [c.name for c in controls if c.settings.needs.hidden or c.settings.needs.cache or c.settings.needs.grad]
    if not stateful:
        return
    drafts = named.get("assistant_model") is not None or _setting(named, config, "prompt_lookup_num_tokens")
    if drafts or _setting(named, config, "assistant_early_exit"):
        raise UnsupportedPathError(
            f"assisted decoding scores several positions at once and takes tokens back, which control {stateful[0]!r} can't follow; drop "
            "assistant_model / prompt_lookup_num_tokens, or the control"
        )
    scale = _setting(named, config, "guidance_scale")
    if scale is not None and scale != 1:
        raise UnsupportedPathError(
            f"guidance_scale runs the model a second time in each step, and control {stateful[0]!r} would read that pass's hidden state"
        )


def _setting(named: dict[str, Any], config: Any, name: str) -> Any:
    value = named.get(name)
    return getattr(config, name, None) if value is None else value


def _input_ids(named: dict[str, Any]) -> torch.Tensor | None:
    for name in ("inputs", "input_ids"):
        if isinstance(named.get(name), torch.Tensor):
            return named[name]
    return None


def _attention_mask(lm: LanguageModel, named: dict[str, Any], ids: torch.Tensor | None) -> torch.Tensor | None:
    """The mask transformers will use: the caller's, or its own rule (pad tokens count as padding unless they end texts)."""
    mask = named.get("attention_mask")
    if mask is not None or ids is None:
        return mask
    pad = lm.pad_token_id
    if pad is None or pad in lm.eos_token_ids:
        return torch.ones_like(ids)
    return (ids != pad).long()
