"""vLLM's own hidden states for the guard: its logits layer, replaced by one that keeps what it was given.

``register`` stands in the entry-point group ``vllm.general_plugins``, which vLLM loads in every process. It does nothing unless
``MORALGUARD_VLLM_HEAD=1``: one package only may replace a layer of vLLM. Without it controls that read hidden states have a pass of the
guard's own for them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

SWITCH = "MORALGUARD_VLLM_HEAD"


@dataclass
class HeadStates:
    """What went through the head in the newest step, a row for each row of logits.

    Attributes:
        hidden: f[n, d], after the final norm; logits f[n, V], before scale and soft cap. None before the first step, and once taken.
    """

    hidden: Any = None
    logits: Any = None

    def take(self, rows: int) -> tuple[Any, Any] | None:
        """The states of this step, once; None where there are none of that many rows (a head that runs for something else)."""
        found = (self.hidden, self.logits)
        self.hidden = self.logits = None
        return None if found[0] is None or found[0].shape[0] != rows else found


newest = HeadStates()
"""Of this process: vLLM computes logits and samples one after the other, in one thread."""


def is_registered() -> bool:
    """Whether this process keeps the head's states."""
    return os.environ.get(SWITCH) == "1"


def register() -> None:
    """Replace vLLM's logits layer, where ``MORALGUARD_VLLM_HEAD=1``."""
    if not is_registered():
        return
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    class MoralguardHead(LogitsProcessor):
        def _apply_head(self, lm_head: Any, hidden_states: Any, embedding_bias: Any = None) -> Any:
            logits = super()._apply_head(lm_head, hidden_states, embedding_bias)
            newest.hidden, newest.logits = hidden_states, logits
            return logits

    LogitsProcessor.register_oot(MoralguardHead)
