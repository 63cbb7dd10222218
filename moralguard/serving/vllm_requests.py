"""What a request of vLLM says to the guard; imports neither torch nor vLLM, as vLLM's front end checks requests with it."""

from __future__ import annotations

from typing import Any

from moralguard.errors import PolicyError
from moralguard.serving.config import ServingConfig

ARGUMENT = "moralguard"
"""The key in ``SamplingParams.extra_args`` (HTTP: ``vllm_xargs``)."""


def admit(config: ServingConfig, sampling_params: Any) -> tuple[str | None, float]:
    """(policy id or None, strength) of a request, from its sampling parameters.

    Raises:
        PolicyError: it asks for what isn't served, or for log-probabilities of its prompt, which vLLM computes without the guard.
    """
    asked = (getattr(sampling_params, "extra_args", None) or {}).get(ARGUMENT)
    policy_id, strength = config.admit(asked)
    if policy_id is not None and getattr(sampling_params, "prompt_logprobs", None) is not None:
        raise PolicyError(
            f"prompt_logprobs with policy {policy_id!r}: vLLM computes them without the guard; leave them out, or score them with "
            "`moralguard serve`"
        )
    return policy_id, strength
