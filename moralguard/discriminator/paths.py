"""How the built-in discriminator reads a window of text: one path a script, each giving relevance and broken logits.

A text is read in windows; each path says how it cuts them and what it makes of them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from moralguard.discriminator.character_path import CharacterPath as CharacterNetwork
from moralguard.discriminator.character_path import character_batch
from moralguard.discriminator.inputs import known_values
from moralguard.discriminator.network import Encoded, Network
from moralguard.discriminator.tokens import Tokens, WordPieces

WINDOW = 96  # tokens, or characters of Chinese times two
OVERLAP = 24
_TOKENS_A_BATCH = 4096
_PAIRS_A_BATCH = 8192  # texts times values whose features are held at once, some 50 MB
_CACHED_VALUES = 4096

ReadingMode = Literal["cached", "cross"]


@dataclass(frozen=True, slots=True)
class Window:
    """Characters [start, end) of a text, and what its path made of them."""

    start: int
    end: int
    content: Any


class Path(Protocol):
    """A way to read text."""

    name: str

    def cut(self, texts: Sequence[str]) -> list[list[Window]]:
        """Each text's windows, at least one."""

    def logits(self, windows: Sequence[Window], statements: Sequence[str], context: str, mode: ReadingMode) -> tuple[Tensor, Tensor, str]:
        """Relevance and broken logits, float64 [n_windows, n_values] on the CPU, and the calibration that they need."""

    def features(self, windows: Sequence[Window]) -> Tensor:
        """What an adaptation reads of each window, float64 [n_windows, f]."""


class SentenceEncoder(Protocol):
    """What turns statements into the pre-trained model's sentence vectors."""

    def sentence_vectors(self, statements: Sequence[str]) -> Tensor:
        """float32 [n, d], length 1."""


class LeastRecent:
    """A bounded mapping that several threads may use."""

    def __init__(self, size: int):
        self._size = size
        self._items: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Any:
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
            return self._items.get(key)

    def put(self, key: Hashable, item: Any) -> None:
        with self._lock:
            self._items[key] = item
            while len(self._items) > self._size:
                self._items.popitem(last=False)


def batches(lengths: Sequence[int], tokens: int = _TOKENS_A_BATCH) -> Iterator[list[int]]:
    """Indices in batches of similar length, each of at most ``tokens`` tokens with its padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def cut_by_pieces(pieces: WordPieces, texts: Sequence[str]) -> list[list[Window]]:
    """Windows of word pieces; a window's content is (ids, offsets)."""
    found = []
    for text, (ids, offsets) in zip(texts, pieces.pieces(texts), strict=True):
        starts = range(0, max(1, len(ids) - OVERLAP), WINDOW - OVERLAP) if len(ids) > WINDOW else (0,)
        windows = []
        for start in starts:
            part = offsets[start : start + WINDOW]
            windows.append(Window(part[0][0] if part else 0, part[-1][1] if part else len(text), (ids[start : start + WINDOW], part)))
        found.append(windows)
    return found


