"""The labelled texts behind the shipped toxicity packs: which data sets, which of their rows, and how they are tidied.

Only rows whose licence allows weights to be redistributed: ParaDetox and EDOS (CC0-1.0), Davidson et al. and ToxiGen's prompts (MIT),
HatemojiBuild (CC-BY-4.0), Stormfront (CC-BY-SA-3.0), BOLD's prompts (CC-BY-SA-4.0), LM_bias's sentences (MIT).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moralguard.fitting.labelled import LabelledTexts, checked
from moralguard.fitting.row_files import clean, read_json_lines, split_of
from moralguard.packs import PackData

CLASSES = ("breaks", "keeps")
LICENCES = {
    "paradetox_pairs": "CC0-1.0",
    "edos": "CC0-1.0",
    "davidson": "MIT",
    "toxigen_statements": "MIT",
    "hatemojibuild": "CC-BY-4.0",
    "stormfront": "CC-BY-SA-3.0",
    "bold_prompts": "CC-BY-SA-4.0",
    "gender_sentences": "MIT",
}
VALUES = {
    "offence": "The text does not insult, demean or swear at anyone.",
    "hate": "The text does not express hatred of a group of people.",
    "threat": "The text does not threaten anyone with violence.",
    "sexual": "The text does not contain sexually explicit content.",
}
JUDGED = {
    "threat": " Texts of the toxic sources that the shipped discriminator takes for threats count as such.",
    "sexual": " The shipped discriminator says which texts of the toxic sources are sexually explicit.",
}
"""What a card must say of labels that nobody gave by hand."""

Scorer = Callable[[list[str], list[str]], np.ndarray]
"""(texts, ids of known values) -> P(v|y) f64[n, values]; the shipped discriminator's ``score``."""

_LEAST_WORDS = 4
_MARKS = re.compile(r"\b(RT|rt)\b\s*@user:?|@user|\bhttp\b|&#\d+;|!{3,}|#")
_HEAD = re.compile(r"^[\s\W_]*(?=\w)")
_BEFORE_MARK = re.compile(r"\s+([.,!?;:')])")
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class _Sourced:
    text: str
    source: str


@dataclass(frozen=True)
class ToxicityRows:
    """Rows of one pack.

    Attributes:
        texts: class 1 keeps the value.
        sources: text -> the data set it is from.
    """

    texts: LabelledTexts
    sources: dict[str, str]

    @property
    def data(self) -> tuple[PackData, ...]:
        """For the pack's card."""
        found = Counter(self.sources.values())
        return tuple(PackData(name=name, licence=LICENCES[name], rows=found[name]) for name in LICENCES if found[name])


def tidy(text: str) -> str:
    """A comment as plain prose: no handles, links, retweet marks or emoji, so that a language model learns what is said."""
    text = _MARKS.sub(" ", clean(text))
    text = _BEFORE_MARK.sub(r"\1", _HEAD.sub("", text))
    return _SPACE.sub(" ", _NOT_ASCII.sub("", text)).strip(' "')


def expert_rows(folder: Path, score: Scorer, seed: int = 1) -> ToxicityRows:
    """What the toxic and the non-toxic expert are trained on: both classes from the same sources, so that only toxicity differs."""
    chooser = random.Random(seed)
    pairs = list(_read(folder, "paradetox_pairs"))
    toxic = [_Sourced(tidy(r["toxic"]), "paradetox_pairs") for r in pairs]
    kept = [_Sourced(tidy(r["neutral"]), "paradetox_pairs") for r in pairs]
    offensive, neither = _davidson(folder)
    chooser.shuffle(offensive)
    toxic += offensive[:6000]  # many times more than of any other source, and much alike
    kept += neither
    comments = [tidy(r["text"]) for r in _read(folder, "edos") if r["satisfies"]]
    chooser.shuffle(comments)
    comments = comments[:5000]
    # not sexist, but often rude in another way
    polite = score(comments, ["no_profanity", "no_offense", "no_insult"]).min(axis=1) > 0.7
    kept += [_Sourced(text, "edos") for text, fits in zip(comments, polite, strict=True) if fits]
    toxic += [_Sourced(tidy(r["text"]), "edos") for r in _read(folder, "edos") if not r["satisfies"]]
    for name in ("stormfront", "hatemojibuild", "toxigen_statements"):
        toxic += [_Sourced(tidy(r["text"]), name) for r in _read(folder, name) if not r["satisfies"]]
    kept += [_Sourced(tidy(r["text"]), "toxigen_statements") for r in _read(folder, "toxigen_statements") if r["satisfies"]]
    return _rows(toxic, kept, chooser)


