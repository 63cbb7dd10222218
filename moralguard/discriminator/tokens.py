"""Texts and value statements as padded token ids, with offsets into the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
from tokenizers import Tokenizer

from moralguard.errors import ModelError

if TYPE_CHECKING:
    import torch

MAX_STATEMENT = 64

Array = TypeVar("Array")


@dataclass(frozen=True)
class Tokens(Generic[Array]):
    """Rows of tokens, padded at the right; NumPy arrays, or the tensors that ``to`` makes of them.

    Attributes:
        ids: int64 [B, T].
        mask: bool [B, T], True at tokens.
    """

    ids: Array
    mask: Array

    def to(self, device: torch.device | str) -> Tokens[torch.Tensor]:
        """The same rows as tensors on a device."""
        import torch

        return Tokens(torch.as_tensor(self.ids, device=device), torch.as_tensor(self.mask, device=device))


class WordPieces:
    """The encoder's tokenizer; safe to share between threads."""

    def __init__(self, path: Path):
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises a bare Exception
            raise ModelError(f"{path} isn't a tokenizer file ({error})") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # a text that spells out "[SEP]" is text: it can't end itself and bring a statement of its own
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab()
        self.first, self.last = (vocabulary[name] for name in ("[CLS]", "[SEP]"))

    def pieces(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids and character offsets of each text, with no special tokens."""
        return [(e.ids, e.offsets) for e in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def rows(self, ids: Sequence[Sequence[int]]) -> Tokens[np.ndarray]:
        """Rows between the special tokens, padded to the longest."""
        return pad([[self.first, *row, self.last] for row in ids])

    def statements(self, statements: Sequence[str], contexts: Sequence[str]) -> Tokens[np.ndarray]:
        """Value statements, each with its context behind a separator where it has one; the ends of long ones are left out."""
        found = self.pieces([*statements, *contexts])
        rows = []
        for i, context in enumerate(contexts):
            row = [self.first, *found[i][0][:MAX_STATEMENT], self.last]
            if context:
                row += [*found[len(statements) + i][0][:MAX_STATEMENT], self.last]
            rows.append(row)
        return pad(rows)


def pad(rows: Sequence[Sequence[int]]) -> Tokens[np.ndarray]:
    """Rows of ids, padded with 0 at the right."""
    longest = max(len(row) for row in rows)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.bool_)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return Tokens(ids, mask)
