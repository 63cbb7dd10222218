"""The record of one guarded token."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TokenTrace:
    """What happened at one token.

    Attributes:
        position: unpadded position in the text, prompt included.
        token_id, token: what was drawn.
        counterfactual_id, counterfactual: what the unguarded model would have drawn here, after the same text, with the same noise.
        kl: KL(guarded || base) in nats, of the laws at temperature 1 before top-k, top-p and min-p.
        contributions: control -> change in the drawn token's log-odds that this control made (the law with all controls against
            the law without this one); None where that isn't finite (every other token was removed) or unknown (a control failed).
        values: control -> ids of the policy's values it acts for.
    """

    position: int
    token_id: int
    token: str
    counterfactual_id: int
    counterfactual: str
    kl: float
    contributions: dict[str, float | None]
    values: dict[str, list[str]]

    @property
    def changed(self) -> bool:
        return self.token_id != self.counterfactual_id

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"changed": self.changed}
