"""OpenTelemetry spans and evaluation events, through its API alone: without the API, or without an SDK behind it, nothing happens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moralguard.serving.generation import Generation


def record(request_id: str, model: str, operation: str, generations: Sequence[Generation], began_ns: int) -> None:
    """A span of a request, and a ``gen_ai.evaluation.result`` event of each of its continuations. No text is in them.

    Args:
        operation: "chat" or "text_completion".
        began_ns: when it arrived, ``time.time_ns()``.
    """
    try:
        from opentelemetry import trace
    except ImportError:
        return
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "moralguard",
        "gen_ai.request.model": model,
        "gen_ai.response.id": request_id,
        "gen_ai.response.finish_reasons": [generation.finish_reason for generation in generations],
        "gen_ai.usage.input_tokens": sum(len(generation.prompt_ids) for generation in generations),
        "gen_ai.usage.output_tokens": sum(len(generation.token_ids) for generation in generations if generation.given is None),
        "moralguard.policy": generations[0].policy or "none",
        "moralguard.interventions": sum(generation.interventions for generation in generations),
    }
    span = trace.get_tracer("moralguard").start_span(
        f"{operation} {model}", kind=trace.SpanKind.SERVER, start_time=began_ns, attributes=attributes
    )
    try:
        for generation in generations:
            if generation.policy is not None:
                _evaluation(request_id, generation, trace.set_span_in_context(span))
    finally:
        span.end()


def _evaluation(request_id: str, generation: Generation, context: Any) -> None:
    try:
        from opentelemetry._logs import SeverityNumber, get_logger
    except ImportError:  # an older API has no logs
        return
    # the score is the share of tokens at which a control acted
    attributes: dict[str, Any] = {
        "gen_ai.evaluation.name": f"moralguard.{generation.policy}",
        "gen_ai.evaluation.score.value": generation.interventions / max(1, generation.rows_guarded),
        "gen_ai.evaluation.score.label": generation.decision,
        "gen_ai.response.id": request_id,
    }
    if generation.reason is not None:
        attributes["gen_ai.evaluation.explanation"] = generation.reason
    get_logger("moralguard").emit(
        event_name="gen_ai.evaluation.result", severity_number=SeverityNumber.INFO, attributes=attributes, context=context
    )
