"""The last message of a chat, read from the token ids of the whole prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

from moralguard.backends.prompts import Message, encode_words

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel

Role = Literal["system", "user", "assistant", "tool"]

_MARK = "moralguardturn"  # plain letters, which every tokenizer gives back
_CHATS: dict[Role, tuple[tuple[Role, ...], ...]] = {
    "system": (("system", "user"),),
    "user": (("user",), ("system", "user"), ("user", "assistant", "user")),
    "assistant": (("user", "assistant"),),
    "tool": (("user", "assistant", "tool"),),
}


@dataclass(frozen=True)
class LastTurn:
    """The end of a prompt.

    Attributes:
        role: of the last message; None where the prompt isn't a chat.
        text: of the last message; of the whole prompt where it isn't a chat. No special tokens.
    """

    role: Role | None
    text: str


@dataclass(frozen=True)
class _Opening:
    """What a template writes before a message, from the end of the message before it on, or from the start of the chat."""

    role: Role
    text: str
    first: bool


@dataclass(frozen=True)
class _Template:
    """What a template writes: before messages, behind the last one (the longest first), and before an answer that is asked for."""

    openings: tuple[_Opening, ...]
    closings: tuple[str, ...]
    generation: str


def last_turn(lm: LanguageModel, ids: Sequence[int]) -> LastTurn:
    """The last message of a prompt, whoever turned it into ids: the guard, transformers, a serving stack.

    Messages are told by what the tokenizer's chat template writes around them, so a text that spells out the template's own marks counts as
    what it spells. Ids without such marks are plain text.
    """
    tokenizer = lm.tokenizer
    found = _template_of(lm)
    text = str(tokenizer.decode(list(ids)))
    if found is not None:
        text = text.removesuffix(found.generation) if found.generation else text
        while True:
            places = [(place, len(opening.text), opening) for opening in found.openings if (place := _last(text, opening)) >= 0]
            if not places:
                break
            place, length, opening = max(places, key=lambda item: item[:2])
            content = text[place + length :]
            content = content.removesuffix(next((closing for closing in found.closings if content.endswith(closing)), ""))
            if content.strip():
                for special in tokenizer.all_special_tokens:
                    content = content.replace(str(special), "")
                return LastTurn(opening.role, content)
            text = text[:place]  # an answer that is yet to be written
    return LastTurn(None, str(tokenizer.decode(list(ids), skip_special_tokens=True)))


def tells_roles(lm: LanguageModel) -> tuple[Role, ...]:
    """The roles that ``last_turn`` can tell on this model; none without a tokenizer or a chat template."""
    found = None if lm.tokenizer is None else _template_of(lm)
    known = set() if found is None else {opening.role for opening in found.openings}
    return tuple(role for role in get_args(Role) if role in known)


def _last(text: str, opening: _Opening) -> int:
    if opening.first:
        return 0 if text.startswith(opening.text) else -1
    return text.rfind(opening.text)


def _template_of(lm: LanguageModel) -> _Template | None:
    template = getattr(lm.tokenizer, "chat_template", None)
    return _read(lm, template) if isinstance(template, str) else None


@lru_cache(maxsize=32)
def _read(lm: LanguageModel, template: str) -> _Template | None:
    openings: dict[tuple[str, bool], set[Role]] = {}
    closings: set[str] = set()
    for role, chats in _CHATS.items():
        for chat in chats:
            text = _rendered(lm, chat)
            if text is None:
                continue
            place = 0 if role == "system" else len(chat) - 1
            parts = text.split(_MARK)
            if len(parts) == len(chat) + 1 and parts[place].strip():
                openings.setdefault((parts[place], place == 0), set()).add(role)
                closings.add(parts[-1])
    # what a template writes before messages of several roles tells none of them
    told = tuple(_Opening(next(iter(roles)), text, first) for (text, first), roles in openings.items() if len(roles) == 1)
    plain, asked = _rendered(lm, ("user",)), _rendered(lm, ("user",), asked=True)
    if not told or plain is None or asked is None:
        return None
    longest_first = tuple(sorted(closings, key=lambda closing: (-len(closing), closing)))
    return _Template(told, longest_first, asked.removeprefix(plain) if asked.startswith(plain) else "")


def _rendered(lm: LanguageModel, roles: Sequence[Role], asked: bool = False) -> str | None:
    """A chat of these roles as the model's tokenizer gives it back from ids; None where the template refuses it."""
    tokenizer: Any = lm.tokenizer
    messages: list[Message] = [{"role": role, "content": _MARK} for role in roles]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked)
    except Exception:  # a template refuses roles and orders with an error type of its own
        return None
    return str(tokenizer.decode(encode_words(lm, text)))
