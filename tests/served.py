"""A tiny model behind a server: policies of different kinds, controls that fail, and a real uvicorn server on a free port."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import uvicorn
from odd_models import BYTE_VOCAB, basis, byte_llama, byte_tokenizer

from moralguard.backends.hf import LanguageModel
from moralguard.controls import BoundControl, Control, Dense, NullspaceProjection, Terms
from moralguard.decoding.terms import Sparse
from moralguard.serving.config import ServingConfig

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if messages[-1]['content'] == 'refuse me' %}{{ raise_exception('no') }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class BoundFaulty(BoundControl["Faulty"]):
    def terms(self, step: Any) -> Terms:
        lengths = step.mask.sum(-1)
        if bool((lengths >= self.settings.at).any()):
            if not self.settings.empties:
                raise RuntimeError("secret words of a user")
            sets = [torch.full((step.rows, 1), token) for token in (0, 1)]  # two that have nothing in common
            kept = tuple(Sparse(ids, torch.zeros(step.rows, 1), keep_rest=False) for ids in sets)
            return Terms(kept, rows=lengths >= self.settings.at)
        return Terms()


class Faulty(Control):
    """Raises, or removes every token, once a text has ``at`` tokens."""

    control_name: ClassVar[str] = "faulty"
    at: int = 8
    empties: bool = False

    @property
    def active(self) -> bool:
        return True

    def bind(self, lm: Any, values: Any) -> BoundFaulty:
        return BoundFaulty(self, lm)


class BoundCounting(BoundControl["Counting"]):
    def columns(self, step: Any) -> dict[str, Any]:
        return {"even": step.weight(0.0)}

    def terms(self, step: Any) -> Terms:
        delta = torch.zeros(step.rows, BYTE_VOCAB)
        delta[:, 5] = step.columns["even"]
        return Terms((Dense(delta),), carry={"even": step.columns["even"] + 0.5})

    def commit(self, step: Any, carry: dict[str, Any], tokens: Any) -> dict[str, Any]:
        return {"even": torch.where(tokens % 2 == 0, carry["even"], step.columns["even"])}


class Counting(Control):
    """Raises a token by how many even tokens were committed: state that only ``commit`` moves."""

    control_name: ClassVar[str] = "counting"

    @property
    def active(self) -> bool:
        return True

    def bind(self, lm: Any, values: Any) -> BoundCounting:
        return BoundCounting(self, lm)


class BoundSlow(BoundControl["Slow"]):
    def terms(self, step: Any) -> Terms:
        time.sleep(0.02)
        return Terms()


class Slow(Control):
    """Takes its time at every step, so that a client can leave in the middle."""

    control_name: ClassVar[str] = "slow"

    @property
    def active(self) -> bool:
        return True

    def bind(self, lm: Any, values: Any) -> BoundSlow:
        return BoundSlow(self, lm)


POLICIES: dict[str, dict[str, Any]] = {
    "loose": {"controls": [{"control": "self-debias@1", "prefixes": [[9, 8, 7]], "decay_constant": 300}]},
    "state": {"controls": [NullspaceProjection(basis=basis(), keep=0.25), Counting()]},
    "strict": {"controls": [{"control": "dexperts@1", "anti_expert": {"prompt": [9, 8, 7]}, "alpha": 1.0, "filter_p": 0.98}]},
    "slow": {"controls": [Slow()]},
    "faulty": {"controls": [Faulty()]},
    "faulty-open": {"controls": [Faulty()], "on_error": "open"},
    "empties": {"controls": [Faulty(empties=True)]},
    "empties-open": {"controls": [Faulty(empties=True)], "on_error": "open"},
}
"""From the loosest to the strictest."""


def language_model() -> LanguageModel:
    return LanguageModel(byte_llama(), byte_tokenizer(TEMPLATE), "tiny")


def config(*ids: str, **more: Any) -> ServingConfig:
    return ServingConfig(policies=[{"id": i, "policy": POLICIES[i]} for i in ids or POLICIES], **more)


@contextmanager
def live(app: Any) -> Iterator[str]:
    """The base URL of a uvicorn server that runs the app in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    """Return as soon as it holds.

    Raises:
        TimeoutError: it never did.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("what was waited for didn't come")
        time.sleep(0.002)
