"""The methods, one file each. Names are imported on first use, so that a policy loads only what it names."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "BoundControl": "base",
    "Control": "base",
    "DExperts": "dexperts",
    "FactoredHead": "fudge",
    "Fudge": "fudge",
    "NullspaceProjection": "nullspace",
    "PPLM": "pplm",
    "Prompt": "experts",
    "SelfDebias": "self_debias",
}

__all__ = sorted(_HOMES)

if TYPE_CHECKING:  # names are re-exported lazily below
    # ruff: noqa: F401
    from moralguard.controls.base import BoundControl, Control
    from moralguard.controls.dexperts import DExperts
    from moralguard.controls.experts import Prompt
    from moralguard.controls.fudge import FactoredHead, Fudge
    from moralguard.controls.nullspace import NullspaceProjection
    from moralguard.controls.pplm import PPLM
    from moralguard.controls.self_debias import SelfDebias


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
