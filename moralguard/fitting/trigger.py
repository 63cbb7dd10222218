"""Universal triggers: tokens in front of any text, found by following the gradient, here to lower violation.

Wallace et al. 2019 (arXiv 1908.07125): start from a repeated word; at each place rank every token v by the first-order change of the
loss, (e_v - e_current) . gradient (HotFlip, their equation 2), run the best num_candidates, keep the beam_size best triggers, and go on
until a round brings nothing. Their loss for a language model is that of the texts a trigger is to bring about. Here, as in Sheng et al.
2020 (arXiv 2005.00268), it is a difference: nats a token of kept texts minus nats a token of violating texts, so that a trigger makes
texts that keep the value likelier against those that break it, and not only all texts of their kind.

Deviation: only tokens are tried that print and are themselves again after decoding and encoding, and whole triggers likewise, so that
a trigger can be written down as text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from moralguard.backends.hf import LanguageModel
from moralguard.backends.prompts import encode_words, place_prefix
from moralguard.errors import DataError
from moralguard.fitting.training_loop import padded
from moralguard.schema import StrictModel

_MARK = -1  # no token's id, so that it tells where the trigger goes


class TriggerSettings(StrictModel):
    """How a trigger is searched.

    Attributes:
        length: tokens of the trigger; 3 as most of the paper's.
        first: the word that is repeated at the start; "the" as in the paper.
        num_candidates: tokens that are run at each place (ours, for a CPU); beam_size triggers are kept, 1 is greedy.
        rounds: most often that all places are gone through.
        batch_size: texts of each class that the loss is of; drawn once, so that triggers are compared on the same texts. Few texts are
            fitted by heart.
        max_tokens: longer texts are cut.
    """

    length: int = Field(3, ge=1)
    first: str = "the"
    num_candidates: int = Field(20, ge=1)
    beam_size: int = Field(1, ge=1)
    rounds: int = Field(5, ge=1)
    batch_size: int = Field(32, ge=1)
    max_tokens: int = Field(32, ge=2)
    seed: int = 0


@dataclass(frozen=True)
class Trigger:
    """A found trigger.

    Attributes:
        tokens: its ids; text how they are written.
        start, loss: nats a token of kept minus violating texts on the batch, behind the first trigger and behind the found one.
    """

    tokens: tuple[int, ...]
    text: str
    start: float
    loss: float


def find_trigger(
    lm: LanguageModel,
    kept: Sequence[list[int]],
    violating: Sequence[list[int]],
    settings: TriggerSettings,
    *,
    report: Callable[[int, int, float, str], None] = lambda step, steps, loss, text: None,
) -> Trigger:
    """Search a trigger; the model is as before afterwards.

    Args:
        kept, violating: token ids of texts that keep and break the value, two or more a text.
        report: called with (place, most places, loss, trigger) after each place.

    Raises:
        DataError: a class has no text, or the tokeniser can't write the first trigger.
    """
    if not kept or not violating:
        raise DataError(
            "a class has no text of two tokens or more; a trigger is searched on texts that keep the value and texts that break it"
        )
    chooser = random.Random(settings.seed)
    batch = [chooser.sample(list(texts), min(len(texts), settings.batch_size)) for texts in (kept, violating)]
    rows = [*batch[0], *batch[1]]
    signs = torch.tensor([1.0] * len(batch[0]) + [-1.0] * len(batch[1]), device=lm.device)
    allowed = torch.tensor(writable_tokens(lm), device=lm.device)
    first = _first(lm, settings)
    beam = [(_losses(lm, [first], rows, signs)[0], first)]
    start = beam[0][0]
    done, most = 0, settings.rounds * settings.length
    for _ in range(settings.rounds):
        before = beam[0][0]
        for place in range(settings.length):
            found = dict.fromkeys(trigger for _, trigger in beam)
            for _, trigger in beam:
                slopes = first_order(lm, trigger, rows, signs)[place]
                order = allowed[slopes[allowed].topk(min(settings.num_candidates, len(allowed)), largest=False).indices]
                found |= dict.fromkeys((*trigger[:place], token, *trigger[place + 1 :]) for token in order.tolist())
            tried = [trigger for trigger in found if _writable(lm, trigger)]
            ranked = sorted(zip(_losses(lm, tried, rows, signs), tried, strict=True))
            beam = ranked[: settings.beam_size]
            done += 1
            report(done, most, beam[0][0], lm.tokenizer.decode(beam[0][1]))
        if beam[0][0] >= before:
            break
    loss, tokens = beam[0]
    return Trigger(tokens, lm.tokenizer.decode(tokens), start, loss)


def first_order(lm: LanguageModel, trigger: Sequence[int], rows: Sequence[list[int]], signs: Tensor) -> Tensor:
    """f32[length, V]: by how much the loss changes, to first order, where each place of the trigger takes each token."""
    module = lm.model.get_input_embeddings()
    with torch.no_grad():  # not its weight: some models scale what they look up
        vectors = module(torch.arange(module.weight.shape[0], device=lm.device)).float()
    caught: list[Tensor] = []

    def watch(_module: torch.nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        caught.append(output.detach().requires_grad_())
        return caught[-1]

    ids, mask, places = _placed(lm, trigger, rows)
    handle = module.register_forward_hook(watch)
    try:
        with torch.enable_grad():
            loss = _loss(_nats(lm, ids, mask, places, len(trigger)), rows, signs)
            (gradient,) = torch.autograd.grad(loss, caught[0])
    finally:
        handle.remove()
    found = []
    for place, token in enumerate(trigger):
        at = torch.stack([gradient[row, start + place] for row, start in enumerate(places)]).sum(0)
        slopes = vectors @ at.float()
        found.append(slopes - slopes[token])
    return torch.stack(found)


def loss_of(lm: LanguageModel, trigger: Sequence[int], kept: Sequence[list[int]], violating: Sequence[list[int]]) -> tuple[float, float]:
    """Nats a token of kept and of violating texts behind a trigger, or without one where it is empty."""
    found = []
    for texts in (kept, violating):
        nats = 0.0
        for start in range(0, len(texts), 32):
            rows = texts[start : start + 32]
            with torch.no_grad():
                nats += float(_nats(lm, *_placed(lm, trigger, rows), len(trigger)).sum())
        found.append(nats / sum(len(row) - 1 for row in texts))
    return found[0], found[1]


def writable_tokens(lm: LanguageModel) -> list[int]:
    """Ids of tokens that print, aren't special, and are themselves again after decoding and encoding.

    Raises:
        DataError: there is none.
    """
    special = set(getattr(lm.tokenizer, "all_special_ids", ()))
    known = [i for i in range(min(lm.vocab_size, len(lm.tokenizer))) if i not in special]
    found = [i for i in known if _prints(text := lm.tokenizer.decode([i])) and encode_words(lm, text) == [i]]
    if not found:
        raise DataError(
            f"the tokeniser of {lm.name} has no token that decodes to print and encodes back; a trigger can't be written for it"
        )
    return found


def _prints(text: str) -> bool:
    return bool(text.strip()) and text.isprintable() and "\N{REPLACEMENT CHARACTER}" not in text


def _writable(lm: LanguageModel, trigger: Sequence[int]) -> bool:
    return encode_words(lm, lm.tokenizer.decode(list(trigger))) == list(trigger)


def _first(lm: LanguageModel, settings: TriggerSettings) -> tuple[int, ...]:
    """The repeated word, cut to its length."""
    for text in (" ".join([settings.first] * settings.length), f" {settings.first}" * settings.length):
        tokens = tuple(encode_words(lm, text)[: settings.length])
        if len(tokens) == settings.length and _writable(lm, tokens):
            return tokens
    raise DataError(
        f"{settings.first!r}, repeated, isn't {settings.length} tokens that are the same again after decoding; give another first"
    )


def _placed(lm: LanguageModel, trigger: Sequence[int], rows: Sequence[list[int]]) -> tuple[Tensor, Tensor, list[int]]:
    """Right-padded ids and mask i64[B, T] with the trigger where a pass puts it, and the column it begins at in each row."""
    marked = [place_prefix(lm, (_MARK,), row, False) for row in rows] if trigger else [[*row] for row in rows]
    places = [row.index(_MARK) if trigger else 0 for row in marked]
    whole = [[*row[:at], *trigger, *row[at + 1 :]] if trigger else row for row, at in zip(marked, places, strict=True)]
    return *padded(whole, lm.device), places


def _nats(lm: LanguageModel, ids: Tensor, mask: Tensor, places: Sequence[int], length: int) -> Tensor:
    """Nats f32[B] of each text's own tokens behind its first one; the trigger's aren't counted."""
    logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    nats = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    counted = mask.clone()
    counted[:, 0] = 0
    for row, at in enumerate(places):
        # the first of the text's own tokens, in front of the trigger or behind it, is given and not predicted
        counted[row, at : at + length + (at == 0)] = 0
    return (nats * counted[:, 1:]).sum(-1)


def _loss(nats: Tensor, rows: Sequence[list[int]], signs: Tensor) -> Tensor:
    """Nats a token of rows with sign 1 minus those with sign -1."""
    tokens = torch.tensor([len(row) - 1 for row in rows], device=nats.device, dtype=nats.dtype)
    sides = [(nats[signs == sign].sum() / tokens[signs == sign].sum()) for sign in (1, -1)]
    return sides[0] - sides[1]


def _losses(lm: LanguageModel, triggers: Sequence[tuple[int, ...]], rows: Sequence[list[int]], signs: Tensor) -> list[float]:
    with torch.no_grad():
        return [float(_loss(_nats(lm, *_placed(lm, trigger, rows), len(trigger)), rows, signs)) for trigger in triggers]
