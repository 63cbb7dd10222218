"""Hugging Face sequence classifiers as the adapters see them: rows of texts in, logits out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from moralguard.discriminator.windows import evaluating
from moralguard.errors import ModelError

_ROWS = 32
_NO_LIMIT = 100_000  # a tokenizer that knows no limit says 1e30


def load_classifier(name_or_folder: str | Path, device: str | torch.device | None) -> tuple[Any, Any]:
    """Model (float32) and tokenizer of a Hugging Face id or folder; safetensors only, and no code that comes with the model.

    Raises:
        ModelError: it can't be read, or its classification head isn't in the weights.
    """
    from moralguard.backends.hf_files import quiet_transformers

    name = str(name_or_folder)
    try:
        with quiet_transformers():
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                name, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # huggingface_hub, safetensors and transformers each raise types of their own here
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise ModelError(
            f"{name!r} can't be loaded as a sequence classifier: {type(error).__name__}: {reason[:300]}. Expected a local folder or a "
            "Hugging Face id that this machine can reach, with safetensors weights, a tokenizer and no code of its own"
        ) from error
    if missing := sorted(loaded["missing_keys"]):
        # transformers fills these in at random and only warns
        raise ModelError(
            f"{name!r} lacks weights of a sequence classifier ({', '.join(missing[:3])}); expected a model that was trained as one"
        )
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer


class SequenceClassifier:
    """A sequence classifier with its tokenizer. The model's weights, device and mode are left as they are.

    Attributes:
        labels: names of its labels, by index.
        limit: tokens that it reads at most, or None.
        name: how messages name it.

    Raises:
        ModelError: the model isn't such a classifier, or there is no tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any):
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.config: Any = getattr(self.model, "config", None)
        if not isinstance(self.model, nn.Module) or not getattr(self.config, "id2label", None):
            raise ModelError(
                f"{type(model).__name__} isn't a transformers sequence classifier; expected what "
                "AutoModelForSequenceClassification.from_pretrained(...) returns (from_pretrained here takes an id or a folder)"
            )
        self.name = getattr(self.config, "_name_or_path", "") or type(self.model).__name__
        if not callable(tokenizer):
            raise ModelError(f"{self.name} was given with {type(tokenizer).__name__} for a tokenizer; pass the one it was trained with")
        self.tokenizer = tokenizer
        config: Any = self.config
        self.labels = [str(label) for _, label in sorted((int(i), label) for i, label in config.id2label.items())]
        self.limit = self._limit()
        text_config = config.get_text_config()
        pad = getattr(text_config, "pad_token_id", None)
        # the model's own id, not the tokenizer's: RoBERTa tells positions, and GPT-2 the last token, by it
        self._pad = pad if pad is not None and 0 <= pad < text_config.vocab_size else None
        # what parameter-efficient wrappers take says nothing of the model inside
        inner: Any = getattr(self.model, "get_base_model", lambda: self.model)()
        self._takes_sides = "token_type_ids" in inspect.signature(inner.forward).parameters

    def _limit(self) -> int | None:
        known = [getattr(self.tokenizer, "model_max_length", None), getattr(self.config.get_text_config(), "max_position_embeddings", None)]
        for name, module in self.model.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                # RoBERTa's positions start behind its padding's, so two of its 514 can't be used
                known.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
        return min((int(n) for n in known if isinstance(n, (int, float)) and 0 < n < _NO_LIMIT), default=None)

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[dict[str, list[int]]]:
        """Rows (``input_ids`` and, where the model tells sides apart, ``token_type_ids``) of texts, or of texts and their pairs."""
        if not texts:
            return []
        # a text that spells a special token must not become one: it could end the premise and bring a hypothesis of its own
        arguments = {"split_special_tokens": True, "truncation": False, "padding": False, "verbose": False}
        found = self.tokenizer(list(texts), None if pairs is None else list(pairs), **arguments)
        names = ["input_ids", *(["token_type_ids"] if self._takes_sides and "token_type_ids" in found else [])]
        return [{name: list(found[name][i]) for name in names} for i in range(len(texts))]

    def lengths(self, texts: Sequence[str], pair: str | None = None) -> list[int]:
        """Tokens of the rows that texts become, each with the same pair."""
        return [len(row["input_ids"]) for row in self.encode(texts, None if pair is None else [pair] * len(texts))]

    def logits(self, rows: Sequence[dict[str, list[int]]]) -> np.ndarray:
        """Logits of rows, float64 [n, labels]; a row's don't depend on the others'.

        Raises:
            ModelError: they have another shape.
        """
        found = np.zeros((len(rows), len(self.labels)))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        # decoder models without an id to pad with refuse more than one row
        size = _ROWS if self._pad is not None else 1
        with evaluating(self.model), torch.inference_mode():
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                found[batch] = self._forward([rows[i] for i in batch])
        return found

    def _forward(self, rows: list[dict[str, list[int]]]) -> np.ndarray:
        width = max(len(row["input_ids"]) for row in rows)
        device = next(self.model.parameters()).device

        def padded(name: str, fill: int) -> torch.Tensor:
            return torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows], device=device)

        inputs = {name: padded(name, (self._pad or 0) if name == "input_ids" else 0) for name in rows[0]}
        lengths = torch.tensor([len(row["input_ids"]) for row in rows], device=device)
        inputs["attention_mask"] = (torch.arange(width, device=device) < lengths[:, None]).long()
        logits = getattr(self.model(**inputs), "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.shape != (len(rows), len(self.labels)):
            shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ModelError(
                f"{self.name} ({type(self.model).__name__}) gave logits of shape {shape} for {len(rows)} rows; expected "
                f"{(len(rows), len(self.labels))}, one a label of its config. Load it with AutoModelForSequenceClassification"
            )
        return logits.double().cpu().numpy()
