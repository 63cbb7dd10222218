"""The text of a continuation as it grows, ended before the first of its stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moralguard.text_stream import TextStream


class StoppedText:
    """Pieces of text whose concatenation is the continuation's, up to a stop string.

    Args:
        tokenizer: what decodes the ids.
        stop: strings, none empty. While the text ends in what may become one of them, that much is held back.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._stream = TextStream(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is certain with this token, possibly empty; afterwards ``stopped`` says whether a stop string came."""
        return self._tell(self._stream.push(token), final=False)

    def flush(self) -> str:
        """What was held back, at the end."""
        return self._tell(self._stream.flush(), final=True)

    def _tell(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            keep = min(found)
        else:
            keep = len(text) if final else len(text) - self._undecided(text)
        piece, self._held = text[:keep], text[keep:]
        self.text += piece
        return piece

    def _undecided(self, text: str) -> int:
        """Length of the longest ending that a stop string begins with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
