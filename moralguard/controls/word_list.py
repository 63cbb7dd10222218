"""Word list: listed words and phrases are kept out of a text, or made less probable."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from moralguard.backends.capabilities import Capabilities
from moralguard.backends.prompts import encode_words
from moralguard.backends.token_bytes import vocabulary_bytes
from moralguard.controls.base import BoundControl, Control
from moralguard.controls.conflicts import Thing, things
from moralguard.controls.listed_words import ListedWords, Tail, fold, read
from moralguard.decoding.step import Step
from moralguard.decoding.terms import Dense, Only, Terms
from moralguard.errors import PolicyError
from moralguard.values import Value

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel

_CUT_CHARACTER = 3  # lone bytes that the window of the text may begin with


class WordList(Control):
    """A token that would finish a listed word or phrase is removed, or loses ``penalty`` of its logit.

    No paper's method: the plain blocklist, done on texts and not on token ids, so that neither case, nor a leading space, nor another
    cut into tokens gets around it (``listed_words`` has the rules). A word counts where it stands as a whole: "class" may hold "ass".
    In scripts that put no spaces between words every occurrence counts. What the prompt holds is the user's own; a word that the prompt
    begins and the text would finish counts.

    Whether "ass" is a word or the beginning of "assume" only the next token tells. By default a word is finished as soon as the text
    ends in it: no text holds one then, wherever it is cut off (``max_new_tokens``, a stop string, a stream), and "assume" can still be
    written in any other cut ("assume", "as" + "sume"). With ``unfinished`` the token is let through and the next one decides: it must
    go on with the word, so neither the end of the text nor a token that begins with a boundary or a part of a character may follow; but
    a text that ``max_new_tokens`` cuts off there ends in the word.

    Not seen: other spellings (accents, full-width letters, "a$$"), which are to be listed themselves.

    Args:
        words: words and phrases; case and white space don't matter.
        file: a UTF-8 text file with one of them a line, beside ``words``; empty lines and lines that begin with "# " are left out.
        penalty: what a token that would finish one loses, in logits: the log-odds of finishing one go down by it. 0 deactivates; None
            removes it.
        unfinished: see above.
    """

    control_name: ClassVar[str] = "word-list"
    any_arrays: ClassVar[bool] = True

    words: tuple[str, ...] = ()
    file: str | None = None
    penalty: Annotated[float, Field(ge=0)] | None = None
    unfinished: bool = False

    @field_validator("file", mode="before")
    @classmethod
    def _as_text(cls, file: object) -> object:
        return str(file) if isinstance(file, Path) else file

    @model_validator(mode="after")
    def _has_entries(self) -> WordList:
        if not self.entries():
            raise PolicyError("word-list has no words; list some under `words`, or name a `file` with one a line")
        return self

    def entries(self) -> tuple[str, ...]:
        """The listed words and phrases, folded, each once.

        Raises:
            PolicyError: the file can't be read as UTF-8, or a word is empty.
        """
        listed = [(f"word {i} of `words`", word) for i, word in enumerate(self.words)]
        if self.file is not None:
            try:
                lines = Path(self.file).read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise PolicyError(f"word-list file {self.file!r} can't be read as UTF-8 text: {error}") from error
            listed += [(f"line {i}", line) for i, line in enumerate(lines, 1) if line.strip() and not line.startswith("# ")]
        folded = {place: fold(word).strip() for place, word in listed}
        empty = next((place for place, word in folded.items() if not word), None)
        if empty is not None:
            raise PolicyError(f"word-list: {empty} is empty; give at least one character or leave it out")
        return tuple(dict.fromkeys(folded.values()))

    @property
    def active(self) -> bool:
        return self.penalty != 0

    def scaled(self, factor: float) -> Self:
        """The penalty, ``factor`` times as large; a removal can't be more than one, and is none at 0."""
        if self.penalty is None:
            return self if factor else self.replaced(penalty=0.0)
        return self.replaced(penalty=self.penalty * factor)

    @property
    def avoids(self) -> tuple[Thing, ...]:
        return things("word", *self.entries())

    @property
    def needs(self) -> Capabilities:
        return Capabilities(history=True)

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundWordList:
        if lm.tokenizer is None:
            raise PolicyError(f"word-list holds texts, but {lm.name} was given without a tokenizer; give (model, tokenizer)")
        return BoundWordList(self, lm)


class BoundWordList(BoundControl[WordList]):
    def __init__(self, settings: WordList, lm: LanguageModel):
        super().__init__(settings, lm)
        self._spellings = vocabulary_bytes(lm)
        entries = settings.entries()
        for entry in entries:
            self._check_spelling(entry)
        self._listed = ListedWords(entries, self._spellings, lm.eos_token_ids, settings.unfinished)

    def _check_spelling(self, entry: str) -> None:
        """Tokens put together must give the text, or a listed word would be looked for in vain."""
        ids = encode_words(self.lm, f"a {entry} a")
        spelled = read(b"".join(self._spellings[i] for i in ids))[0]
        if getattr(self.lm.tokenizer, "unk_token_id", None) not in ids and f"a {entry} a" not in spelled:
            raise PolicyError(
                f"word-list can't follow {entry!r}: the tokenizer of {self.lm.name} spells 'a {entry} a' as {spelled!r}. Word lists "
                "need a tokenizer whose tokens put together give the text (byte-level or sentencepiece); where it rewrites letters, "
                "list the word as it writes it"
            )

    def terms(self, step: Step) -> Terms:
        arrays = step.arrays
        rows = zip(step.history.tolist(), step.mask.sum(-1).tolist(), step.generated.tolist(), strict=True)
        masks = np.stack([self._listed.finishing(self._tail(ids[len(ids) - length :], own)) for ids, length, own in rows])
        if not masks.any():
            return Terms()
        acts = arrays.beside(arrays.cast(arrays.integers(masks.any(-1)), arrays.bool_), step.logits)
        if self.settings.penalty is None:
            stays = arrays.beside(arrays.cast(arrays.integers(~masks), arrays.bool_), step.logits)
            return Terms((Only(stays),), rows=acts)
        delta = arrays.beside(arrays.float_array(np.where(masks, -self.settings.penalty, 0.0)), step.logits)
        return Terms((Dense(delta),), rows=acts)

    def _tail(self, ids: list[int], generated: int) -> Tail:
        """The end of a text of token ids, of which the last ``generated`` aren't the prompt's."""
        wanted = self._listed.reach + 1 + _CUT_CHARACTER
        window = wanted
        while True:  # tokens that show nothing, or white space alone, add no character
            text, pending = read(b"".join(self._spellings[i] for i in ids[-window:]))
            if len(text) >= wanted or window >= len(ids):
                break
            window *= 2
        own = sum(len(self._spellings[i]) for i in ids[len(ids) - generated :][-window:])
        return Tail(text, pending, own > len(pending))
