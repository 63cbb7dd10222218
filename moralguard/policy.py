"""Policies: the values a text must keep and the controls that enforce them, as data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, PlainSerializer, SkipValidation, WithJsonSchema, field_validator, model_validator

from moralguard.backends.arrays import kind_of
from moralguard.controls.base import Control
from moralguard.controls.registry import control_class, control_names, read_control, write_control
from moralguard.decoding.gate import Gate
from moralguard.errors import PolicyError
from moralguard.review.base import ReviewMethod
from moralguard.review.registry import in_order, method_class, method_names, read_method, write_method
from moralguard.schema import StrictModel, nearest
from moralguard.values import Value

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel

_SUFFIXES = (".yaml", ".yml", ".json")

AnyControl = Annotated[
    SkipValidation[Control],
    BeforeValidator(read_control),
    PlainSerializer(write_control),
    WithJsonSchema({"type": "object", "properties": {"control": {"type": "string"}}, "required": ["control"]}),
]

AnyMethod = Annotated[
    SkipValidation[ReviewMethod],
    BeforeValidator(read_method),
    PlainSerializer(write_method),
    WithJsonSchema({"type": "object", "properties": {"method": {"type": "string"}}, "required": ["method"]}),
]


class DecodingDefaults(StrictModel):
    """Decoding settings that apply where a call names none; None leaves moralguard's own default."""

    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None


class FittedControls(StrictModel):
    """Controls made of packs that were fitted on one model.

    Attributes:
        model: the model's name, for people.
        fingerprint: ``LanguageModel.fingerprint`` of the model, which its export to ONNX keeps.
        runtime: only where the model runs on this; LoRA packs need torch. None is either.
        controls, gate: what acts on that model in place of the policy's own controls and gate.
    """

    model: str
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    runtime: Literal["torch", "onnx"] | None = None
    controls: tuple[AnyControl, ...]
    gate: Gate | None = None


