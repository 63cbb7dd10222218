"""A control for moralguard: words that become less probable."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field

from moralguard import LanguageModel, Value
from moralguard.controls import BoundControl, Control, Sparse, Step, Terms
from moralguard.errors import PolicyError


class DiscouragedWords(Control):
    """z' = z + bias on the first token of each discouraged word, in all its spellings: with and without a leading space or capital.

    A first token may also begin other words, so a strong bias costs those too.

    Args:
        discouraged: words, or token ids.
        bias: added to their logits, negative to discourage; 0 deactivates.
    """

    control_name: ClassVar[str] = "discouraged-words"

    discouraged: Annotated[tuple[int | str, ...], Field(min_length=1)]
    bias: float = -5.0

    @property
    def active(self) -> bool:
        return self.bias != 0

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundDiscouragedWords:
        ids: set[int] = set()  # distinct: a sparse term names each id once a row
        for word in self.discouraged:
            if isinstance(word, str):
                ids |= first_tokens(lm, word)
            elif 0 <= word < lm.vocab_size:
                ids.add(word)
            else:
                raise PolicyError(
                    f"discouraged-words holds token id {word}, outside the vocabulary of {lm.name} (0 to {lm.vocab_size - 1})"
                )
        return BoundDiscouragedWords(self, lm, torch.tensor(sorted(ids), device=lm.device))


class BoundDiscouragedWords(BoundControl[DiscouragedWords]):
    def __init__(self, settings: DiscouragedWords, lm: LanguageModel, ids: torch.Tensor):
        super().__init__(settings, lm)
        self.ids = ids

    def terms(self, step: Step) -> Terms:
        ids = self.ids.expand(step.rows, -1)
        bias = step.weight(self.settings.bias)[:, None].expand(ids.shape)
        return Terms((Sparse(ids, bias, keep_rest=True),))


def first_tokens(lm: LanguageModel, word: str) -> set[int]:
    if lm.tokenizer is None:
        raise PolicyError(f"discouraged-words holds the word {word!r}, but {lm.name} was given without a tokenizer; give token ids")
    bare = word.strip()
    spellings = {space + form for space in ("", " ") for form in (bare, bare.capitalize())}
    encoded = [lm.tokenizer(spelling, add_special_tokens=False)["input_ids"] for spelling in spellings]
    found = {int(ids[0]) for ids in encoded if ids}
    if not found:
        raise PolicyError(f"discouraged-words holds {word!r}, which has no token in the vocabulary of {lm.name}")
    return found
