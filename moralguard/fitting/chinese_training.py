"""Fitting the discriminator's Chinese path on the data folder."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from moralguard.discriminator.character_path import (
    BAG_ORDERS,
    CharacterConfig,
    CharacterPath,
    buckets,
    character_batch,
    hash_ngrams,
    normalise,
    pad,
)
from moralguard.fitting.chinese_rows import (
    anti_bias_rows,
    cold_rows,
    doubtful,
    frequent_words,
    harm_rows,
    harmless_rows,
    mention_rows,
    moral_rows,
    swap_groups,
)
from moralguard.fitting.chinese_wordings import WORDINGS
from moralguard.fitting.rows import Row

SentenceEncoder = Callable[[Sequence[str]], Tensor]
"""English statements to their L2-normalised MiniLM vectors [N, 384]."""


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How a `CharacterPath` is fitted. The defaults are those of the shipped weights."""

    epochs: int = 5
    bag_epochs: int = 6
    batch: int = 256
    rate: float = 2e-3
    decay: float = 0.05
    smoothing: float = 0.05
    doubt: float = 0.45
    swap: float = 0.5
    gram_drop: float = 0.15
    values_per_text: int = 2
    english: float = 0.4
    opposite: float = 0.15
    average: float = 0.98
    templates: int = 1500
    bfloat16: bool = True


@dataclass(slots=True)
class _Text:
    """A text and its rows; the row of no_offense, if there is one, comes first and is taken in every epoch."""

    text: str
    hashes: np.ndarray
    rows: list[Row] = field(default_factory=list)


def chinese_rows(folder: Path, settings: FitSettings, *, seed: int) -> list[Row]:
    """All training rows of the Chinese path."""
    rows = list(cold_rows(folder, doubt=settings.doubt))
    texts = sorted({row.text for row in rows})
    moral, harmless = list(moral_rows(folder)), list(harmless_rows(folder))
    contexts = sorted({row.text for row in harmless if len(row.text) < 60})
    rows += moral + harmless
    rows += mention_rows(texts, frequent_words(texts), seed=seed)
    rows += anti_bias_rows(count=settings.templates, seed=seed)
    rows += harm_rows(contexts, count=settings.templates, seed=seed)
    return rows