class Policy(StrictModel):
    """A frozen policy.

    Attributes:
        name, description: for people.
        values: what the text must keep. Ids are distinct.
        controls: how it is enforced, in any order; None derives a prompted contrast and self-debiasing prefixes from the values.
        on_error: "closed" ends a request whose control fails, with an error; "open" passes over the failure and counts it.
        decoding: defaults of ``guard.generate``.
        gate: when the controls act; always, without one.
        fitted: controls for single models, made of packs fitted on them; where none is for the model at hand, ``controls`` act.
        review: what happens to whole texts; one of each method, in any order.
    """

    name: str = "custom"
    description: str = ""
    values: tuple[Value, ...] = ()
    controls: tuple[AnyControl, ...] | None = None
    on_error: Literal["closed", "open"] = "closed"
    decoding: DecodingDefaults = DecodingDefaults()
    gate: Gate | None = None
    fitted: tuple[FittedControls, ...] = ()
    review: tuple[AnyMethod, ...] = ()

    @field_validator("values", mode="before")
    @classmethod
    def _read_values(cls, values: Any) -> Any:
        if not isinstance(values, (list, tuple)):
            raise PolicyError(f"values is a {type(values).__name__}; expected a list of statements or of {{id, statement}}")
        return _with_distinct_ids(values)

    @model_validator(mode="after")
    def _distinct_ids(self) -> Policy:
        ids = [value.id for value in self.values]
        repeated = sorted({i for i in ids if ids.count(i) > 1})
        if repeated:
            raise PolicyError(f"policy {self.name!r} has several values with id {', '.join(repeated)}; ids are distinct")
        return self

    @model_validator(mode="after")
    def _one_entry_a_model(self) -> Policy:
        for i, entry in enumerate(self.fitted):
            for other in self.fitted[:i]:
                apart = None not in (entry.runtime, other.runtime) and entry.runtime != other.runtime
                if entry.fingerprint == other.fingerprint and not apart:
                    raise PolicyError(
                        f"policy {self.name!r} has several fitted entries with fingerprint {entry.fingerprint}; keep one a model, or one a "
                        "runtime (torch, onnx)"
                    )
        return self

    @model_validator(mode="after")
    def _reviews_fit(self) -> Policy:
        if any(method.active for method in in_order(self.review)) and not self.values:
            raise PolicyError(f"policy {self.name!r} reviews texts, which are judged by its values, and has none; name at least one")
        return self

    @classmethod
    def load(cls, source: str | Path | dict[str, Any] | Policy) -> Policy:
        """A policy from a built-in name, the path of a YAML or JSON file, a dict, or another policy.

        Raises:
            PolicyError: no such policy, or it can't be read; names the key and the nearest known one.
        """
        if isinstance(source, Policy):
            return source
        if isinstance(source, dict):
            return cls(**{str(key): value for key, value in source.items()})
        if not isinstance(source, (str, Path)):
            raise PolicyError(
                f"a policy is a built-in name, the path of a YAML or JSON file, a dict or a Policy; got a {type(source).__name__}"
            )
        path = Path(source)
        if path.suffix.lower() in _SUFFIXES:
            if not path.is_file():
                raise PolicyError(
                    f"policy file {str(source)!r} isn't there; give an existing file or a built-in name: {', '.join(built_in_policies())}"
                )
            return cls._parse(path.read_text(encoding="utf-8"), str(path))
        if str(source) not in built_in_policies():
            raise PolicyError(
                f"there is no built-in policy {str(source)!r}; {nearest(str(source), built_in_policies())} (a file ends in .yaml or .json)"
            )
        return cls._parse(_built_in_text(str(source)), f"built-in policy {source}")

    @classmethod
    def _parse(cls, text: str, where: str) -> Policy:
        # JSON isn't quite a part of YAML 1.1 (tabs, surrogate escapes), so each is read by its own reader
        try:
            data = json.loads(text) if where.lower().endswith(".json") else yaml.safe_load(text)
        except (yaml.YAMLError, json.JSONDecodeError) as error:
            raise PolicyError(f"{where} isn't {'JSON' if where.lower().endswith('.json') else 'YAML'}: {error}") from error
        if not isinstance(data, dict):
            raise PolicyError(f"{where} holds a {type(data).__name__}; expected a mapping with values, controls, ...")
        try:
            return cls(**{str(key): value for key, value in data.items()})
        except PolicyError as error:
            raise PolicyError(f"{where}: {error}") from None

    @classmethod
    def from_values(cls, *statements: str) -> Policy:
        """A policy of nothing but value statements; its controls are derived from them."""
        return cls(name="values", values=statements)

    def effective_controls(self) -> tuple[Control, ...]:
        """The controls that run: the named ones, or those derived from the values. Listing one object twice counts once."""
        if self.controls is None:
            return _controls_for_values() if self.values else ()
        distinct: dict[int, Control] = {id(control): control for control in self.controls}
        return tuple(distinct.values())

    def fitted_for(self, lm: LanguageModel) -> FittedControls | None:
        """The entry of ``fitted`` that is for this model."""
        # without entries the model's weights aren't read
        runtime = "onnx" if kind_of(lm) == "numpy" else "torch"
        found = (entry for entry in self.fitted if entry.fingerprint == lm.fingerprint)
        return next((entry for entry in found if entry.runtime in (None, runtime)), None)

    def for_model(self, lm: LanguageModel) -> Policy:
        """The policy as it acts on a model: with the controls and the gate of its entry in ``fitted``, where it has one."""
        entry = self.fitted_for(lm)
        return self if entry is None else self.replaced(controls=entry.controls, gate=entry.gate, fitted=())

    def scaled(self, factor: float) -> Policy:
        """The policy with every control ``factor`` times as strong; 1 is the policy itself.

        Raises:
            PolicyError: a control has no strength to scale, or its settings don't go so far.
        """
        if factor == 1:
            return self
        fitted = tuple(entry.replaced(controls=tuple(control.scaled(factor) for control in entry.controls)) for entry in self.fitted)
        return self.replaced(controls=tuple(control.scaled(factor) for control in self.effective_controls()), fitted=fitted)

    def as_dict(self) -> dict[str, Any]:
        """Plain data that ``Policy.load`` reads back.

        Raises:
            PolicyError: a control holds a tensor, a model or a function.
        """
        data = self.model_dump(mode="json", exclude_none=True, exclude={"controls", "fitted", "gate", "review"})
        if self.gate is not None:
            data["gate"] = _write_gate(self.gate)
        if self.controls is not None:
            data["controls"] = [write_control(control) for control in self.controls]
        if self.fitted:
            data["fitted"] = [_write_fitted(entry) for entry in self.fitted]
        if self.review:
            data["review"] = [write_method(method) for method in self.review]
        return {key: value for key, value in data.items() if value not in ("", {}, []) or key == "controls"}

    def as_yaml(self) -> str:
        data = self.as_dict()
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
        # a few characters that YAML takes for line breaks survive only when escaped
        return text if yaml.safe_load(text) == data else yaml.safe_dump(data, sort_keys=False, width=120)

    @property
    def digest(self) -> str:
        """Short hash of the policy's data."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:12]


def _with_distinct_ids(values: Sequence[Any]) -> tuple[Any, ...]:
    """Statements as values; those that begin alike get a number, while ids that someone chose stay as they are."""
    taken = {v.id if isinstance(v, Value) else str(v.get("id")) for v in values if isinstance(v, (Value, dict))}
    named: list[Any] = []
    for value in values:
        if not isinstance(value, str):
            named.append(value)
            continue
        found = Value.from_statement(value)
        number = 2
        while found.id in taken:
            found = Value(id=f"{Value.from_statement(value).id}-{number}", statement=value)
            number += 1
        taken.add(found.id)
        named.append(found)
    return tuple(named)


def _write_fitted(entry: FittedControls) -> dict[str, Any]:
    data = entry.model_dump(mode="json", include={"model", "fingerprint", "runtime"}, exclude_none=True)
    data["controls"] = [write_control(control) for control in entry.controls]
    return data if entry.gate is None else data | {"gate": _write_gate(entry.gate)}


def _write_gate(gate: Gate) -> dict[str, Any]:
    # what a gate doesn't use isn't a setting of it
    return gate.model_dump(mode="json", exclude_defaults=True)


def _controls_for_values() -> tuple[Control, ...]:
    return (read_control({"control": "dexperts@1", "alpha": 1.0}), read_control({"control": "self-debias@1"}))


def built_in_policies() -> list[str]:
    """Names of the policies that come with moralguard."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def _built_in_text(name: str) -> str:
    return (_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def _folder() -> Any:
    return resources.files("moralguard") / "policies"


def policy_schema() -> dict[str, Any]:
    """JSON schema of a policy file, the settings of every known control included."""
    schema = Policy.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    options = [_described(definitions, "control", name, control_class(name)) for name in sorted(control_names())]
    methods = [_described(definitions, "method", name, method_class(name)) for name in method_names()]
    values = schema["properties"]["values"]
    values["items"] = {"anyOf": [values["items"], {"type": "string", "minLength": 3}]}  # a statement alone is a value
    controls = {"type": "array", "items": {"oneOf": options}}
    schema["properties"]["controls"] = {"anyOf": [controls, {"type": "null"}]}
    definitions["FittedControls"]["properties"]["controls"] = controls
    schema["properties"]["review"]["items"] = {"oneOf": methods}
    return schema


def _described(definitions: dict[str, Any], key: str, name: str, found: type[Control] | type[ReviewMethod]) -> dict[str, str]:
    """The settings of a control or a review method as a definition, and a reference to it."""
    settings = found.model_json_schema(ref_template="#/$defs/{model}")
    definitions.update(settings.pop("$defs", {}))
    settings["properties"] = {key: {"enum": [found.versioned_name(), name]}} | settings.get("properties", {})
    settings["required"] = [key, *settings.get("required", [])]
    definitions[found.__name__] = settings
    return {"$ref": f"#/$defs/{found.__name__}"}
