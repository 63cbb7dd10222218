"""The guard as a transformers logits processor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

from moralguard.backends.hf import Captured, LanguageModel
from moralguard.controls.base import BoundControl
from moralguard.decoding.counters import Counters
from moralguard.decoding.gate import BoundGate
from moralguard.decoding.grad import plain_no_grad
from moralguard.errors import UnsupportedPathError
from moralguard.step_processor import StepProcessor


class GuardLogitsProcessor(StepProcessor, LogitsProcessor):
    """Guards any transformers ``generate()``; one object may serve many calls, one after the other.

    Requests are told by their token history. The processor runs where transformers runs processors of the user: after its own
    (bans, penalties, which the guard keeps) and before temperature, top-k and top-p. It returns normalised log-probabilities in
    rows where a control acted, and the scores as received elsewhere. The same guard listed twice acts once.
    """

    def __init__(
        self,
        lm: LanguageModel,
        controls: Sequence[BoundControl],
        gate: BoundGate | None,
        open_on_error: bool,
        counters: Counters,
        *,
        attention_mask: torch.Tensor | None = None,
        temperature: float = 1.0,
        captured: Captured | None = None,
    ):
        super().__init__(lm, controls, gate, open_on_error, counters, attention_mask=attention_mask, temperature=temperature)
        self._captured = captured

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Guarded scores f[R, V] for ids i64[R, T] and scores f[R, V].

        Raises:
            ControlError: a control failed and the policy fails closed.
            BypassError: tokens were emitted since the last call that the guard never saw, and the policy fails closed.
        """
        with plain_no_grad():
            guarded: torch.Tensor = self._guarded(input_ids, scores)
        return guarded

    def _base_logits(self, scores: torch.Tensor) -> torch.Tensor:
        # a copy, too, as tensors made in a caller's inference mode can't be used by autograd
        return scores.detach().to(self._lm.device, torch.float32, copy=True)

    @property
    def _given_hidden(self) -> bool:
        return self._captured is not None

    def _hidden(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if self._captured is None:
            return None, None
        if self._captured.hidden is None or self._captured.head_logits is None:
            raise UnsupportedPathError(
                "the model's head ran without its hook, so hidden states can't be read; enter guard.attach() before compiling the model"
            )
        return self._captured.hidden[:, -1].clone(), self._captured.head_logits[:, -1].clone()

    def _scores(self, logits: torch.Tensor, touched: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        guarded = torch.log_softmax(logits, -1).to(scores)
        return guarded if bool(touched.all()) else torch.where(touched.to(scores.device)[:, None], guarded, scores)
