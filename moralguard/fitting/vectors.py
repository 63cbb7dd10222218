"""Steering vectors from labelled or paired texts: how states differ between texts that keep a value and texts that break it, by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from moralguard.backends.edits import layer_modules
from moralguard.backends.hf import LanguageModel
from moralguard.errors import DataError
from moralguard.fitting.directions import fit_directions
from moralguard.fitting.hidden_states import Progress, encode_texts, pooled_states
from moralguard.fitting.labelled import LabelledTexts

Method = Literal["mean", "pca"]

_POOLED = {"last": "last", "mean": "rest"}
_SOURCES = {
    "mean": "contrastive activation addition: mean difference of states (arXiv 2312.06681)",
    "pca": "representation engineering: first principal direction of paired differences (arXiv 2310.01405)",
}


@dataclass(frozen=True)
class VectorFit:
    """Steering vectors and what is known of them; ``settings`` and ``metrics`` are plain data, for a pack's card.

    Attributes:
        vectors: layer -> f64[d]; + moves towards the kept value.
        method: what was done, with its source.
    """

    vectors: dict[int, Tensor]
    method: str
    settings: dict[str, Any]
    metrics: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write ``vectors.safetensors`` into the folder, which is made where it isn't there."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({f"layer.{layer}": vector.float().contiguous() for layer, vector in self.vectors.items()}, folder / "vectors.safetensors")


def fit_vectors(
    lm: LanguageModel,
    texts: LabelledTexts,
    method: Method = "mean",
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    kept: str | None = None,
    layers: Sequence[int] | None = None,
    best: int | None = 1,
    pooling: str = "last",
    seed: int = 0,
    max_tokens: int = 64,
    progress: Progress = lambda done, total: None,
) -> VectorFit:
    """Fit a vector a layer on the training rows, and keep those that tell the held-back rows apart best.

    ``mean`` is mean(h of kept) - mean(h of broken). ``pca`` is the first principal direction, about zero, of the differences between
    counterparts, turned the way they point; ours: as long as their mean is along it, so that a strength of 1 means the same as for
    ``mean``. The probe of a layer is its vector itself: a held-back row counts as kept where it lies beyond the middle of the training
    classes' means along the vector.

    Args:
        texts: of two classes.
        pairs: (kept, broken) counterparts among the texts, for ``pca``; without them training rows of the two classes are paired by
            chance, as in representation engineering.
        kept: name of the class that keeps the value; None is class 1, as in ``read_pairs`` and where labels are 0 and 1.
        layers: candidates, 1 to L - 1 (all where None), the state behind so many layers. The last one's state is the head's alone:
            a nullspace projection edits it for less.
        best: how many layers are kept, by accuracy, then by separation; None keeps all.
        pooling: "last", the state of a text's last token, or "mean", of all its tokens but the first, whose state many models make a
            sink of attention, many times as long as all others and much the same for every text.

    Raises:
        DataError: settings that don't fit the model or the rows; no held-back rows of both classes; states that don't differ.
        ModelError: as ``layer_modules`` and ``encode_texts``.
    """
    chosen = _candidates(lm, layers)
    if method not in _SOURCES or pooling not in _POOLED:
        raise DataError(f"got method {method!r} and pooling {pooling!r}; expected mean or pca, and {' or '.join(_POOLED)}")
    if best is not None and not 1 <= best <= len(chosen):
        raise DataError(f"best is {best}; expected 1 to {len(chosen)}, the number of layers to choose from")
    if len(texts.classes) != 2 or (kept is not None and kept not in texts.classes):
        raise DataError(f"the rows are of the classes {', '.join(texts.classes)}; expected two, and the kept one ({kept!r}) among them")
    side = 1 if kept is None else texts.classes.index(kept)
    held = torch.tensor([row.split != "train" for row in texts.rows])
    is_kept = torch.tensor([row.label == side for row in texts.rows])
    if not (bool((held & is_kept).any()) and bool((held & ~is_kept).any())):
        raise DataError("the held-back rows aren't of both classes, so no layer can be chosen; give some rows the split dev or test")
    index = _pair_rows(texts, pairs, is_kept, held, seed) if method == "pca" else None
    rows = encode_texts(lm, [row.text for row in texts.rows], max_tokens)
    pooled = pooled_states(lm, rows, layers=chosen, poolings=(_POOLED[pooling],), progress=progress)
    states = {layer: x for (layer, _), x in pooled.items()}
    vectors, found = {}, {}
    for layer in chosen:
        x = states[layer].double()
        vectors[layer] = _vector(x, is_kept & ~held, ~is_kept & ~held, index, layer)
        found[layer] = _probe(x, is_kept, held, vectors[layer])
    ranked = sorted(chosen, key=lambda layer: (-found[layer]["accuracy"], -found[layer]["separation"], layer))
    own = sorted(ranked[:best])
    settings: dict[str, Any] = {
        "method": method,
        "kept": texts.classes[side],
        "layers": own,
        "candidates": list(chosen),
        "pooling": pooling,
    }
    settings |= {"seed": seed, "max_tokens": max_tokens, "paired": pairs is not None and method == "pca"}
    metrics: dict[str, Any] = {
        "rows": len(texts.rows),
        "held_back_rows": int(held.sum()),
        "layers": {str(layer): {name: round(value, 4) for name, value in numbers.items()} for layer, numbers in found.items()},
    }
    return VectorFit({layer: vectors[layer] for layer in own}, _SOURCES[method], settings, metrics)


def _candidates(lm: LanguageModel, layers: Sequence[int] | None) -> tuple[int, ...]:
    last = len(layer_modules(lm)) - 1
    chosen = tuple(range(1, last + 1)) if layers is None else tuple(dict.fromkeys(layers))
    wrong = next((layer for layer in chosen if not 1 <= layer <= last), None)
    if wrong is not None or not chosen:
        raise DataError(f"layers are {list(chosen)}; {lm.name} has layers 1 to {last} to fit at, without the last, which is the head's")
    return chosen


def _pair_rows(texts: LabelledTexts, pairs: Sequence[tuple[str, str]] | None, is_kept: Tensor, held: Tensor, seed: int) -> Tensor:
    """i64[n, 2], rows (kept, broken) of the training split."""
    if pairs is None:
        sides = [(of & ~held).nonzero()[:, 0] for of in (is_kept, ~is_kept)]
        generator = torch.Generator().manual_seed(seed)
        count = min(len(rows) for rows in sides)
        return torch.stack([rows[torch.randperm(len(rows), generator=generator)[:count]] for rows in sides], 1)
    place = {(row.text, bool(keeps)): i for i, (row, keeps) in enumerate(zip(texts.rows, is_kept, strict=True))}
    missing = next((text for pair in pairs for text, side in zip(pair, (True, False), strict=True) if (text, side) not in place), None)
    if missing is not None:
        raise DataError(f"the pairs hold the text {missing[:60]!r}, which isn't among the rows of its class; give the rows they come from")
    index = torch.tensor([[place[good, True], place[bad, False]] for good, bad in pairs], dtype=torch.int64).reshape(-1, 2)
    index = index[~held[index].any(1)]
    if not len(index):
        raise DataError("no pair is of the training split; give more pairs, or mark some with split 'train'")
    return index


def _vector(x: Tensor, kept: Tensor, broken: Tensor, pairs: Tensor | None, layer: int) -> Tensor:
    """f64[d] of states f64[n, d]."""
    if pairs is None:
        vector = x[kept].mean(0) - x[broken].mean(0)
    else:
        differences = x[pairs[:, 0]] - x[pairs[:, 1]]
        direction = fit_directions(differences, 1).direction
        assert direction is not None  # an orthogonal fit has one
        vector = (differences.mean(0) @ direction) * direction
    if not bool(vector.abs().max() > 0):
        raise DataError(f"the states of the two classes don't differ at layer {layer}; the texts must differ where their states are read")
    return vector


def _probe(x: Tensor, kept: Tensor, held: Tensor, vector: Tensor) -> dict[str, float]:
    """What a layer's vector tells of held-back rows: accuracy (mean of both classes'), separation in standard deviations, and lengths."""
    along = x @ (vector / vector.norm())
    middle = (along[kept & ~held].mean() + along[~kept & ~held].mean()) / 2
    own, other = along[kept & held], along[~kept & held]
    spread = torch.cat([own - own.mean(), other - other.mean()]).square().mean().sqrt()
    return {
        "accuracy": float(((own > middle).double().mean() + (other <= middle).double().mean()) / 2),
        "separation": float((own.mean() - other.mean()) / spread.clamp_min(1e-12)),
        "vector_length": float(vector.norm()),
        "state_length": float(x[~held].norm(dim=1).mean()),
    }
