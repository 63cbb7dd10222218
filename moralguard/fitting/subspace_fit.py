"""From labelled texts to a subspace of a model's last hidden state, with the probes that say what it did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from moralguard.backends.edits import layer_modules
from moralguard.backends.hf import LanguageModel
from moralguard.errors import DataError, ModelError
from moralguard.fitting.directions import fit_class_means, fit_word_odds, law_metric
from moralguard.fitting.hidden_states import LAST, Progress, encode_texts, pooled_states
from moralguard.fitting.inlp import fit_inlp
from moralguard.fitting.labelled import LabelledTexts
from moralguard.fitting.leace import fit_leace
from moralguard.fitting.probe import probe
from moralguard.fitting.subspace import Subspace

Method = Literal["leace", "inlp", "directions"]
SHRINKAGE = 0.1
"""Of LEACE's covariance: what held-back classes and neutral text (perplexity) suffer least from, on a few hundred texts."""
WORD_RANK = 8
"""Log-odds that ``directions`` takes away where nothing else is asked for."""


@dataclass(frozen=True)
class SubspaceFit:
    """A subspace and what is known of it; ``settings`` and ``metrics`` are plain data, for a pack's card.

    Attributes:
        method: what was done, with its source.
    """

    subspace: Subspace
    method: str
    settings: dict[str, Any]
    metrics: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write ``basis.safetensors`` into the folder, which is made where it isn't there."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.subspace.tensors(), folder / "basis.safetensors")


def fit_subspace(
    lm: LanguageModel,
    texts: LabelledTexts,
    method: Method,
    *,
    counterparts: list[tuple[int, ...]] | None = None,
    rank: int | None = None,
    rounds: int | None = None,
    min_accuracy: float = 0.0,
    seed: int = 0,
    max_tokens: int = 64,
    mlp: bool = False,
    layer: int = LAST,
    pooling: Literal["last", "mean"] = "last",
    progress: Progress = lambda done, total: None,
) -> SubspaceFit:
    """Fit on the training rows' states at one layer, one a text; the probes are scored on all other rows.

    Args:
        counterparts: token ids of words, one of each class. With them ``directions`` takes away log-odds between words
            (``fit_word_odds``), without them the class means' differences.
        rank: ``leace`` and class means: the strongest directions alone; ``directions`` with counterparts: at most so many pairs of
            words, those first that the model finds likeliest behind the texts. ``inlp`` has ``rounds`` (8) instead.
        mlp: probe with a network too.
        layer: -1, behind the final norm (for ``NullspaceProjection``), or the state behind so many layers (``LayerProjection``).
        pooling: "last", the state of a text's last token, or "mean", of all its tokens but the first (a sink of attention): for a
            concept that the whole text tells, and for ``LayerProjection``, which acts at every position and so on their mean.

    Raises:
        DataError: settings that the method doesn't have, no rows outside the training split, or rows that can't be fitted.
        ModelError: the model has no tokenizer, or no head of a known form.
    """
    if method not in ("leace", "inlp", "directions"):
        raise DataError(f"there is no method {method!r}; expected leace, inlp or directions")
    if rank is not None and (method == "inlp" or rank < 1):
        raise DataError(f"rank {rank}: inlp takes --rounds and no rank" if method == "inlp" else f"rank is {rank}; expected at least 1")
    if rounds is not None and (method != "inlp" or rounds < 1):
        raise DataError(f"rounds is {rounds}; expected at least 1" if method == "inlp" else f"{method} has no rounds; leave them out")
    if counterparts and layer != LAST:
        raise DataError(
            f"words' log-odds are read from the head's states, not from layer {layer}; leave the layer out, or use leace or inlp"
        )
    last = len(layer_modules(lm)) - 1 if layer != LAST else LAST
    if layer != LAST and not 1 <= layer <= last:
        raise DataError(f"layer is {layer}; expected 1 to {last}, or {LAST} for the states that the head reads")
    if pooling not in ("last", "mean"):
        raise DataError(f"pooling is {pooling!r}; expected last or mean")
    held = torch.tensor([row.split != "train" for row in texts.rows])
    if not bool(held.any()):
        raise DataError("every row is of the training split, so nothing can be probed; give some rows the split dev or test")
    rows = encode_texts(lm, [row.text for row in texts.rows], max_tokens)
    pooled = "rest" if pooling == "mean" else "last"
    states = pooled_states(lm, rows, layers=(layer,), poolings=(pooled,), progress=progress)[layer, pooled]
    labels = torch.tensor([row.label for row in texts.rows])
    x, y = states[~held], labels[~held]
    settings: dict[str, Any] = {"method": method, "classes": list(texts.classes), "layer": layer, "pooling": pooling}
    settings |= {"seed": seed, "max_tokens": max_tokens}
    metrics: dict[str, Any] = {}
    if method == "leace":
        subspace = fit_leace(x, y, rank=rank, shrinkage=SHRINKAGE)
        settings["shrinkage"] = SHRINKAGE
        about = "least-squares concept erasure (arXiv 2306.03819)"
    elif method == "inlp":
        fitted = fit_inlp(x, y, rounds=rounds or 8, min_accuracy=min_accuracy, seed=seed)
        subspace, about = fitted.subspace, "iterative nullspace projection (arXiv 2004.07667)"
        settings |= {"rounds": rounds or 8, "min_accuracy": min_accuracy}
        metrics["accuracies"] = [round(value, 4) for value in fitted.accuracies]
    elif counterparts:
        if lm.head is None:
            raise ModelError(f"{lm.name} has no head of a known form, so words have no directions; use leace or inlp")
        metric, likely = law_metric(lm.head, x)
        pairs = _likeliest(counterparts, likely, WORD_RANK if rank is None else rank)
        rows_of = lm.head.weight.double().cpu()
        differences = torch.stack([rows_of[b] - rows_of[a] for a, b in pairs])
        subspace = fit_word_odds(differences, metric)
        about = "log-odds of counterpart words set to 0 where the law moves least"
        settings["words"] = [[lm.spell(a), lm.spell(b)] for a, b in pairs]
        metrics["mean_log_odds"] = _odds(differences, states[held], subspace)
    else:
        subspace, about = fit_class_means(x, y, rank), "span of the differences between class means"
    result = probe(states, labels, subspace.apply, held=held, mlp=mlp, seed=seed)
    metrics |= {"rank": subspace.rank, "rows": len(texts.rows), "held_back_rows": int(held.sum())}
    metrics["probe"] = {name: round(value, 4) for name, value in asdict(result).items() if value is not None}
    return SubspaceFit(subspace, about, settings | {"rank": subspace.rank}, metrics)


def _likeliest(counterparts: list[tuple[int, ...]], likely: Tensor, rank: int) -> list[tuple[int, int]]:
    """The pairs (first class's word, another's) of the likeliest tuples, ``rank`` at most."""
    ordered = sorted(dict.fromkeys(counterparts), key=lambda ids: -float(likely[list(ids)].sum()))
    return [(ids[0], other) for ids in ordered for other in ids[1:]][:rank]


def _odds(differences: Tensor, states: Tensor, subspace: Subspace) -> dict[str, float]:
    """Mean absolute log-odds (in the head's units) over the pairs and states, before and after."""
    sizes = [(differences @ s.double().T).abs().mean() for s in (states, subspace.apply(states))]
    return {"before": round(float(sizes[0]), 4), "after": round(float(sizes[1]), 4)}
