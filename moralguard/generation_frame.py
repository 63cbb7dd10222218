"""What a running ``generate()`` knows and its logits processors aren't told: which call it is, and which ids are padding.

transformers hands processors the ids and the scores, but not the attention mask, and pad tokens alone don't tell padding from text
(the pad token is often the end-of-text or even the beginning-of-text token). The mask stands in the local variables of the
decoding method that calls the processor, and one list of processors is made for each call; both are read there, and nothing is
changed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np

from moralguard.decoding.history import Ids, host_ids, leading

_MODULE = "transformers.generation.utils"
_FRAMES = 60


@dataclass(frozen=True)
class RunningCall:
    """A ``generate`` that is running in this thread.

    Attributes:
        identity: an object that is one and the same during the call.
        padding: left padding of each row, i64[rows], or None where the call doesn't say.
    """

    identity: Any
    padding: Ids | None


def running_call(rows: int) -> RunningCall | None:
    """The outermost ``generate`` of this thread; None where none is running."""
    frame: FrameType | None = sys._getframe(1)
    padding, identity, decoding = None, None, False
    for _ in range(_FRAMES):
        if frame is None:
            break
        if frame.f_globals.get("__name__") == _MODULE:
            arguments = frame.f_locals
            if not decoding and isinstance(arguments.get("model_kwargs"), dict):
                decoding, padding = True, _padding(arguments["model_kwargs"].get("attention_mask"), rows)
            if frame.f_code.co_name == "generate":
                identity = arguments.get("prepared_logits_processor", identity)
        frame = frame.f_back
    return None if identity is None else RunningCall(identity, padding)


def _padding(mask: Any, rows: int) -> Ids | None:
    if mask is None:
        return np.zeros(rows, np.int64)  # transformers drops a mask of all ones
    if mask.ndim == 2 and mask.shape[0] == rows:
        return leading(host_ids(mask) == 0)
    return None
