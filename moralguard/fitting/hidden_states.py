"""Hidden states of many texts in batches of a like length: what heads and subspaces are fitted on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from moralguard.backends.hf import LanguageModel
from moralguard.backends.prompts import encode_words
from moralguard.errors import DataError, ModelError

Progress = Callable[[int, int], None]
LAST = -1
"""The layer whose states the head reads, behind the final norm."""
POOLINGS = ("mean", "rest", "last")
"""Of a text's states: the mean of all; of all but the first token's, which many models make a sink of attention, many times as long as
all others and much the same for every text; the last token's alone. A text of one token has only that one."""


def encode_texts(lm: LanguageModel, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each text as a prompt has them, behind a beginning-of-text token where the tokenizer writes one.

    Args:
        max_tokens: longer texts are cut, and those that exceed the model's context.

    Raises:
        ModelError: there is no tokenizer. DataError: a text without a token.
    """
    if lm.tokenizer is None:
        raise ModelError(f"{lm.name} was given without a tokenizer; fitting on texts needs (model, tokenizer)")
    if max_tokens < 1:
        raise DataError(f"max_tokens is {max_tokens}; expected at least 1")
    most = min(max_tokens, lm.context_length or max_tokens)
    rows = [encode_words(lm, text) for text in texts]
    empty = next((i for i, row in enumerate(rows) if not row), None)
    if empty is not None:
        raise DataError(f"text {empty + 1} ({texts[empty][:40]!r}) has no token; drop it")
    start = _start(lm)
    return [[*start, *row][:most] for row in rows]


def _start(lm: LanguageModel) -> list[int]:
    """What the tokenizer writes before every prompt: the states of a Llama's first token differ from all others'."""
    bos = getattr(lm.tokenizer, "bos_token_id", None)
    ids = lm.tokenizer("a")["input_ids"]
    return [int(bos)] if bos is not None and len(ids) and ids[0] == bos and encode_words(lm, "a")[:1] != [bos] else []


def token_states(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    *,
    layers: Sequence[int] = (LAST,),
    batch_tokens: int = 2048,
    bfloat16: bool = False,
    progress: Progress = lambda done, total: None,
) -> Iterator[tuple[list[int], dict[int, Tensor], Tensor]]:
    """Batches of (indices of the rows, layer -> f32[B, T, d], mask bool[B, T]), right-padded, rows of a like length together.

    Args:
        layers: 0 .. L, the state behind so many layers (0: the embeddings), or -1: the state that the head reads; transformers
            gives that one as layer L too.
        batch_tokens: of a batch, padding counted; a longer row is a batch of its own.
        bfloat16: compute in bfloat16, where that is faster.

    Raises:
        ModelError: a layer that the model doesn't have.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    done = start = 0
    inner = [layer for layer in layers if layer != LAST]
    while start < len(order):
        size = 1
        while start + size < len(order) and (size + 1) * len(rows[order[start + size]]) <= batch_tokens:
            size += 1
        chosen = order[start : start + size]
        width = len(rows[chosen[-1]])
        ids = torch.tensor([[*rows[i], *[0] * (width - len(rows[i]))] for i in chosen], device=lm.device)
        mask = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in chosen], device=lm.device)
        precision = torch.autocast(lm.device.type, torch.bfloat16) if bfloat16 else nullcontext()
        # no_grad and not inference_mode: the states go into training
        with torch.no_grad(), precision, lm.capture(states=True) as captured:
            # the decoder alone: nobody reads the logits
            output = lm.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=bool(inner))
        states = {}
        for layer in layers:
            if layer == LAST:
                if captured.states is None:
                    raise ModelError(f"{lm.name} shows no hidden states")
                states[layer] = captured.states.float()
                continue
            if not 0 <= layer < len(output.hidden_states):
                raise ModelError(f"{lm.name} has layers 0 to {len(output.hidden_states) - 1} and {LAST}, not {layer}")
            states[layer] = output.hidden_states[layer].float()
        yield chosen, states, mask.bool()
        done += len(chosen)
        start += size
        progress(done, len(rows))


def pooled_states(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    *,
    layers: Sequence[int] = (LAST,),
    poolings: Sequence[str] = ("mean",),
    bfloat16: bool = False,
    progress: Progress = lambda done, total: None,
) -> dict[tuple[int, str], Tensor]:
    """One state a row for each layer and pooling: (layer, one of ``POOLINGS``) -> f32[n, d] on the CPU.

    Raises:
        DataError: no rows, layers or poolings, or an unknown pooling. ModelError: as ``token_states``.
    """
    if not (rows and layers and poolings):
        raise DataError(
            f"got {len(rows)} rows, {len(layers)} layers and {len(poolings)} poolings; pooling states needs one of each at least"
        )
    unknown = set(poolings) - set(POOLINGS)
    if unknown:
        raise DataError(f"pooling {', '.join(sorted(unknown))} is unknown; expected {', '.join(POOLINGS[:-1])} or {POOLINGS[-1]}")
    found: dict[tuple[int, str], Tensor] = {}
    for chosen, states, mask in token_states(lm, rows, layers=layers, bfloat16=bfloat16, progress=progress):
        rest = mask.clone()
        rest[:, 0] &= mask.sum(1) == 1
        for layer, values in states.items():
            for pooling in poolings:
                if pooling == "last":
                    pooled = values[torch.arange(len(values), device=values.device), mask.sum(1) - 1]
                else:
                    kept = mask if pooling == "mean" else rest
                    pooled = (values * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)
                if (layer, pooling) not in found:
                    found[layer, pooling] = torch.empty(len(rows), pooled.shape[-1])
                found[layer, pooling][chosen] = pooled.cpu()
    return found
