"""Attribute heads: classifiers of pooled hidden states, from labelled texts.

Dathathri et al. 2020 (arXiv 1912.02164), section 4.2, steer by a linear classifier of the mean of a model's last hidden states. Other
layers and poolings, and a hidden layer, make heads that judge texts but can't steer PPLM.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moralguard.backends.hf import LanguageModel
from moralguard.backends.tensor_files import load_tensors
from moralguard.errors import DataError, ModelError
from moralguard.fitting.head_metrics import measure, scikit_learn
from moralguard.fitting.hidden_states import LAST, Progress, encode_texts, pooled_states
from moralguard.fitting.labelled import LabelledText, LabelledTexts

_FILE = "head.safetensors"
_LEAST_DEV = 5  # rows of every class; fewer choose a layer by luck
_FOLDS = 5
_BATCH = 256

Parts = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, eq=False)
class FittedHead:
    """A head on raw hidden states, standardisation folded in: linear, or an MLP with one hidden layer (ReLU).

    Attributes:
        parts: (weight f32[out, in], bias f32[out]) of each layer; the last one's ``out`` are the classes.
        classes: their names.
        layer: whose states it reads (``hidden_states.LAST``: those that the model's own head reads).
        pooling: over a text's tokens, "mean" or "last".
        metrics: of train, dev and test rows (``head_metrics.measure``), and the "search" over layers and poolings.
    """

    parts: Parts
    classes: tuple[str, ...]
    layer: int
    pooling: str
    metrics: dict[str, Any]

    @property
    def linear(self) -> bool:
        return len(self.parts) == 1

    @property
    def drives_pplm(self) -> bool:
        """Whether PPLM can take it: its gradient is that of a linear head on the mean of the last states."""
        return self.linear and self.layer == LAST and self.pooling == "mean"

    @property
    def weight(self) -> Tensor:
        """f32[classes, d] of a linear head. Raises: ModelError: it has a hidden layer."""
        return self._only()[0]

    @property
    def bias(self) -> Tensor:
        """f32[classes] of a linear head. Raises: ModelError: it has a hidden layer."""
        return self._only()[1]

    def logits(self, states: Tensor) -> Tensor:
        """f32[n, classes] of pooled states f[n, d]."""
        found = states.to("cpu", torch.float32)
        for i, (weight, bias) in enumerate(self.parts):
            found = F.linear(found if i == 0 else found.relu(), weight, bias)
        return found

    def predict(self, states: Tensor) -> Tensor:
        """Probabilities f32[n, classes] of pooled states f[n, d].

        Raises:
            ModelError: states of another width.
        """
        width = self.parts[0][0].shape[1]
        if states.ndim != 2 or states.shape[1] != width:
            raise ModelError(f"got states of shape {tuple(states.shape)}; this head reads [n, {width}], of the model it was fitted on")
        return self.logits(states).softmax(-1)

    def save(self, path: str | Path) -> None:
        """Write head.safetensors (into a folder, or the file itself): weight and bias, of an MLP weight_1, bias_1, weight_2, bias_2."""
        file = Path(path) if Path(path).suffix == ".safetensors" else Path(path) / _FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for i, (weight, bias) in enumerate(self.parts, 1):
            end = "" if self.linear else f"_{i}"
            tensors |= {f"weight{end}": weight.contiguous(), f"bias{end}": bias.contiguous()}
        about = {"classes": self.classes, "layer": self.layer, "pooling": self.pooling, "metrics": self.metrics}
        save_file(tensors, file, metadata={"head": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> FittedHead:
        """What ``save`` wrote.

        Raises:
            ModelError: it isn't there, or isn't such a file.
        """
        file = Path(path) / _FILE if Path(path).is_dir() else Path(path)
        tensors = load_tensors(file)
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {}).get("head", "{}"))
        names = [("weight", "bias")] if "weight" in tensors else [("weight_1", "bias_1"), ("weight_2", "bias_2")]
        try:
            parts = tuple((tensors[weight], tensors[bias]) for weight, bias in names)
            return cls(parts, tuple(about["classes"]), about["layer"], about["pooling"], about["metrics"])
        except KeyError as error:
            raise ModelError(f"{file} lacks {error}; expected a file that FittedHead.save wrote") from error

    def _only(self) -> tuple[Tensor, Tensor]:
        if not self.linear:
            raise ModelError(
                f"this head has a hidden layer of {len(self.parts[0][1])}; only a linear one has a weight: fit with hidden=None"
            )
        return self.parts[0]


def fit_attribute_head(
    lm: LanguageModel,
    texts: LabelledTexts,
    *,
    layers: Sequence[int] = (LAST,),
    poolings: Sequence[str] = ("mean",),
    hidden: int | None = None,
    max_tokens: int = 64,
    l2: float = 1e-2,
    epochs: int = 40,
    learning_rate: float = 1e-3,
    seed: int = 0,
    bfloat16: bool = False,
    progress: Progress = lambda done, total: None,
) -> FittedHead:
    """A head that tells the classes apart, on the layer and pooling that do so best on held-back rows.

    Every class weighs the same. Of several layers and poolings the best by AUROC (two classes) or balanced accuracy on the dev rows
    is taken, the first of equals; where a class has fewer than five dev rows, by stratified cross-validation on the training rows.
    Same data, settings and seed, same head.

    Args:
        layers, poolings: as ``hidden_states.pooled_states``; every pair is tried.
        hidden: width of a hidden layer; None for a linear head (logistic regression).
        l2: weight of the squared weights on standardised states, against the mean loss; of an MLP AdamW's weight decay.
        epochs, learning_rate: of an MLP.
        bfloat16: compute the states in bfloat16.

    Raises:
        DataError: a setting out of range, or too few rows of a class to choose between layers.
        ModelError: a layer that isn't there, no tokenizer, or scikit-learn isn't installed.
    """
    scikit_learn()
    if l2 <= 0 or epochs < 1 or learning_rate <= 0 or (hidden is not None and hidden < 1):
        raise DataError(
            f"got l2 {l2}, epochs {epochs}, learning_rate {learning_rate}, hidden {hidden}; expected numbers above 0 (hidden may be None)"
        )
    rows = encode_texts(lm, [row.text for row in texts.rows], max_tokens)
    pooled = pooled_states(lm, rows, layers=layers, poolings=poolings, bfloat16=bfloat16, progress=progress)
    trainer = _Trainer(len(texts.classes), hidden, l2, epochs, learning_rate, seed)
    tried = {pair: _held_back(trainer, states, texts) for pair, states in pooled.items()} if len(pooled) > 1 else {}
    best = max(tried, key=lambda pair: float(tried[pair].get("auroc", tried[pair]["balanced_accuracy"]))) if tried else next(iter(pooled))
    layer, pooling = best
    chosen = pooled[best]
    head = FittedHead(trainer.fit(chosen[_at(texts, "train")], _labels(texts.of("train"))), texts.classes, layer, pooling, {})
    for split in ("train", "dev", "test"):
        if texts.of(split):
            head.metrics[split] = measure(head.logits(chosen[_at(texts, split)]), _labels(texts.of(split)))
    head.metrics["search"] = [{"layer": layer, "pooling": pooling, **found} for (layer, pooling), found in tried.items()]
    return head


@dataclass(frozen=True)
class _Trainer:
    """How a head is fitted to states."""

    classes: int
    hidden: int | None
    l2: float
    epochs: int
    learning_rate: float
    seed: int

    def fit(self, states: Tensor, labels: Sequence[int]) -> Parts:
        """The head's layers, on raw states f32[n, d]."""
        centre, spread = states.double().mean(0), states.double().std(0, correction=0)
        spread = torch.where(spread > 1e-6 * spread.max(), spread, 1.0)  # a dimension that never moves tells nothing
        normal = ((states.double() - centre) / spread).float()
        parts = self._linear(normal, labels) if self.hidden is None else self._mlp(normal, labels, self.hidden)
        # w . (h - c) / s + b = (w / s) . h + (b - (w / s) . c)
        (weight, bias), *rest = parts
        raw = weight.double() / spread
        first = (raw.float(), (bias.double() - raw @ centre).float())
        return (first, *rest)

    def _linear(self, normal: Tensor, labels: Sequence[int]) -> Parts:
        model = scikit_learn().linear_model.LogisticRegression(C=1 / (self.l2 * len(labels)), class_weight="balanced", max_iter=1000)
        model.fit(normal.double().numpy(), np.asarray(labels))
        weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
        if len(weight) == 1:  # of two classes: the log-odds of class 1
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        return ((weight, bias),)

    def _mlp(self, normal: Tensor, labels: Sequence[int], hidden: int) -> Parts:
        generator = torch.Generator().manual_seed(self.seed)
        known = torch.tensor(labels)
        counts = torch.bincount(known, minlength=self.classes).clamp_min(1)
        balance = len(known) / (self.classes * counts)
        width = normal.shape[1]
        shapes = ((hidden, width), (self.classes, hidden))
        weights = [(torch.randn(shape, generator=generator) * (2 / shape[1]) ** 0.5).requires_grad_() for shape in shapes]
        biases = [torch.zeros(shape[0], requires_grad=True) for shape in shapes]
        decayed = {"params": weights, "weight_decay": self.l2}
        optimizer = torch.optim.AdamW([decayed, {"params": biases, "weight_decay": 0.0}], lr=self.learning_rate)
        with torch.enable_grad():
            for _ in range(self.epochs):
                for rows in torch.randperm(len(known), generator=generator).split(_BATCH):
                    inner = F.linear(normal[rows], weights[0], biases[0]).relu()
                    loss = F.cross_entropy(F.linear(inner, weights[1], biases[1]), known[rows], balance)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        return tuple((weight.detach(), bias.detach()) for weight, bias in zip(weights, biases, strict=True))


def _held_back(trainer: _Trainer, states: Tensor, texts: LabelledTexts) -> dict[str, Any]:
    """Metrics of one layer and pooling on rows that the head wasn't fitted on, and how they were held back ("by")."""
    train, dev = texts.of("train"), texts.of("dev")
    known, inner = _labels(train), states[_at(texts, "train")]
    if min(_counts(dev, texts)) >= _LEAST_DEV:
        scored = _logits(trainer.fit(inner, known), states[_at(texts, "dev")])
        return {"by": "dev", **measure(scored, _labels(dev))}
    folds = min(_FOLDS, *_counts(train, texts))
    if folds < 2:
        lacking = texts.classes[int(np.argmin(_counts(train, texts)))]
        raise DataError(
            f"class {lacking} has one training row, and some class fewer than {_LEAST_DEV} dev rows, so nothing tells which layer is best: "
            "give more rows, or one layer and one pooling"
        )
    splitter = scikit_learn().model_selection.StratifiedKFold(folds, shuffle=True, random_state=trainer.seed)
    scored = torch.empty(len(known), trainer.classes)
    for fitted, held in splitter.split(np.zeros(len(known)), known):
        scored[held] = _logits(trainer.fit(inner[fitted], [known[i] for i in fitted]), inner[held])
    return {"by": f"{folds}-fold cross-validation", **measure(scored, known)}


def _logits(parts: Parts, states: Tensor) -> Tensor:
    return FittedHead(parts, (), LAST, "mean", {}).logits(states)


def _labels(rows: Sequence[LabelledText]) -> list[int]:
    return [row.label for row in rows]


def _counts(rows: Sequence[LabelledText], texts: LabelledTexts) -> list[int]:
    labels = _labels(rows)
    return [labels.count(i) for i in range(len(texts.classes))]


def _at(texts: LabelledTexts, split: str) -> list[int]:
    return [i for i, row in enumerate(texts.rows) if row.split == split]
