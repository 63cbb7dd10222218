"""Labelled texts for fitting heads, subspaces and experts: from files, data sets and parallel pairs, checked before anything is trained."""

from __future__ import annotations

import csv
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moralguard.errors import DataError
from moralguard.fitting.row_files import read_json_lines, split_of

Rows = str | Path | Iterable[Mapping[str, Any]]
Records = Rows | Mapping[str, Rows]
"""A ``.jsonl``, ``.jsonl.gz`` or ``.csv`` file, a folder that ``datasets``' ``save_to_disk`` wrote, rows such as a ``Dataset``, or any
of these by split, as in a ``DatasetDict``."""

_LABELS = ("label", "kept", "satisfies")
_SPLITS = ("train", "dev", "test")
_SPLIT_NAMES = {name: name for name in _SPLITS} | {"validation": "dev", "valid": "dev", "val": "dev"}
_BINARY = {"true": "1", "false": "0"}


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text, the index of its class and the split it belongs to (train, dev or test)."""

    text: str
    label: int
    split: str


@dataclass(frozen=True)
class LabelledTexts:
    """Checked rows: at least two classes, each with training rows, and no text in two splits.

    Attributes:
        rows: without exact repeats.
        classes: names; a row's label is an index into them.
    """

    rows: tuple[LabelledText, ...]
    classes: tuple[str, ...]

    def of(self, split: str) -> list[LabelledText]:
        return [row for row in self.rows if row.split == split]


def read_labelled(source: Records, *, text: str = "text", label: str | None = None, classes: Sequence[str] | None = None) -> LabelledTexts:
    """Rows with a text and a label.

    Fields: ``text``; the label (``label``, ``kept`` or ``satisfies`` where ``label`` isn't named); optional ``split`` (train, dev,
    validation or test; a hash of the text where there is none). Labels are numbers 0, 1, ..., true and false, or class names.

    Args:
        classes: names in order, where they aren't those found; a label is one of them, or its number.

    Raises:
        DataError: naming the row and what was expected: an empty text, a label that is missing or out of range, one class only, a
            text that stands in two splits, or a file that can't be read.
    """
    found: list[tuple[str, str, str, str]] = []
    for where, record in _records(source):
        words = _words(record, text, where, "drop the row or name the field that holds it")
        given = record.get(label) if label else next((record[name] for name in _LABELS if not _missing(record.get(name))), None)
        if _missing(given):
            raise DataError(f"{where}: no label in {label or ', '.join(_LABELS)}; give each row the class it belongs to")
        found.append((where, words, str(given).strip(), _split(record.get("split"), where) or split_of(words)))
    numbers = None if classes is None else {name: i for i, name in enumerate(classes)}
    if numbers is None:
        numbers = {name: i for i, name in enumerate(_names({_class_name(given) for _, _, given, _ in found}))}
    rows = ((words, _class_number(given, numbers, where), split) for where, words, given, split in found)
    return checked(rows, tuple(numbers))


def read_pairs(source: Records, positive: str, negative: str) -> LabelledTexts:
    """Rows that hold two texts each, one of either class: class 1 is ``positive``.

    A pair stays in one split, and so do pairs that share a text: the first split given among them, or a hash of the first text.

    Raises:
        DataError: as ``read_labelled``.
    """
    pairs: list[tuple[str, str, str]] = []
    for where, record in _records(source):
        advice = f"a pair has one in {positive!r} and one in {negative!r}"
        low, high = (_words(record, name, where, advice) for name in (negative, positive))
        pairs.append((low, high, _split(record.get("split"), where)))
    group = _joined((low, high) for low, high, _ in pairs)
    chosen: dict[str, str] = {}
    for low, _, split in pairs:
        if split:
            chosen.setdefault(group[low], split)
    rows = []
    for low, high, split in pairs:
        split = split or chosen.setdefault(group[low], split_of(group[low]))
        rows += [(low, 0, split), (high, 1, split)]
    return checked(rows, (negative, positive))


def read_text_pairs(source: Records, positive: str, negative: str) -> list[tuple[str, str]]:
    """(positive text, negative text) of every row that ``read_pairs`` reads, repeats too.

    Raises:
        DataError: as ``read_labelled``.
    """
    advice = f"a pair has one in {positive!r} and one in {negative!r}"
    rows = ([_words(record, name, where, advice) for name in (positive, negative)] for where, record in _records(source))
    return [(high, low) for high, low in rows]


def checked(rows: Iterable[tuple[str, int, str]], classes: Sequence[str]) -> LabelledTexts:
    """Rows (text, label, split) without repeats.

    Raises:
        DataError: a text in two splits, fewer than two classes to train on, or a class that has no training row.
    """
    splits: dict[str, str] = {}
    kept = dict.fromkeys(LabelledText(*row) for row in rows)
    for row in kept:
        other = splits.setdefault(row.text, row.split)
        if other != row.split:
            raise DataError(
                f"the text {row.text[:60]!r} stands in the splits {other} and {row.split}; a held-back score would be too good: "
                "keep each text in one split"
            )
    trained = Counter(row.label for row in kept if row.split == "train")
    if len(trained) < 2:
        only = ", ".join(classes[i] for i in sorted(trained)) or "nothing"
        raise DataError(f"the training rows hold {only} alone; give texts of at least two classes")
    untrained = [name for i, name in enumerate(classes) if not trained[i]]
    if untrained:
        raise DataError(
            f"no training row is of class {', '.join(untrained)}; give some, mark more of its rows with split 'train', or leave it out "
            "(classes that are numbers count from 0)"
        )
    return LabelledTexts(tuple(kept), tuple(classes))


def _records(source: Records) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each row behind the words that name it in a message."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        for where, record in _records(_load(path)):
            yield f"{path}, {where}", record
        return
    if isinstance(source, Mapping):
        for split, rows in source.items():
            _split(split, "rows by split")
            for where, record in _records(rows):
                yield f"{split}, {where}", record if not _missing(record.get("split")) else {**record, "split": split}
        return
    if not isinstance(source, Iterable):
        raise DataError(f"the rows are a {type(source).__name__}; expected a file, a folder, or an iterable of mappings")
    for number, record in enumerate(source, 1):
        if not isinstance(record, Mapping):
            raise DataError(f"row {number} is a {type(record).__name__}; expected a mapping with a text and a label")
        yield f"row {number}", record


def _load(path: Path) -> Records:
    if path.is_dir():
        try:
            from datasets import load_from_disk
        except ImportError as error:
            raise DataError(f"{path} is a folder; reading a saved data set needs the package `datasets`: pip install datasets") from error
        found: Records = load_from_disk(str(path))
        return found
    try:
        if path.suffix != ".csv":
            return list(read_json_lines(path))
        # a spreadsheet's export begins with a byte-order mark
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise DataError(f"{path} doesn't exist; give a .jsonl, .jsonl.gz or .csv file, or the folder of a saved data set") from None
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise DataError(f"{path} can't be read ({error}); expected UTF-8 text in a .jsonl, .jsonl.gz or .csv file") from error


def _words(record: Mapping[str, Any], field: str, where: str, advice: str) -> str:
    words = record.get(field)
    if not isinstance(words, str) or not words.strip():
        raise DataError(f"{where}: field {field!r} must hold a text, not {words!r}; {advice}")
    return words


def _missing(value: Any) -> bool:
    # a table's empty cell is read as NaN by some libraries
    return value is None or str(value).strip() == "" or value != value


def _class_name(given: str) -> str:
    """The name of a label's class: "1" for 1, 1.0 and true."""
    if given.endswith(".0") and given[:-2].isdecimal():
        given = given[:-2]
    return str(int(given)) if given.isdecimal() else _BINARY.get(given.lower(), given)


