"""Requests found by their token history: what a logits processor sees is only the ids so far, in whatever order beams put them.

Ids are NumPy arrays here on every backend: they are few, and what is asked of them decides what runs next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Continuation:
    """How new histories follow from the ones before.

    Attributes:
        parents: i64[n], the earlier row that each new row extends; None for one a row in the same order.
        dropped: newest tokens of the parents that are gone (rejected drafts).
        tokens: i64[n, k], tokens that came after what is left of the parents.
    """

    parents: Ids | None
    dropped: int
    tokens: Ids


def host_ids(ids: Any) -> Ids:
    """Token ids of any kind of array, on any device, as i64 in memory of their own."""
    found: Ids = np.array(ids.detach().to("cpu") if hasattr(ids, "detach") else ids, dtype=np.int64)
    return found


def follow(before: Ids, now: Ids) -> Continuation | None:
    """How ids ``now`` i64[n, T'] follow from ``before`` i64[m, T] (same left padding); None where they don't.

    Extension by one token in the same order, extension with reordering (beams) and a rewind followed by an extension (assisted
    decoding) are found; the shared part must be of one length for all rows.
    """
    if now.shape[0] == before.shape[0] and now.shape[1] == before.shape[1] + 1 and bool((now[:, :-1] == before).all()):
        return Continuation(None, 0, now[:, -1:])
    shared = min(now.shape[1] - 1, before.shape[1])
    if shared < 1:
        return None
    agree = (now[:, None, :shared] == before[None, :, :shared]).cumprod(-1).sum(-1)  # [n, m]
    common = int(agree.max(-1).min())
    if common < 1:
        return None
    return Continuation(agree.argmax(-1), before.shape[1] - common, now[:, common:])


def goes_on(before: Ids, now: Ids, prompt_width: int) -> bool:
    """Whether ids ``now`` may belong to the same call as ``before``: every row begins with one of its prompts (-1: any token)."""
    if not prompt_width < now.shape[1] <= before.shape[1] + 1:
        return False
    prompts, known = now[:, :prompt_width], before[:, :prompt_width]
    return bool(((prompts[:, None] == known[None]) | (known[None] < 0)).all(-1).any(-1).all())


def leading(flags: NDArray[Any]) -> Ids:
    """How many flags of each row [n, T] are set before the first that isn't, i64[n]."""
    count: Ids = flags.astype(np.int64).cumprod(-1).sum(-1)
    return count


def left_padding(ids: Ids, pad_token_id: int | None) -> Ids:
    """How many leading ids of each row are padding, i64[n], where no mask tells.

    The longest prompt of a batch has none, so pad tokens that **every** row begins with are text (a beginning-of-text token that
    doubles as padding).
    """
    if pad_token_id is None or ids.shape[1] == 0:
        return np.zeros(len(ids), np.int64)
    found = leading(ids == pad_token_id)
    return found - found.min()


def unpadded(ids: Ids) -> list[list[int]]:
    """The ids of each row without its padding, which is negative."""
    return [[i for i in row if i >= 0] for row in ids.tolist()]