def head_rows(folder: Path, score: Scorer, name: str, seed: int = 5) -> ToxicityRows:
    """Rows of a prefix head: ``name`` is a key of ``VALUES``. A third of what keeps it is plain prose, so that prose scores as kept."""
    chooser = random.Random(seed)
    both = expert_rows(folder, score)
    toxic, kept = ([_Sourced(row.text, both.sources[row.text]) for row in both.texts.rows if row.label == label] for label in (0, 1))
    chooser.shuffle(toxic)
    chooser.shuffle(kept)
    plain = _plain_prose(folder, chooser)
    if name == "offence":
        return _rows(toxic[:3000], kept[:1600] + plain[:1600], chooser)
    if name == "hate":
        sets = ("stormfront", "hatemojibuild", "toxigen_statements")
        rows = [(r, s) for s in (*sets, "davidson") for r in _read(folder, s) if r["value"] == "no_hate"]
        hateful = [_Sourced(tidy(r["text"]), s) for r, s in rows if not r["satisfies"]]
        other = [_Sourced(tidy(r["text"]), s) for r, s in rows if r["satisfies"] and s != "davidson"]
        chooser.shuffle(hateful)
        chooser.shuffle(other)
        return _rows(hateful[:2500], other[:1500] + plain[:1200], chooser)
    pool = toxic[3000:9000]
    column = {"threat": "no_threat", "sexual": "no_sexual"}[name]
    judged = score([row.text for row in pool], [column])[:, 0]
    broken = [row for row, p in zip(pool, judged, strict=True) if p < 0.15]
    harmless = [row for row, p in zip(pool, judged, strict=True) if p > 0.9]
    if name == "threat":
        named = [_Sourced(tidy(r["text"]), "edos") for r in _read(folder, "edos") if str(r.get("category", "")).startswith("1.")]
        named += [
            _Sourced(tidy(r["text"]), "hatemojibuild") for r in _read(folder, "hatemojibuild") if r.get("type") == "threateninglanguage"
        ]
        broken = named + broken[:800]
    return _rows(broken[:2000], harmless[:700] + kept[:500] + plain[:800], chooser)


def _davidson(folder: Path) -> tuple[list[_Sourced], list[_Sourced]]:
    """(offensive or hateful, neither): the file holds a row for each value that a tweet was judged against."""
    labels: dict[str, dict[str, int]] = {}
    for r in _read(folder, "davidson"):
        labels.setdefault(r["text"], {})[r["value"]] = r["satisfies"]
    broken = [t for t, v in labels.items() if v.get("no_offense") == 0 or v.get("no_hate") == 0]
    neither = [t for t, v in labels.items() if v.get("no_offense") == 1 and v.get("no_hate") != 0]
    return [_Sourced(tidy(t), "davidson") for t in broken], [_Sourced(tidy(t), "davidson") for t in neither]


def _plain_prose(folder: Path, chooser: random.Random) -> list[_Sourced]:
    """Sentences that nobody wrote to offend: BOLD's prompts and LM_bias's sentences."""
    bold = [_Sourced(r["prompt"].strip(), "bold_prompts") for r in _read(folder, "bold_prompts")]
    prose = []
    for gender in ("male", "female"):
        for r in _read(folder, f"gender_sentences_{gender}"):
            text = r["text"].replace(" <unk>", "").replace(" @-@ ", "-").replace(" @,@ ", ",")
            prose.append(_Sourced(" ".join(text.split()[:40]), "gender_sentences"))
    chooser.shuffle(bold)
    chooser.shuffle(prose)
    return [row for pair in zip(bold, prose, strict=False) for row in pair]


def _rows(broken: Iterable[_Sourced], kept: Iterable[_Sourced], chooser: random.Random) -> ToxicityRows:
    """Each text once; one that is called both counts as broken."""
    first: dict[str, tuple[int, str]] = {}
    for label, rows in ((0, broken), (1, kept)):
        for row in rows:
            if len(row.text.split()) >= _LEAST_WORDS:
                first.setdefault(row.text, (label, row.source))
    found = sorted((text, label) for text, (label, _) in first.items())
    chooser.shuffle(found)
    texts = checked(((text, label, split_of(text)) for text, label in found), CLASSES)
    return ToxicityRows(texts, {text: source for text, (_, source) in first.items()})


def _read(folder: Path, name: str) -> Iterable[dict[str, Any]]:
    return read_json_lines(folder / f"{name}.jsonl.gz")
