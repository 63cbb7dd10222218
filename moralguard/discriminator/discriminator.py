"""The built-in discriminator: shipped weights, read by script, calibrated, adaptable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moralguard.discriminator.adaptation import (
    Adaptation,
    Principle,
    RefusedUpdateError,
    checked_examples,
    fit_head,
)
from moralguard.discriminator.base import BaseDiscriminator, Reading
from moralguard.discriminator.calibration import Calibration, log_odds, sigmoid
from moralguard.discriminator.han_path import HanPath
from moralguard.discriminator.inputs import as_context, as_values
from moralguard.discriminator.judgement import Basis, Span
from moralguard.discriminator.onnx_path import OnnxPath
from moralguard.discriminator.paths import Path as ReadingPath
from moralguard.discriminator.paths import ReadingMode, is_han
from moralguard.errors import DataError, ModelError
from moralguard.values import Value

if TYPE_CHECKING:
    import torch

    from moralguard.discriminator.torch_paths import WordPath

DiscriminatorMode = Literal["auto", "cached", "cross"]
_ON_TORCH = "load it on torch: install torch and call Discriminator.load() without onnx="
_FEW = 8  # values that a text is read together with, one by one, where a context is given


def _torch_is_installed() -> bool:
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def shipped_discriminator(onnx: bool = False) -> Discriminator:
    """The shipped discriminator in float32 on the CPU, loaded once a process; ``onnx`` as ``Discriminator.load`` takes it."""
    return Discriminator.load(onnx=onnx)


class Discriminator(BaseDiscriminator):
    """P(v|y) for any value statement, from weights that ship with the package; immutable, and safe to share between threads.

    English is read by an encoder, Chinese by a character network, chosen text by text. The encoder has two readings: against cached
    value vectors, and as a cross-encoder, where each word sees the statement. Long texts are read in overlapping windows and the
    window most likely to break a value decides about it.

    Args:
        words: reads everything but Chinese. han: reads Chinese.
        calibrations: by the reading's name (cross, cached, characters).
        adaptations: what ``adapt`` learned, by statement and context.
        mode: "cached" or "cross" for one reading; "auto" takes the cached one, and in a context the mean of both readings' log-odds
            for up to eight values. On the shipped weights' development rows the cached reading is the better one nearly everywhere,
            the cross reading on norms scoped to a context, and the mean there better than either (the card has the figures).
    """

    def __init__(
        self,
        words: WordPath | OnnxPath,
        han: HanPath,
        calibrations: Mapping[str, Calibration],
        adaptations: Sequence[Adaptation] = (),
        mode: DiscriminatorMode = "auto",
    ):
        if mode not in ("auto", "cached", "cross"):
            raise DataError(f'mode is {mode!r}; expected "auto", "cached" or "cross"')
        self._words = words
        self._han = han
        self._calibrations = dict(calibrations)
        self._adaptations = {(item.value.statement, item.context): item for item in adaptations}
        self._mode: DiscriminatorMode = mode

    @classmethod
    def load(
        cls,
        folder: str | Path | None = None,
        *,
        device: str = "cpu",
        dtype: torch.dtype | str = "float32",
        mode: DiscriminatorMode = "auto",
        adaptations: Sequence[str | Path] = (),
        onnx: str | Path | bool = False,
    ) -> Discriminator:
        """The shipped discriminator, or one that ``moralguard fit discriminator`` wrote into ``folder``.

        Args:
            dtype: float32, or bfloat16: about twice as fast on a CPU that multiplies it; P(v|y) differed by .002 on average and by .02 at
                most over 50 texts and six values.
            adaptations: packs that ``save_adaptation`` wrote.
            onnx: True reads without torch, which isn't imported: English on onnxruntime (extra ``onnx``), Chinese in NumPy, in float32
                on the CPU; it can't be adapted, and explains by occlusion only. So does a folder that ``export_onnx`` wrote, whose graphs
                are then taken, and so does every discriminator where torch isn't installed.

        Raises:
            ModelError: the folder, or a pack, doesn't hold what it should; onnxruntime isn't installed; another device or dtype is
                asked for than onnxruntime reads with.
            DataError: ``adaptations`` without torch.
        """
        from moralguard.discriminator.packs import load_adaptation, load_onnx_parts, load_parts

        if not onnx and _torch_is_installed():
            words, han, calibrations = load_parts(folder, device, dtype)
            loaded = cls(words, han, calibrations, mode=mode)
            return loaded._with([load_adaptation(Path(path), loaded.fingerprint) for path in adaptations]) if adaptations else loaded
        if adaptations:
            raise DataError(f"a discriminator on onnxruntime takes no adaptations; {_ON_TORCH}")
        if str(device) != "cpu" or str(dtype).removeprefix("torch.") != "float32":
            raise ModelError(f"a discriminator on onnxruntime runs on the CPU in float32, not on {device} in {dtype}; {_ON_TORCH}")
        return cls(*load_onnx_parts(folder, None if isinstance(onnx, bool) else Path(onnx)), mode=mode)

    @property
    def fingerprint(self) -> str:
        """A hash of the weights that adaptations are bound to."""
        from moralguard.discriminator.stored_weights import fingerprint

        if isinstance(self._words, OnnxPath):
            return self._words.network.fingerprint
        state = self._words.network.state_dict()
        return fingerprint((name, tensor.detach().cpu().float().numpy()) for name, tensor in state.items())

    def _torch_words(self, purpose: str) -> WordPath:
        if isinstance(self._words, OnnxPath):
            raise DataError(f"a discriminator on onnxruntime {purpose}; {_ON_TORCH}")
        return self._words

    @property
    def adaptations(self) -> tuple[Adaptation, ...]:
        return tuple(self._adaptations.values())

    def read(self, texts: Sequence[str], values: Sequence[Value], context: str) -> Reading:
        shape = (len(texts), len(values))
        relevance, valence = np.zeros(shape), np.ones(shape)
        window = np.zeros((*shape, 2), dtype=np.int64)
        windows = np.ones(len(texts), dtype=np.int64)
        paths = ["empty"] * len(texts)
        filled = [i for i, text in enumerate(texts) if text.strip()]
        for path in (self._words, self._han):
            rows = [i for i in filled if is_han(texts[i]) == (path is self._han)]
            if not rows:
                continue
            cut = path.cut([texts[i] for i in rows])
            flat = [item for items in cut for item in items]
            relevant, broken, reading = self._probabilities(path, flat, values, context)
            first = 0
            for i, items in zip(rows, cut, strict=True):
                own = slice(first, first + len(items))
                worst = broken[own].argmax(0)
                columns = np.arange(len(values))
                chance, stake = broken[own][worst, columns], relevant[own][worst, columns]
                relevance[i], valence[i] = stake, 1.0 - chance / stake
                window[i] = [(items[w].start, items[w].end) for w in worst]
                windows[i], paths[i] = len(items), reading
                first += len(items)
        return Reading(relevance, np.clip(valence, 0.0, 1.0), window, windows, paths)

    def _probabilities(self, path: Any, windows: list, values: Sequence[Value], context: str) -> tuple[np.ndarray, np.ndarray, str]:
        """Relevance and P(broken), calibrated and adapted, [n_windows, n_values]; relevance is at least P(broken)."""
        statements = [value.statement for value in values]
        readings = [self._reading(path, windows, statements, context, mode) for mode in self._modes(path, values, context)]
        relevance = sigmoid(np.mean([log_odds(found) for found, _, _ in readings], axis=0))
        broken = sigmoid(np.mean([log_odds(found) for _, found, _ in readings], axis=0))
        reading = "+".join(item[2] for item in readings)
        adapted = [(j, self._adaptations.get((statement, context))) for j, statement in enumerate(statements)]
        heads = [(j, item.heads[path.name]) for j, item in adapted if item is not None and path.name in item.heads]
        if heads:
            features = path.features(windows)
            # heads were fitted on the cached reading, which doesn't depend on how many values are asked for
            for j, head in heads:
                broken[:, j] = head.apply(self._unadapted(path, windows, statements[j], context), features)
        return np.maximum(relevance, broken), broken, reading

    def _unadapted(self, path: ReadingPath, windows: Sequence[Any], statement: str, context: str) -> np.ndarray:
        return self._reading(path, windows, [statement], context, "cached")[1][:, 0]

    def _modes(self, path: ReadingPath, values: Sequence[Value], context: str) -> tuple[ReadingMode, ...]:
        if self._mode != "auto":
            return (self._mode,)
        both = context and path is self._words and len(values) <= _FEW
        return ("cached", "cross") if both else ("cached",)

    def _reading(
        self, path: ReadingPath, windows: Sequence[Any], statements: Sequence[str], context: str, mode: ReadingMode
    ) -> tuple[np.ndarray, np.ndarray, str]:
        """One reading's relevance and calibrated P(broken), [n_windows, n_statements], and its name."""
        relevance_logits, broken_logits, name = path.logits(windows, statements, context, mode)
        relevance = sigmoid(relevance_logits)
        broken = relevance * sigmoid(broken_logits)
        return relevance, self._calibrations[name].apply(broken) if name in self._calibrations else broken, name

    def adapt(
        self,
        value: str | Value,
        examples: Sequence[tuple[str, bool]],
        *,
        context: str | None = None,
        principles: Sequence[Principle] = (),
    ) -> Discriminator:
        """A discriminator that has learned ``value`` from examples; this one stays as it is.

        It fits a head of under a thousand numbers on the frozen network, in well under a second for 32 short examples.

        Args:
            examples: (text, whether it keeps the value), 8 to 32 of them, of both kinds.
            principles: values of higher priority with anchors. The update is refused where, on an anchor, the adapted value or the
                principle itself would then say otherwise than the anchor does and didn't before.

        Raises:
            DataError: examples, value or principles that can't be used.
            RefusedUpdateError: the update breaks a principle; its message names the principle and the examples.
        """
        (stated,), where = as_values(value)[:1], as_context(context)
        texts, kept = checked_examples(examples)
        heads, left_out = {}, np.full(len(texts), np.nan)
        for path in (self._words, self._han):
            rows = [i for i, text in enumerate(texts) if is_han(text) == (path is self._han)]
            if len(rows) < 2 or len(set(kept[rows])) < 2:
                continue
            windows = [items[0] for items in path.cut([texts[i] for i in rows])]
            before = self._unadapted(path, windows, stated.statement, where)
            heads[path.name], left_out[rows] = fit_head(before, path.features(windows), kept[rows])
        if not heads:
            raise DataError("examples that keep the value and examples that break it must be of the same script")
        known = ~np.isnan(left_out)
        accuracy = float(((left_out[known] < 0.5) == (kept[known] == 1)).mean())
        adapted = self._with([Adaptation(stated, where, heads, len(texts), accuracy)])
        for principle in principles:
            self._check_principle(adapted, stated, where, principle)
        return adapted

    def _check_principle(self, adapted: Discriminator, value: Value, context: str, principle: Principle) -> None:
        if not principle.anchors:
            raise DataError(f"principle {principle.value.id!r} has no anchors; give (text, kept) judgements that must stand")
        if principle.value.priority <= value.priority:
            raise DataError(
                f"principle {principle.value.id!r} has priority {principle.value.priority}, value {value.id!r} {value.priority}; "
                "a principle's must be higher"
            )
        texts = [text for text, _ in principle.anchors]
        for judged in (value, principle.value):
            before = self.read(texts, [judged], context).probability[:, 0]
            after = adapted.read(texts, [judged], context).probability[:, 0]
            broken = [
                (text, bool(kept), float(b), float(a))
                for (text, kept), b, a in zip(principle.anchors, before, after, strict=True)
                if (a >= judged.threshold) != bool(kept) and (b >= judged.threshold) == bool(kept)
            ]
            if broken:
                shown = "; ".join(
                    f"{text[:60]!r}: P {b:.2f} -> {a:.2f}, must {'keep' if kept else 'break'}" for text, kept, b, a in broken[:3]
                )
                raise RefusedUpdateError(
                    f"the update of {value.id!r} breaks principle {principle.value.id!r} (priority {principle.value.priority}: "
                    f"{principle.value.statement}) on {len(broken)} of its {len(texts)} anchors: {shown}. "
                    "Change the examples, or the principle's anchors",
                    principle.value,
                    broken,
                )

    def save_adaptation(self, value: str | Value, folder: str | Path, *, context: str | None = None) -> None:
        """Write what was learned of a value as a pack: a folder with safetensors and a JSON card.

        Raises:
            DataError: the value wasn't adapted.
        """
        from moralguard.discriminator.packs import save_adaptation

        (stated,) = as_values(value)[:1]
        item = self._adaptations.get((stated.statement, as_context(context)))
        if item is None:
            known = ", ".join(repr(statement) for statement, _ in self._adaptations) or "none"
            raise DataError(f"{stated.statement!r} wasn't adapted in this context; adapted values: {known}")
        save_adaptation(item, Path(folder), self.fingerprint)

    def export_onnx(self, folder: str | Path) -> None:
        """Write the English network as ONNX graphs (extra ``onnx``); ``Discriminator.load(onnx=folder)`` reads with them."""
        from moralguard.discriminator.onnx_network import export_network

        export_network(self._torch_words("exports no network").network, Path(folder), self.fingerprint)

    def gradient_spans(self, text: str, value: Value, context: str, basis: Basis) -> tuple[Span, ...]:
        if is_han(text):
            raise DataError('the character path gives no gradients; explain with method="occlusion"')
        words = self._torch_words('gives no gradients: explain with method="occlusion"')
        from moralguard.discriminator.gradient import gradient_spans

        return gradient_spans(words, text, value.statement, context, basis.window)

    def _with(self, adaptations: Sequence[Adaptation]) -> Discriminator:
        items = {(item.value.statement, item.context): item for item in (*self.adaptations, *adaptations)}
        return Discriminator(self._words, self._han, self._calibrations, list(items.values()), self._mode)


__all__ = ["Adaptation", "Discriminator", "Principle", "RefusedUpdateError"]
