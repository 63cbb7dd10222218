"""English by the exported network on onnxruntime, in place of the encoder on torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moralguard.discriminator.onnx_network import OnnxNetwork
from moralguard.discriminator.paths import LeastRecent, ReadingMode, Window, batches, cut_by_pieces
from moralguard.discriminator.tokens import WordPieces
from moralguard.errors import DataError

_CACHED_VALUES = 4096


class OnnxPath:
    """Reads what ``WordPath`` reads, to the rounding of float32; it has no features, so it can't be adapted."""

    name = "words"

    def __init__(self, network: OnnxNetwork, pieces: WordPieces):
        self.network = network
        self.pieces = pieces
        self._values = LeastRecent(_CACHED_VALUES)

    def cut(self, texts: Sequence[str]) -> list[list[Window]]:
        return cut_by_pieces(self.pieces, texts)

    def logits(self, windows: Sequence[Window], statements: Sequence[str], context: str, mode: ReadingMode) -> tuple[Tensor, Tensor, str]:
        cross = mode == "cross"
        relevance = torch.zeros(len(windows), len(statements), dtype=torch.float64)
        broken = torch.zeros_like(relevance)
        rows_of_values = [self.pieces.statements([statement], [context]) for statement in statements] if cross else []
        vectors = None if cross else self._value_vectors(statements, context)
        for rows in batches([len(window.content[0]) + 2 for window in windows]):
            tokens = self.pieces.rows([windows[i].content[0] for i in rows])
            if vectors is not None:
                r, b = self.network.cached_logits(tokens.ids, tokens.mask, *vectors)
                relevance[rows], broken[rows] = r.double(), b.double()
            for j, value in enumerate(rows_of_values):
                count = (len(rows), -1)
                r, b = self.network.cross_logits(tokens.ids, tokens.mask, value.ids.expand(count), value.mask.expand(count))
                relevance[rows, j], broken[rows, j] = r.double(), b.double()
        return relevance, broken, mode

    def features(self, windows: Sequence[Window]) -> Tensor:
        raise DataError("a discriminator on onnxruntime can't be adapted; adapt it on torch (Discriminator.load() without onnx=)")

    def sentence_vectors(self, statements: Sequence[str]) -> Tensor:
        """Frozen sentence vectors, float32 [n, d], length 1."""
        return self._value_vectors(statements, "")[1]

    def _value_vectors(self, statements: Sequence[str], context: str) -> tuple[Tensor, Tensor]:
        found = []
        for statement in statements:
            item = self._values.get((statement, context))
            if item is None:
                tokens = self.pieces.statements([statement], [context])
                item = self.network.value_vectors(tokens.ids, tokens.mask)
                self._values.put((statement, context), item)
            found.append(item)
        return torch.cat([vector for vector, _ in found]), torch.cat([sentence for _, sentence in found])
