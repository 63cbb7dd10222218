"""How much tokens and laws lean to one of two groups, by the direction between the groups in a model's token embeddings.

Yang et al. 2023 (arXiv 2210.04492) and their released code, with e_x the input embedding of token x, v the direction and a in {0, 1}:

    v          sum of e_1 - e_0 over the pairs: the first component of the supervised PCA that they fit, which for two classes of
               centred pairs has rank 1
    p(a|x)     sigmoid(+-cos(e_x, v) / tau), tau = .1
    p(a|x, c)  the same of the mean of the context's embeddings and e_x
    p(x|a)     in proportion to p(x) p(a|x) where p(a|x) > .75

Deviation: embeddings are taken less their mean over the vocabulary and less their first principal components (Mu & Viswanath 2018,
arXiv 1702.01417). Without that 45,480 of SmolLM2-135M's 49,152 tokens lean to women, and the rest to men are frequent tokens of any
kind; less one component they are " her", " she", " women" and " he", " man", " his". ``components`` 0 is as published.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import logsigmoid

from moralguard.backends.prompts import encode_words
from moralguard.errors import PolicyError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moralguard.backends.hf import LanguageModel

_TAU = 0.1  # the released code's
_LEANS = 0.75
_ALPHABET = 300  # entries of a byte-pair vocabulary before its merges: 256 bytes and special tokens
_SMALL = 1e-12  # an embedding of zeros has no direction


class GroupPolarity:
    """Two groups in the vocabulary of a model.

    Args:
        lm: the model; the weights of its embeddings are only read.
        pairs: (word of group 0, word of group 1); words or token ids.
        frequencies: f32[V], p(x) up to a factor; None for Zipf's law over the ids. components: how many are left out.
        name: the control's, for messages.

    Attributes:
        log_odds: f32[V], log p(a=1|x) / p(a=0|x).
        laws: f32[2, V], p(x|a).

    Raises:
        PolicyError: a word can't be read, the pairs give no direction, or no token leans to one of the groups.
    """

    def __init__(
        self,
        lm: LanguageModel,
        pairs: tuple[tuple[int | str, int | str], ...],
        frequencies: NDArray[np.float32] | None,
        components: int,
        name: str,
    ):
        weight = lm.model.get_input_embeddings().weight.detach()
        if weight.shape[0] < lm.vocab_size:
            raise PolicyError(f"{name} pairs need an embedding of each token; {lm.name} has {weight.shape[0]} for {lm.vocab_size} tokens")
        self.embeddings = weight[: lm.vocab_size]
        wide = self.embeddings.float()
        self.mean = wide.mean(0) if components else torch.zeros_like(wide[0])
        wide = wide - self.mean
        if components >= wide.shape[1]:
            raise PolicyError(
                f"{name} leaves out {components} components of the embeddings, but {lm.name} has no more than {wide.shape[1]}"
            )
        self.common = torch.linalg.eigh(wide.T @ wide)[1][:, wide.shape[1] - components :]  # f32[d, components]
        wide = self._rid(wide)
        means = [[wide[_ids_of(lm, word, name)].mean(0) for word in pair] for pair in pairs]
        direction = torch.stack([one - zero for zero, one in means]).sum(0)
        if not float(direction.norm()) > _SMALL:
            raise PolicyError(f"{name} pairs give no direction on {lm.name}: the embeddings of the two groups are the same")
        self.direction = direction / direction.norm()
        self.along, self.square = wide @ self.direction, (wide * wide).sum(-1)
        self.log_odds = self.along / self.square.sqrt().clamp_min(_SMALL) / _TAU
        given = torch.stack([torch.sigmoid(-self.log_odds), torch.sigmoid(self.log_odds)])
        weights = given * (given > _LEANS) * _frequencies(lm, frequencies, name)
        if not bool((weights.sum(-1) > 0).all()):
            raise PolicyError(f"{name} pairs: no token of {lm.name} leans to group {int(weights.sum(-1).argmin())}; give other pairs")
        self.laws = weights / weights.sum(-1, keepdim=True)
        # 1/2 sum_a p(a|x) log 2 p(a|x): what a token says of the groups whatever stands before it
        logs = torch.stack([logsigmoid(-self.log_odds), logsigmoid(self.log_odds)])
        self.information = (given * (logs + math.log(2.0))).sum(0) / 2

    def gap(self, law: torch.Tensor) -> torch.Tensor:
        """|H(p, p(x|a=0)) - H(p, p(x|a=1))|, f32[R] of laws f32[R, V]; H(p, q) = sqrt(1 - sum_x sqrt(p q)) is Hellinger's distance."""
        distances = (1 - law.sqrt() @ self.laws.sqrt().T).clamp_min(0).sqrt()
        return (distances[:, 0] - distances[:, 1]).abs()

    def loss(self, law: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """sum_x p(x) [KL(p(a|x, c) || p(a|x)) + 1/2 sum_a p(a|x) log 2 p(a|x)], f32[R]; the gradient goes through the law.

        Args:
            law: f32[R, V]. context: f32[R, d], what ``context`` gives; cosines don't tell a sum from a mean.
        """
        # a context has neither mean nor common part, so that its product with an embedding's is the embedding's own
        inner = (context.to(self.embeddings.dtype) @ self.embeddings.T).float() - (context @ self.mean)[:, None]
        norm = ((context * context).sum(-1, keepdim=True) + 2 * inner + self.square).clamp_min(_SMALL).sqrt()
        odds = ((context @ self.direction)[:, None] + self.along) / norm / _TAU
        change = sum(torch.sigmoid(sign * odds) * (logsigmoid(sign * odds) - logsigmoid(sign * self.log_odds)) for sign in (-1.0, 1.0))
        return (law * (change + self.information)).sum(-1)

    def context(self, history: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """f32[R, d], sum of the embeddings of tokens i64[R, T] under a mask i64[R, T]."""
        total = (self.embeddings[history].float() * mask[..., None]).sum(1) - mask.sum(-1, keepdim=True) * self.mean
        return self._rid(total)

    def _rid(self, vectors: torch.Tensor) -> torch.Tensor:
        """f32[..., d] without the common components."""
        return vectors - (vectors @ self.common) @ self.common.T


def _ids_of(lm: LanguageModel, word: int | str, name: str) -> list[int]:
    if isinstance(word, int):
        if not 0 <= word < lm.vocab_size:
            raise PolicyError(f"{name} pairs hold token id {word}, outside the vocabulary of {lm.name} (0 to {lm.vocab_size - 1})")
        return [word]
    if lm.tokenizer is None:
        raise PolicyError(f"{name} pairs hold the word {word!r}, but {lm.name} was given without a tokenizer; give token ids")
    ids = [int(i) for i in encode_words(lm, " " + word.strip())]
    if not word.strip() or not ids:
        raise PolicyError(f"{name} pairs hold {word!r}, which isn't a word")
    return ids


def _frequencies(lm: LanguageModel, given: NDArray[np.float32] | None, name: str) -> torch.Tensor:
    """f32[V], on the model's device."""
    if given is None:
        # 1 / rank in the order in which byte-pair merges were found; the bytes in front of them are in no such order
        zipf = 1 / torch.arange(lm.vocab_size, device=lm.device).clamp_min(_ALPHABET).float()
        if lm.tokenizer is not None:
            zipf[[i for i in lm.tokenizer.all_special_ids if i < lm.vocab_size]] = 0
        return zipf
    if len(given) != lm.vocab_size:
        raise PolicyError(f"{name} frequencies are {len(given)}, but {lm.name} has {lm.vocab_size} tokens")
    return torch.as_tensor(given, device=lm.device, dtype=torch.float32)
