"""What a head's logits are worth on labelled rows."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
from torch import Tensor

from moralguard.errors import ModelError


def scikit_learn() -> ModuleType:
    """scikit-learn, which only fitting needs.

    Raises:
        ModelError: it isn't installed.
    """
    try:
        import sklearn.linear_model
        import sklearn.metrics
        import sklearn.model_selection
    except ImportError as error:
        raise ModelError("fitting heads needs scikit-learn: pip install 'moralguard[fit]'") from error
    module: ModuleType = sklearn
    return module


def measure(logits: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Of logits f[n, classes]: rows, accuracy, balanced accuracy, and AUROC of two classes where both stand in ``labels``.

    Balanced accuracy is the mean over the classes present of the share that was recognised: 1 / classes by chance, however many
    rows each class has.
    """
    metrics = scikit_learn().metrics
    known, scores = np.asarray(labels), logits.double().numpy()
    guessed = scores.argmax(1)
    recalls = [float((guessed[known == label] == label).mean()) for label in sorted(set(labels))]
    found = {"rows": len(known), "accuracy": float((guessed == known).mean()), "balanced_accuracy": float(np.mean(recalls))}
    if logits.shape[1] == 2 and len(recalls) == 2:
        found["auroc"] = float(metrics.roc_auc_score(known, scores[:, 1] - scores[:, 0]))
    return found
