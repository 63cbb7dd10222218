"""Controls by versioned name. A control's module is imported only when a policy names it."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from moralguard.controls.base import Control
from moralguard.errors import PolicyError
from moralguard.schema import nearest

ENTRY_POINT_GROUP = "moralguard.controls"

_BUILT_IN = {
    "args": "moralguard.controls.args:ARGS",
    "arithmetic": "moralguard.controls.arithmetic:ModelArithmetic",
    "contrastive": "moralguard.controls.contrastive:ContrastiveDecoding",
    "dexperts": "moralguard.controls.dexperts:DExperts",
    "fudge": "moralguard.controls.fudge:Fudge",
    "gedi": "moralguard.controls.gedi:GeDi",
    "guidance": "moralguard.controls.guidance:Guidance",
    "instruction": "moralguard.controls.instruction:Instruction",
    "layer-projection": "moralguard.controls.layer_projection:LayerProjection",
    "nullspace": "moralguard.controls.nullspace:NullspaceProjection",
    "pplm": "moralguard.controls.pplm:PPLM",
    "prefix": "moralguard.controls.prefix:Prefix",
    "proxy-tuning": "moralguard.controls.proxy_tuning:ProxyTuning",
    "rad": "moralguard.controls.rad:RAD",
    "sasa": "moralguard.controls.sasa:SASA",
    "safe-decoding": "moralguard.controls.safe_decoding:SafeDecoding",
    "self-debias": "moralguard.controls.self_debias:SelfDebias",
    "steering": "moralguard.controls.steering:SteeringVectors",
    "uddia": "moralguard.controls.uddia:UDDIA",
    "word-list": "moralguard.controls.word_list:WordList",
}


def control_names() -> dict[str, str]:
    """Name -> "module:class" of every control, built in or installed by others (entry-point group ``moralguard.controls``)."""
    installed = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
    return installed | _BUILT_IN


def control_class(versioned: str) -> type[Control]:
    """The class of "name@version" (or "name", the newest).

    Raises:
        PolicyError: no such control, or not in this version.
    """
    name, _, version = versioned.partition("@")
    known = control_names()
    if name not in known:
        raise PolicyError(f"there is no control {name!r}; {nearest(name, known)}")
    module, _, attribute = known[name].partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise PolicyError(f"control {name!r} can't be imported from {known[name]}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Control)):
        raise PolicyError(f"{known[name]} isn't a Control class; entry points of {ENTRY_POINT_GROUP} name subclasses of Control")
    if version and version != str(found.version):
        raise PolicyError(f"control {name!r} is installed in version {found.version}, but the policy asks for {versioned}")
    return found


def read_control(data: Any) -> Control:
    """A control from policy data: {"control": "name@version", settings...}."""
    if isinstance(data, Control):
        return data
    if not isinstance(data, dict) or not isinstance(data.get("control"), str):
        raise PolicyError(f"a control is a mapping with the key `control`, such as {{control: dexperts@1, alpha: 2}}; got {data!r}")
    settings = {key: value for key, value in data.items() if key != "control"}
    return control_class(data["control"])(**settings)


def write_control(control: Control) -> dict[str, Any]:
    """Policy data of a control: its name and the settings that differ from the defaults.

    Raises:
        PolicyError: a setting is a tensor, a model or a function; those travel as files.
    """
    data: dict[str, Any] = {"control": control.versioned_name()}
    fields = type(control).model_fields
    for name in sorted(fields, key=lambda name: name in Control.model_fields):  # those of every control behind its own
        field, value = fields[name], getattr(control, name)
        if value == field.default if isinstance(value, (str, int, float, bool, tuple, type(None))) else False:
            continue
        if name == "when":  # what it doesn't use isn't a condition of it
            data[name] = value.model_dump(mode="json", exclude_defaults=True)
            continue
        data[name] = _plain(value, f"{control.control_name}.{name}")
    return data


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [_plain(item, where) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise PolicyError(f"{where} is a {type(value).__name__}, which a policy file can't hold; save it and name its path instead")
