"""Text from tokens as they come, never a broken character."""

from __future__ import annotations

from typing import Any

_REPLACEMENT = "\ufffd"
_WINDOW = 128  # tokens decoded together at most, where the tokenizer allows it


class TextStream:
    """Turns tokens into pieces of text whose concatenation is the decoded whole.

    Tokens are decoded together with those before them (a tokenizer may join or space them), and text is held back while it ends
    in a replacement character, which a later token may complete.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._told = ""

    def push(self, token: int) -> str:
        """Text that is certain now, possibly empty."""
        self._ids.append(token)
        text = self._decode()
        if text.endswith(_REPLACEMENT) or not text.startswith(self._told):
            return ""
        piece = self._tell(text)
        if len(self._ids) >= _WINDOW:
            self._forget()
        return piece

    def _forget(self) -> None:
        """Decode only the newer half from now on, where its text is the end of the whole: else each token costs the text's length."""
        newer = self._ids[len(self._ids) // 2 :]
        text = self._tokenizer.decode(newer, skip_special_tokens=True)
        if self._told.endswith(text):
            self._ids, self._told = newer, text

    def flush(self) -> str:
        """What was held back."""
        return self._tell(self._decode())

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)

    def _tell(self, text: str) -> str:
        piece, self._told = text[len(self._told) :], text
        return piece
