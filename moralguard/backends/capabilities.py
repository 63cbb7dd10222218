"""What a control needs and what a backend has; a mismatch is an error when the guard is built."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Capabilities:
    """Flags named as in the design.

    Attributes:
        hidden: the last hidden state and the unembedding (a head of the form z = g(E h + b)).
        grad: autograd through the model.
        cache: read and write access to the KV cache.
        history: the token ids so far.
        auxiliary: extra forward passes on the model's own weights.
        per_request: different weights for each row of a batch.
        edits: the outputs of its modules can be edited, row by row.
    """

    hidden: bool = False
    grad: bool = False
    cache: bool = False
    history: bool = False
    auxiliary: bool = False
    per_request: bool = False
    edits: bool = False

    def missing_from(self, offered: Capabilities) -> list[str]:
        """Names of the capabilities that this asks for and ``offered`` lacks."""
        return [f.name for f in fields(self) if getattr(self, f.name) and not getattr(offered, f.name)]
