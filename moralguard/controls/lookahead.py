"""One token ahead: what a model's last hidden state would be behind each candidate, read on the request's own cache."""

from __future__ import annotations

import torch

from moralguard.backends.hf import LanguageModel
from moralguard.backends.kv_cache import cache_from
from moralguard.decoding.passes import PassView


def candidate_states(lm: LanguageModel, view: PassView, candidates: torch.Tensor) -> torch.Tensor:
    """f32[R, C, d], the last hidden state at candidate i64[R, C] read behind row r's tokens; the pass itself doesn't move.

    A row is one forward of C rows of one token, on the row's own keys and values without its padding: what it gives doesn't depend
    on its neighbours, and no more than one row's cache is held C times at once.

    Args:
        lm: the pass's weights, with a plain cache. view: the pass, on these weights and without an adapter.
    """
    pairs, lengths = view.key_values(), view.mask.sum(-1).tolist()
    states = []
    for row, length in enumerate(lengths):
        own = [tuple(part[row : row + 1, :, -length:].expand(candidates.shape[1], -1, -1, -1) for part in pair) for pair in pairs]
        output = lm.forward(
            cache=cache_from([(keys, values) for keys, values in own]),
            input_ids=candidates[row, :, None],
            position_ids=torch.full((candidates.shape[1], 1), length, device=candidates.device),
            hidden=True,
        )
        if output.hidden is None:
            raise RuntimeError(f"{lm.name} gave no hidden states")
        states.append(output.hidden.float())
    return torch.stack(states)
