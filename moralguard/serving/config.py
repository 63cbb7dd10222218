"""What an operator says of a guarded server: which policies there are, which one is the default, and what a request may ask for.

Clients name policies by id. They hand in no policy of their own, no path and no tensor, and they may tighten the default, never loosen it.
"""

from __future__ import annotations

import json
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from moralguard.errors import PolicyError
from moralguard.policy import Policy
from moralguard.schema import StrictModel, nearest

ENVIRONMENT = "MORALGUARD_SERVING"
"""Names the operator's file where a stack lets a logits processor have no arguments (vLLM)."""

Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class ServedPolicy(StrictModel):
    """A policy that requests may name.

    Attributes:
        id: the name in requests.
        policy: a built-in name, the path of a YAML or JSON file (relative to the operator's file), or the policy itself.
    """

    id: Id
    policy: str | dict[str, Any]


class GuardRequest(StrictModel):
    """What a request says to the guard.

    Attributes:
        policy: id of a served policy; None is the operator's default.
        strength: multiplies every control's strength; at least 1, at most the operator's ``max_strength``.
        trace: ask for a record of what the guard did; stacks that can't hand one back ignore it.
    """

    policy: str | None = None
    strength: float = 1.0
    trace: bool = False


class ServingConfig(StrictModel):
    """The operator's file.

    Attributes:
        policies: from the loosest to the strictest. A request may name the default or one that stands behind it.
        default: id of the policy of requests that name none; None leaves those unguarded, and any policy may be named.
        max_strength: the largest strength that a request may ask for.
        model: what the guard's own passes run on (a folder, an id, a GGUF or ONNX file), where the stack's model can't be used for
            them; None is the model that the stack serves.
        folder: where paths of policies start; the file's own folder, and not a setting of the file.
    """

    policies: tuple[ServedPolicy, ...]
    default: str | None = None
    max_strength: Annotated[float, Field(ge=1)] = 2.0
    model: str | None = None
    folder: Path = Path()

    @model_validator(mode="after")
    def _consistent(self) -> ServingConfig:
        ids = [served.id for served in self.policies]
        repeated = sorted({i for i in ids if ids.count(i) > 1})
        if not ids:
            raise PolicyError("a guarded server has no policies; list at least one under `policies`")
        if repeated:
            raise PolicyError(f"several served policies have the id {', '.join(repeated)}; ids are distinct")
        if self.default is not None and self.default not in ids:
            raise PolicyError(f"the default policy {self.default!r} isn't served; {nearest(self.default, ids)}")
        return self

    @classmethod
    def load(cls, path: str | Path) -> ServingConfig:
        """The operator's file, YAML or JSON; every policy in it is read, so that a mistake shows before anything is served.

        Raises:
            PolicyError: the file or a policy can't be used.
        """
        file = Path(path)
        if not file.is_file():
            raise PolicyError(f"the serving file {str(path)!r} isn't there; expected YAML or JSON with `policies` and `default`")
        text = file.read_text(encoding="utf-8")
        try:
            data = json.loads(text) if file.suffix.lower() == ".json" else yaml.safe_load(text)
        except (yaml.YAMLError, json.JSONDecodeError) as error:
            raise PolicyError(f"{path} can't be read: {error}") from error
        if not isinstance(data, dict):
            raise PolicyError(f"{path} holds a {type(data).__name__}; expected a mapping with `policies` and `default`")
        known = [name for name in cls.model_fields if name != "folder"]
        unknown = next((str(key) for key in data if key not in known), None)
        if unknown is not None:
            raise PolicyError(f"{path} has no setting {unknown!r}; {nearest(unknown, known)}")
        try:
            config = cls(folder=file.parent, **{str(key): value for key, value in data.items()})
            for served in config.policies:
                config.policy(served.id)
        except PolicyError as error:
            raise PolicyError(f"{path}: {error}") from None
        return config

    @classmethod
    def from_environment(cls) -> ServingConfig:
        """The file that ``MORALGUARD_SERVING`` names.

        Raises:
            PolicyError: the variable isn't set, or the file can't be used.
        """
        path = os.environ.get(ENVIRONMENT)
        if not path:
            raise PolicyError(f"set {ENVIRONMENT} to the path of the serving file (YAML with `policies` and `default`)")
        return _cached(path, os.stat(path).st_mtime_ns if os.path.exists(path) else 0)

    def policy(self, policy_id: str) -> Policy:
        """The served policy of this id.

        Raises:
            PolicyError: there is none, or it can't be used.
        """
        found = next((served for served in self.policies if served.id == policy_id), None)
        if found is None:
            raise PolicyError(f"no policy {policy_id!r} is served; {nearest(policy_id, [served.id for served in self.policies])}")
        if isinstance(found.policy, str) and found.policy.lower().endswith((".yaml", ".yml", ".json")):
            return Policy.load(self.folder / found.policy)
        return Policy.load(found.policy)

    def admit(self, asked: Any) -> tuple[str | None, float]:
        """(policy id or None for unguarded, strength) of a request.

        Args:
            asked: None, a mapping with the fields of ``GuardRequest``, or the same as a JSON string.

        Raises:
            PolicyError: it is malformed, names a policy that isn't served, would loosen the default, or asks for too much strength.
        """
        request = _read(asked)
        if not math.isfinite(request.strength) or not 1 <= request.strength <= self.max_strength:
            raise PolicyError(f"strength is {request.strength:g}; a request may ask for 1 to {self.max_strength:g}")
        if request.policy is None:
            if self.default is None and request.strength != 1:
                raise PolicyError("strength without a policy: this server has no default policy, so name one")
            return self.default, request.strength
        ids = [served.id for served in self.policies]
        if request.policy not in ids:
            raise PolicyError(f"no policy {request.policy!r} is served; {nearest(request.policy, ids)}")
        if self.default is not None and ids.index(request.policy) < ids.index(self.default):
            raise PolicyError(
                f"policy {request.policy!r} is looser than this server's default {self.default!r}; a request may only tighten it"
            )
        if request.strength != 1:
            self.policy(request.policy).scaled(request.strength)
        return request.policy, request.strength


def _read(asked: Any) -> GuardRequest:
    if asked is None:
        return GuardRequest()
    if isinstance(asked, str):
        try:
            asked = json.loads(asked)
        except json.JSONDecodeError as error:
            raise PolicyError(f"the moralguard argument isn't JSON: {error}") from None
    if not isinstance(asked, dict):
        raise PolicyError(f"the moralguard argument is a {type(asked).__name__}; expected an object with policy and strength")
    return GuardRequest(**{str(key): value for key, value in asked.items()})


@lru_cache(maxsize=4)
def _cached(path: str, modified: int) -> ServingConfig:
    """Requests are checked one by one, and the file seldom changes."""
    return ServingConfig.load(path)
