"""How probable the rows of a pass were, token by token: what a class-conditional pass is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from moralguard.backends.arrays import Array, namespace_of

# Logits of so many entries are computed at once: 64 MiB as float32.
_MOST_ENTRIES = 2**24


class Likelihood:
    """Log-probabilities of the tokens that rows have read, columns as in the rows' mask.

    Attributes:
        ids: i64[R, W], the tokens.
        counted: i64[R, W], 1 where a token counts: it stands behind the row's prefix, and something stands before it.
        log_probs: f64[R, W], nats; 0 where a token doesn't count.
    """

    def __init__(self, lm: Any, lengths: Sequence[int], first: Sequence[int]):
        """Of rows of these lengths, left-padded; ``first`` is the place in each row from which its tokens count."""
        self._lm, self._arrays = lm, namespace_of(lm)
        width = max(lengths)
        start = [width - length + max(place, 1) for length, place in zip(lengths, first, strict=True)]
        self.counted = self._arrays.integers([[int(column >= s) for column in range(width)] for s in start], lm)
        self.ids = self.counted[:, :0]
        self.log_probs = self._arrays.as_double(self.ids)

    @property
    def sums(self) -> Array:
        """f64[R]; added up from the left, so that padding changes no bit."""
        total: Array = self.log_probs.cumsum(-1)[:, -1]
        return total

    @property
    def counts(self) -> Array:
        """i64[R], how many tokens each sum is of."""
        total: Array = self.counted.sum(-1)
        return total

    def read(self, ids: Array, law: Array | None, states: Array) -> None:
        """Take note of tokens i64[R, n] that were just read.

        Args:
            ids: their ids.
            law: f32[R, V], the logits before the first of them; None where nothing stands before it.
            states: f[R, n, d], last hidden states at these tokens.
        """
        arrays = self._arrays
        found = [arrays.as_double(ids[:, :1]) * 0 if law is None else self._of(law[:, None], ids[:, :1])]
        step = max(1, _MOST_ENTRIES // (ids.shape[0] * self._lm.vocab_size))
        for start in range(0, ids.shape[1] - 1, step):
            stop = min(start + step, ids.shape[1] - 1)
            found.append(self._of(self._lm.logits_of(states[:, start:stop]), ids[:, start + 1 : stop + 1]))
        self.ids = arrays.cat([self.ids, ids], -1)
        new = self.ids.shape[1] - self.counted.shape[1]
        if new > 0:
            self.counted = arrays.cat([self.counted, ids[:, -new:] * 0 + 1], -1)
        newest = arrays.cat(found, -1)
        # what stands at padding may be anything, NaN too
        newest = arrays.where(self.counted[:, -ids.shape[1] :] > 0, newest, newest * 0)
        newest = arrays.masked_fill(newest, arrays.isnan(newest), 0.0)
        self.log_probs = arrays.cat([self.log_probs, newest], -1)

    def _of(self, logits: Array, ids: Array) -> Array:
        """f64[R, n], log softmax of logits f32[R, n, V] at ids i64[R, n]."""
        arrays = self._arrays
        probabilities = arrays.gather(arrays.softmax(arrays.as_double(logits)), ids[..., None])
        found: Array = arrays.log(probabilities)[..., 0]
        return found

    def select(self, rows: Array) -> Likelihood:
        """These rows (i64[n]; an index may repeat) as one's own."""
        return self._changed(lambda values: values[rows])

    def without_oldest(self, columns: int) -> Likelihood:
        return self._changed(lambda values: values[:, columns:])

    def without_newest(self, columns: int) -> Likelihood:
        return self._changed(lambda values: values[:, : values.shape[1] - columns])

    def widened(self, width: int) -> Likelihood:
        """With columns in front, at which nothing was read, up to this width."""
        return self._changed(lambda values: self._arrays.pad_left(values, width, 0))

    def joined(self, other: Likelihood) -> Likelihood:
        """Rows of another group of the same model behind one's own, padded on the left to one width."""
        arrays = self._arrays
        width = max(self.ids.shape[1], other.ids.shape[1])
        twin = copy(self)
        for name in ("ids", "counted", "log_probs"):
            setattr(twin, name, arrays.cat([arrays.pad_left(getattr(part, name), width, 0) for part in (self, other)]))
        return twin

    def _changed(self, change: Any) -> Likelihood:
        twin = copy(self)
        for name in ("ids", "counted", "log_probs"):
            setattr(twin, name, change(getattr(self, name)))
        return twin
