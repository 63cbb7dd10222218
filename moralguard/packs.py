"""Packs: folders of fitted weights with a card that says what they are, which model they fit and what they were fitted on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import numpy as np
from pydantic import Field

from moralguard import __version__
from moralguard.backends.tensor_files import load_arrays, load_tensors
from moralguard.errors import ModelError, PolicyError
from moralguard.schema import StrictModel, nearest

if TYPE_CHECKING:
    import torch

    from moralguard.backends.hf import LanguageModel

FORMAT = 1
CARD = "card.json"
PREFIX = "pack:"

PackKind = Literal["lora-expert", "prefix", "prefix-head", "attribute-head", "subspace", "steering-vectors"]

FILES: dict[str, tuple[str, ...]] = {
    "lora-expert": ("adapter_config.json", "adapter_model.safetensors"),
    "prefix": ("prefix.safetensors",),
    "prefix-head": ("head.safetensors",),
    "attribute-head": ("head.safetensors",),
    "subspace": ("basis.safetensors",),
    "steering-vectors": ("vectors.safetensors",),
}
"""What a pack of each kind holds at least, beside its card."""

_SUFFIXES = (".safetensors", ".json")
_SHIPPED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PackBase(StrictModel):
    """The model that a pack fits.

    Attributes:
        name: for people.
        fingerprint: ``LanguageModel.fingerprint``.
        tokenizer: ``LanguageModel.tokenizer_hash``; None where it was fitted without one.
        width: of the states that the head reads.
        vocabulary: entries of the head.
    """

    name: str
    fingerprint: str
    tokenizer: str | None = None
    width: Annotated[int, Field(ge=1)]
    vocabulary: Annotated[int, Field(ge=1)]


class PackData(StrictModel):
    """Rows that a pack was fitted on."""

    name: str
    licence: str
    rows: Annotated[int, Field(ge=0)]
    url: str = ""


class PackCard(StrictModel):
    """``card.json`` of a pack.

    Attributes:
        format: of the folder and the card.
        kind: what the folder holds: ``lora-expert`` (peft's adapter_config.json and adapter_model.safetensors), ``prefix``
            (prefix.safetensors with one of tokens i64[n]; embeddings f[n, d]; keys.i and values.i f[heads, n, head_dim] for each layer
            i), ``prefix-head`` (head.safetensors, a ``FactoredHead``), ``attribute-head`` (head.safetensors with weight f[classes, d] and
            bias f[classes]; ``settings["target"]`` is the class that is sought; ``layer`` and ``pooling`` there are those of the states it
            reads, -1 and "mean" where not told), ``subspace`` (basis.safetensors with basis f[d, r], or
            U_in, U_out and mu; optionally direction f[d]), ``steering-vectors`` (vectors.safetensors with layer.N f[d], N the layer).
        method: how it was fitted.
        values: statements of the values it stands for.
        base: the model it fits. data: what it was fitted on. settings: how. metrics: what was measured.
        program: versions of moralguard, torch and transformers.
        files: sha256 of every other file of the folder, by name.
    """

    format: int = FORMAT
    kind: PackKind
    method: str
    name: str
    description: str = ""
    values: tuple[str, ...] = ()
    base: PackBase
    data: tuple[PackData, ...]
    settings: dict[str, Any]
    metrics: dict[str, Any]
    program: dict[str, str]
    files: dict[str, Sha256]


@dataclass(frozen=True)
class Pack:
    """A verified pack.

    Attributes:
        folder: where it lies.
        card: its card; every file's hash is as it says.
    """

    folder: Path
    card: PackCard

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors of one of its safetensors files."""
        return load_tensors(self.folder / name)

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The same as NumPy arrays, without torch."""
        return load_arrays(self.folder / name)

    def check(self, lm: LanguageModel) -> None:
        """Compare the model that the pack was fitted on with ``lm``.

        Raises:
            ModelError: another model; names what differs, on both sides.
        """
        base = self.card.base
        sides: list[tuple[str, object, object]] = [
            ("fingerprint", base.fingerprint, lm.fingerprint),
            ("hidden width", base.width, lm.width),
            ("vocabulary size", base.vocabulary, lm.vocab_size),
        ]
        # where a side has no tokenizer, prompts are token ids: nothing to compare
        if base.tokenizer is not None and lm.tokenizer_hash is not None:
            sides.append(("tokenizer", base.tokenizer, lm.tokenizer_hash))
        different = "; ".join(f"{what} {theirs}, here {mine}" for what, theirs, mine in sides if theirs != mine)
        if different:
            raise ModelError(
                f"pack {self.folder} ({self.card.kind} {self.card.name!r}) was fitted on {base.name}, which isn't {lm.name}: "
                f"{different}. Fit one for this model with `moralguard fit`"
            )


def is_pack(source: Any) -> bool:
    """Whether this names a pack: ``pack:NAME``, or a folder with a card."""
    if not isinstance(source, (str, Path)):
        return False
    return str(source).startswith(PREFIX) or (Path(source) / CARD).is_file()


def shipped_folder() -> Path:
    """The packs that come with the package."""
    return Path(str(files("moralguard") / "shipped_packs"))


def shipped_packs() -> list[str]:
    """Names of the packs that come with the package, such as "smollm2-135m/toxic"; ``pack:NAME`` stands for one."""
    return sorted(card.parent.relative_to(shipped_folder()).as_posix() for card in shipped_folder().rglob(CARD))


def find_pack(source: str | Path) -> Path:
    """The folder of ``pack:NAME`` (shipped) or of a path.

    Raises:
        ModelError: no such pack, or NAME isn't one (absolute, or with "..").
    """
    text = str(source)
    if not text.startswith(PREFIX):
        folder = Path(source)
        if not (folder / CARD).is_file():
            raise ModelError(f"{text!r} isn't a pack: it has no {CARD}; expected a folder that `moralguard fit` wrote, or {PREFIX}NAME")
        return folder
    name = text.removeprefix(PREFIX)
    if not _SHIPPED_NAME.fullmatch(name):
        raise ModelError(f"{text!r} names no shipped pack: one looks like {PREFIX}smollm2-135m/toxic; a folder goes without {PREFIX}")
    known = shipped_packs()
    if name not in known:
        raise ModelError(f"there is no shipped pack {name!r}; {nearest(name, known) if known else 'this installation has none'}")
    return shipped_folder() / name


def read_pack(source: str | Path, kind: PackKind | None = None) -> Pack:
    """A pack, verified: its format and kind, the hash of every file, and that its tensors load and are finite.

    Args:
        source: a folder, or ``pack:NAME``.
        kind: the kind that is expected; any, without one.

    Raises:
        ModelError: it isn't there, isn't whole, isn't what its card says, or is of another kind or format.
    """
    folder = find_pack(source)
    card = _read_card(folder)
    if kind is not None and card.kind != kind:
        raise ModelError(f"{folder} is a pack of kind {card.kind!r}; expected one of kind {kind!r}")
    present = _files(folder)
    lacking = sorted({*card.files, *FILES[card.kind]} - set(present))
    if lacking:
        raise ModelError(f"{folder} lacks {', '.join(lacking)}, which a {card.kind!r} pack with this {CARD} holds; copy it again whole")
    strange = sorted(set(present) - set(card.files))
    if strange:
        raise ModelError(f"{folder} holds {', '.join(strange)}, which its {CARD} doesn't name; remove what isn't the pack's")
    for name, path in present.items():
        found = _sha256(path)
        if found != card.files[name]:
            raise ModelError(
                f"{path} isn't the file that {CARD} names: sha256 {found}, the card says {card.files[name]}; copy or fit the pack again"
            )
    for name, path in present.items():
        if path.suffix != ".safetensors":
            continue
        broken = sorted(key for key, array in load_arrays(path).items() if not bool(np.isfinite(array.astype(np.float32)).all()))
        if broken:
            raise ModelError(f"{folder / name} holds values that aren't finite, in {', '.join(broken)}; fit the pack again")
    return Pack(folder, card)


def write_pack(
    folder: str | Path,
    *,
    kind: PackKind,
    method: str,
    lm: LanguageModel,
    name: str,
    data: Sequence[PackData | Mapping[str, Any]],
    settings: Mapping[str, Any],
    metrics: Mapping[str, Any],
    description: str = "",
    values: Sequence[str] = (),
) -> Path:
    """Write the card of the fitted files that lie in ``folder``; gives the folder.

    Args:
        lm: the model they were fitted on.
        settings, metrics: plain data, as JSON holds it.

    Raises:
        ModelError: a file that the kind needs is missing, or one lies there that no pack holds or that can't be read.
        PolicyError: the card's data can't be written.
    """
    place = Path(folder)
    if not place.is_dir():
        raise ModelError(f"{place} isn't a folder; write the fitted files into it first")
    card = PackCard(
        kind=kind,
        method=method,
        name=name,
        description=description,
        values=tuple(values),
        # a local path says where it was fitted, which is nobody's business
        base=PackBase(
            name=Path(lm.name).name if Path(lm.name).is_absolute() else lm.name,
            fingerprint=lm.fingerprint,
            tokenizer=lm.tokenizer_hash,
            width=lm.width,
            vocabulary=lm.vocab_size,
        ),
        data=tuple(row if isinstance(row, PackData) else PackData(**row) for row in data),
        settings=_plain(settings, f"settings of pack {name!r}"),
        metrics=_plain(metrics, f"metrics of pack {name!r}"),
        program={"moralguard": __version__, **{package: _version(package) for package in ("torch", "transformers")}},
        files={file: _sha256(path) for file, path in sorted(_files(place).items())},
    )
    (place / CARD).write_text(json.dumps(card.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        read_pack(place, kind)
    except ModelError:
        (place / CARD).unlink()  # what can't be read isn't left behind as a pack
        raise
    return place


def _read_card(folder: Path) -> PackCard:
    path = folder / CARD
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} can't be read as JSON ({type(error).__name__}: {error}); copy or fit the pack again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds a {type(data).__name__}; expected an object with format, kind, base, ...")
    if data.get("format") != FORMAT:
        raise ModelError(f"{path} is of format {data.get('format')!r}; this moralguard ({__version__}) reads {FORMAT}: update or fit again")
    if data.get("kind") not in get_args(PackKind):
        raise ModelError(f"{path} is of kind {data.get('kind')!r}; expected one of {', '.join(get_args(PackKind))}")
    try:
        return PackCard(**data)
    except PolicyError as error:
        raise ModelError(f"{path} isn't a pack's card: {error}") from error


def _files(folder: Path) -> dict[str, Path]:
    """Everything in a folder but the card, by name."""
    found = {path.name: path for path in sorted(folder.iterdir()) if path.name != CARD}
    wrong = [name for name, path in found.items() if not path.is_file() or path.suffix not in _SUFFIXES]
    if wrong:
        raise ModelError(f"{folder} holds {', '.join(wrong)}; a pack is a flat folder of safetensors and JSON files, so remove it")
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        return dict(json.loads(json.dumps(dict(data), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise PolicyError(f"{where} can't be written as JSON: {error}; give numbers that are finite, texts, lists and mappings") from error


def _version(package: str) -> str:
    try:
        return installed_version(package)
    except PackageNotFoundError:  # a build of its own, without metadata
        return "unknown"
