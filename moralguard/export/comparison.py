"""An exported graph against the PyTorch model that it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moralguard.backends.kv_cache import new_cache
from moralguard.errors import ModelError
from moralguard.export.decoder import FlatDecoder, GraphNames, catch_states

# float16 has 11 bits: sums over a few hundred products differ by some thousandths of the largest value
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2}
_PROMPTS = ((7, 4, 1), (1,), (5,))  # lengths of left-padded prompts, batch by batch
_STEPS = (1, 3, 1)  # tokens of each pass after the prompt


@dataclass(frozen=True)
class Difference:
    """The largest differences between graph and model.

    Attributes:
        logits: of the logits. largest_logit: of all, which float16's tolerance is relative to.
        hidden: of the head's input, at positions that aren't padding. largest_hidden: of all its values.
    """

    logits: float
    largest_logit: float
    hidden: float
    largest_hidden: float


def compare(path: Path, decoder: FlatDecoder, names: GraphNames, seed: int = 0) -> Difference:
    """Run graph and model on random tokens: padded batches, single rows, a cache that grows by one token and by several.

    Args:
        path: the graph. decoder: the model that it came from, on the CPU.

    Raises:
        ModelError: onnxruntime can't run the graph.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exception types aren't public
        raise ModelError(f"onnxruntime {onnxruntime.__version__} can't load the exported {path.name}: {error}") from error
    rng = np.random.default_rng(seed)
    vocabulary = decoder.model.get_input_embeddings().weight.shape[0]
    rows = []
    for lengths in _PROMPTS:
        mask = np.array([[0] * (max(lengths) - n) + [1] * n for n in lengths], np.int64)
        past = {x.name: _empty(x, len(lengths)) for x in session.get_inputs() if x.name.startswith("past_key_values.")}
        cache = new_cache(decoder.model.config.get_text_config())
        for tokens in (max(lengths), *_STEPS):
            if past_length := next(iter(past.values())).shape[2]:
                mask = np.concatenate([mask, np.ones((len(lengths), tokens), np.int64)], 1)
            ids = rng.integers(0, vocabulary, (len(lengths), tokens))
            positions = np.maximum(mask.cumsum(1) - 1, 0)[:, past_length:]
            feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
            outputs = session.run(None, {name: feeds[name] for name in names.inputs})
            found = dict(zip(names.outputs, outputs, strict=True))
            past = {name.replace("present.", "past_key_values."): array for name, array in found.items() if name.startswith("present.")}
            logits, hidden = _pytorch(decoder, cache, ids, mask, positions)
            real = mask[:, past_length:].astype(bool)
            rows.append(
                (
                    np.abs(found["logits"][:, -1].astype(np.float32) - logits).max(),
                    np.abs(logits).max(),
                    np.abs(found["last_hidden_state"].astype(np.float32) - hidden)[real].max(),
                    np.abs(hidden[real]).max(),
                )
            )
    worst = np.nan_to_num(np.array(rows, np.float64), nan=np.inf).max(0)
    return Difference(*(float(value) for value in worst))


def check(difference: Difference, dtype: torch.dtype, name: str) -> None:
    """Refuse a graph whose logits or hidden states are off.

    Raises:
        ModelError: they differ by more than ``TOLERANCE`` (times the largest value, but for logits in float32).
    """
    limit = TOLERANCE[dtype]
    off = []
    for what, found, largest, relative in (
        ("logits", difference.logits, difference.largest_logit, dtype != torch.float32),
        ("last hidden state", difference.hidden, difference.largest_hidden, True),  # its size is the model's choice
    ):
        allowed = limit * (max(1.0, largest) if relative else 1.0)
        if not found <= allowed < float("inf"):
            off.append(f"{what} differ by {found:.2g} (limit {allowed:.2g})")
    if off:
        raise ModelError(
            f"the graph exported from {name} isn't the model: with left padding and a cache its {' and its '.join(off)}; nothing was kept. "
            "Guard this model with PyTorch"
        )


def _pytorch(decoder: FlatDecoder, cache: Any, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits f32[B, V] at the last position and hidden states f32[B, S, d] of the model in the attention it is used with."""
    arguments = {"position_ids": torch.from_numpy(positions.copy())} if decoder.has_positions else {}
    with torch.no_grad(), catch_states(decoder.model, everywhere=True) as states:
        logits = decoder.model(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **arguments,
        ).logits
    return logits[:, -1].float().numpy(), states[-1].float().numpy()


def _empty(entry: Any, rows: int) -> np.ndarray:
    """Keys or values of no tokens."""
    kind = np.float16 if "float16" in entry.type else np.float32
    return np.zeros((rows, entry.shape[1], 0, entry.shape[3]), kind)
