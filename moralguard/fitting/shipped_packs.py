"""The packs that ship for the demo model, fitted again from the labelled files: the same code paths as `moralguard fit`'s commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moralguard.backends.hf import LanguageModel
from moralguard.discriminator.discriminator import Discriminator
from moralguard.errors import DataError
from moralguard.fitting.attribute_head import fit_attribute_head
from moralguard.fitting.expert_packs import fit_expert_packs
from moralguard.fitting.experts import ExpertSettings
from moralguard.fitting.labelled import LabelledTexts
from moralguard.fitting.prefix import PrefixSettings
from moralguard.fitting.prefix_head import PrefixHeadSettings, train_prefix_head
from moralguard.fitting.prefix_packs import fit_prefix_packs
from moralguard.fitting.subspace_fit import SubspaceFit, fit_subspace
from moralguard.fitting.toxicity_rows import CLASSES, JUDGED, VALUES, Scorer, ToxicityRows, expert_rows, head_rows
from moralguard.fitting.vectors import VectorFit, fit_vectors
from moralguard.packs import write_pack
from moralguard.schema import nearest

EXPERTS = ExpertSettings(steps=250, batch_size=24, max_tokens=40)
PREFIX_HEADS = PrefixHeadSettings(max_tokens=40, bfloat16=True)
PREFIXES = PrefixSettings(max_tokens=40)
SUBSPACE_LAYER = 18
VECTOR_LAYERS = (6, 9, 12, 15, 18, 21)
NAMES = ("experts", *(f"{name}-head" for name in VALUES), "toxicity-attribute", "civil-vector", "tone-subspace", "civil-prefixes")


def fit_shipped_packs(
    lm: LanguageModel, data: str | Path, out: str | Path, only: str | None = None, say: Callable[[str], None] = lambda line: None
) -> list[Path]:
    """Fit ``NAMES`` (or one of them) into folders of ``out``; an interrupted run of the experts goes on.

    Raises:
        DataError: a labelled file is missing, or ``only`` is none of the names.
    """
    if only is not None and only not in NAMES:
        raise DataError(f"there is no shipped pack {only!r} to fit; {nearest(only, NAMES)}")
    folder, place = Path(data), Path(out)
    score: Scorer = Discriminator.load().score
    written: list[Path] = []
    for name in NAMES if only is None else (only,):
        if name == "experts":
            written += _experts(lm, expert_rows(folder, score), place, say)
        elif name == "toxicity-attribute":
            written.append(_attribute(lm, head_rows(folder, score, "offence"), place / name))
        elif name == "civil-vector":
            written.append(_vector(lm, head_rows(folder, score, "offence"), place / name))
        elif name == "tone-subspace":
            written.append(_subspace(lm, head_rows(folder, score, "offence"), place / name))
        elif name == "civil-prefixes":
            written += _prefixes(lm, expert_rows(folder, score), place / name, say)
        else:
            written.append(_prefix(lm, folder, score, name.removesuffix("-head"), place / name))
        say(f"written: {name}")
    return written


def _experts(lm: LanguageModel, rows: ToxicityRows, place: Path, say: Callable[[str], None]) -> list[Path]:
    # nothing is held back: what the pair is worth is measured by what it does to continuations (benchmarks/detox.py)
    whole = LabelledTexts(tuple(replace(row, split="train") for row in rows.texts.rows), rows.texts.classes)

    def report(name: str, step: int, steps: int, loss: float) -> None:
        if step % 25 == 0:
            say(f"{name}: step {step} of {steps}, loss {loss:.3f}")

    return list(fit_expert_packs(lm, whole, place, EXPERTS, value=VALUES["offence"], sources=rows.data, report=report))


def _prefixes(lm: LanguageModel, rows: ToxicityRows, place: Path, say: Callable[[str], None]) -> list[Path]:
    def report(step: int, steps: int, loss: float) -> None:
        if step % 25 == 0:
            say(f"step {step} of {steps}, loss {loss:.3f}")

    return fit_prefix_packs(lm, rows.texts, place, PREFIXES, value=VALUES["offence"], sources=rows.data, report=report)


def _prefix(lm: LanguageModel, folder: Path, score: Scorer, name: str, place: Path) -> Path:
    rows = head_rows(folder, score, name)
    fitted = train_prefix_head(lm, rows.texts, PREFIX_HEADS)
    fitted.head.save(place)
    return _written(
        lm,
        place,
        rows,
        value=name,
        kind="prefix-head",
        method="factored future discriminator (FUDGE, arXiv 2104.05218)",
        settings=PREFIX_HEADS.model_dump(mode="json"),
        metrics=fitted.metrics,
        description=f"P(kept | prefix, next token) from the model's own last hidden state.{JUDGED.get(name, '')}",
    )


def _attribute(lm: LanguageModel, rows: ToxicityRows, place: Path) -> Path:
    fitted = fit_attribute_head(lm, rows.texts, max_tokens=40, bfloat16=True)
    fitted.save(place)
    return _written(
        lm,
        place,
        rows,
        kind="attribute-head",
        method="linear head on the mean last hidden state (PPLM, arXiv 1912.02164)",
        settings={"target": 1, "layer": fitted.layer, "pooling": fitted.pooling, "classes": list(fitted.classes), "max_tokens": 40},
        metrics=fitted.metrics,
        description="Tells texts that keep from texts that break the value; for PPLM.",
    )


def _vector(lm: LanguageModel, rows: ToxicityRows, place: Path) -> Path:
    fitted = fit_vectors(lm, rows.texts, kept=CLASSES[1], layers=VECTOR_LAYERS, pooling="mean", max_tokens=40)
    return _of_states(
        lm, place, rows, fitted, "steering-vectors", "Moves states from texts that break the value towards texts that keep it."
    )


def _subspace(lm: LanguageModel, rows: ToxicityRows, place: Path) -> Path:
    fitted = fit_subspace(lm, rows.texts, "leace", layer=SUBSPACE_LAYER, pooling="mean", max_tokens=40)
    told = "What tells texts that break the value from texts that keep it, for layer-projection."
    return _of_states(lm, place, rows, fitted, "subspace", told)


def _of_states(lm: LanguageModel, place: Path, rows: ToxicityRows, fitted: VectorFit | SubspaceFit, kind: str, description: str) -> Path:
    fitted.save(place)
    card: dict[str, Any] = {"method": fitted.method, "settings": fitted.settings, "metrics": fitted.metrics, "description": description}
    return _written(lm, place, rows, kind=kind, **card)


def _written(lm: LanguageModel, place: Path, rows: ToxicityRows, *, value: str = "offence", **card: Any) -> Path:
    return write_pack(place, lm=lm, name=place.name, data=rows.data, values=(VALUES[value],), **card)
