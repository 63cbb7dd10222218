"""Binding a policy's controls and gate to a model, with what each needs held against what the model offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moralguard.backends.arrays import kind_of
from moralguard.controls.base import BoundControl, Control
from moralguard.decoding.gate import BoundGate, Gate
from moralguard.decoding.when import When
from moralguard.errors import PolicyError

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel
    from moralguard.policy import Policy


def bind_control(control: Control, lm: LanguageModel, policy: Policy) -> BoundControl[Any]:
    """Bind one control, after comparing what it needs with what the model offers.

    Raises:
        PolicyError: a capability is missing, or the settings don't fit.
    """
    if control.when is not None and (missing := lm.missing(control.when.needs)):
        raise PolicyError(
            f"`when` of control {control.versioned_name()} of policy {policy.name!r} needs {', '.join(missing)}, which {lm.name} doesn't "
            "offer; use one without risk"
        )
    missing = lm.missing(control.needs)
    if missing:
        raise PolicyError(
            f"control {control.versioned_name()} of policy {policy.name!r} needs {', '.join(missing)}, which {lm.name} "
            f"({type(getattr(lm, 'model', lm)).__name__}) doesn't offer; {control.instead(missing)}"
        )
    if kind_of(lm) != "torch" and not control.any_arrays:
        raise PolicyError(
            f"control {control.versioned_name()} of policy {policy.name!r} computes with torch tensors, {lm.name} with NumPy arrays; use "
            f"a PyTorch model, or write its terms with step.arrays and set {type(control).__name__}.any_arrays = True"
        )
    return control.bind(lm, policy.values)


def bind_gate(gate: Gate, lm: LanguageModel, policy: Policy) -> BoundGate:
    """Bind a gate, after comparing what it needs with what the model offers.

    Raises:
        PolicyError: a capability is missing. ModelError: a pack of another model.
    """
    if isinstance(gate, When):
        raise PolicyError(
            f"policy {policy.name!r} has a When as its gate; language and role are conditions of a control: give them as its `when`"
        )
    missing = lm.missing(gate.needs)
    if missing:
        raise PolicyError(
            f"the gate of policy {policy.name!r} needs {', '.join(missing)}, which {lm.name} doesn't offer; use one without risk"
        )
    return gate.bind(lm)