def train_character_path(
    data_dir: Path,
    *,
    seed: int = 0,
    epochs: int | None = None,
    settings: FitSettings | None = None,
    config: CharacterConfig | None = None,
    sentence_encoder: SentenceEncoder | None = None,
    calibration_rows: Sequence[Row] | None = None,
    rows: Sequence[Row] | None = None,
) -> CharacterPath:
    """Fit a `CharacterPath` on the data folder: about five minutes on one CPU core with bfloat16 instructions.

    On cores that other programs use, one torch thread is many times faster than two (they wait for each other), and glibc's
    MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ set to gigabytes save fresh pages for every step's buffers.

    Args:
        data_dir: the folder with cold_train.jsonl.gz and the others.
        seed: of the weights, the order, the augmentation and the templates.
        epochs: instead of ``settings.epochs``.
        settings: how to fit.
        config: the model's sizes.
        sentence_encoder: MiniLM, for English statements; without it only Chinese statements are learnt.
        calibration_rows: no_offense rows on which .5 is made the operating point; COLD's dev rows if None.
        rows: training rows instead of those of ``data_dir``.
    """
    settings = settings or FitSettings()
    epochs = settings.epochs if epochs is None else epochs
    torch.manual_seed(seed)
    chance = random.Random(seed)
    model = CharacterPath(config or CharacterConfig())
    texts = _by_text(rows if rows is not None else chinese_rows(data_dir, settings, seed=seed), model.config.max_characters)
    statements = _Statements(settings, chance, sentence_encoder)
    fit_bag(model, texts, settings, chance)
    averaged = copy.deepcopy(model)
    tables = [model.characters.weight, model.bigrams.weight, model.bag.weight]
    others = [parameter for parameter in model.parameters() if not any(parameter is table for table in tables)]
    optimiser = torch.optim.AdamW(
        [{"params": tables, "weight_decay": settings.decay}, {"params": others, "weight_decay": settings.decay}],
        lr=settings.rate,
        fused=True,
    )
    steps = max(1, epochs * ((len(texts) + settings.batch - 1) // settings.batch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.rate, total_steps=steps, pct_start=0.1)
    model.train()
    done = 0
    with Progress(transient=True) as progress:
        task = progress.add_task("Chinese path", total=steps)
        for _ in range(epochs):
            for batch in _batches(texts, settings.batch, chance):
                loss = _loss(model, batch, statements, settings, chance)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                schedule.step()
                done += 1
                if done % 4 == 0:  # the average costs a pass over the tables
                    _average(averaged, model, min(settings.average**4, done / (done + 40)))
                progress.update(task, advance=1)
    averaged.eval()
    if sentence_encoder is not None:
        align_english(averaged, sentence_encoder)
    if calibration_rows is None:
        # COLD's dev rows carry the doubtful labels too: calibrated on them, the model would make up for them on every other text.
        calibration_rows = [row for row in cold_rows(data_dir, "dev") if not (settings.doubt and doubtful(row.text))]
    calibrate(averaged, calibration_rows)
    return averaged


@torch.no_grad()
def align_english(model: CharacterPath, encoder: SentenceEncoder, penalty: float = 0.02) -> None:
    """Make an English wording's vector that of the same value's Chinese wordings: ridge regression, in closed form.

    Gradient steps leave the map from sentence vectors far behind the character side (vectors of half the length, so that nothing was
    judged kept): it has few distinct inputs. A statement that none of the wordings resembles falls back to their mean.
    """
    sources: list[str] = []
    targets: list[Tensor] = []
    for words in WORDINGS.values():
        for english, chinese in ((words.en, words.zh), (words.en_opposite, words.zh_opposite)):
            if english and chinese:
                batch = character_batch(list(chinese))
                sources += english
                targets += [model.encode_values(batch.ids, batch.mask).mean(0)] * len(english)
    x, y = encoder(sources).double(), torch.stack(targets).double()
    centre, offset = x.mean(0), y.mean(0)
    x = x - centre
    kernel = x @ x.T + penalty * torch.eye(len(x), dtype=torch.float64)
    weight = (x.T @ torch.linalg.solve(kernel, y - offset)).T
    model.sentence.weight.copy_(weight.float())
    model.sentence.bias.copy_((offset - weight @ centre).float())


def calibrate(model: CharacterPath, rows: Sequence[Row]) -> None:
    """Fit the scale and the shift of b on no_offense rows, by likelihood."""
    chosen = [row for row in rows if row.value_id == "no_offense"]
    if not chosen:
        return
    with torch.inference_mode():
        statement = character_batch([WORDINGS["no_offense"].zh[0]])
        value = model.encode_values(statement.ids, statement.mask)
        model.calibration.copy_(torch.tensor([1.0, 0.0]))
        pairs = []
        for start in range(0, len(chosen), 256):
            part = character_batch([row.text for row in chosen[start : start + 256]], model.config.max_characters)
            pairs.append(torch.cat(model.logits(model.encode_text(part.ids, part.mask), value), dim=1))
    relevance, broken = torch.cat(pairs).clone().unbind(1)
    target = torch.tensor([1 - row.kept for row in chosen])
    fitted = torch.tensor([1.0, 0.0], requires_grad=True)
    optimiser = torch.optim.LBFGS([fitted], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        chance = torch.sigmoid(relevance) * torch.sigmoid(broken * fitted[0] + fitted[1])
        loss = F.binary_cross_entropy(chance.clamp(1e-6, 1 - 1e-6), target)
        loss.backward()
        return loss

    optimiser.step(closure)
    # On few rows, all of them judged right, the likeliest scale has no bound.
    model.calibration.copy_(torch.stack([fitted[0].detach().clamp(0.25, 4.0), fitted[1].detach()]))


def fit_bag(model: CharacterPath, texts: Sequence[_Text], settings: FitSettings, chance: random.Random) -> None:
    """Fit the bag's first column on no_offense alone, as a linear model, and let b start from it for every value.

    Learnt together with the rest from random tables, the whole model had .877 on COLD's dev rows after minutes; this has .90 in seconds.
    """
    chosen = [text for text in texts if text.rows[0].value_id == "no_offense"]
    if not chosen or not settings.bag_epochs:
        return
    size, limit = model.config.bag, model.config.max_characters
    broken = torch.tensor([1 - text.rows[0].kept for text in chosen]) * (1 - settings.smoothing) + settings.smoothing / 2
    bag = torch.nn.EmbeddingBag(size, 1, mode="sum")
    torch.nn.init.zeros_(bag.weight)
    shift = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.Adam([bag.weight, shift], lr=0.1, fused=True)
    steps = settings.bag_epochs * (len(chosen) // 512 + 1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, steps)
    for _ in range(settings.bag_epochs):
        arrays = [
            hash_ngrams(normalise(swap_groups(text.text, chance), limit)[0]) if chance.random() < settings.swap else text.hashes
            for text in chosen
        ]
        for part in torch.randperm(len(chosen)).split(512):
            flat = [array[:, :BAG_ORDERS][array[:, :BAG_ORDERS] != 0] for array in (arrays[index] for index in part.tolist())]
            counts = torch.tensor([len(one) for one in flat])
            ids = buckets(torch.from_numpy(np.concatenate(flat)), size)
            kept = (torch.rand(len(ids)) > settings.gram_drop).float() / (1 - settings.gram_drop)
            logits = bag(ids, counts.cumsum(0) - counts, per_sample_weights=kept)[:, 0] / counts.sqrt() + shift
            loss = F.binary_cross_entropy_with_logits(logits, broken[part]) + 0.05 * bag.weight.square().sum() / len(chosen)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        width = model.config.bag_width
        scale = bag.weight.std().clamp(min=1e-3) * 10  # the table's entries stay near the other columns' in size
        model.bag.weight[1:, 0] = bag.weight[1:, 0] / scale
        model.bag_weights.weight.mul_(0.1)
        model.bag_weights.bias.zero_()
        model.bag_weights.bias[width] = scale
        model.gates.weight.mul_(0.1)
        model.gates.bias[1] = shift


class _Statements:
    """Draws a wording for a row, and encodes the wordings of a batch."""

    def __init__(self, settings: FitSettings, chance: random.Random, encoder: SentenceEncoder | None) -> None:
        self.settings, self.chance = settings, chance
        self.hashes: dict[str, np.ndarray] = {}
        self.sentences: dict[str, Tensor] = {}
        if encoder is not None:
            english = sorted({wording for words in WORDINGS.values() for wording in (*words.en, *words.en_opposite)})
            self.sentences = dict(zip(english, encoder(english).float(), strict=True))

    def draw(self, row: Row) -> tuple[str, float, float | None]:
        """A statement with the row's label and relevance under it."""
        if row.statement:
            return row.statement, row.kept, row.relevance
        words = WORDINGS[row.value_id]
        english = bool(self.sentences) and self.chance.random() < self.settings.english
        opposite = words.en_opposite if english else words.zh_opposite
        if opposite and self.chance.random() < self.settings.opposite:
            return self.chance.choice(opposite), 1 - row.kept, None
        return self.chance.choice(words.en if english else words.zh), row.kept, row.relevance

    def encode(self, model: CharacterPath, statements: Sequence[str]) -> Tensor:
        """Vectors [len(statements), d]; each distinct statement is encoded once."""
        places: dict[str, int] = {}
        vectors: list[Tensor] = []
        chinese = sorted({one for one in statements if one not in self.sentences})
        english = sorted({one for one in statements if one in self.sentences})
        if chinese:
            for one in chinese:
                if one not in self.hashes:
                    self.hashes[one] = hash_ngrams(normalise(one)[0])
            vectors.append(model.encode_values(*pad([self.hashes[one] for one in chinese])))
        if english:
            vectors.append(model.encode_sentences(torch.stack([self.sentences[one] for one in english])))
        places = {one: place for place, one in enumerate([*chinese, *english])}
        return torch.cat(vectors)[torch.tensor([places[one] for one in statements])]


def _by_text(rows: Sequence[Row], limit: int) -> list[_Text]:
    found: dict[str, _Text] = {}
    for row in rows:
        if row.text not in found:
            found[row.text] = _Text(row.text, hash_ngrams(normalise(row.text, limit)[0]))
        found[row.text].rows.append(row)
    for text in found.values():
        text.rows.sort(key=lambda row: row.value_id != "no_offense")
    return list(found.values())


def _batches(texts: Sequence[_Text], size: int, chance: random.Random) -> list[list[_Text]]:
    # Like lengths go together, but only roughly, so that batches differ from epoch to epoch.
    order = sorted(texts, key=lambda text: len(text.hashes) * chance.uniform(0.8, 1.25))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    chance.shuffle(batches)
    return batches


def _loss(model: CharacterPath, batch: Sequence[_Text], statements: _Statements, settings: FitSettings, chance: random.Random) -> Tensor:
    arrays, drawn, labels, relevances = [], [], [], []
    for text in batch:
        lead = 1 if text.rows[0].value_id == "no_offense" else 0
        rest = text.rows[lead:]
        rows = text.rows[:lead] + chance.sample(rest, min(len(rest), settings.values_per_text - lead))
        hashes = text.hashes
        # A row about the text's own words would be wrong once the groups are swapped.
        if settings.swap and chance.random() < settings.swap and not any(row.statement or row.value_id == "no_profanity" for row in rows):
            hashes = hash_ngrams(normalise(swap_groups(text.text, chance), model.config.max_characters)[0])
        arrays.append(hashes)
        for slot in range(settings.values_per_text):
            # Texts with fewer rows repeat one with its label unset: the loss leaves it out.
            statement, label, relevance = statements.draw(rows[min(slot, len(rows) - 1)])
            drawn.append(statement)
            labels.append(label if slot < len(rows) else -1.0)
            relevances.append(-1.0 if relevance is None or slot >= len(rows) else relevance)
    ids, mask = pad(arrays)
    if settings.gram_drop:
        ids = torch.where(torch.rand(ids.shape) < settings.gram_drop, 0, ids)
    shape = (len(batch), settings.values_per_text)
    kept, known = torch.tensor(labels).view(shape), torch.tensor(relevances).view(shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
        values = statements.encode(model, drawn).view(*shape, -1)
        at_stake, broken = model.logits(model.encode_text(ids, mask), values)
    breaks = torch.sigmoid(at_stake.float()) * torch.sigmoid(broken.float())
    target = (1 - kept.clamp(min=0)) * (1 - settings.smoothing) + settings.smoothing / 2
    weight = (kept >= 0).float()
    weight[:, 1:] *= 0.5  # the first is no_offense where there is one
    main = (F.binary_cross_entropy(breaks.clamp(1e-5, 1 - 1e-5), target, reduction="none") * weight).sum()
    stated = (known >= 0).float() * weight
    side = (F.binary_cross_entropy_with_logits(at_stake.float(), known.clamp(min=0), reduction="none") * stated).sum()
    return (main + 0.2 * side) / weight.sum().clamp(min=1)


@torch.no_grad()
def _average(averaged: CharacterPath, model: CharacterPath, keep: float) -> None:
    for old, new in zip(averaged.parameters(), model.parameters(), strict=True):
        old.lerp_(new, 1 - keep)
