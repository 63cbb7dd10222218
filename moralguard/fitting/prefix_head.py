"""Fitting a factored prefix head: P(v | y_<=t, w) from a model's own hidden state, every prefix of a text an example.

Yang & Klein 2021 (arXiv 2104.05218), section 3: the label of the whole text is the label of each of its prefixes. The head is the
bilinear form u(h_t) . g(E_w), so that all next tokens cost one thin product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from moralguard.backends.factored_head import FactoredHead
from moralguard.backends.hf import LanguageModel
from moralguard.errors import DataError, ModelError
from moralguard.fitting.checkpoints import linear_rate
from moralguard.fitting.head_metrics import measure, scikit_learn
from moralguard.fitting.hidden_states import LAST, Progress, encode_texts, token_states
from moralguard.fitting.labelled import LabelledText, LabelledTexts
from moralguard.schema import StrictModel

SHARES = (0.25, 0.5, 0.75, 1.0)
"""How much of a held-back text the head has read where it is measured."""

_LEAST_DEV = 5  # texts of either label; fewer would end the training by luck
_STEPS_A_PASS = 64  # at least, or few texts would hardly be learned from
_HALF = 65504.0


class PrefixHeadSettings(StrictModel):
    """How a prefix head is trained.

    Attributes:
        rank: k of the query and key matrices.
        epochs: passes over the prefixes, at most.
        batch_size: prefixes a step.
        learning_rate: peak rate of AdamW, decaying linearly; 0.06 / sqrt(d) where None: a step moves every weight, and so a logit
            by more the wider the states are.
        max_tokens: longer texts are cut.
        max_prefixes: more are sampled; each takes 2 d bytes.
        patience: passes without a lower dev loss after which training ends.
        bfloat16: compute the states in bfloat16.
    """

    rank: int = Field(16, ge=1)
    epochs: int = Field(20, ge=1)
    batch_size: int = Field(1024, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    max_tokens: int = Field(64, ge=2)
    max_prefixes: int = Field(100_000, ge=1)
    patience: int = Field(3, ge=1)
    seed: int = 0
    bfloat16: bool = False


@dataclass(frozen=True, eq=False)
class FittedPrefixHead:
    """A head and what it is worth.

    Attributes:
        head: logits of the sought class.
        metrics: of "train" texts, prefixes and loss; of "dev" and "test" texts (where there are such) loss, and by how much of the
            text was read ("25%" to "100%") what ``head_metrics.measure`` gives; "epochs": passes that the head was trained for.
    """

    head: FactoredHead
    metrics: dict[str, Any]


def fit_prefix_head(
    lm: LanguageModel,
    texts: LabelledTexts | Sequence[str],
    kept: Sequence[bool] | None = None,
    *,
    target: int = 1,
    rank: int = 16,
    epochs: int = 20,
    learning_rate: float | None = None,
    weight_decay: float = 1e-2,
    max_tokens: int = 64,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> FactoredHead:
    """A head for ``lm`` from labelled texts.

    Args:
        texts: whole texts. kept: whether each keeps the value; None where ``texts`` say it themselves.
        target: the class of labelled texts that is sought.
        rank, epochs, ...: as ``PrefixHeadSettings``.

    Raises:
        DataError: texts and labels that don't fit, or one label only.
        ModelError: the model's head has no known form, or it has no tokenizer.
    """
    settings = PrefixHeadSettings(
        rank=rank, epochs=epochs, learning_rate=learning_rate, weight_decay=weight_decay, max_tokens=max_tokens, seed=seed
    )
    if isinstance(texts, LabelledTexts):
        if kept is not None:
            raise DataError("labelled texts hold their labels; leave kept out")
        return _fit(lm, _binary(texts, target), settings, progress).head
    if kept is None or len(texts) != len(kept):
        given = "none" if kept is None else str(len(kept))
        raise DataError(f"a prefix head needs as many labels as texts ({len(texts)} texts, {given} labels) and both labels")
    rows = [LabelledText(text, int(bool(label)), "train") for text, label in zip(texts, kept, strict=True)]
    return _fit(lm, rows, settings, progress).head


def train_prefix_head(
    lm: LanguageModel,
    texts: LabelledTexts,
    settings: PrefixHeadSettings | None = None,
    *,
    target: int = 1,
    progress: Progress = lambda done, total: None,
) -> FittedPrefixHead:
    """A head for ``lm``, measured on the held-back texts.

    Args:
        target: the class that is sought; all others count as breaking the value.
        progress: called with (texts whose states are read, texts).

    Raises:
        DataError: ``target`` is no class, or too few texts have two tokens.
        ModelError: the model's head has no known form, it has no tokenizer, or scikit-learn isn't installed.
    """
    scikit_learn()
    fitted = _fit(lm, _binary(texts, target), settings or PrefixHeadSettings(), progress)
    metrics: dict[str, Any] = {"train": fitted.train, "epochs": fitted.epochs}
    for split, (logits, labels) in fitted.held.items():
        both = torch.stack([torch.zeros_like(logits), logits], -1)
        metrics[split] = {f"{share:.0%}": measure(both[:, i], labels.long().tolist()) for i, share in enumerate(SHARES)}
        metrics[split]["loss"] = float(F.binary_cross_entropy_with_logits(logits, labels[:, None].expand_as(logits)))
    return FittedPrefixHead(fitted.head, metrics)


@dataclass(frozen=True)
class _Fitted:
    """A head; facts on its training; of the held-back splits logits f32[texts, SHARES] and labels f32[texts]."""

    head: FactoredHead
    epochs: int
    train: dict[str, float]
    held: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Prefixes:
    """Prefixes of some texts, n of them.

    Attributes:
        states: f16[n, d] before the next token. following: that token's id, i64[n].
        text: i64[n], whose prefix it is. labels: of the texts, f32[texts].
    """

    states: Tensor
    following: Tensor
    text: Tensor
    labels: Tensor

    def of(self, rows: Sequence[LabelledText], split: str) -> Tensor:
        """Places i64[m] of the prefixes of a split."""
        marked = torch.tensor([row.split == split for row in rows], device=self.text.device)
        return marked[self.text].nonzero()[:, 0]

    def known(self, places: Tensor) -> Tensor:
        return self.labels[self.text[places]]

    def weights(self, places: Tensor) -> Tensor:
        """f32[m], 1 on average: both labels weigh the same, and of one label every text."""
        text = self.text[places]
        count = torch.bincount(text, minlength=len(self.labels)).float()
        texts = torch.stack([((count > 0) & (self.labels == label)).sum() for label in (0.0, 1.0)]).float()
        flat = 1 / (count[text] * texts[self.labels[text].long()])
        return flat / flat.mean()

    def texts_of_either_label(self, places: Tensor) -> int:
        """How many texts the rarer label has."""
        found = self.labels[self.text[places].unique()]
        return int(torch.minimum(found.sum(), (1 - found).sum()))


class _Standardised:
    """States and following tokens as the form reads them, by the moments of the training prefixes."""

    def __init__(self, prefixes: _Prefixes, train: Tensor, unembedding: Tensor):
        self._prefixes = prefixes
        self.centre, self.spread = _moments(prefixes.states, train)
        used, self._place = torch.unique(prefixes.following, return_inverse=True)
        embedding = unembedding[used].float()
        self.centre_key = embedding[self._place[train]].mean(0)
        self.spread_key = (embedding - self.centre_key).std(correction=0).clamp_min(1e-6)
        self._tokens = (embedding - self.centre_key) / self.spread_key

    def of(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """(states f32[m, d], tokens f32[m, d])."""
        return (self._prefixes.states[places].float() - self.centre) / self.spread, self._tokens[self._place[places]]


@dataclass
class _Form:
    """The bilinear form on standardised states n = (h - centre) / spread and tokens t = (e - centre_key) / spread_key.

    logit = (query n) . (key t) + linear . t + state . n + bias.
    """

    query: Tensor
    key: Tensor
    linear: Tensor
    state: Tensor
    bias: Tensor

    def parameters(self) -> list[Tensor]:
        return [self.query, self.key, self.linear, self.state, self.bias]

    def logits(self, normal: Tensor, tokens: Tensor) -> Tensor:
        return ((normal @ self.query.T) * (tokens @ self.key.T)).sum(-1) + tokens @ self.linear + normal @ self.state + self.bias

    def copy(self) -> _Form:
        return _Form(*(part.detach().clone() for part in self.parameters()))


def _binary(texts: LabelledTexts, target: int) -> list[LabelledText]:
    if not 0 <= target < len(texts.classes):
        raise DataError(f"target is {target}, but the classes are 0 to {len(texts.classes) - 1} ({', '.join(texts.classes)})")
    return [LabelledText(row.text, int(row.label == target), row.split) for row in texts.rows]


def _fit(lm: LanguageModel, rows: Sequence[LabelledText], settings: PrefixHeadSettings, progress: Progress) -> _Fitted:
    if len({row.label for row in rows if row.split == "train"}) < 2:
        raise DataError(f"a prefix head needs training texts of both labels; the {len(rows)} texts hold one")
    if lm.head is None:
        raise ModelError(f"{lm.name} has no head of a known form")
    encoded = encode_texts(lm, [row.text for row in rows], settings.max_tokens)
    whole = [i for i, ids in enumerate(encoded) if len(ids) >= 2]
    ids, rows = [encoded[i] for i in whole], [rows[i] for i in whole]
    generator = torch.Generator().manual_seed(settings.seed)
    places = _places(ids, rows, settings.max_prefixes, generator)
    if len({row.label for row, place in zip(rows, places, strict=True) if row.split == "train" and place}) < 2:
        raise DataError(
            f"the training texts of two tokens or more aren't of both labels, or max_prefixes ({settings.max_prefixes}) leaves one out; "
            "give more texts"
        )
    prefixes = _read(lm, ids, rows, places, settings.bfloat16, progress)
    train, dev = prefixes.of(rows, "train"), prefixes.of(rows, "dev")
    inputs = _Standardised(prefixes, train, lm.head.weight)
    form, epochs, loss = _train(prefixes, inputs, train, dev, settings, generator)
    held = {}
    for split in ("dev", "test"):
        judged = prefixes.of(rows, split)
        if len(judged):
            with torch.no_grad():
                logits = form.logits(*inputs.of(judged)).reshape(-1, len(SHARES))
            held[split] = (logits.cpu(), prefixes.known(judged).reshape(-1, len(SHARES))[:, 0].cpu())
    facts = {"texts": len(prefixes.text[train].unique()), "prefixes": len(train), "loss": loss}
    return _Fitted(_folded(form, inputs), epochs, facts, held)


def _train(
    prefixes: _Prefixes, inputs: _Standardised, train: Tensor, dev: Tensor, settings: PrefixHeadSettings, generator: torch.Generator
) -> tuple[_Form, int, float]:
    """The form with the lowest dev loss, the passes it took and the mean loss of the last one; without enough dev texts all passes."""
    width, device = prefixes.states.shape[1], prefixes.states.device
    form = _Form(
        (torch.randn(settings.rank, width, generator=generator) / width**0.5).to(device),
        # as in a LoRA adapter one factor starts at 0: the form begins linear, without noise in the product
        torch.zeros(settings.rank, width, device=device),
        torch.zeros(width, device=device),
        torch.zeros(width, device=device),
        torch.zeros((), device=device),
    )
    judged = len(dev) > 0 and prefixes.texts_of_either_label(dev) >= _LEAST_DEV
    weights, dev_weights = prefixes.weights(train), prefixes.weights(dev) if judged else None
    parameters = [part.requires_grad_() for part in form.parameters()]
    rate = settings.learning_rate or 0.06 / width**0.5
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=settings.weight_decay)
    size = max(1, min(settings.batch_size, len(train) // _STEPS_A_PASS))
    steps = settings.epochs * -(-len(train) // size)
    best, lowest, best_epoch, step, mean = form, float("inf"), 0, 0, 0.0
    for epoch in range(1, settings.epochs + 1):
        total = torch.zeros((), device=device)
        with torch.enable_grad():
            for chosen in torch.randperm(len(train), generator=generator).to(device).split(size):
                for group in optimizer.param_groups:
                    group["lr"] = rate * linear_rate(step, 1, steps)
                places = train[chosen]
                loss = F.binary_cross_entropy_with_logits(form.logits(*inputs.of(places)), prefixes.known(places), weights[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(chosen)
                step += 1
        mean = float(total) / len(train)
        if not judged:
            best, best_epoch = form, epoch
            continue
        with torch.no_grad():
            found = float(F.binary_cross_entropy_with_logits(form.logits(*inputs.of(dev)), prefixes.known(dev), dev_weights))
        if found < lowest:
            best, lowest, best_epoch = form.copy(), found, epoch
        elif epoch - best_epoch >= settings.patience:
            break
    return best, best_epoch, mean


def _places(rows: Sequence[Sequence[int]], texts: Sequence[LabelledText], most: int, generator: torch.Generator) -> list[list[int]]:
    """Which states of each text are read: of training texts all but the last, ``most`` sampled of more; of others those at SHARES."""
    trained = [i for i, text in enumerate(texts) if text.split == "train"]
    every = [(i, t) for i in trained for t in range(len(rows[i]) - 1)]
    if len(every) > most:
        every = [every[j] for j in sorted(torch.randperm(len(every), generator=generator)[:most].tolist())]
    found: list[list[int]] = [[] for _ in rows]
    for i, t in every:
        found[i].append(t)
    for i, text in enumerate(texts):
        if text.split != "train":
            last = len(rows[i]) - 1  # prefixes that have a next token
            found[i] = [max(0, -int(-share * last // 1) - 1) for share in SHARES]
    return found


def _read(
    lm: LanguageModel,
    ids: Sequence[Sequence[int]],
    rows: Sequence[LabelledText],
    places: Sequence[Sequence[int]],
    bfloat16: bool,
    progress: Progress,
) -> _Prefixes:
    """The prefixes that end at ``places``, in the order of the rows."""
    starts = [0]
    for place in places:
        starts.append(starts[-1] + len(place))
    states = torch.empty(starts[-1], lm.width, dtype=torch.float16, device=lm.device)
    for chosen, found, _ in token_states(lm, ids, bfloat16=bfloat16, progress=progress):
        for i, values in zip(chosen, found[LAST], strict=True):
            # half the memory; a few models have states beyond float16's range in some dimensions
            states[starts[i] : starts[i + 1]] = values[list(places[i])].clamp(-_HALF, _HALF).half()
    following = [row[t + 1] for row, place in zip(ids, places, strict=True) for t in place]
    text = [i for i, place in enumerate(places) for _ in place]
    labels = [float(row.label) for row in rows]
    return _Prefixes(states, *(torch.tensor(part, device=lm.device) for part in (following, text, labels)))


def _moments(states: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation f32[d] of some states, read in pieces."""
    total = torch.zeros(2, states.shape[1], dtype=torch.float64, device=states.device)
    centre = states[places[:256]].double().mean(0)  # squares of what is near 0 lose nothing
    for piece in places.split(4096):
        shifted = states[piece].double() - centre
        total += torch.stack([shifted.sum(0), (shifted**2).sum(0)])
    mean, square = total / len(places)
    return (centre + mean).float(), (square - mean**2).clamp_min(0).sqrt().clamp_min(1e-3).float()


def _folded(form: _Form, inputs: _Standardised) -> FactoredHead:
    """The head on raw hidden states and raw unembeddings."""
    query, key, linear, state, bias = (part.detach().double() for part in form.parameters())
    middle, spread = inputs.centre.double(), inputs.spread.double()
    middle_key, spread_key = inputs.centre_key.double(), inputs.spread_key.double()
    query, state, key, linear = query / spread, state / spread, key / spread_key, linear / spread_key
    # (Q (h - c)) . (K (e - m)) + l . (e - m) + s . (h - c) + b, multiplied out
    shift, shift_key = query @ middle, key @ middle_key
    constant = bias + shift @ shift_key - linear @ middle_key - state @ middle
    parts = (query, key, linear - key.T @ shift, state - query.T @ shift_key)
    whole = [part.float().contiguous() for part in parts]
    return FactoredHead(whole[0], whole[1], whole[2], float(constant), whole[3])