def _names(found: set[str]) -> tuple[str, ...]:
    """Class names in order; numbers name the classes 0 to the largest."""
    if found and all(name.isdecimal() for name in found):
        largest = max(map(int, found))
        if largest >= 2 * len(found):
            shown = ", ".join(sorted(found, key=int)[:8])
            raise DataError(f"the labels {shown} leave most numbers up to {largest} out; number the classes 0, 1, ... or name them")
        return tuple(str(i) for i in range(largest + 1))
    return tuple(sorted(found))


def _class_number(given: str, numbers: Mapping[str, int], where: str) -> int:
    if given in numbers:
        return numbers[given]
    name = _class_name(given)
    if name in numbers:
        return numbers[name]
    if name.isdecimal() and int(name) < len(numbers):
        return int(name)
    raise DataError(f"{where}: label {given!r} is none of {', '.join(numbers)} (0 to {len(numbers) - 1}); correct it, or name all classes")


def _split(given: Any, where: str) -> str:
    """The split's name; "" where there is none."""
    if _missing(given):
        return ""
    name = _SPLIT_NAMES.get(str(given).strip().lower())
    if name is None:
        raise DataError(f"{where}: split {given!r} is none of {', '.join(_SPLITS)}")
    return name


def _joined(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """For each text the first of all texts that pairs connect it with (union-find)."""
    above: dict[str, str] = {}

    def first(text: str) -> str:
        while above.setdefault(text, text) != text:
            above[text] = text = above[above[text]]
        return text

    for low, high in pairs:
        root, other = first(low), first(high)
        above[other] = root
    return {text: first(text) for text in list(above)}
