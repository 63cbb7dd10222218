"""What callers may hand over as texts and values, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from moralguard.errors import DataError, PolicyError
from moralguard.values import Value


@cache
def known_values() -> dict[str, dict[str, str]]:
    """The values that go by an id alone: id -> statement by language, "en" and for some "zh"."""
    return yaml.safe_load((files("moralguard.discriminator") / "known_values.yaml").read_text(encoding="utf-8"))


def as_texts(texts: Any) -> list[str]:
    """One text or a sequence of texts, as a list; characters that no encoder can read (lone surrogates) become U+FFFD.

    Raises:
        DataError: something isn't a string, naming its place.
    """
    if isinstance(texts, str):
        texts = [texts]
    if isinstance(texts, (bytes, bytearray)) or not hasattr(texts, "__iter__") or isinstance(texts, dict):
        raise DataError(f"texts must be a string or a list of strings, not {type(texts).__name__}{_hint(texts)}")
    found = list(texts)
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise DataError(f"texts[{i}] is {type(text).__name__}, expected a string{_hint(text)}")
    return [_readable(text) for text in found]


def _hint(given: Any) -> str:
    if isinstance(given, (bytes, bytearray)):
        return '; decode it first, e.g. text.decode("utf-8", errors="replace")'
    return "; leave missing texts out, or give an empty string" if given is None else ""


def _readable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    return text


def as_values(values: Any) -> list[Value]:
    """Values from statements, ids of known values, ``Value`` objects, a policy, or a sequence of those.

    Raises:
        DataError: something else, an empty statement, or none at all.
    """
    if isinstance(values, (str, Value)):
        values = [values]
    if isinstance(values, (bytes, bytearray, dict)) or not isinstance(values, Sequence):
        from moralguard.policy import Policy  # here, since plain statements need none of what a policy needs

        if isinstance(values, Policy):
            if not values.values:
                raise DataError(f"policy {values.name!r} names no values to score against; give value statements")
            return list(values.values)
        raise DataError(f"values must be statements, known ids or Value objects, not {type(values).__name__}")
    if not values:
        raise DataError('no values were given; name at least one, e.g. "The text does not insult anyone."')
    return [_value(value, i) for i, value in enumerate(values)]


def _value(value: Any, place: int) -> Value:
    if isinstance(value, Value):
        return value
    if not isinstance(value, str):
        raise DataError(f"values[{place}] is {type(value).__name__}, expected a statement, a known id or a Value")
    statement = _readable(value).strip()
    if statement in known_values():
        return Value(id=statement, statement=known_values()[statement]["en"])
    if not statement:
        raise DataError(f'values[{place}] is empty; state what a text must keep, e.g. "The text does not insult anyone."')
    try:
        return Value.from_statement(statement)
    except PolicyError as error:
        raise DataError(f"values[{place}] can't be used: {error}") from None


def as_context(context: Any) -> str:
    """A context as text, "" for none.

    Raises:
        DataError: it isn't a string.
    """
    if context is None:
        return ""
    if not isinstance(context, str):
        raise DataError(f'context is {type(context).__name__}, expected text such as "Japan" or "a job interview"')
    return _readable(context).strip()
