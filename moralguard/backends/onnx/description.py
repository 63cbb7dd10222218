"""What the files beside a graph say of its model: limits, special tokens, sizes, and which PyTorch model it was exported from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moralguard.backends.onnx.weights import initializers, read_graph, read_tensor
from moralguard.errors import ModelError

EXPORT_RECORD = "moralguard.json"
"""Written by ``moralguard export``: "fingerprint" and "tokenizer_hash" of the model that was exported."""

_SAMPLES = 64


@dataclass(frozen=True)
class Description:
    """A model's settings, from config.json, generation_config.json, genai_config.json and moralguard.json; None where none says.

    Attributes:
        name: how messages name the model.
        context_length: positions at most. vocab_size: V. width: d.
        heads, size: of the KV cache.
        eos_token_ids, pad_token_id: as generation uses them.
        fingerprint: of the PyTorch model that it was exported from.
    """

    name: str
    context_length: int | None = None
    vocab_size: int | None = None
    width: int | None = None
    heads: int | None = None
    size: int | None = None
    eos_token_ids: frozenset[int] = frozenset()
    pad_token_id: int | None = None
    fingerprint: str | None = None

    def hash_weights(self, path: Path) -> str:
        """16 hex digits of a graph's weights: their names, sizes and samples of their numbers."""
        digest = hashlib.sha256()
        for tensor in initializers(read_graph(path).graph):
            digest.update(f"{tensor.name}{tuple(tensor.dims)}{tensor.data_type}".encode())
            flat = read_tensor(tensor, path.parent).reshape(-1)
            digest.update(np.ascontiguousarray(flat[:: max(1, flat.size // _SAMPLES)][:_SAMPLES]).tobytes())
        return digest.hexdigest()[:16]


def folders_of(path: Path) -> list[Path]:
    """Where the files that belong to a graph may lie: its folder, and the one around it where that is called ``onnx``."""
    folder = path.resolve().parent
    return [folder, folder.parent] if folder.name == "onnx" else [folder]


def read_json(path: Path, name: str) -> dict[str, Any]:
    """The object in a file beside a graph; empty where there is none.

    Raises:
        ModelError: the file isn't JSON or no object.
    """
    for folder in folders_of(path):
        found = folder / name
        if found.is_file():
            try:
                content = json.loads(found.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ModelError(f"{found} can't be read as JSON ({error}); copy or export it again") from error
            if not isinstance(content, dict):
                raise ModelError(f"{found} holds a {type(content).__name__}; expected an object of settings")
            return content
    return {}


def describe(path: Path, name: str) -> Description:
    """Read what stands beside the graph ``path``.

    Raises:
        ModelError: one of the files isn't JSON.
    """
    config = read_json(path, "config.json")
    config = config.get("text_config") or config
    generation = read_json(path, "generation_config.json")
    genai = read_json(path, "genai_config.json").get("model", {})
    decoder = genai.get("decoder", {})

    def number(*found: Any) -> int | None:
        return next((int(i) for i in found if isinstance(i, (int, float)) and not isinstance(i, bool)), None)

    heads = number(config.get("num_attention_heads"), config.get("n_head"), decoder.get("num_attention_heads"))
    width = number(config.get("hidden_size"), config.get("n_embd"), config.get("d_model"), decoder.get("hidden_size"))
    eos: Any = next(
        (i for i in (generation.get("eos_token_id"), config.get("eos_token_id"), genai.get("eos_token_id")) if i is not None), []
    )
    return Description(
        name=name,
        context_length=number(config.get("max_position_embeddings"), config.get("n_positions"), genai.get("context_length")),
        vocab_size=number(config.get("vocab_size"), genai.get("vocab_size")),
        width=width,
        heads=number(config.get("num_key_value_heads"), decoder.get("num_key_value_heads"), heads),
        size=number(config.get("head_dim"), decoder.get("head_size"), width // heads if width and heads else None),
        eos_token_ids=frozenset(int(i) for i in (eos if isinstance(eos, list) else [eos])),
        pad_token_id=number(generation.get("pad_token_id"), config.get("pad_token_id"), genai.get("pad_token_id")),
        fingerprint=read_json(path, EXPORT_RECORD).get("fingerprint"),
    )
