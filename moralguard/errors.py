"""Every error that moralguard raises on purpose. Messages say what was wrong, where, what was expected and how to mend it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moralguard.decoding.records import GenerationResult


class GuardError(Exception):
    """Base class of moralguard's errors."""


class PolicyError(GuardError, ValueError):
    """A policy, a value or a control's settings can't be used as they are."""


class ModelError(GuardError, ValueError):
    """A model can't be loaded, or can't be guarded in the way asked for."""


class PromptError(GuardError, ValueError):
    """A prompt can't be used: empty, too long for the context, or of a wrong type."""


class DataError(GuardError, ValueError):
    """Labelled rows, texts or values handed over for scoring or fitting can't be used as they are."""


class UnsupportedPathError(GuardError):
    """A generation path that the guard can't cover; nothing was generated and nothing is left patched."""


class BypassError(GuardError):
    """Tokens were emitted that the guard never saw."""


class ControlError(GuardError):
    """A control raised while decoding and its policy fails closed.

    Attributes:
        control: name of the control that failed.
        result: what was generated up to then, the failed requests marked ``finish_reason == "guard_error"``; None under
            transformers' own ``generate``.
    """

    def __init__(self, message: str, control: str, result: GenerationResult | None = None):
        super().__init__(message)
        self.control = control
        self.result = result
