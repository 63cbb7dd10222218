"""Calibrating a fitted discriminator on development rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from moralguard.discriminator.calibration import Calibration, fit_calibration
from moralguard.discriminator.paths import Path, ReadingMode
from moralguard.errors import DataError
from moralguard.fitting.rows import Row
from moralguard.fitting.sampling import Wordings


def stated(row: Row, wordings: Mapping[str, Wordings]) -> str:
    """The statement that a row is judged by: its own, or the first wording of its value."""
    return row.statement or wordings[row.value_id].keeps[0]


def rows_by_statement(rows: Sequence[Row], wordings: Mapping[str, Wordings]) -> dict[tuple[str, str], list[int]]:
    """Row numbers by (statement, context), so that a statement is read once against all its texts."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        found[stated(row, wordings), row.context].append(i)
    return dict(found)


def raw_probabilities(path: Path, rows: Sequence[Row], wordings: Mapping[str, Wordings], mode: ReadingMode) -> np.ndarray:
    """Uncalibrated probabilities that each row's value is broken, [n]; of the window most likely to break it."""
    found = np.zeros(len(rows))
    for (statement, context), places in rows_by_statement(rows, wordings).items():
        cut = path.cut([rows[i].text for i in places])
        flat = [window for windows in cut for window in windows]
        relevance, broken, _ = path.logits(flat, [statement], context, mode)
        chance = (torch.from_numpy(relevance).sigmoid() * torch.from_numpy(broken).sigmoid())[:, 0].numpy()
        first = 0
        for i, windows in zip(places, cut, strict=True):
            found[i] = chance[first : first + len(windows)].max()
            first += len(windows)
    return found


def calibrate(
    path: Path, rows: Sequence[Row], wordings: Mapping[str, Wordings], mode: ReadingMode, most: int = 400, least: int = 20
) -> Calibration:
    """The calibration of one reading, every value weighing the same and both labels of a value too.

    Args:
        most: rows of one value and label that are used. least: values with fewer rows of either label are left out, unless all are.

    Raises:
        DataError: no value has rows of both labels.
    """
    cells: dict[str, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row.value_id][row.kept].append(row)
    whole = {value: labels for value, labels in cells.items() if len(labels) == 2}
    large = {value: labels for value, labels in whole.items() if min(map(len, labels.values())) >= least} or whole
    if not large:
        raise DataError("calibration needs development rows that keep a value and rows that break it; mark some with split 'dev'")
    chosen: list[Row] = []
    weights: list[float] = []
    for labels in large.values():
        for items in labels.values():
            picked = items[:: max(1, len(items) // most)][:most]
            chosen += picked
            weights += [1.0 / len(picked)] * len(picked)
    broken = raw_probabilities(path, chosen, wordings, mode)
    return fit_calibration(broken, np.array([row.kept for row in chosen]), np.array(weights) * len(weights) / sum(weights))
