"""What every torch stack's adapter shares: rows guarded in place, counts, tokens that passed the guard by, and failures of all kinds."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from numpy_model import NumpyModel
from odd_models import CONTROLS, PROMPTS
from tiny_models import VOCAB, llama

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.errors import BypassError, ControlError, ModelError, PolicyError, PromptError
from moralguard.serving.running_requests import RunningRequests, admitted

END = 198
TEXTS = [list(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module", params=["torch", "numpy"])
def lm(request: pytest.FixtureRequest) -> Any:
    torch.set_num_threads(1)
    return NumpyModel(llama()) if request.param == "numpy" else LanguageModel(llama(), None)


def guard_of(lm: Any, on_error: str = "closed") -> mg.Guard:
    return mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()], on_error=on_error), lm)


def rows(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ends(row: torch.Tensor) -> bool:
    return bool(row[END] == 0) and bool(torch.isneginf(row).sum() == VOCAB - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_guarded_in_place_and_others_are_left_alone(lm: Any, dtype: torch.dtype) -> None:
    running, guard = RunningRequests(lm), guard_of(lm)
    running.add(4, guard, TEXTS[0], END)
    running.add(9, mg.Guard(mg.Policy(), lm), TEXTS[1], END)
    with torch.inference_mode():  # as stacks do: such tensors can be written in it only
        given = rows(3, dtype=dtype)
        logits = given.clone()
        assert running.step({9: [], 4: [], 7: []}, logits) == {}
    assert torch.equal(logits[[0, 2]], given[[0, 2]]), "a policy of no controls, and a request that isn't guarded"
    assert logits.dtype == dtype
    assert abs(float(logits[1].float().exp().sum()) - 1) < 0.05
    assert not torch.equal(logits[1], given[1])
    assert (len(running), 4 in running, 7 in running) == (2, True, False)
    counted = guard.counters.as_dict()
    assert (counted["requests"], counted["rows_guarded"], counted["rows_touched"], counted["tokens_emitted"]) == (1, 1, 1, 1)


@pytest.mark.parametrize("on_error", ["closed", "open"])
def test_tokens_that_passed_the_guard_by(lm: Any, on_error: str) -> None:
    running, guard = RunningRequests(lm), guard_of(lm, on_error)
    running.add(0, guard, TEXTS[0], END)
    running.add(1, guard_of(lm), TEXTS[1], END)
    running.step({0: [], 1: []}, rows(2))
    logits = rows(2)
    errors = running.step({0: [3, 4, 5], 1: [3]}, logits)
    assert not ends(logits[1])
    if on_error == "closed":
        assert isinstance(errors[0], BypassError)
        assert "2 tokens of the request in slot 0 were emitted without the guard" in str(errors[0])
        assert ends(logits[0])
        assert running.step({0: [3, 4, 5, END]}, logits) == {}, "told once"
        assert ends(logits[0])
        assert guard.counters.as_dict()["failed_closed"] == 1
    else:
        assert errors == {}
        assert not ends(logits[0])
        assert guard.counters.as_dict()["unguarded_tokens"] == 2


def test_an_error_that_nobody_expected_ends_the_rows_of_its_step(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No exception may reach a stack: it would end every request, or be printed and passed over."""
    running, closed, opened = RunningRequests(lm), guard_of(lm), guard_of(lm, "open")
    running.add(0, closed, TEXTS[0], END)
    running.add(1, opened, TEXTS[1], END)
    running.add(2, closed, TEXTS[2], END)
    running.step({2: []}, rows(1))
    with monkeypatch.context() as patched:
        patched.setattr(running._slots, "step", lambda *_args, **_kwargs: 1 / 0)
        logits, given = rows(2), rows(2)
        errors = running.step({0: [], 1: []}, logits)
    assert isinstance(errors[0], ControlError)
    assert ends(logits[0])
    assert torch.equal(logits[1], given[1])
    assert (closed.counters.as_dict()["failed_closed"], opened.counters.as_dict()["failed_open"]) == (1, 1)
    alone = RunningRequests(lm)
    alone.add(0, guard_of(lm), TEXTS[2], END)
    expected, found = rows(1), rows(1)
    alone.step({0: [5]}, expected)
    running.step({2: [5]}, found)
    assert torch.allclose(expected, found, atol=1e-4), "a request that waited goes on"


def test_another_models_logits(lm: Any) -> None:
    running = RunningRequests(lm)
    running.add(0, guard_of(lm), TEXTS[0], END)
    errors = running.step({0: []}, torch.zeros(1, VOCAB + 5))
    assert "logits have 204 columns, those of the guard's model 199" in str(errors[0])
    with pytest.raises(ModelError, match="is bound to"):
        running.add(1, guard_of(LanguageModel(llama(seed=3), None)), TEXTS[0], END)
    with pytest.raises(PromptError, match="empty prompt"):
        running.add(1, guard_of(lm), [], END)


def test_a_request_that_is_refused_says_nothing(lm: Any, caplog: pytest.LogCaptureFixture) -> None:
    running = RunningRequests(lm)
    with caplog.at_level(logging.ERROR):
        running.refuse(0, PolicyError("no policy 'a secret'"), END)
    logits = rows(1)
    assert running.step({0: []}, logits) == {}
    assert ends(logits[0])
    assert "secret" not in caplog.text, "logs hold no words of a request"
    running.remove(0)
    assert len(running) == 0


def test_admission(lm: Any) -> None:
    guard = guard_of(lm)
    assert admitted(guard, None) is guard
    with pytest.raises(PolicyError, match="requests may not choose"):
        admitted(guard, '{"policy": "x"}')
