"""Tokens as strings for log-probability tables: every token has a string of its own, whether it decodes to text or not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def _bytes_of_symbols() -> dict[str, int]:
    """The characters by which byte-level vocabularies spell bytes: printable ones stand for themselves, the others are shifted."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(shifted)}


class TokenStrings:
    """Spells the tokens of a vocabulary.

    A token's string is its text; ``bytes:\\xNN...`` where its bytes are no valid UTF-8 of their own, because all such tokens would
    decode to the same replacement character; ``token_id:N`` where the vocabulary holds nothing at that id. Strings come from the
    vocabulary's own entries, which are distinct, so that no two tokens share one.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._added = set(tokenizer.get_added_vocab().values() if hasattr(tokenizer, "get_added_vocab") else tokenizer.all_special_ids)
        symbols = _bytes_of_symbols()
        entries = [tokenizer.convert_ids_to_tokens(i) or "" for i in range(min(len(tokenizer), 4096)) if i not in self._added]
        # sentencepiece vocabularies hold "▁", which spells no byte
        self._byte_level = bool(entries) and all(all(symbol in symbols for symbol in entry) for entry in entries)

    def raw(self, token_id: int) -> bytes | None:
        """The bytes of a token; None where nothing is at that id."""
        entry = self._tokenizer.convert_ids_to_tokens(int(token_id))
        if not isinstance(entry, str):
            return None
        if token_id in self._added:
            return entry.encode("utf-8", "replace")
        if self._byte_level:
            symbols = _bytes_of_symbols()
            if all(symbol in symbols for symbol in entry):
                return bytes(symbols[symbol] for symbol in entry)
        if len(entry) == 6 and entry.startswith("<0x") and entry.endswith(">"):
            return bytes([int(entry[3:5], 16)])
        return entry.replace("\u2581", " ").encode("utf-8", "replace")

    def spell(self, token_id: int) -> str:
        """The string of a token."""
        raw = self.raw(token_id)
        if raw is None:
            return f"token_id:{int(token_id)}"
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def text_lengths(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Characters of text before each token; a token that only completes a character begins where that character does.

    A window of tokens is decoded at a time, so that a long text costs no square of its length.
    """
    lengths, known, window, read = [], 0, 0, 0
    for index in range(len(ids)):
        lengths.append(known)
        before = tokenizer.decode(list(ids[window:read]), skip_special_tokens=True)
        now = tokenizer.decode(list(ids[window : index + 1]), skip_special_tokens=True)
        if len(now) > len(before) and not now.endswith("\ufffd"):
            known += len(now) - len(before)
            window, read = read, index + 1
    return lengths
