"""The operator's file, and what requests may ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from odd_models import basis, future
from tiny_models import llama

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.controls import PPLM, Control, DExperts, Fudge, NullspaceProjection, Prompt, SelfDebias
from moralguard.errors import PolicyError
from moralguard.serving.config import ENVIRONMENT, ServingConfig
from moralguard.serving.guards import ServedGuards

LOOSE = {"controls": [{"control": "self-debias@1", "prefixes": [[9, 8, 7]], "decay_constant": 10}]}
STRICT = {"controls": [{"control": "dexperts@1", "anti_expert": {"prompt": [9, 8, 7]}, "alpha": 1.0}]}


def config(**more: Any) -> ServingConfig:
    return ServingConfig(policies=[{"id": "loose", "policy": LOOSE}, {"id": "strict", "policy": STRICT}], **more)


def test_a_request_may_tighten_the_default_and_never_loosen_it() -> None:
    assert config(default="loose").admit(None) == ("loose", 1.0)
    assert config(default="loose").admit({"policy": "strict", "strength": 1.5}) == ("strict", 1.5)
    assert config(default="loose").admit('{"strength": 2}') == ("loose", 2.0)
    with pytest.raises(PolicyError, match="'loose' is looser than this server's default 'strict'"):
        config(default="strict").admit({"policy": "loose"})
    with pytest.raises(PolicyError, match="may ask for 1 to 2"):
        config(default="strict").admit({"strength": 0.5})


def test_without_a_default_requests_are_unguarded_unless_they_ask() -> None:
    assert config().admit(None) == (None, 1.0)
    assert config().admit({}) == (None, 1.0)
    assert config().admit({"policy": "loose"}) == ("loose", 1.0)
    with pytest.raises(PolicyError, match="no default policy, so name one"):
        config().admit({"strength": 1.5})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("{", "isn't JSON"),
        ("[1]", "is a list; expected an object"),
        (3, "is a int; expected an object"),
        ({"policy": "strikt"}, "no policy 'strikt' is served; did you mean 'strict'"),
        ({"policy": 3}, "policy"),
        ({"strength": "much"}, "strength"),
        ({"strength": 1e9}, "may ask for 1 to 2"),
        ('{"strength": NaN}', "strength"),
        ({"polcy": "strict"}, "no setting 'polcy'; did you mean 'policy'"),
    ],
)
def test_malformed_requests(asked: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        config(default="loose").admit(asked)


def test_the_operators_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.json").write_text(json.dumps(STRICT))
    file = tmp_path / "serving.yaml"
    file.write_text("policies:\n  - {id: detox, policy: detox}\n  - {id: own, policy: own.json}\ndefault: detox\nmax_strength: 3\n")
    loaded = ServingConfig.load(file)
    assert loaded.policy("own").controls == mg.Policy.load(STRICT).controls
    assert loaded.policy("detox") == mg.Policy.load("detox")
    monkeypatch.setenv(ENVIRONMENT, str(file))
    assert ServingConfig.from_environment() == loaded
    monkeypatch.delenv(ENVIRONMENT)
    with pytest.raises(PolicyError, match=ENVIRONMENT):
        ServingConfig.from_environment()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policies: []", "has no policies"),
        ("policies: [{id: a, policy: detox}, {id: a, policy: detox}]", "distinct"),
        ("policies: [{id: a, policy: detoxx}]", "no built-in policy 'detoxx'; did you mean 'detox'"),
        ("policies: [{id: a, policy: gone.yaml}]", "isn't there"),
        ("policies: [{id: 'a b', policy: detox}]", "id"),
        ("policies: [{id: a, policy: detox}]\ndefault: b", "default policy 'b' isn't served"),
        ("policies: [{id: a, policy: detox}]\nmax_strength: .5", "max_strength"),
        ("policies: [{id: a, policy: detox}]\nfolder: /", "no setting 'folder'"),
        ("policies: [{id: a, policy: detox}]\nmax_strenght: 3", "did you mean 'max_strength'"),
        ("[1", "can't be read"),
        ("3", "expected a mapping"),
    ],
)
def test_files_that_cannot_be_used(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "serving.yaml"
    file.write_text(text)
    with pytest.raises(PolicyError, match=message) as error:
        ServingConfig.load(file)
    assert str(file) in str(error.value)
    with pytest.raises(PolicyError, match="isn't there"):
        ServingConfig.load(tmp_path / "none.yaml")


class Unscaled(SelfDebias):
    def scaled(self, factor: float) -> Any:
        return Control.scaled(self, factor)


def test_a_policy_scaled_is_its_controls_scaled() -> None:
    controls = [
        DExperts(anti_expert=Prompt([9]), alpha=1.5),
        Fudge(discriminator=future, strength=2.0),
        SelfDebias(prefixes=[[3]], decay_constant=10),
        PPLM(bag_of_words=[[5]], stepsize=0.1),
        NullspaceProjection(basis=basis(), keep=0.6),
    ]
    policy = mg.Policy(controls=controls)
    assert policy.scaled(1.0) is policy
    found: Any = policy.scaled(2.0).controls
    assert [found[0].alpha, found[1].strength, found[2].decay_constant, found[3].stepsize] == [3.0, 4.0, 20.0, 0.2]
    assert abs(found[4].keep - 0.2) < 1e-12
    assert policy.scaled(5.0).controls[4].keep == 0  # type: ignore[index]
    with pytest.raises(PolicyError, match="self-debias@1 has no strength"):
        mg.Policy(controls=[Unscaled(prefixes=[[3]])]).scaled(2.0)
    detox = mg.Policy.load("detox").scaled(1.5)
    assert [getattr(control, "strength", None) or control.alpha for control in detox.fitted[0].controls] == [4.5, 4.5]


def test_guards_are_bound_once_and_their_counts_added_up() -> None:
    guards = ServedGuards(config(max_strength=200), LanguageModel(llama(), None))
    assert guards.guard("loose") is guards.guard("loose")
    assert guards.guard("loose", 1.5) is guards.guard("loose", 1.5)
    for step in range(80):  # more than stay bound
        guards.guard("strict", 1 + step).generate([[5, 6]], max_new_tokens=1)
    counted = guards.counters()
    assert counted["strict"]["tokens_emitted"] == 80
    assert counted["loose"]["tokens_emitted"] == 0
    with pytest.raises(PolicyError, match="no policy 'other'"):
        guards.guard("other")


def test_a_policy_that_needs_what_the_stack_lacks_is_refused_at_the_start() -> None:
    lm = LanguageModel(llama(), None)
    pplm = ServingConfig(policies=[{"id": "steered", "policy": {"controls": [{"control": "pplm@1", "bag_of_words": [[5, 6]]}]}}])
    with pytest.raises(PolicyError, match="'steered': control 'pplm' needs grad, cache, which vLLM doesn't offer"):
        ServedGuards(pplm, lm, lacks=("grad", "cache"), stack="vLLM")
    assert ServedGuards(pplm, lm).guard("steered").controls
