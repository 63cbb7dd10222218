"""English by the network on onnxruntime, in place of the encoder on torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moralguard.discriminator.onnx_network import OnnxEncoded, OnnxNetwork
from moralguard.discriminator.paths import CACHED_VALUES, PAIRS_A_BATCH, LeastRecent, ReadingMode, Window, batches, cut_by_pieces
from moralguard.discriminator.tokens import WordPieces
from moralguard.errors import DataError

_VALUES_A_BATCH = 64


@dataclass(frozen=True, slots=True)
class _Value:
    encoded: OnnxEncoded
    vector: np.ndarray  # its first state read alone, float32 [1, d]


class OnnxPath:
    """Reads what ``WordPath`` reads, to the rounding of float32; it has no features, so it can't be adapted."""

    name = "words"

    def __init__(self, network: OnnxNetwork, pieces: WordPieces):
        self.network = network
        self.pieces = pieces
        self._values = LeastRecent(CACHED_VALUES)

    def cut(self, texts: Sequence[str]) -> list[list[Window]]:
        return cut_by_pieces(self.pieces, texts)

    def logits(
        self, windows: Sequence[Window], statements: Sequence[str], context: str, mode: ReadingMode
    ) -> tuple[np.ndarray, np.ndarray, str]:
        relevance = np.zeros((len(windows), len(statements)))
        broken = np.zeros_like(relevance)
        values = self._encoded_values(statements, context)
        for rows in batches([len(window.content[0]) + 2 for window in windows]):
            tokens = self.pieces.rows([windows[i].content[0] for i in rows])
            texts = self.network.encode(tokens.ids, tokens.mask)
            found = self._cross(texts, values) if mode == "cross" else self._cached(texts, values)
            relevance[rows], broken[rows] = found
        return relevance, broken, mode

    def features(self, windows: Sequence[Window]) -> np.ndarray:
        raise DataError(
            "a discriminator on onnxruntime has no features to adapt; adapt it on torch: install torch and call Discriminator.load() "
            "without onnx="
        )

    def sentence_vectors(self, statements: Sequence[str]) -> np.ndarray:
        """Frozen sentence vectors, float32 [n, d], length 1."""
        return np.concatenate([value.encoded.sentences for value in self._encoded_values(statements, "")])

    def _encoded_values(self, statements: Sequence[str], context: str) -> list[_Value]:
        """Each value encoded, from the cache or now; rows of one, without padding."""
        found = [self._values.get((statement, context)) for statement in statements]
        missing = [i for i, item in enumerate(found) if item is None]
        for start in range(0, len(missing), _VALUES_A_BATCH):
            chunk = missing[start : start + _VALUES_A_BATCH]
            tokens = self.pieces.statements([statements[i] for i in chunk], [context] * len(chunk))
            encoded = self.network.encode(tokens.ids, tokens.mask)
            vectors = self.network.first_states(encoded)
            for row, i in enumerate(chunk):
                own, length = slice(row, row + 1), int(tokens.mask[row].sum())
                # copies, so that the cache holds no more than it needs
                lower, sentences = encoded.lower[own, :length].copy(), encoded.sentences[own].copy()
                found[i] = _Value(OnnxEncoded(tokens.mask[own, :length].copy(), lower, sentences), vectors[own].copy())
                self._values.put((statements[i], context), found[i])
        return found

    def _cached(self, texts: OnnxEncoded, values: Sequence[_Value]) -> tuple[np.ndarray, np.ndarray]:
        parts = []
        size = max(1, PAIRS_A_BATCH // len(texts.mask))
        for start in range(0, len(values), size):
            chunk = values[start : start + size]
            vectors = np.concatenate([value.vector for value in chunk])
            parts.append(self.network.cached(texts, vectors, np.concatenate([value.encoded.sentences for value in chunk])))
        return np.concatenate([r for r, _ in parts], 1), np.concatenate([b for _, b in parts], 1)

    def _cross(self, texts: OnnxEncoded, values: Sequence[_Value]) -> tuple[np.ndarray, np.ndarray]:
        count = len(texts.mask)
        columns = []
        for value in values:
            one = value.encoded
            repeated = (np.repeat(array, count, 0) for array in (one.mask, one.lower, one.sentences))
            columns.append(self.network.cross(texts, OnnxEncoded(*repeated)))
        return np.stack([r for r, _ in columns], 1), np.stack([b for _, b in columns], 1)
