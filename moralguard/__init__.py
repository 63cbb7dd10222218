"""moralguard: guard middleware for text generation.

Name the values a text must keep and the controls that enforce them while a language model decodes; no weight changes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Discriminator": "discriminator.discriminator",
    "Guard": "guard",
    "GuardError": "errors",
    "LanguageModel": "backends.hf",
    "Policy": "policy",
    "Prompt": "controls.experts",
    "Value": "values",
    "load_model": "models",
}

__all__ = sorted([*_HOMES, "__version__"])

if TYPE_CHECKING:  # names are re-exported lazily below
    # ruff: noqa: F401
    from moralguard.backends.hf import LanguageModel
    from moralguard.controls.experts import Prompt
    from moralguard.discriminator.discriminator import Discriminator
    from moralguard.errors import GuardError
    from moralguard.guard import Guard
    from moralguard.models import load_model
    from moralguard.policy import Policy
    from moralguard.values import Value


def __getattr__(name: str) -> Any:
    # Imported on first use: `import moralguard` pulls in neither torch nor transformers.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
