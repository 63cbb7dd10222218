"""The bytes that every token of a vocabulary stands for, so that texts can be put together across tokens that cut characters."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel


@cache
def _bytes_of_symbols() -> dict[str, int]:
    """The characters by which byte-level vocabularies spell bytes: printable ones stand for themselves, the others are shifted."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(shifted)}


def vocabulary_bytes(lm: LanguageModel) -> list[bytes]:
    """One entry a token id of the model: its bytes, a leading space included; empty where a decoded text shows nothing.

    Byte-level vocabularies (GPT-2 and its kind) and those of sentencepiece ("▁" for a space, <0xNN> for a byte) are read. Special
    tokens and ids that the tokenizer doesn't know are empty, as decoding with ``skip_special_tokens`` leaves them out.
    """
    tokenizer: Any = lm.tokenizer
    count = min(len(tokenizer), lm.vocab_size)
    entries = tokenizer.convert_ids_to_tokens(list(range(count)))
    added = set(tokenizer.get_added_vocab().values()) if hasattr(tokenizer, "get_added_vocab") else set()
    special = {int(i) for i in tokenizer.all_special_ids} | set(lm.eos_token_ids)
    symbols = _bytes_of_symbols()
    own = [entry for i, entry in enumerate(entries[:4096]) if isinstance(entry, str) and i not in added and i not in special]
    byte_level = bool(own) and all(symbol in symbols for entry in own for symbol in entry)

    def spelled(token_id: int, entry: Any) -> bytes:
        if token_id in special or not isinstance(entry, str):
            return b""
        if token_id in added:
            return entry.encode("utf-8", "replace")
        if byte_level and all(symbol in symbols for symbol in entry):
            return bytes(symbols[symbol] for symbol in entry)
        if len(entry) == 6 and entry.startswith("<0x") and entry.endswith(">"):
            return bytes([int(entry[3:5], 16)])
        return entry.replace("\u2581", " ").encode("utf-8", "replace")

    return [spelled(i, entry) for i, entry in enumerate(entries)] + [b""] * (lm.vocab_size - count)
