"""Fitting a whole discriminator: rows, English network, character network, calibration, folder."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from moralguard import __version__
from moralguard.discriminator import packs
from moralguard.discriminator.calibration import Calibration
from moralguard.discriminator.character_path import load_character_path, save_character_path
from moralguard.discriminator.tokens import WordPieces
from moralguard.discriminator.torch_paths import WordPath
from moralguard.discriminator.weights import is_frozen, load_network, save_network
from moralguard.errors import DataError
from moralguard.fitting.discriminator_calibration import calibrate
from moralguard.fitting.discriminator_rows import SHARES, discriminator_rows
from moralguard.fitting.discriminator_training import Progress, TrainingSettings, train_network
from moralguard.fitting.english_rows import LICENCES
from moralguard.fitting.row_files import read_user_rows
from moralguard.fitting.rows import Row
from moralguard.fitting.sampling import Sampler, known_wordings
from moralguard.fitting.starting_weights import encoder_folder, starting_network

CHECKPOINT = "checkpoint.safetensors"


def fit_discriminator(
    out: Path,
    *,
    data: Path | None = None,
    rows: Sequence[Path] = (),
    start: Path | None = None,
    base: Path | None = None,
    settings: TrainingSettings | None = None,
    device: str = "cpu",
    report: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Fit a discriminator and write it into ``out``, where ``Discriminator.load(out)`` finds it.

    An interrupted run goes on from its checkpoint in ``out`` when it is started again with the same settings.

    Args:
        data: folder with the labelled files that the shipped weights come from.
        rows: files with a user's own rows (``row_files.read_user_rows``); alone, or beside ``data``.
        start: folder of the BERT encoder to start from; all-MiniLM-L6-v2, fetched once, where None.
        base: folder of a fitted discriminator to go on from instead (the shipped one: ``packs.shipped_folder()``).

    Raises:
        DataError: neither data nor rows, or rows that can't be used.
        ModelError: the starting encoder can't be read.
    """
    if data is None and not rows:
        raise DataError("give labelled rows: a folder with the data files, or files with rows of your own")
    settings = settings or TrainingSettings()
    out.mkdir(parents=True, exist_ok=True)
    found = [] if data is None else discriminator_rows(data, settings.seed)
    for file in rows:
        found += read_user_rows(file)
    has_chinese = data is not None and _character_network(out, data, start, base, settings.seed, say)
    wordings = known_wordings()
    train = [row for row in found if row.split == "train"]
    say(f"{len(train)} training rows of {len({row.value_id for row in train})} values")
    sampler = Sampler(train, SHARES, wordings, settings.seed, settings.siblings)
    if base is not None:
        network = load_network(base / packs.NETWORK)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(not is_frozen(name))
        tokenizer = base / packs.TOKENIZER
    else:
        folder = encoder_folder() if start is None else start
        network, tokenizer = starting_network(folder, settings.seed), folder / packs.TOKENIZER
    pieces = WordPieces(tokenizer)
    train_network(network, pieces, sampler, settings, device=device, checkpoint=out / CHECKPOINT, report=report)
    save_network(network.to("cpu"), out / packs.NETWORK)
    if tokenizer.resolve() != (out / packs.TOKENIZER).resolve():
        shutil.copy(tokenizer, out / packs.TOKENIZER)
    if not has_chinese:
        source = base or packs.shipped_folder()
        for name in (packs.CHARACTERS, packs.CHARACTER_SIZES):
            shutil.copy(source / name, out / name)
    say("calibrating on the development rows")
    # calibrated as it will be loaded: float16 weights
    path = WordPath(load_network(out / packs.NETWORK).to(device), pieces)
    dev = [row for row in found if row.split == "dev"]
    calibrations = {mode: calibrate(path, dev, wordings, mode) for mode in ("cached", "cross")} if dev else {}
    if not dev:
        say("no row has split 'dev': the discriminator is written without calibration")
    _write_settings(out, settings, train, calibrations)
    (out / CHECKPOINT).unlink(missing_ok=True)
    return out


def _character_network(out: Path, data: Path, start: Path | None, base: Path | None, seed: int, say: Callable[[str], None]) -> bool:
    """Fit the Chinese path, unless an interrupted run already did."""
    from moralguard.fitting.chinese_training import train_character_path

    weights, sizes = out / packs.CHARACTERS, out / packs.CHARACTER_SIZES
    if weights.is_file() and sizes.is_file():
        load_character_path(weights, sizes)
        return True
    say("fitting the Chinese path")
    # only the frozen half is asked, which is the same in both
    folder = base or start or encoder_folder()
    network = starting_network(folder, seed).eval() if base is None else load_network(base / packs.NETWORK)
    words = WordPath(network, WordPieces(folder / packs.TOKENIZER))

    def encoded(statements: Sequence[str]) -> torch.Tensor:
        return torch.from_numpy(words.sentence_vectors(list(statements)))

    model = train_character_path(data, seed=seed, sentence_encoder=encoded)
    save_character_path(model, weights, sizes)
    return True


def _write_settings(out: Path, settings: TrainingSettings, train: Sequence[Row], calibrations: dict[str, Calibration]) -> None:
    data = {
        "format": packs.FORMAT,
        "moralguard": __version__,
        "calibrations": {name: item.model_dump() for name, item in calibrations.items()},
        "training": settings.model_dump(),
        "rows": dict(sorted(Counter(row.source for row in train).items())),
        "licences": {source: LICENCES[source] for source in sorted({row.source for row in train} & LICENCES.keys())},
    }
    (out / packs.SETTINGS).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
