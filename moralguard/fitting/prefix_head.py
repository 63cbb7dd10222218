"""Fitting a factored prefix head: P(v | y_<=t, w) from a model's own hidden state, every prefix of a text an example.

Yang & Klein 2021 (arXiv 2104.05218), section 3: the label of the whole text is the label of each of its prefixes. The head is the
bilinear form u(h_t) . g(E_w), so that all next tokens cost one thin product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moralguard.backends.factored_head import FactoredHead
from moralguard.backends.hf import LanguageModel
from moralguard.backends.prompts import encode_words
from moralguard.errors import DataError, ModelError


def fit_prefix_head(
    lm: LanguageModel,
    texts: Sequence[str],
    kept: Sequence[bool],
    *,
    rank: int = 16,
    epochs: int = 20,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
    max_tokens: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FactoredHead:
    """A head for ``lm`` from labelled texts.

    Args:
        texts: whole texts. kept: whether each keeps the value.
        rank: k of the query and key matrices.

    Raises:
        DataError: texts and labels that don't fit, or one label only.
        ModelError: the model's head has no known form, or it has no tokenizer.
    """
    if len(texts) != len(kept) or len(set(map(bool, kept))) < 2:
        raise DataError(f"a prefix head needs as many labels as texts ({len(texts)} texts, {len(kept)} labels) and both labels")
    if lm.head is None:
        raise ModelError(f"{lm.name} has no head of a known form")
    hidden, following, labels, weights = _prefixes(lm, texts, kept, max_tokens, progress)
    embedding = lm.head.weight.float()
    width = hidden.shape[1]
    generator = torch.Generator().manual_seed(seed)
    centre, spread = hidden.mean(0), hidden.std(0).clamp_min(1e-3)
    spread_key = embedding.std().clamp_min(1e-6)
    query = (torch.randn(rank, width, generator=generator) / width**0.5).requires_grad_()
    key = (torch.randn(rank, width, generator=generator) / width**0.5).requires_grad_()
    linear = torch.zeros(width, requires_grad=True)
    state = torch.zeros(width, requires_grad=True)  # what the prefix says whatever comes next
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.AdamW([query, key, linear, state, bias], lr=learning_rate, weight_decay=weight_decay)
    normal = (hidden - centre) / spread
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=generator).split(128):
            tokens = embedding[following[rows]] / spread_key
            logits = ((normal[rows] @ query.T) * (tokens @ key.T)).sum(-1) + tokens @ linear + normal[rows] @ state + bias
            loss = F.binary_cross_entropy_with_logits(logits, labels[rows], weights[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return _folded(query, key, linear, state, bias, centre, spread, spread_key)


def _prefixes(
    lm: LanguageModel, texts: Sequence[str], kept: Sequence[bool], max_tokens: int, progress: Callable[[int, int], None]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states f32[n, d] before each token, the token ids i64[n], labels and weights f32[n]; every text weighs the same."""
    hidden, following, labels, weights = [], [], [], []
    share = sum(map(bool, kept)) / len(kept)
    with torch.inference_mode():
        for i, (text, label) in enumerate(zip(texts, kept, strict=True)):
            ids = encode_words(lm, text)[:max_tokens]
            if len(ids) >= 2:
                with lm.capture(states=True) as captured:
                    lm.model(input_ids=torch.tensor([ids], device=lm.device), use_cache=False)
                if captured.states is None:
                    raise ModelError(f"{lm.name} shows no hidden states")
                count = len(ids) - 1
                hidden.append(captured.states[0, :-1].float().cpu())
                following.append(torch.tensor(ids[1:]))
                labels.append(torch.full((count,), float(bool(label))))
                weights.append(torch.full((count,), 0.5 / (share if label else 1 - share) / count))
            progress(i + 1, len(texts))
    if not hidden:
        raise DataError("no text has two tokens or more")
    flat = torch.cat(weights)
    return torch.cat(hidden).clone(), torch.cat(following), torch.cat(labels), flat / flat.mean()


def _folded(
    query: Tensor, key: Tensor, linear: Tensor, state: Tensor, bias: Tensor, centre: Tensor, spread: Tensor, spread_key: Tensor
) -> FactoredHead:
    """The head on raw hidden states and raw unembeddings."""
    with torch.no_grad():
        raw_query, raw_key, raw_state = query / spread, key / spread_key, state / spread
        raw_linear = linear / spread_key - raw_key.T @ (raw_query @ centre)
        parts = (raw_query, raw_key, raw_linear, raw_state)
        whole = [part.detach().contiguous() for part in parts]
        return FactoredHead(whole[0], whole[1], whole[2], float(bias - raw_state @ centre), whole[3])
