"""Review methods by versioned name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from moralguard.errors import PolicyError
from moralguard.review.base import ReviewMethod
from moralguard.schema import nearest

_METHODS = {
    "best-of-n": "moralguard.review.best_of_n:BestOfN",
    "final-check": "moralguard.review.final_check:FinalCheck",
    "rollback": "moralguard.review.rollback:Rollback",
    "self-critique": "moralguard.review.self_critique:SelfCritique",
}


def method_names() -> list[str]:
    return sorted(_METHODS)


def method_class(versioned: str) -> type[ReviewMethod]:
    """The class of "name@version" (or "name", the newest).

    Raises:
        PolicyError: no such method, or not in this version.
    """
    name, _, version = versioned.partition("@")
    if name not in _METHODS:
        raise PolicyError(f"there is no review method {name!r}; {nearest(name, _METHODS)}")
    module, _, attribute = _METHODS[name].partition(":")
    found: type[ReviewMethod] = getattr(import_module(module), attribute)
    if version and version != str(found.version):
        raise PolicyError(f"review method {name!r} is installed in version {found.version}, but the policy asks for {versioned}")
    return found


def read_method(data: Any) -> ReviewMethod:
    """A method from policy data: {"method": "name@version", settings...}."""
    if isinstance(data, ReviewMethod):
        return data
    if not isinstance(data, dict) or not isinstance(data.get("method"), str):
        raise PolicyError(f"a review is a mapping with the key `method`, such as {{method: best-of-n@1, n: 4}}; got {data!r}")
    return method_class(data["method"])(**{key: value for key, value in data.items() if key != "method"})


def write_method(method: ReviewMethod) -> dict[str, Any]:
    """Policy data of a method: its name and the settings that differ from the defaults."""
    return {"method": method.versioned_name(), **method.model_dump(mode="json", exclude_defaults=True)}


def in_order(methods: Sequence[ReviewMethod]) -> tuple[ReviewMethod, ...]:
    """Methods in the order in which they run.

    Raises:
        PolicyError: one is there twice.
    """
    names = [method.method_name for method in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PolicyError(f"review names {', '.join(twice)} more than once; keep one of each (a method has settings for how often)")
    return tuple(sorted(methods, key=lambda method: method.stage))
