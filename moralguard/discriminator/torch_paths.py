"""The paths' networks on torch: the encoder that reads English, and the character network that reads Chinese."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moralguard.discriminator.character_path import CharacterPath as CharacterNetwork
from moralguard.discriminator.character_path import TextStates, character_batch
from moralguard.discriminator.network import Encoded, Network
from moralguard.discriminator.paths import CACHED_VALUES, PAIRS_A_BATCH, LeastRecent, ReadingMode, Window, batches, cut_by_pieces
from moralguard.discriminator.tokens import Tokens, WordPieces


class WordPath:
    """English, by the encoder.

    Mode "cached" reads texts against cached value vectors, "cross" each text together with each value.
    """

    name = "words"

    def __init__(self, network: Network, pieces: WordPieces):
        self.network = network
        self.pieces = pieces
        self._values = LeastRecent(CACHED_VALUES)

    @property
    def device(self) -> torch.device:
        return self.network.sides.weight.device

    def cut(self, texts: Sequence[str]) -> list[list[Window]]:
        return cut_by_pieces(self.pieces, texts)

    def logits(
        self, windows: Sequence[Window], statements: Sequence[str], context: str, mode: ReadingMode
    ) -> tuple[np.ndarray, np.ndarray, str]:
        cross = mode == "cross"
        relevance = np.zeros((len(windows), len(statements)))
        broken = np.zeros_like(relevance)
        with torch.inference_mode():
            values = self._encoded_values(statements, context)
            for rows in batches([len(window.content[0]) + 2 for window in windows]):
                tokens = self.tokens([windows[i] for i in rows])
                texts = self.network.encode(tokens.ids, tokens.mask, side=1, alone=not cross)
                found = self._cross(texts, values) if cross else self._cached(texts, values)
                relevance[rows], broken[rows] = (logits.double().cpu().numpy() for logits in found)
        return relevance, broken, mode

    def tokens(self, windows: Sequence[Window]) -> Tokens[Tensor]:
        """The windows' tokens, padded, on the network's device."""
        return self.pieces.rows([window.content[0] for window in windows]).to(self.device)

    def features(self, windows: Sequence[Window]) -> np.ndarray:
        found = np.zeros((len(windows), 2 * self.network.config.hidden_size))
        with torch.inference_mode():
            for rows in batches([len(window.content[0]) + 2 for window in windows]):
                tokens = self.tokens([windows[i] for i in rows])
                texts = self.network.encode(tokens.ids, tokens.mask, side=1)
                assert texts.states is not None
                first = torch.nn.functional.normalize(texts.states[:, 0].float(), dim=-1)
                found[rows] = torch.cat([texts.sentence.float(), first], -1).double().cpu().numpy()
        return found

    def sentence_vectors(self, statements: Sequence[str]) -> np.ndarray:
        """Frozen sentence vectors, float32 [n, d], length 1."""
        return torch.stack([value.sentence[0] for value in self._encoded_values(statements, "")]).float().cpu().numpy()

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
        size = max(1, PAIRS_A_BATCH // len(texts.mask))
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


class TorchCharacters:
    """A ``CharacterReader`` on torch; value vectors are tensors on the network's device."""

    def __init__(self, network: CharacterNetwork):
        self.network = network
        self.limit = network.config.max_characters

    @property
    def device(self) -> torch.device:
        return self.network.entry.weight.device

    @torch.inference_mode()
    def statement(self, worded: str) -> Tensor:
        batch = character_batch([worded], self.limit)
        return self.network.encode_values(batch.ids.to(self.device), batch.mask.to(self.device))

    @torch.inference_mode()
    def sentence(self, vectors: np.ndarray) -> Tensor:
        return self.network.encode_sentences(torch.from_numpy(vectors).to(self.device))

    @torch.inference_mode()
    def logits(self, texts: Sequence[str], vectors: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        relevance, broken = self.network.logits(self._states(texts), torch.cat(list(vectors)))
        return relevance.double().cpu().numpy(), broken.double().cpu().numpy()

    @torch.inference_mode()
    def features(self, texts: Sequence[str]) -> np.ndarray:
        states = self._states(texts)
        real = states.mask[..., None].float()
        mean = (states.hidden.float() * real).sum(1) / real.sum(1)
        parts = [torch.nn.functional.normalize(part.float(), dim=-1) for part in (mean, states.bag)]
        return torch.cat(parts, -1).double().cpu().numpy()

    def _states(self, texts: Sequence[str]) -> TextStates:
        batch = character_batch(texts, self.limit)
        return self.network.encode_text(batch.ids.to(self.device), batch.mask.to(self.device))
