"""The canonical order of controls: sums of floats depend on their order, so no law may depend on that of a policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moralguard.backends.arrays import is_tensor

if TYPE_CHECKING:
    from moralguard.controls.base import BoundControl, Control


def in_order(controls: Sequence[BoundControl]) -> tuple[BoundControl, ...]:
    """The controls by name, and those of one name by their settings.

    Only controls whose settings differ in nothing but models, or functions of one name, stay in the order they were given.
    """
    return tuple(controls) if len(controls) < 2 else tuple(sorted(controls, key=lambda control: control.place))


def place_of(control: Control) -> tuple[str, str]:
    """(versioned name, settings as text): what a control is sorted by."""
    return control.versioned_name(), json.dumps(plain(dict(control)), sort_keys=True)


def plain(value: Any) -> Any:
    """A setting as JSON holds it: arrays by their hash, objects that hold no data by their type and name."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if is_tensor(value):
        value = value.detach().float().cpu().numpy()
    if isinstance(value, np.ndarray):
        return [list(value.shape), hashlib.sha256(np.ascontiguousarray(value, np.float64).tobytes()).hexdigest()]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "model_dump"):
        return plain(dict(value))
    return [type(value).__qualname__, str(getattr(value, "__qualname__", ""))]
