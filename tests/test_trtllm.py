"""The guard in TensorRT-LLM: its processors, called as TensorRT-LLM calls them. The library itself needs a GPU and isn't run."""

from __future__ import annotations

import ast
import inspect
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from failing_control import Failing
from odd_models import CONTROLS, PROMPTS
from tiny_models import VOCAB, llama

import moralguard as mg
from moralguard.errors import ModelError, PolicyError, UnsupportedPathError
from moralguard.serving import trtllm
from moralguard.serving.trtllm import BatchProcessor, EngineRequests, RequestProcessor, batch_processor, check_engine, request_processor

NEW = 7
END = 198
TEXTS = [list(prompt) for prompt in PROMPTS]
DEBIAS = {"control": "self-debias@1", "prefixes": [[11, 12, 13], [14]], "decay_constant": 300.0}
SOURCE = os.environ.get("MORALGUARD_TRTLLM_SOURCE")
contract = pytest.mark.skipif(not SOURCE, reason="MORALGUARD_TRTLLM_SOURCE doesn't name the folder of TensorRT-LLM's package")
SERIAL = SimpleNamespace(disable_overlap_scheduler=True, speculative_config=None, max_beam_width=1)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    found = llama()
    found.generation_config.eos_token_id = END
    return found.requires_grad_(False)


