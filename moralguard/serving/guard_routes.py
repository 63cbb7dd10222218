"""GET /v1/guards: the policies that may be named. POST /v1/guards/score: P(v|y) by the shipped discriminator."""

from __future__ import annotations

import anyio
import anyio.to_thread
from fastapi import APIRouter

from moralguard.backends.arrays import kind_of
from moralguard.errors import GuardError
from moralguard.serving.answers import GuardCard, GuardList, GuardScores, NamedValue, ScoredValue
from moralguard.serving.engine import BusyError
from moralguard.serving.openai_errors import ApiError
from moralguard.serving.openapi import errors
from moralguard.serving.protocol import ScoreRequest
from moralguard.serving.state import ServerState

_MOST_WAITING = 32


def router(state: ServerState) -> APIRouter:
    """The endpoints of a server."""
    routes = APIRouter(tags=["guards"])
    # one at a time, as a discriminator takes every core that it gets and generation goes on beside it; the others wait without a thread
    limiter = anyio.CapacityLimiter(1)

    @routes.get("/v1/guards")
    def guards() -> GuardList:
        """Policies by id, from the loosest to the strictest; a request may name the default or one behind it."""
        config = state.config
        ids = [served.id for served in config.policies]
        first = 0 if config.default is None else ids.index(config.default)
        return GuardList(
            default=config.default,
            max_strength=config.max_strength,
            data=[_described(state, policy_id, selectable=place >= first) for place, policy_id in enumerate(ids)],
        )

    def scored(body: ScoreRequest) -> GuardScores:
        from moralguard.discriminator.discriminator import shipped_discriminator
        from moralguard.discriminator.inputs import as_values

        try:
            judge = shipped_discriminator(onnx=True) if kind_of(state.lm) == "numpy" else shipped_discriminator()
            values = as_values(body.values)
            scores = judge.score(body.texts, values, context=body.context)
        except GuardError as error:
            raise ApiError(400, str(error), "invalid_value", "values") from None
        return GuardScores(
            values=[ScoredValue(id=value.id, statement=value.statement, threshold=value.threshold) for value in values],
            scores=[[float(score) for score in row] for row in scores],
        )

    @routes.post("/v1/guards/score", responses=errors(400, 429))
    async def score(body: ScoreRequest) -> GuardScores:
        """P(v|y): the probability that each text keeps each value; `scores[i][j]` is text i against value j."""
        if limiter.statistics().tasks_waiting >= _MOST_WAITING:
            raise BusyError(f"{_MOST_WAITING} requests wait to be scored; try again later")
        return await anyio.to_thread.run_sync(scored, body, limiter=limiter)

    return routes


def _described(state: ServerState, policy_id: str, selectable: bool) -> GuardCard:
    guard = state.guards.guard(policy_id)
    return GuardCard(
        id=policy_id,
        name=guard.policy.name,
        description=guard.policy.description,
        digest=state.digest(guard),
        values=[NamedValue(id=value.id, statement=value.statement) for value in guard.policy.values],
        controls=[control.settings.versioned_name() for control in guard.controls],
        review=[method.versioned_name() for method in guard.review],
        on_error=guard.policy.on_error,
        default=policy_id == state.config.default,
        selectable=selectable,
    )
