"""Requests found by their token history: what a logits processor sees is only the ids so far, in whatever order beams put them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Continuation:
    """How new histories follow from the ones before.

    Attributes:
        parents: i64[n], the earlier row that each new row extends; None for one a row in the same order.
        dropped: newest tokens of the parents that are gone (rejected drafts).
        tokens: i64[n, k], tokens that came after what is left of the parents.
    """

    parents: torch.Tensor | None
    dropped: int
    tokens: torch.Tensor


def follow(before: torch.Tensor, now: torch.Tensor) -> Continuation | None:
    """How ids ``now`` i64[n, T'] follow from ``before`` i64[m, T] (same left padding); None where they don't.

    Extension by one token in the same order, extension with reordering (beams) and a rewind followed by an extension (assisted
    decoding) are found; the shared part must be of one length for all rows.
    """
    width = now.shape[1]
    if width == before.shape[1] + 1:
        if now.shape[0] == before.shape[0] and bool((now[:, :-1] == before).all()):
            return Continuation(None, 0, now[:, -1:])
        same = (now[:, None, :-1] == before[None]).all(-1)
        if bool(same.any(-1).all()):
            return Continuation(same.int().argmax(-1), 0, now[:, -1:])
    shared = min(width - 1, before.shape[1])
    if shared < 1:
        return None
    agree = (now[:, None, :shared] == before[None, :, :shared]).cumprod(-1).sum(-1)  # [n, m]
    best, parents = agree.max(-1)
    common = int(best.min())
    if common < 1:
        return None
    return Continuation(parents, before.shape[1] - common, now[:, common:])


def left_padding(ids: torch.Tensor, pad_token_id: int | None) -> torch.Tensor:
    """How many leading ids of each row are padding, i64[n], where no mask tells.

    The longest prompt of a batch has none, so pad tokens that **every** row begins with are text (a beginning-of-text token that
    doubles as padding).
    """
    import torch

    if pad_token_id is None or ids.shape[1] == 0:
        return torch.zeros(ids.shape[0], dtype=torch.int64)
    leading = (ids == pad_token_id).int().cumprod(-1).sum(-1).cpu()
    return (leading - leading.min()).to(torch.int64)