@pytest.fixture
def serving_file(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An operator's file, and its model where the workers find it."""
    model.save_pretrained(tmp_path / "model")
    policies = [
        {"id": "open", "policy": {"controls": [{**DEBIAS, "decay_constant": 100.0}]}},
        {"id": "strict", "policy": {"controls": [DEBIAS]}},
    ]
    file = tmp_path / "serving.json"
    file.write_text(json.dumps({"policies": policies, "default": "open", "model": str(tmp_path / "model")}))
    monkeypatch.setattr(trtllm, "_served", {})
    return str(file)


class Engine:
    """TensorRT-LLM's steps, drawn greedily; a processor is given views of one tensor of logits."""

    def __init__(self, model: Any):
        self.model, self.texts, self.prompts = model, {}, {}

    def add(self, req_id: int, prompt: list[int]) -> None:
        self.texts[req_id], self.prompts[req_id] = list(prompt), len(prompt)

    def logits(self, req_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([self.model(torch.tensor([self.texts[req_id]])).logits[:, -1] for req_id in req_ids])

    def step(self, processors: dict[int, Any]) -> None:
        """As the PyTorch backend: each request's processor is given its rows."""
        logits = self.logits(list(processors))
        for row, (req_id, processor) in enumerate(processors.items()):
            assert 4 <= len(inspect.signature(processor).parameters) <= 5
            with torch.inference_mode():
                processor(req_id, logits[row : row + 1].view(1, 1, -1), [list(self.texts[req_id])], None, None)
        self.draw(list(processors), logits)

    def step_batch(self, processor: Any, req_ids: list[int]) -> None:
        """As the TensorRT backend: one call for all."""
        logits = self.logits(req_ids)
        views = [logits[row : row + 1].view(1, 1, -1) for row in range(len(req_ids))]
        with torch.inference_mode():
            processor(req_ids, views, [[list(self.texts[req_id])] for req_id in req_ids], None, [None] * len(req_ids))
        self.draw(req_ids, logits)

    def draw(self, req_ids: list[int], logits: torch.Tensor) -> None:
        for req_id, token in zip(req_ids, logits.argmax(-1).tolist(), strict=True):
            self.texts[req_id].append(token)

    def new(self, req_id: int) -> list[int]:
        return self.texts[req_id][self.prompts[req_id] :]


class Direct:
    """A processor of requests that are at hand, not loaded from a file."""

    def __init__(self, requests: EngineRequests):
        self.requests = requests

    def __call__(self, req_id: int, logits: torch.Tensor, token_ids: list[list[int]], stream_ptr: Any, client_id: Any) -> None:
        self.requests.step([req_id], [logits], [token_ids], [None], [1.0])


def alone(guard: mg.Guard, text: list[int], new: int = NEW) -> list[int]:
    return guard.generate([text], max_new_tokens=new, do_sample=False).token_ids[0]


@pytest.mark.parametrize("control", sorted(CONTROLS))
def test_requests_have_the_tokens_that_they_have_alone(model: Any, control: str) -> None:
    guard = mg.Guard(mg.Policy(controls=[CONTROLS[control]()]), (model, None))
    engine, processor = Engine(model), Direct(EngineRequests(guard))
    for i, text in enumerate(TEXTS):
        engine.add(i, text)
        engine.step(dict.fromkeys(range(i + 1), processor))
    for _ in range(3):
        engine.step(dict.fromkeys((2, 0, 3, 1), processor))
    for i, text in enumerate(TEXTS):
        expected = alone(guard, text)
        assert engine.new(i)[: len(expected)] == expected[: len(engine.new(i))]


def test_processors_travel_and_each_request_has_its_policy(model: Any, serving_file: str) -> None:
    asked = [None, '{"policy": "strict"}', '{"policy": "strict", "strength": 1.5}']
    made = [request_processor(serving_file, SERIAL, what) for what in asked]
    arrived = {i: pickle.loads(pickle.dumps(processor)) for i, processor in enumerate(made)}
    engine = Engine(model)
    for i in arrived:
        engine.add(i, TEXTS[i])
    for _ in range(NEW):
        engine.step(arrived)
    guards = trtllm._engine_requests(serving_file)._guards
    assert not isinstance(guards, mg.Guard)
    for i, guard in enumerate((guards.guard("open"), guards.guard("strict"), guards.guard("strict", 1.5))):
        expected = alone(guard, TEXTS[i])
        assert engine.new(i)[: len(expected)] == expected


def test_a_batch_at_once(model: Any, serving_file: str) -> None:
    processor = pickle.loads(pickle.dumps(batch_processor(serving_file)))
    assert isinstance(processor, BatchProcessor)
    processor([], [], [], None, [])
    engine = Engine(model)
    for i, text in enumerate(TEXTS):
        engine.add(i, text)
    for _ in range(NEW):
        engine.step_batch(processor, [3, 0, 1, 2])
    guard = trtllm._engine_requests(serving_file)._guards.guard("open")  # type: ignore[union-attr]
    for i, text in enumerate(TEXTS):
        expected = alone(guard, text)
        assert engine.new(i)[: len(expected)] == expected


def test_a_context_in_chunks_is_shown_several_times(model: Any) -> None:
    guard = mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()]), (model, None))
    engine, processor = Engine(model), Direct(EngineRequests(guard))
    engine.add(0, TEXTS[0])
    with torch.inference_mode():
        processor(0, torch.zeros(1, 1, VOCAB), [TEXTS[0]], None, None)
    for _ in range(3):
        engine.step({0: processor})
    assert guard.counters.as_dict()["tokens_emitted"] == 3
    assert engine.new(0) == alone(guard, TEXTS[0], 3)


@pytest.mark.parametrize("on_error", ["closed", "open"])
def test_a_control_that_fails(model: Any, on_error: str) -> None:
    guard = mg.Guard(mg.Policy(controls=[Failing()], on_error=on_error), (model, None))
    engine, processor = Engine(model), Direct(EngineRequests(guard))
    engine.add(0, TEXTS[0])
    for _ in range(4):
        engine.step({0: processor})
    counted = guard.counters.as_dict()
    if on_error == "closed":
        assert engine.new(0)[2:] == [END, END]
        assert counted["failed_closed"] == 1
    else:
        assert END not in engine.new(0)
        assert counted["failed_open"] == 1


def test_beams_and_policies_that_are_not_served_end_their_request(model: Any, serving_file: str) -> None:
    requests = EngineRequests(mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()]), (model, None)))
    beams = torch.zeros(2, 1, VOCAB)
    requests.step([0], [beams], [[TEXTS[0], TEXTS[0]]], [None], [1.0])
    assert beams.argmax(-1).flatten().tolist() == [END, END]
    row = torch.zeros(1, 1, VOCAB)
    RequestProcessor(serving_file, '{"policy": "none"}')(1, row, [TEXTS[0]], None, None)
    assert row.argmax().item() == END


