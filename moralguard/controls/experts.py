"""Experts: where the extra logits of a contrast come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from moralguard.backends.arrays import is_language_model, kind_of, weights_of
from moralguard.backends.lora_folder import is_adapter_folder
from moralguard.backends.onnx.load import is_onnx_source
from moralguard.backends.prompts import encode_words
from moralguard.controls.prefix_pack import prefix_pass
from moralguard.decoding.passes import Pass
from moralguard.errors import ModelError, PolicyError
from moralguard.packs import PREFIX, Pack, is_pack, read_pack
from moralguard.schema import StrictModel

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel


class Prompt(StrictModel):
    """An expert made of the base's own weights and a text in front of the request's text.

    Attributes:
        prompt: text, or token ids that go in front exactly as given. Text goes behind a beginning-of-text token and inside the
            first turn of a chat, so that templates stay intact.
    """

    prompt: str | tuple[int, ...]

    def __init__(self, *prompt: str | Sequence[int], **data: Any):
        """``Prompt("text")`` or ``Prompt([ids])``; policy data names the field."""
        if prompt:
            data["prompt"] = prompt[0] if isinstance(prompt[0], str) else tuple(prompt[0])
        super().__init__(**data)

    @field_validator("prompt")
    @classmethod
    def _not_empty(cls, prompt: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if not prompt:
            raise PolicyError("an empty Prompt is the base itself; give some text or token ids")
        return prompt

    def bind(self, lm: LanguageModel, where: str) -> Pass:
        if isinstance(self.prompt, tuple):
            bad = next((i for i in self.prompt if not 0 <= i < lm.vocab_size), None)
            if bad is not None:
                raise PolicyError(f"{where} holds token id {bad}, outside the vocabulary of {lm.name} (0 to {lm.vocab_size - 1})")
            return Pass(lm, self.prompt, literal=True)
        if lm.tokenizer is None:
            raise PolicyError(f"{where} is text, but {lm.name} was given without a tokenizer; give token ids or (model, tokenizer)")
        return Pass(lm, tuple(encode_words(lm, self.prompt)))


class Unconditional(StrictModel):
    """The base's own weights with no prompt: they read the prompt's last token and what is generated behind it.

    As released with Sanchez et al. 2023 (arXiv 2306.17806) and in transformers: a model needs some token to begin with, and with the
    prompt's last one the rows of one step end in the same token. Positions count from 0; nothing stands before, no beginning-of-text token
    either.
    """

    unconditional: Literal[True] = True

    def bind(self, lm: LanguageModel, where: str) -> Pass:
        return Pass(lm, unconditional=True)


def bind_expert(expert: Any, lm: LanguageModel, where: str) -> Pass:
    """The pass of an expert.

    Args:
        expert: a ``Prompt``, ``Unconditional()``, a model, (model, tokenizer), a pack (folder or ``pack:NAME``; of a LoRA
            adapter or a prefix), a LoRA adapter folder, a local folder, GGUF or ONNX file, or hub id.

    Raises:
        ModelError: it can't be loaded, is a pack of another model, has another vocabulary, or runs on another backend than the base.
        PolicyError: its type is none of these.
    """
    if isinstance(expert, (Prompt, Unconditional)):
        return expert.bind(lm, where)
    if is_expert_pack(expert):
        pack = read_expert_pack(expert)
        if pack.card.kind == "prefix":
            return prefix_pass(lm, pack, where)
        pack.check(lm)
        return _adapted(lm, pack.folder, str(expert), where)
    if isinstance(expert, (str, Path)) and is_adapter_folder(expert):
        return _adapted(lm, expert, str(expert), where)
    if isinstance(expert, (str, Path)):
        _check_same_backend(lm, str(expert), "numpy" if is_onnx_source(expert) else "torch", where)  # before it is loaded
    other = as_language_model(expert, where, lm)
    if weights_of(other) is weights_of(lm):
        return Pass(lm)
    _check_same_backend(lm, other.name, kind_of(other), where)
    check_same_vocabulary(lm, other, where)
    return Pass(other)


def _check_same_backend(lm: LanguageModel, name: str, kind: str, where: str) -> None:
    if kind != kind_of(lm):
        onnx, plain = (lm.name, name) if kind == "torch" else (name, lm.name)
        raise ModelError(
            f"{where} and its base run on different backends: {onnx} on ONNX Runtime, {plain} on PyTorch; use two of a kind "
            "(`moralguard export` writes a PyTorch model as ONNX)"
        )


def _adapted(lm: LanguageModel, folder: str | Path, source: str, where: str) -> Pass:
    if kind_of(lm) != "torch":
        raise ModelError(
            f"{where} is the LoRA adapter {source}, which needs a PyTorch model; {lm.name} runs on ONNX Runtime. Export the expert with "
            f"the adapter merged, `moralguard export MODEL OUT --adapter {source}`, and give OUT as the expert"
        )
    from moralguard.backends.lora import load_adapter

    return Pass(lm, adapter=load_adapter(folder, lm))


def is_expert_pack(expert: Any) -> bool:
    """Whether this names a pack. A whole model's folder isn't one, whatever else lies there."""
    if not is_pack(expert):
        return False
    return str(expert).startswith(PREFIX) or is_adapter_folder(expert) or not (Path(expert) / "config.json").is_file()


def read_expert_pack(source: str | Path) -> Pack:
    """A verified pack that can stand as an expert.

    Raises:
        ModelError: it is broken, or of another kind.
    """
    pack = read_pack(source)
    if pack.card.kind not in ("lora-expert", "prefix"):
        raise ModelError(f"{source} is a pack of kind {pack.card.kind!r}; expected one of kind 'lora-expert' or 'prefix'")
    return pack


def as_language_model(source: Any, where: str, base: LanguageModel) -> LanguageModel:
    """The model that is given, or loaded to where the base is."""
    if is_language_model(source):
        found: LanguageModel = source
        return found
    if isinstance(source, (str, Path)):
        from moralguard.models import load_model

        return load_model(str(source), device=getattr(base, "device", None))
    if (isinstance(source, tuple) and len(source) == 2) or (hasattr(source, "generate") and hasattr(source, "config")):
        from moralguard.backends.hf import LanguageModel

        return LanguageModel(*source) if isinstance(source, tuple) else LanguageModel(source)
    raise PolicyError(
        f"{where} is a {type(source).__name__}; expected Prompt(...), a model, (model, tokenizer), a pack, a LoRA adapter folder, a "
        "model folder, a GGUF file or a Hugging Face id"
    )


def check_same_vocabulary(lm: LanguageModel, expert: LanguageModel, where: str) -> None:
    """Logits can be combined only if token i means the same in both models."""
    if expert.vocab_size != lm.vocab_size:
        raise ModelError(
            f"{where} ({expert.name}) has {expert.vocab_size} vocabulary entries, but {lm.name} has {lm.vocab_size}; logits are "
            "combined token by token, so use an expert with the base model's tokenizer"
        )
    if lm.tokenizer is not None and expert.tokenizer is not None and lm.tokenizer.get_vocab() != expert.tokenizer.get_vocab():
        raise ModelError(
            f"{where} ({expert.name}) has as many vocabulary entries as {lm.name}, but other tokens; use an expert with the base "
            "model's tokenizer"
        )
