"""What every edit of hidden states is to the rectification: a pass of the base under the edits, whose logits replace the base's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moralguard.controls.base import BoundControl, Control
from moralguard.decoding.passes import Pass
from moralguard.decoding.step import Step
from moralguard.decoding.terms import Mix, Terms
from moralguard.errors import ModelError, PolicyError

if TYPE_CHECKING:
    from moralguard.backends.edit_rules import Edit
    from moralguard.backends.hf import LanguageModel

ONNX_ADVICE = "edits of hidden states need the modules of a PyTorch model: use one, or a nullspace projection, which edits the head's input"


class BoundEdits(BoundControl[Control]):
    """The edited rows ride the base's own forward, and the trace sees an ordinary term; other controls' deltas add to it."""

    def __init__(self, settings: Control, lm: LanguageModel, edits: Mapping[str, Edit]):
        from moralguard.backends.edits import bind_edits

        try:
            bound = bind_edits(lm, edits)
        except ModelError as error:
            raise PolicyError(f"{settings.control_name} doesn't fit {lm.name}: {error}") from error
        super().__init__(settings, lm, (Pass(lm, edits=bound),))

    def terms(self, step: Step) -> Terms:
        sources: tuple[Any, ...] = (step.of(self.passes[0]).logits,)
        return Terms((Mix(sources, (step.weight(1.0),), step.weight(-1.0)),))