def test_none_of_a_batch_is_forgotten_while_it_runs(model: Any) -> None:
    guard = mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()]), (model, None))
    requests, engine = EngineRequests(guard, most=2), Engine(model)
    for i in range(4):
        engine.add(i, TEXTS[i])
    for _ in range(3):
        engine.step_batch(lambda ids, logits, tokens, *_: requests.step(ids, logits, tokens, [None] * 4, [1.0] * 4), [0, 1, 2, 3])
    for i in range(4):
        assert engine.new(i) == alone(guard, TEXTS[i], 3)


def test_requests_that_were_forgotten_are_read_anew(model: Any) -> None:
    guard = mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()]), (model, None))
    requests = EngineRequests(guard, most=2)
    engine, processor = Engine(model), Direct(requests)
    for i in range(3):
        engine.add(i, TEXTS[i])
    for _ in range(3):
        for i in range(3):  # one after the other, so that each is forgotten before it comes back
            engine.step({i: processor})
    assert len(requests) == 2
    for i in range(3):
        assert engine.new(i) == alone(guard, TEXTS[i], 3)


def test_an_id_that_comes_again_is_another_request(model: Any) -> None:
    guard = mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()]), (model, None))
    engine, processor = Engine(model), Direct(EngineRequests(guard))
    engine.add(0, TEXTS[0])
    engine.step({0: processor})
    engine.add(0, TEXTS[2])
    for _ in range(3):
        engine.step({0: processor})
    assert engine.new(0) == alone(guard, TEXTS[2], 3)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"disable_overlap_scheduler": False}, "overlap scheduler"),
        ({"speculative_config": object()}, "speculative_config"),
        ({"max_beam_width": 4}, "max_beam_width"),
    ],
)
def test_engines_that_pass_the_guard_over_are_refused(setting: dict[str, Any], words: str) -> None:
    check_engine(SERIAL)
    with pytest.raises(UnsupportedPathError, match=words):
        check_engine(SimpleNamespace(**{**vars(SERIAL), **setting}))


def test_what_is_refused_before_anything_is_sent(model: Any, serving_file: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no disable_overlap_scheduler"):
        check_engine(object())
    with pytest.raises(PolicyError, match="no policy 'none' is served"):
        request_processor(serving_file, SERIAL, '{"policy": "none"}')
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps({"policies": [{"id": "a", "policy": {"controls": [DEBIAS]}}]}))
    with pytest.raises(PolicyError, match="names no `model`"):
        request_processor(str(bare), SERIAL)
    with pytest.raises(PolicyError, match="must name a `model` and a `default`"):
        batch_processor(str(bare))
    with pytest.raises(PolicyError, match="has no end-of-text token"):
        EngineRequests(mg.Guard(mg.Policy(), (llama(), None)))


@contract
@pytest.mark.parametrize(("name", "ours"), [("LogitsProcessor", RequestProcessor), ("BatchedLogitsProcessor", BatchProcessor)])
def test_contract_of_the_processors(name: str, ours: type) -> None:
    module = ast.parse((Path(str(SOURCE)) / "sampling_params.py").read_text())
    theirs = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name)
    call = next(node for node in theirs.body if isinstance(node, ast.FunctionDef) and node.name == "__call__")
    assert [argument.arg for argument in call.args.args] == list(inspect.signature(ours.__call__).parameters)  # type: ignore[operator]


@contract
def test_contract_of_the_settings() -> None:
    settings = (Path(str(SOURCE)) / "llmapi" / "llm_args.py").read_text()
    for name in ("disable_overlap_scheduler", "speculative_config", "max_beam_width"):
        assert f"{name}:" in settings
    assert "def register_approved_class" in (Path(str(SOURCE)) / "serialization.py").read_text()
