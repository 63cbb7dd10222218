"""Which rows a training step sees: sources by their shares, values and labels evened out, and a wording for each value."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files

import yaml

from moralguard.errors import DataError
from moralguard.fitting.rows import Row
from moralguard.fitting.schwartz import schwartz_wordings

_FLIPPED = 0.2
_MISSPELT = 0.06


@dataclass(frozen=True)
class Wordings:
    """The wordings of one value: ``keeps`` are true of texts that keep it, ``breaks`` of texts that break it."""

    keeps: tuple[str, ...]
    breaks: tuple[str, ...]


def known_wordings() -> dict[str, Wordings]:
    """The wordings of the known values, by id (``statements.yaml``, and Schwartz's values)."""
    data = yaml.safe_load((files("moralguard.fitting") / "statements.yaml").read_text(encoding="utf-8"))
    known = {name: Wordings(tuple(item["keeps"]), tuple(item["breaks"])) for name, item in data.items()}
    return known | {name: Wordings(tuple(keeps), tuple(breaks)) for name, keeps, breaks in schwartz_wordings()}


class Sampler:
    """Draws rows; the draw of a step depends on the seed and the step alone, so a resumed run sees what an unbroken one would.

    Args:
        rows: training rows.
        shares: relative share of each source; a source that isn't named has 1 per cent for every 500 rows, at most 10.
        wordings: wordings of the values whose rows carry no statement.
        siblings: further rows of the same text that come with each drawn row: a text is encoded once for all its values.

    Raises:
        DataError: no rows, or a value with neither a statement nor wordings.
    """

    def __init__(self, rows: Sequence[Row], shares: Mapping[str, float], wordings: Mapping[str, Wordings], seed: int, siblings: int = 0):
        if not rows:
            raise DataError("there are no training rows; check the folder of labelled files and the rows' 'split' field")
        for row in rows:
            if not row.statement and row.value_id not in wordings:
                raise DataError(
                    f"rows of {row.source!r} name the value {row.value_id!r}, which has no known wording; give them a 'statement'"
                )
        self._wordings = wordings
        self._seed = seed
        self._siblings = siblings
        self._of_text: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in rows if siblings else ():
            self._of_text[row.source, row.text].append(row)
        cells: dict[str, dict[str, dict[float, list[Row]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        for row in rows:
            cells[row.source][row.value_id][row.kept].append(row)
        # siblings of the commoner label are thinned, so that both labels of a value stay as frequent
        self._thinned = {
            (source, value, kept): min(1.0, len(labels.get(1.0 - kept, ())) / len(found)) if len(labels) > 1 else 0.25
            for source, values in cells.items()
            for value, labels in values.items()
            for kept, found in labels.items()
        }
        self._sources = sorted(cells)
        counts = {source: sum(len(r) for values in cells[source].values() for r in values.values()) for source in cells}
        self._shares = [shares.get(s, min(0.1, 0.01 * counts[s] / 500)) for s in self._sources]
        self._cells = []
        for source in self._sources:
            values = sorted(cells[source])
            # values by the square root of their rows: common ones often, rare ones still seen
            weights = [math.sqrt(sum(len(r) for r in cells[source][v].values())) for v in values]
            self._cells.append(([sorted(cells[source][v].items()) for v in values], weights))

    def draw(self, step: int, count: int) -> list[list[Row]]:
        """``count`` texts, each with its rows (one, and its siblings), statements filled in."""
        chooser = random.Random(f"{self._seed}:{step}")
        found = []
        for source in chooser.choices(range(len(self._sources)), self._shares, k=count):
            values, weights = self._cells[source]
            labels = chooser.choices(values, weights)[0]
            row = chooser.choice(chooser.choice(labels)[1])
            others = [
                other
                for other in self._of_text.get((row.source, row.text), ())
                if other is not row and chooser.random() < self._thinned[other.source, other.value_id, other.kept]
            ]
            group = [row, *chooser.sample(others, min(self._siblings, len(others)))]
            text = _misspelt(row.text, chooser) if chooser.random() < _MISSPELT else row.text
            found.append([replace(self._worded(item, step), text=text) for item in group])
        return found

    def _worded(self, row: Row, step: int) -> Row:
        """A row with a wording of its value: one wording a value in each draw, so that it is encoded once for many texts."""
        statement, kept, relevance = row.statement, row.kept, row.relevance
        chooser = random.Random(f"{self._seed}:{step}:{row.value_id}:{statement}")
        if not statement:
            wordings = self._wordings[row.value_id]
            if wordings.breaks and chooser.random() < _FLIPPED:
                # an affirmative statement demands something of every text, so it is always at stake
                statement, kept, relevance = chooser.choice(wordings.breaks), 1.0 - kept, 1.0
            else:
                statement = chooser.choice(wordings.keeps)
        if chooser.random() < 0.3:
            statement = statement.rstrip(".")
        return replace(row, statement=statement, kept=kept, relevance=relevance)


def _misspelt(text: str, chooser: random.Random) -> str:
    """A text with a few characters dropped, doubled, swapped, starred or spaced, as people do to get round filters."""
    characters = list(text)
    for _ in range(1 + len(text) // 25):
        if len(characters) < 4:
            break
        place = chooser.randrange(1, len(characters) - 1)
        kind = chooser.randrange(5)
        if kind == 0:
            del characters[place]
        elif kind == 1:
            characters.insert(place, characters[place])
        elif kind == 2:
            characters[place - 1], characters[place] = characters[place], characters[place - 1]
        elif kind == 3 and characters[place].lower() in "aeiou":
            characters[place] = {"a": "@", "e": "3", "i": "1", "o": "0"}.get(characters[place].lower(), "*")
        elif kind == 4 and characters[place].isalpha():
            characters[place] = "*"
    return "".join(characters)
