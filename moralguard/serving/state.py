"""What the endpoints of a server share."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from moralguard.errors import ModelError, PolicyError
from moralguard.guard import Guard
from moralguard.review.refusals import REFUSALS
from moralguard.schema import StrictModel
from moralguard.serving.audit import AuditLog
from moralguard.serving.config import ServingConfig
from moralguard.serving.engine import BusyError, Engine
from moralguard.serving.generation import Generation
from moralguard.serving.guards import ServedGuards
from moralguard.serving.metrics import Metrics
from moralguard.serving.reviewing import Reviews, is_reviewed
from moralguard.serving.token_strings import TokenStrings

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel

_DIGESTS = 64


class ServerSettings(StrictModel):
    """Limits of a server, and how it speaks.

    Attributes:
        served_model_name: what requests name the model.
        max_running, max_waiting: continuations that run side by side, and those that may wait; more are answered with 429.
        default_max_tokens: tokens of a chat answer at most where the request gives no number.
        max_seconds: how long one continuation may run.
        max_body_bytes: of a request.
        refusal: the text of denied answers; a policy's review has refusals of its own. It mustn't be empty: clients count an empty answer
            as an attack that succeeded.
    """

    served_model_name: Annotated[str, Field(min_length=1)] = "model"
    max_running: Annotated[int, Field(ge=1)] = 16
    max_waiting: Annotated[int, Field(ge=0)] = 128
    default_max_tokens: Annotated[int, Field(ge=1)] = 1024
    max_seconds: Annotated[float, Field(gt=0)] = 600.0
    max_body_bytes: Annotated[int, Field(ge=1024)] = 4 * 2**20
    refusal: Annotated[str, Field(min_length=1)] = REFUSALS["latin"]


class ServerState:
    """The model, its guards, the engine and the books of one server.

    Args:
        lm: the model, with a tokenizer.
        config: the operator's policies.
        audit: where every continuation is noted; None notes nothing.

    Raises:
        ModelError: the model has no tokenizer. PolicyError: a policy can't be bound.
    """

    def __init__(self, lm: LanguageModel, config: ServingConfig, settings: ServerSettings, audit: AuditLog | None = None):
        if lm.tokenizer is None:
            raise ModelError(f"{lm.name} was given without a tokenizer, and a server answers with text; pass (model, tokenizer)")
        self.lm, self.config, self.settings, self.audit = lm, config, settings, audit
        self.guards = ServedGuards(config, lm, stack="moralguard serve")
        self.metrics = Metrics()
        served = [self.guards.guard(each.id) for each in config.policies]
        self.engine = Engine(
            lm,
            [control for guard in served for control in guard.controls],
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            max_seconds=settings.max_seconds,
            observer=self.metrics,
        )
        self.reviews = Reviews(self.engine)
        self.metrics.watch(lambda: self.engine.running, lambda: self.engine.waiting)
        self.strings = TokenStrings(lm.tokenizer)
        self.audit_failed = False
        self._digests: OrderedDict[Guard, str | None] = OrderedDict()
        self._lock = threading.Lock()

    def submit(self, generations: Sequence[Generation]) -> None:
        """Have continuations run, under review where their policy has one.

        Raises:
            BusyError: there is no room; nothing was begun.
        """
        reviewed = [generation for generation in generations if is_reviewed(generation)]
        plain = [generation for generation in generations if not is_reviewed(generation)]
        if plain:
            self.engine.submit(plain)
        if reviewed:
            try:
                self.reviews.submit(reviewed)
            except BusyError:
                self.engine.cancel(plain)
                raise

    def refusal(self, generation: Generation) -> str:
        """The text of a denied answer."""
        return self.settings.refusal if generation.refusal is None else generation.refusal

    @property
    def tokenizer(self) -> Any:
        return self.lm.tokenizer

    def digest(self, guard: Guard | None) -> str | None:
        """Short hash of a guard's policy at its strength; None where a control holds what can't be written as data."""
        if guard is None:
            return None
        with self._lock:
            if guard not in self._digests:
                try:
                    self._digests[guard] = guard.policy.digest
                except PolicyError:
                    self._digests[guard] = None
                if len(self._digests) > _DIGESTS:
                    self._digests.popitem(last=False)
            return self._digests[guard]
