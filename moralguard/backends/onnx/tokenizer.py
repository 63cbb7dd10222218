"""A tokenizer read from tokenizer.json, with the part of transformers' interface that the guard uses; transformers isn't needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moralguard.backends.onnx.description import folders_of, read_json
from moralguard.errors import ModelError, PromptError

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class OnnxTokenizer:
    """``tokenizers.Tokenizer`` with special tokens and a chat template.

    Attributes:
        backend_tokenizer: the ``tokenizers.Tokenizer``.
        special_tokens_map: token texts by role ("bos_token", ...).
        chat_template: Jinja source, or None.
    """

    def __init__(self, backend: Any, special: dict[str, str], chat_template: str | None = None, extra_special: Sequence[str] = ()):
        self.backend_tokenizer = backend
        self.special_tokens_map = special
        self.chat_template = chat_template
        self._extra = tuple(extra_special)

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = True) -> dict[str, Any]:
        """{"input_ids": ids}: a list for a text, a list of lists for several."""
        if isinstance(text, str):
            return {"input_ids": self.encode(text, add_special_tokens)}
        return {"input_ids": [self.encode(item, add_special_tokens) for item in text]}

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        listed = [ids] if isinstance(ids, int) else [int(i) for i in ids]
        return str(self.backend_tokenizer.decode(listed, skip_special_tokens=skip_special_tokens))

    def get_vocab(self) -> dict[str, int]:
        return dict(self.backend_tokenizer.get_vocab(with_added_tokens=True))

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        return [self.backend_tokenizer.id_to_token(int(i)) for i in ids]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        if isinstance(tokens, str):
            found = self.backend_tokenizer.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def _id(self, role: str) -> int | None:
        token = self.special_tokens_map.get(role)
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    @property
    def bos_token_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._id("unk_token")

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens_map.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens_map.get("eos_token")

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self._extra]))

    @property
    def all_special_ids(self) -> list[int]:
        ids = (self.backend_tokenizer.token_to_id(token) for token in self.all_special_tokens)
        return list(dict.fromkeys(i for i in ids if i is not None))

    def apply_chat_template(
        self, messages: Sequence[dict[str, Any]], tokenize: bool = True, add_generation_prompt: bool = False, **variables: Any
    ) -> Any:
        """The chat as text, or as token ids where ``tokenize``; rendered in Jinja's sandbox.

        Raises:
            PromptError: there is no template, it refuses the messages, or jinja2 isn't installed.
        """
        if self.chat_template is None:
            raise PromptError("the tokenizer has no chat template; give plain text")
        try:
            from jinja2.exceptions import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise PromptError('a chat needs jinja2, which isn\'t installed; pip install "jinja2>=3.1"') from error

        def refuse(message: str) -> None:
            raise TemplateError(message)

        # as transformers sets it up, so that one template gives one text
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=refuse, strftime_now=_now)
        try:
            text = environment.from_string(self.chat_template).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self.special_tokens_map, **variables
            )
        except TemplateError as error:
            raise PromptError(f"the chat template refuses these messages: {error}") from error
        return self.encode(text, add_special_tokens=False) if tokenize else text


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **other: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **other)


def _now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


def load_tokenizer(path: Path) -> OnnxTokenizer | None:
    """The tokenizer beside the graph ``path``; None where there is no tokenizer.json.

    Raises:
        ModelError: it can't be read.
    """
    file = next((folder / "tokenizer.json" for folder in folders_of(path) if (folder / "tokenizer.json").is_file()), None)
    if file is None:
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ModelError(f'{file} needs the package tokenizers, which isn\'t installed; pip install "moralguard[onnx]"') from error
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises plain Exception
        raise ModelError(f"{file} can't be read as a tokenizer ({str(error)[:200]}); copy it again") from error
    backend.no_truncation()
    backend.no_padding()
    config = read_json(path, "tokenizer_config.json")
    stated = {**read_json(path, "special_tokens_map.json"), **config}
    special = {role: _text(stated[role]) for role in _SPECIAL if stated.get(role) is not None}
    extra = stated.get("additional_special_tokens") or stated.get("extra_special_tokens") or []
    listed = list(extra.values()) if isinstance(extra, dict) else list(extra)
    return OnnxTokenizer(backend, special, _template(file.parent, config), [_text(token) for token in listed])


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # named templates: the default one
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found
