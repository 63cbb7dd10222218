"""Policies as data: every way to load one, strictness, round trips, the JSON schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moralguard.controls import PPLM, Control, DExperts, Fudge, NullspaceProjection, Prompt, SelfDebias
from moralguard.controls.registry import control_class, control_names
from moralguard.decoding.gate import Gate
from moralguard.errors import GuardError, PolicyError
from moralguard.policy import Policy, built_in_policies, policy_schema
from moralguard.values import Value

DATA: dict[str, Any] = {
    "name": "example",
    "description": "For tests \N{SNOWMAN} \N{SLIGHTLY SMILING FACE}.",
    "values": [
        {"id": "kind", "statement": "The text does not insult anyone.", "priority": 2},
        "The text does not threaten anyone.",
    ],
    "controls": [
        {"control": "self-debias@1", "decay_constant": 10, "prefixes": ["Insults:\n", [1, 2, 3]]},
        {"control": "dexperts", "alpha": 0.5, "expert": {"prompt": "Kind words:\n"}, "anti_expert": {"prompt": [7, 8]}},
        {"control": "pplm@1", "bag_of_words": [["kind", 5], ["calm"]], "stepsize": 0.03},
    ],
    "on_error": "open",
    "decoding": {"do_sample": True, "top_p": 0.9, "max_new_tokens": 7},
    "gate": {"min_entropy": 0.5},
}

CONTROLS: tuple[Control, ...] = (
    SelfDebias(decay_constant=10, prefixes=("Insults:\n", (1, 2, 3))),
    DExperts(alpha=0.5, expert=Prompt("Kind words:\n"), anti_expert=Prompt([7, 8])),
    PPLM(bag_of_words=(("kind", 5), ("calm",)), stepsize=0.03),
)


def check_example(policy: Policy) -> None:
    assert policy.name == "example"
    assert policy.description == DATA["description"]
    assert [value.id for value in policy.values] == ["kind", "the-text-does-not-threaten-anyone"]
    assert policy.values[0].priority == 2
    assert policy.controls == CONTROLS
    assert policy.on_error == "open"
    assert policy.decoding.model_dump(exclude_none=True) == DATA["decoding"]
    assert policy.gate == Gate(min_entropy=0.5)


# --- loading ------------------------------------------------------------------------------------------------------------------


def test_load_from_a_dict() -> None:
    check_example(Policy.load(DATA))


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".YAML"])
def test_load_from_yaml(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"policy{suffix}"
    file.write_text(yaml.safe_dump(DATA, allow_unicode=True), encoding="utf-8")
    check_example(Policy.load(file))
    check_example(Policy.load(str(file)))


@pytest.mark.parametrize("how", [{}, {"indent": 2}, {"indent": "\t"}, {"ensure_ascii": False}, {"separators": (",", ":")}], ids=str)
def test_load_from_json(tmp_path: Path, how: dict[str, Any]) -> None:
    """As any JSON writer may lay it out: indented with tabs, without spaces, with escaped surrogate pairs."""
    file = tmp_path / "policy.json"
    file.write_text(json.dumps(DATA, **how), encoding="utf-8")
    check_example(Policy.load(file))


def test_load_from_objects() -> None:
    values = [Value(id="kind", statement="The text does not insult anyone.", priority=2), DATA["values"][1]]
    policy = Policy(**{**DATA, "values": values, "controls": list(CONTROLS)})
    check_example(policy)
    assert all(mine is given for mine, given in zip(policy.controls or (), CONTROLS, strict=True)), "objects are taken as they are"


def test_load_from_a_policy_and_a_name() -> None:
    policy = Policy.load("detox")
    assert Policy.load(policy) is policy
    assert policy.name == "detox"


def test_empty_policy() -> None:
    policy = Policy.load({})
    assert policy == Policy()
    assert policy.effective_controls() == ()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("detoxx", "no built-in policy 'detoxx'; did you mean 'detox'"),
        ("zzz", "known: .*detox"),
        ("/nowhere/policy.yaml", "isn't there; give an existing file or a built-in name: balanced"),
    ],
)
def test_what_is_not_there(source: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Policy.load(source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "holds a list; expected a mapping"),
        ("", "holds a NoneType; expected a mapping"),
        ("name: [unclosed", "isn't YAML"),
        ("name: x\nvaluse: []\n", r"policy\.yaml: .*no setting 'valuse'; did you mean 'values'"),
        ("controls:\n  - !!python/object/apply:os.getcwd []\n", "isn't YAML"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    with pytest.raises(PolicyError, match=message) as caught:
        Policy.load(file)
    assert "policy.yaml" in str(caught.value)


def test_json_is_read_as_json(tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    file.write_text("name: yaml in a file that says it is JSON\n")
    with pytest.raises(PolicyError, match="isn't JSON"):
        Policy.load(file)


# --- strictness ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"nmae": "x"}, "Policy has no setting 'nmae'; did you mean 'name'"),
        ({"zzzz": 1}, "no setting 'zzzz'; known: controls, decoding"),
        ({"values": [{"id": "a", "statment": "The text is kind."}]}, r"values\.0: .*no setting 'statment'; did you mean 'statement'"),
        ({"controls": [{"control": "self-debias@1", "decay_konstant": 1}]}, r"controls\.0: .*did you mean 'decay_constant'"),
        ({"controls": [{"control": "dexperts@1", "expert": {"promt": "x"}}]}, "no setting 'promt'; did you mean 'prompt'"),
        ({"controls": [{"control": "self-debia@1"}]}, "no control 'self-debia'; did you mean 'self-debias'"),
        ({"controls": [{"control": "self-debias@2"}]}, "installed in version 1, but the policy asks for self-debias@2"),
        ({"controls": [{"control": "self-debias@1.0"}]}, "installed in version 1, but the policy asks for self-debias@1.0"),
        ({"controls": ["self-debias@1"]}, "a control is a mapping with the key `control`"),
        ({"controls": [{"alpha": 1}]}, "a control is a mapping with the key `control`"),
        ({"controls": [{"control": "dexperts@1", "alpha": -1}]}, r"alpha: .*greater than or equal to 0 \(got -1\)"),
        ({"controls": [{"control": "dexperts@1", "alpha": float("nan")}]}, "alpha: .*finite"),
        ({"controls": [{"control": "pplm@1"}]}, "neither a bag_of_words nor a head"),
        ({"controls": [{"control": "fudge@1"}]}, "discriminator: Field required"),
        ({"decoding": {"topp": 0.9}}, "no setting 'topp'; did you mean 'top_p'"),
        ({"decoding": {"top_p": 0}}, "top_p: .*greater than 0"),
        ({"gate": {"min_entrpy": 1}}, "did you mean 'min_entropy'"),
        ({"on_error": "ajar"}, "on_error: .*'closed' or 'open'"),
        ({"values": "The text is kind."}, "values is a str; expected a list"),
        ({"values": [{"id": "two words", "statement": "The text is kind."}]}, r"values\.0: .*id: .*\(got 'two words'\)"),
        ({"values": [{"id": "a", "statement": "The text is kind.", "threshold": 1.5}]}, "threshold: .*less than or equal to 1"),
        (
            {"values": [{"id": "a", "statement": "One is."}, {"id": "a", "statement": "Two is."}]},
            "several values with id a; ids are distinct",
        ),
        ({"name": 3}, r"name: .*string \(got 3\)"),
    ],
)
def test_mistakes_are_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message) as caught:
        Policy.load(data)
    assert isinstance(caught.value, GuardError)
    assert isinstance(caught.value, ValueError)


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.load({"name": 3, "on_error": "ajar"})
    assert len(str(caught.value).splitlines()) == 2


def test_a_control_without_version_is_the_installed_one() -> None:
    for name in control_names():
        found = control_class(name)
        assert found.versioned_name() == f"{name}@{found.version}"
        assert control_class(found.versioned_name()) is found
    assert {"dexperts", "fudge", "nullspace", "pplm", "self-debias"} <= control_names().keys()


def test_everything_is_frozen() -> None:
    policy = Policy.load(DATA)
    assert policy.controls is not None
    assert policy.gate is not None
    for thing, name in (
        (policy, "name"),
        (policy, "controls"),
        (policy.values[0], "threshold"),
        (policy.controls[0], "decay_constant"),
        (policy.decoding, "top_p"),
        (policy.gate, "min_entropy"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(thing, name, getattr(thing, name))
    assert isinstance(policy.values, tuple)
    assert isinstance(policy.controls, tuple)
    with pytest.raises(ValidationError, match="frozen"):
        del policy.name


def test_replaced_gives_a_checked_copy() -> None:
    policy = Policy.load(DATA)
    other = policy.replaced(name="other")
    assert (policy.name, other.name) == ("example", "other")
    assert other.controls == policy.controls
    with pytest.raises(PolicyError, match="on_error"):
        policy.replaced(on_error="ajar")


# --- round trips --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["balanced", "debias-gender", "detox", "detox-strong", "example"])
def test_round_trips(tmp_path: Path, source: str) -> None:
    policy = Policy.load(DATA if source == "example" else source)
    again = Policy.load(policy.as_dict())
    assert again == policy
    assert again.digest == policy.digest
    file = tmp_path / "policy.yaml"
    file.write_text(policy.as_yaml(), encoding="utf-8")
    assert Policy.load(file) == policy
    assert json.loads(json.dumps(policy.as_dict())) == policy.as_dict(), "plain data"


def test_every_built_in_policy_is_tested_and_complete() -> None:
    assert built_in_policies() == ["balanced", "debias-gender", "detox", "detox-strong"]
    for name in built_in_policies():
        policy = Policy.load(name)
        assert policy.name == name
        assert policy.description
        assert policy.values
        assert policy.effective_controls()
        assert all(control.active for control in policy.effective_controls())


@settings(deadline=None, max_examples=40, database=None)
@given(
    name=st.text(min_size=1, max_size=8),
    priority=st.integers(-5, 5),
    threshold=st.floats(0, 1),
    statement=st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=3, max_size=30),
    epsilon=st.floats(0, 1, exclude_min=True),
    prefixes=st.one_of(
        st.none(), st.lists(st.one_of(st.text(min_size=1, max_size=5), st.lists(st.integers(0, 99), min_size=1)), max_size=3)
    ),
    decoding=st.fixed_dictionaries({}, optional={"temperature": st.floats(0, 5), "top_k": st.integers(0, 50), "do_sample": st.booleans()}),
)
def test_round_trips_of_any_settings(
    name: str, priority: int, threshold: float, statement: str, epsilon: float, prefixes: Any, decoding: dict[str, Any]
) -> None:
    policy = Policy(
        name=name,
        values=[Value(id="v", statement=statement, priority=priority, threshold=threshold)],
        controls=[SelfDebias(prefixes=prefixes, epsilon=epsilon)],
        decoding=decoding,
    )
    again = Policy.load(policy.as_dict())
    assert again == policy
    assert again.digest == policy.digest
    assert Policy.load(yaml.safe_load(policy.as_yaml())).digest == policy.digest


def test_the_digest_tells_policies_apart_and_nothing_else() -> None:
    digest = Policy.load(DATA).digest
    assert Policy.load(dict(reversed(DATA.items()))).digest == digest, "the order of keys is nothing"
    for change in ({"name": "y"}, {"on_error": "closed"}, {"controls": DATA["controls"][:2]}, {"gate": {"min_entropy": 0.6}}):
        assert Policy.load(DATA | change).digest != digest
    assert Policy().digest != Policy(controls=()).digest, "no controls isn't the same as controls derived from the values"


def test_what_no_file_can_hold() -> None:
    basis = torch.eye(4)[:, :1]
    for control in (NullspaceProjection(basis=basis), Fudge(discriminator=lambda ids, candidates: candidates.float())):
        policy = Policy(controls=[control])
        with pytest.raises(PolicyError, match="a policy file can't hold; save it and name its path"):
            policy.as_dict()
        assert Policy.load(policy).controls == (control,), "it is fine as an object"


def test_a_path_object_is_written_as_text(tmp_path: Path) -> None:
    policy = Policy(controls=[DExperts(expert=tmp_path / "expert")])
    assert policy.as_dict()["controls"][0]["expert"] == str(tmp_path / "expert")


# --- effective controls -------------------------------------------------------------------------------------------------------


def test_one_object_listed_twice_counts_once() -> None:
    control, equal = SelfDebias(decay_constant=10), SelfDebias(decay_constant=10)
    assert Policy(controls=[control, control]).effective_controls() == (control,)
    assert len(Policy(controls=[control, equal]).effective_controls()) == 2


def test_values_alone_derive_controls() -> None:
    policy = Policy.from_values("The text does not insult anyone.", "The text is calm.")
    assert [value.statement for value in policy.values] == ["The text does not insult anyone.", "The text is calm."]
    assert policy.controls is None
    assert [control.control_name for control in policy.effective_controls()] == ["dexperts", "self-debias"]
    assert policy.replaced(controls=()).effective_controls() == ()
    assert Policy.load(policy.as_dict()) == policy


def test_statements_with_a_common_beginning_are_distinct_values() -> None:
    policy = Policy.from_values(
        "The text does not insult anyone because of their sex.", "The text does not insult anyone because of their religion."
    )
    assert len({value.id for value in policy.values}) == 2
    assert Policy.load(policy.as_dict()) == policy


# --- the JSON schema ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="the schema is checked with the jsonschema package where it is installed")
    schema = policy_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_schema_is_plain_json_and_names_every_control() -> None:
    schema = policy_schema()
    assert json.loads(json.dumps(schema)) == schema
    options = schema["properties"]["controls"]["anyOf"][0]["items"]["oneOf"]
    definitions = [schema["$defs"][option["$ref"].removeprefix("#/$defs/")] for option in options]
    assert sorted(name for found in definitions for name in found["properties"]["control"]["enum"]) == sorted(
        [*control_names(), *(control_class(name).versioned_name() for name in control_names())]
    )
    for found in definitions:
        assert found["additionalProperties"] is False
        settings_of = control_class(found["properties"]["control"]["enum"][0]).model_fields
        assert found["properties"].keys() == {"control", *settings_of}


@pytest.mark.parametrize("source", ["balanced", "debias-gender", "detox", "detox-strong", "example"])
def test_the_schema_takes_what_loads(validator: Any, source: str) -> None:
    policy = Policy.load(DATA if source == "example" else source)
    assert [error.message for error in validator.iter_errors(policy.as_dict())] == []


def test_the_schema_takes_statements_as_values(validator: Any) -> None:
    assert [error.message for error in validator.iter_errors(DATA)] == []


@pytest.mark.parametrize(
    "data",
    [
        {"nmae": "x"},
        {"controls": [{"control": "self-debias@1", "decay_konstant": 1}]},
        {"controls": [{"control": "self-debias@2"}]},
        {"controls": [{"control": "fudge@1"}]},
        {"controls": [{"alpha": 1.0}]},
        {"controls": [{"control": "dexperts@1", "alpha": -1}]},
        {"on_error": "ajar"},
        {"values": [{"id": "two words", "statement": "The text is kind."}]},
    ],
    ids=json.dumps,
)
def test_the_schema_refuses_what_does_not_load(validator: Any, data: dict[str, Any]) -> None:
    assert not validator.is_valid(data)
    with pytest.raises(PolicyError):
        Policy.load(data)
