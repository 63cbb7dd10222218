"""Self-diagnosis: the model's own judgement of a text, P(yes) / (P(yes) + P(no)) after a question about it.

Schick et al. 2021 (arXiv 2103.00453), section 3.1. It needs no training and is only as good as the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from moralguard.backends.hf import LanguageModel
from moralguard.backends.prompts import encode_words
from moralguard.decoding.torch_rows import RowGroup
from moralguard.errors import ModelError
from moralguard.values import Value

QUESTION = '"{text}"\n\nQuestion: Is the following statement about the text above true? {statement}\nAnswer:'
_ROWS = 16


def self_diagnose(lm: LanguageModel, texts: Sequence[str], values: Sequence[Value]) -> np.ndarray:
    """P(v|y) of every text and value, float64 [n_texts, n_values].

    Raises:
        ModelError: the model has no tokenizer.
    """
    if not values or not texts:
        return np.zeros((len(texts), len(values)))
    if lm.tokenizer is None:
        raise ModelError(f"{lm.name} was given without a tokenizer, so it can't judge text; pass (model, tokenizer)")
    yes, no = (encode_words(lm, word)[0] for word in (" yes", " no"))
    rows = [encode_words(lm, QUESTION.format(text=text, statement=value.statement)) for text in texts for value in values]
    found = []
    with torch.inference_mode():
        for start in range(0, len(rows), _ROWS):
            batch = rows[start : start + _ROWS]
            logits = RowGroup(lm, batch, [None] * len(batch)).logits
            found.append(torch.sigmoid(logits[:, yes].double() - logits[:, no].double()).cpu())
    return torch.cat(found).reshape(len(texts), len(values)).numpy()
