"""The cheap explanation: gradient times input, one backward pass."""

from __future__ import annotations

import torch

from moralguard.discriminator.explanation import without_overlap
from moralguard.discriminator.judgement import Span
from moralguard.discriminator.torch_paths import WordPath


def gradient_spans(path: WordPath, text: str, statement: str, context: str, window: tuple[int, int]) -> tuple[Span, ...]:
    """Words by their share of P(broken), to first order, strongest first.

    The gradient of P(broken) by the states behind the shared layers, times those states less the mean state of the text; pieces of
    one word are summed. Simonyan et al. 2014 (arXiv 1312.6034); gradient times input: Shrikumar et al. 2017 (arXiv 1704.02685).
    """
    part = text[window[0] : window[1]]
    (piece,) = path.cut([part])[0][:1]
    tokens = path.tokens([piece])
    network = path.network
    values = path.pieces.statements([statement], [context]).to(path.device)
    with torch.no_grad():
        value = network.encode(values.ids, values.mask, side=0)
        text_encoded = network.encode(tokens.ids, tokens.mask, side=1, alone=False)
    assert value.states is not None
    with torch.enable_grad():
        lower = text_encoded.lower.clone().requires_grad_(True)
        states = network.encoder.tuned_states(lower + network.sides.weight[1], tokens.mask[:, None, None, :])
        read = type(text_encoded)(tokens.mask, lower, text_encoded.sentence, states)
        relevance, broken = network.cached_logits(read, value.states[:, 0], value.sentence)
        chance = torch.nn.functional.logsigmoid(relevance) + torch.nn.functional.logsigmoid(broken)
        (slope,) = torch.autograd.grad(chance.sum(), lower)
    centred = lower.detach() - lower.detach().mean(1, keepdim=True)
    share = (slope * centred).sum(-1)[0, 1:-1].double() * chance.exp().item()
    words: list[tuple[int, int, float]] = []
    for (start, end), weight in zip(piece.content[1], share.tolist(), strict=True):
        if words and words[-1][1] == start:  # a piece of the word before it
            words[-1] = (words[-1][0], end, words[-1][2] + weight)
        else:
            words.append((start, end, weight))
    chosen = without_overlap(sorted(words, key=lambda word: -word[2]), least=1e-6)
    return tuple(Span(window[0] + s, window[0] + e, part[s:e], weight) for s, e, weight in chosen)
