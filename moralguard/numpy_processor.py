"""The guard as a logits processor of a loop over an ONNX model: optimum's ``generate``, onnxruntime-genai's Generator, one's own.

Torch is imported only by those who hand in torch tensors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moralguard.step_processor import StepProcessor
from moralguard_kernels import numpy_form


class NumpyLogitsProcessor(StepProcessor):
    """Called with all token ids so far and the scores of the next token, gives the guarded scores; for models of NumPy arrays.

    ``moralguard.processor.GuardLogitsProcessor`` for models without torch, and like it: requests are told by their token history, a
    row in which a control acts comes back as normalised log-probabilities, any other as it was. The passes that controls need are
    the guard's own, on its own caches.
    """

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Guarded scores f[R, V], in the kind of array and on the device they came in.

        Args:
            input_ids: i[R, T], all ids so far, padded on the left. scores: f[R, V].

        Raises:
            PromptError: there are no ids, or a row holds nothing but padding.
            ControlError: a control failed and the policy fails closed.
            BypassError: tokens were emitted since the last call that the guard never saw, and the policy fails closed.
        """
        input_ids, scores = (given if hasattr(given, "ndim") else np.asarray(given) for given in (input_ids, scores))
        return self._guarded(input_ids, scores)

    def _base_logits(self, scores: Any) -> np.ndarray:
        base: np.ndarray = self._arrays.copy_of(self._arrays.float_array(scores))
        return base

    def _scores(self, logits: np.ndarray, touched: np.ndarray, scores: Any) -> Any:
        guarded = numpy_form.log_softmax(logits)
        if not hasattr(scores, "detach"):
            return np.where(touched[:, None], guarded.astype(scores.dtype, copy=False), scores)
        import torch

        return torch.where(torch.from_numpy(touched).to(scores.device)[:, None], torch.from_numpy(guarded).to(scores), scores)
