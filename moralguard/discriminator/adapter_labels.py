"""What a classifier's labels mean: which one breaks or keeps a value, and which ones are an inference model's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from moralguard.discriminator.sequence_classifier import SequenceClassifier
from moralguard.errors import DataError, ModelError
from moralguard.values import Value

Label = str | int
LabelOrSide = Label | tuple[Label, str]

_ROLES = {
    "entailment": ("entailment", "entail", "entails", "entailed"),
    "contradiction": ("contradiction", "contradict", "contradicts", "contradictory"),
    "neutral": ("neutral",),
    "not_entailment": ("not_entailment", "non_entailment", "no_entailment", "notentailment"),
}
_INFERENCE = ({"entailment", "contradiction", "neutral"}, {"entailment", "not_entailment"}, {"entailment", "contradiction"})
_EXPECTED = '"entailment", "contradiction" and "neutral", or "entailment" and "not_entailment"'


def listed(names: Sequence[str], most: int = 12) -> str:
    """Names for a message, the first ones where there are many."""
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def label_columns(classifier: SequenceClassifier, labels: Any) -> dict[str, tuple[int, bool]]:
    """Value id or statement -> the label's index, and whether its probability means that the value is kept.

    Raises:
        DataError: a label isn't one of the model's, or the mapping can't be read.
    """
    if not isinstance(labels, Mapping) or not labels:
        raise DataError(
            'labels must say which label breaks which value, e.g. {"The text does not insult anyone.": "toxic"}; the labels of '
            f"{classifier.name} are {listed(classifier.labels)}"
        )
    found = {}
    for key, label in labels.items():
        if not isinstance(key, str) or not key.strip():
            raise DataError(f"labels has the key {key!r}; expected the id or the statement of a value")
        keeps = False
        if isinstance(label, tuple | list):
            if len(label) != 2 or label[1] not in ("keeps", "breaks"):
                raise DataError(f'labels[{key!r}] is {label!r}; expected a label, or a pair such as ({classifier.labels[0]!r}, "keeps")')
            label, keeps = label[0], label[1] == "keeps"
        found[_plain(key)] = (_index(classifier, label, f"labels[{key!r}]"), keeps)
    return found


def column_of(columns: Mapping[str, tuple[int, bool]], value: Value, place: int, name: str) -> tuple[int, bool]:
    """The entry of a value, found by its id or its statement.

    Raises:
        DataError: there is none; names the nearest that there are.
    """
    keys = (_plain(value.id), _plain(value.statement))
    for key in keys:
        if key in columns:
            return columns[key]
    near = list(dict.fromkeys(match for key in keys for match in get_close_matches(key, list(columns), 3, 0.5)))
    shown = f"nearest: {listed(near)}" if near else f"known: {listed(list(columns))}"
    raise DataError(
        f"values[{place}] ({value.id!r}: {value.statement!r}) has no label of {name}; {shown}. A classifier judges only what it was "
        "trained for: add the value to labels, or use a discriminator that reads statements"
    )


def named_roles(classifier: SequenceClassifier) -> dict[str, int]:
    """Role ("entailment", ...) -> index, told by the names in ``config.id2label``.

    Raises:
        ModelError: the names don't tell.
    """
    found: dict[str, int] = {}
    for i, label in enumerate(classifier.labels):
        plain = re.sub(r"[\W_]+", "_", label.lower()).strip("_")
        role = next((role for role, names in _ROLES.items() if plain in names), None)
        if role is not None:
            found.setdefault(role, i)
    if len(found) == len(classifier.labels) and set(found) in _INFERENCE:
        return found
    raise ModelError(
        f"the labels of {classifier.name} are {listed(classifier.labels)}, which doesn't tell which means what; expected {_EXPECTED}. "
        'If it is an inference model, say so: labels={"entailment": 0, "neutral": 1, "contradiction": 2} in its own order'
    )


def given_roles(classifier: SequenceClassifier, labels: Any) -> dict[str, int]:
    """Role -> index, as the caller says.

    Raises:
        DataError: roles or labels that don't exist, or not each of the model's labels with one role.
    """
    known = listed(classifier.labels)
    if not isinstance(labels, Mapping) or set(labels) not in _INFERENCE:
        given = listed([str(role) for role in labels]) if isinstance(labels, Mapping) else type(labels).__name__
        raise DataError(f"labels gives {given}; expected the roles {_EXPECTED}, each with a label of {classifier.name} ({known})")
    found = {role: _index(classifier, label, f"labels[{role!r}]") for role, label in labels.items()}
    if sorted(found.values()) != list(range(len(classifier.labels))):
        raise DataError(
            f"labels must give each label of {classifier.name} one role; its labels are {known}, and labels is {dict(labels)!r}"
        )
    return found


def _index(classifier: SequenceClassifier, label: Any, where: str) -> int:
    known = classifier.labels
    if isinstance(label, str) and label in known:
        return known.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(known):
        return label
    near = get_close_matches(label, known, 1, 0.5) if isinstance(label, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(
        f"{where} is {label!r}, which isn't a label of {classifier.name}; expected one of {listed(known)}, or an index from 0 to "
        f"{len(known) - 1}{hint}"
    )


def _plain(key: str) -> str:
    return key.strip()
