"""Strict pydantic models: frozen, unknown keys are errors that name the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from moralguard.errors import PolicyError


def nearest(name: str, known: Iterable[str]) -> str:
    """A phrase that names the closest known word, for the end of an error message."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(options)}"


def describe(error: ValidationError) -> str:
    """Pydantic's findings in one line each: where, what, and what was given (numbers and short strings only)."""
    lines = []
    for finding in error.errors():
        place = ".".join(str(part) for part in finding["loc"])
        message = finding["msg"].removeprefix("Value error, ")
        given = finding["input"]
        shown = f" (got {given!r})" if isinstance(given, (int, float, bool)) or (isinstance(given, str) and len(given) < 40) else ""
        if finding["type"] == "value_error":
            shown = ""
        lines.append(f"{error.title}{'.' + place if place else ''}: {message}{shown}")
    return "\n".join(lines)


class StrictModel(BaseModel):
    """Base of everything that is read from a policy file."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False, validate_default=True)

    def __init__(self, **data: Any):
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise PolicyError(describe(error)) from None

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise PolicyError(f"{cls.__name__} has no setting {key!r}; {nearest(str(key), cls.model_fields)}")
        return data

    def replaced(self, **changes: Any) -> Self:
        """A validated copy with some fields changed."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})
