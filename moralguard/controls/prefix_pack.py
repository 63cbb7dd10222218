"""Packs of kind ``prefix`` as passes: found tokens, learned vectors, or a learned cache, in front of the request's text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moralguard.backends.arrays import kind_of
from moralguard.decoding.passes import Pass
from moralguard.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moralguard.backends.hf import LanguageModel
    from moralguard.packs import Pack

PREFIX_FILE = "prefix.safetensors"


def prefix_pass(lm: LanguageModel, pack: Pack, where: str) -> Pass:
    """A pass on the model's own weights behind the prefix of a pack.

    Tokens (a trigger) go where a text prefix goes: behind a beginning-of-text token, and inside the first turn of a chat. Vectors and
    caches stand before everything, as in their papers.

    Args:
        pack: of kind ``prefix``; its fingerprint is compared with the model's.
        where: for messages.

    Raises:
        ModelError: the pack is another model's, its tensors don't fit this one, or the model can't take what isn't tokens (ONNX).
    """
    pack.check(lm)
    name = f"{where}: {pack.folder / PREFIX_FILE}"
    found = pack.arrays(PREFIX_FILE)
    if set(found) == {"tokens"}:
        return Pass(lm, _tokens(lm, found["tokens"], name))
    if kind_of(lm) != "torch":
        held = "vectors" if "embeddings" in found else "keys and values"
        raise ModelError(
            f"{where} is the prefix pack {pack.folder} of {held}, which needs a PyTorch model; {lm.name} runs on ONNX Runtime, whose "
            "graph begins with tokens: use a trigger there (`moralguard fit trigger`) or a prompt"
        )
    from moralguard.backends.learned_prefix import prefix_of

    return Pass(lm, learned=prefix_of(lm, pack.tensors(PREFIX_FILE), name))


def _tokens(lm: LanguageModel, tokens: NDArray[np.generic], name: str) -> tuple[int, ...]:
    if tokens.ndim != 1 or not len(tokens) or not np.issubdtype(tokens.dtype, np.integer):
        raise ModelError(f"{name} holds tokens of {tokens.dtype} {list(tokens.shape)}; expected one or more ids, i64[n]: fit it again")
    ids = tuple(int(token) for token in tokens)
    bad = next((i for i in ids if not 0 <= i < lm.vocab_size), None)
    if bad is not None:
        raise ModelError(f"{name} holds token id {bad}, outside the vocabulary of {lm.name} (0 to {lm.vocab_size - 1}); fit it again")
    return ids
