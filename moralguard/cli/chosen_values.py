"""The values that ``--value``, ``--policy`` and ``--threshold`` name together."""

from __future__ import annotations

from moralguard.discriminator.inputs import as_values, known_values
from moralguard.errors import DataError
from moralguard.policy import Policy
from moralguard.schema import nearest
from moralguard.values import Value


def choose_values(statements: list[str], policy: str | None, threshold: float | None) -> list[Value]:
    """The policy's values, then those named one by one; ids are distinct, and what is named twice counts once.

    Raises:
        DataError: a word that is neither a known id nor a statement, or a policy with no values.
    """
    found = as_values(Policy.load(policy)) if policy is not None else []
    for statement in statements:
        _check_word(statement)
        found.extend(as_values(statement))
    distinct = _distinct(found)
    return distinct if threshold is None else [value.replaced(threshold=threshold) for value in distinct]


def _check_word(statement: str) -> None:
    # a mistyped id would be read as a statement and give numbers that mean nothing
    word = statement.strip()
    if word and word.isascii() and len(word.split()) == 1 and word not in known_values():
        raise DataError(
            f"--value {word!r} is no known value; {nearest(word, known_values())} "
            '(--list-values shows them all; a value of your own is a sentence, e.g. "The text does not insult anyone.")'
        )


def _distinct(values: list[Value]) -> list[Value]:
    """Values whose statements begin alike get a number, for scores are told apart by id."""
    taken: dict[str, Value] = {}
    for value in values:
        if any(value.statement == other.statement for other in taken.values()):
            continue
        name, number = value.id, 2
        while name in taken:
            name, number = f"{value.id}-{number}", number + 1
        taken[name] = value if name == value.id else value.replaced(id=name)
    return list(taken.values())
