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
from moralguard.decoding.conditions import gates_of, reads_hidden
from moralguard.decoding.counters import Counters
from moralguard.decoding.gate import BoundGate
from moralguard.errors import PromptError, UnsupportedPathError
from moralguard.processor import GuardLogitsProcessor

_attached: weakref.WeakSet[Any] = weakref.WeakSet()
_lock = threading.Lock()

_UNCOVERED = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


@contextmanager
def attach(
    lm: LanguageModel,
    controls: Sequence[BoundControl],
    gate: BoundGate | None,
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
    gate: BoundGate | None,
    open_on_error: bool,
    counters: Counters,
    inherited: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    bound = inspect.signature(inherited).bind_partial(*args, **kwargs)
    named = {k: v for k, v in bound.arguments.items() if k not in ("args", "kwargs")} | bound.arguments.get("kwargs", {})
    config = _resolved_config(lm, named)
    _refuse_uncovered(controls, gate, named, config)
    ids = _input_ids(named)
    temperature = config.temperature if config.do_sample and config.temperature else 1.0
    with lm.capture() if reads_hidden(gate, controls) else nullcontext() as captured:
        processor = GuardLogitsProcessor(
            lm,
            controls,
            gate,
            open_on_error,
            counters,
            temperature=float(temperature),
            captured=captured,
        )
        named["logits_processor"] = LogitsProcessorList([*(named.get("logits_processor") or []), processor])
        output = inherited(**named)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    processor.verify(sequences, 1 if ids is None else ids.shape[1])
    return output


def _resolved_config(lm: LanguageModel, named: dict[str, Any]) -> Any:
    """The settings that ``generate`` will use: its arguments over the config it was given over the model's own."""
    others = {name: value for name, value in named.items() if name != "generation_config"}
    return lm.model._prepare_generation_config(named.get("generation_config"), **others)[0]


def _refuse_uncovered(controls: Sequence[BoundControl], gate: BoundGate | None, named: dict[str, Any], config: Any) -> None:
    """Raise on ways of generating that would bypass the guard or mislead a control."""
    if named.get("custom_generate") is not None:
        raise UnsupportedPathError("custom_generate brings a decode loop of its own, which may skip logits processors; use guard.generate")
    if config.cache_implementation == "paged":
        raise UnsupportedPathError("cache_implementation='paged' switches to continuous batching, which never calls logits processors")
    ids = _input_ids(named)
    if named.get("inputs_embeds") is not None and ids is None:
        raise UnsupportedPathError("inputs_embeds without input_ids hides the prompt's tokens from the guard; pass both")
    cache = named.get("past_key_values")
    if cache is not None and ids is not None and cache.get_seq_length() > 0:
        mask = named.get("attention_mask")
        if cache.get_seq_length() >= ids.shape[1] or (mask is not None and mask.shape[1] != ids.shape[1]):
            raise UnsupportedPathError("past_key_values holds text that input_ids lacks; pass the ids of the whole text")
    _check_room(controls, config, ids)
    stateful = [f"control {c.name!r}" for c in controls if c.settings.needs.hidden or c.settings.needs.cache or c.settings.needs.grad]
    if any(each.needs.hidden for each in gates_of(gate, controls)):
        stateful.append("the gate")
    if not stateful:
        return
    drafts = (getattr(config, name, None) for name in ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"))
    if named.get("assistant_model") is not None or any(drafts):
        raise UnsupportedPathError(
            f"assisted decoding scores several positions at once and takes tokens back, which {stateful[0]} can't follow; drop "
            "assistant_model / prompt_lookup_num_tokens, or the control or gate"
        )
    if config.guidance_scale is not None and config.guidance_scale != 1:
        raise UnsupportedPathError(
            f"guidance_scale runs the model a second time in each step, and {stateful[0]} would read that pass's hidden state"
        )


def _check_room(controls: Sequence[BoundControl], config: Any, ids: torch.Tensor | None) -> None:
    """Raise now, not in the middle of the text, where a prefix leaves too little room for what is asked for."""
    if ids is None:
        return
    new = config.max_new_tokens or max(0, (config.max_length or 0) - ids.shape[1])
    for control in controls:
        for item in control.passes:
            limit = item.lm.context_length
            if limit is not None and item.prefix_length and item.prefix_length + ids.shape[1] + new - 1 > limit:
                raise PromptError(
                    f"control {control.name!r} reads the text behind a prefix of {item.prefix_length} tokens: with {ids.shape[1]} of the "
                    f"prompt and {new} new ones that is more than the context of {item.lm.name} ({limit}); lower max_new_tokens or "
                    "shorten the prompt"
                )


def _input_ids(named: dict[str, Any]) -> torch.Tensor | None:
    for name in ("inputs", "input_ids"):
        if isinstance(named.get(name), torch.Tensor):
            return named[name]
    return None