class WordPath:
    """English, by the encoder.

    Mode "cached" reads texts against cached value vectors, "cross" each text together with each value.
    """

    name = "words"

    def __init__(self, network: Network, pieces: WordPieces):
        self.network = network
        self.pieces = pieces
        self._values = LeastRecent(_CACHED_VALUES)

    @property
    def device(self) -> torch.device:
        return self.network.sides.weight.device

    def cut(self, texts: Sequence[str]) -> list[list[Window]]:
        return cut_by_pieces(self.pieces, texts)

    def logits(self, windows: Sequence[Window], statements: Sequence[str], context: str, mode: ReadingMode) -> tuple[Tensor, Tensor, str]:
        cross = mode == "cross"
        relevance = torch.zeros(len(windows), len(statements), dtype=torch.float64)
        broken = torch.zeros_like(relevance)
        with torch.inference_mode():
            values = self._encoded_values(statements, context)
            for rows in batches([len(window.content[0]) + 2 for window in windows]):
                tokens = self.tokens([windows[i] for i in rows])
                texts = self.network.encode(tokens.ids, tokens.mask, side=1, alone=not cross)
                found = self._cross(texts, values) if cross else self._cached(texts, values)
                relevance[rows], broken[rows] = (logits.double().cpu() for logits in found)
        return relevance, broken, mode

    def tokens(self, windows: Sequence[Window]) -> Tokens:
        """The windows' tokens, padded, on the network's device."""
        return self.pieces.rows([window.content[0] for window in windows]).to(self.device)

    def features(self, windows: Sequence[Window]) -> Tensor:
        found = torch.zeros(len(windows), 2 * self.network.config.hidden_size, dtype=torch.float64)
        with torch.inference_mode():
            for rows in batches([len(window.content[0]) + 2 for window in windows]):
                tokens = self.tokens([windows[i] for i in rows])
                texts = self.network.encode(tokens.ids, tokens.mask, side=1)
                assert texts.states is not None
                first = torch.nn.functional.normalize(texts.states[:, 0].float(), dim=-1)
                found[rows] = torch.cat([texts.sentence.float(), first], -1).double().cpu()
        return found

    def sentence_vectors(self, statements: Sequence[str]) -> Tensor:
        """Frozen sentence vectors, float32 [n, d], length 1."""
        return torch.stack([value.sentence[0] for value in self._encoded_values(statements, "")]).float()

    def _encoded_values(self, statements: Sequence[str], context: str) -> list[Encoded]:
        """Each value encoded, from the cache or now; rows of one, without padding."""
        found = [self._values.get((statement, context)) for statement in statements]
        missing = [i for i, item in enumerate(found) if item is None]
        for start in range(0, len(missing), 64):
            chunk = missing[start : start + 64]
            with torch.inference_mode():
                tokens = self.pieces.statements([statements[i] for i in chunk], [context] * len(chunk)).to(self.device)
                encoded = self.network.encode(tokens.ids, tokens.mask, side=0)
            assert encoded.states is not None
            for row, i in enumerate(chunk):
                length = int(tokens.mask[row].sum())
                one = Encoded(
                    encoded.mask[row : row + 1, :length].clone(),
                    encoded.lower[row : row + 1, :length].clone(),
                    encoded.sentence[row : row + 1].clone(),
                    encoded.states[row : row + 1, :1].clone(),
                )
                self._values.put((statements[i], context), one)
                found[i] = one
        return found

    def _cached(self, texts: Encoded, values: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        parts = []
        size = max(1, _PAIRS_A_BATCH // len(texts.mask))
        for start in range(0, len(values), size):
            chunk = values[start : start + size]
            vectors = torch.cat([value.states[:, 0] for value in chunk if value.states is not None])
            parts.append(self.network.cached_logits(texts, vectors, torch.cat([value.sentence for value in chunk])))
        return torch.cat([r for r, _ in parts], 1), torch.cat([b for _, b in parts], 1)

    def _cross(self, texts: Encoded, values: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        count = len(texts.mask)
        columns = []
        for value in values:
            lower, mask = value.lower.expand(count, -1, -1), value.mask.expand(count, -1)
            columns.append(self.network.cross_logits(texts, Encoded(mask, lower, value.sentence.expand(count, -1), None)))
        return torch.stack([r for r, _ in columns], 1), torch.stack([b for _, b in columns], 1)


class HanPath:
    """Chinese, by the character network; statements in other scripts go in as the encoder's sentence vectors."""

    name = "characters"

    def __init__(self, network: CharacterNetwork, words: SentenceEncoder):
        self.network = network
        self._words = words
        self._values = LeastRecent(_CACHED_VALUES)
        self._window = network.config.max_characters

    @property
    def device(self) -> torch.device:
        return self.network.entry.weight.device

    def cut(self, texts: Sequence[str]) -> list[list[Window]]:
        step = self._window - 2 * OVERLAP
        found = []
        for text in texts:
            starts = range(0, max(1, len(text) - 2 * OVERLAP), step) if len(text) > self._window else (0,)
            found.append([Window(s, min(len(text), s + self._window), text[s : s + self._window]) for s in starts])
        return found

    def logits(self, windows: Sequence[Window], statements: Sequence[str], context: str, mode: ReadingMode) -> tuple[Tensor, Tensor, str]:
        relevance = torch.zeros(len(windows), len(statements), dtype=torch.float64)
        broken = torch.zeros_like(relevance)
        with torch.inference_mode():
            vectors = self._value_vectors(statements, context)
            for rows in batches([len(window.content) + 1 for window in windows]):
                batch = character_batch([windows[i].content for i in rows], self._window)
                states = self.network.encode_text(batch.ids.to(self.device), batch.mask.to(self.device))
                r, b = self.network.logits(states, vectors)
                relevance[rows], broken[rows] = r.double().cpu(), b.double().cpu()
        return relevance, broken, "characters"

    def features(self, windows: Sequence[Window]) -> Tensor:
        with torch.inference_mode():
            batch = character_batch([window.content for window in windows], self._window)
            states = self.network.encode_text(batch.ids.to(self.device), batch.mask.to(self.device))
            real = states.mask[..., None].float()
            mean = (states.hidden.float() * real).sum(1) / real.sum(1)
            return torch.cat([torch.nn.functional.normalize(part.float(), dim=-1) for part in (mean, states.bag)], -1).double().cpu()

    def _value_vectors(self, statements: Sequence[str], context: str) -> Tensor:
        """Value vectors [n, d]; a context is read as the statement's first words."""
        found = []
        for statement in statements:
            statement = chinese_wordings().get(statement, statement)
            worded = f"{context}\uff1a{statement}" if context else statement
            vector = self._values.get(worded)
            if vector is None:
                if is_han(worded):
                    batch = character_batch([worded], self._window)
                    vector = self.network.encode_values(batch.ids.to(self.device), batch.mask.to(self.device))
                else:
                    vector = self.network.encode_sentences(self._words.sentence_vectors([worded]).to(self.device))
                self._values.put(worded, vector)
            found.append(vector)
        return torch.cat(found)


@cache
def chinese_wordings() -> dict[str, str]:
    """The Chinese statement of each known value's English one."""
    return {item["en"]: item["zh"] for item in known_values().values() if "zh" in item}


def is_han(text: str) -> bool:
    """Whether a text is for the character path: at least three in ten of its letters are Chinese characters or kana."""
    letters = han = 0
    for character in text[:2000]:
        if character.isalpha():
            letters += 1
            han += "\u3400" <= character <= "\u9fff" or "\u3040" <= character <= "\u30ff" or "\uf900" <= character <= "\ufaff"
    return letters > 0 and han >= 0.3 * letters
