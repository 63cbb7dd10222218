"""The guard in SGLang: its logic with objects of the documented shape, and what it relies on in the released sources.

SGLang needs a GPU. ``pip download --no-deps sglang==0.5.23``, unzip, and name its folder ``sglang`` in MORALGUARD_SGLANG_SOURCE for the
contract tests.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
import os
import sys
from array import array
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from failing_control import Failing
from odd_models import CONTROLS, PROMPTS
from tiny_models import VOCAB, llama

import moralguard as mg
from moralguard.errors import PolicyError, UnsupportedPathError
from moralguard.serving import sglang
from moralguard.serving.config import ENVIRONMENT, ServedPolicy, ServingConfig
from moralguard.serving.guards import ServedGuards
from moralguard.serving.sglang import RequestRows, Row, note_rows, noted_rows, refuse_modes

NEW = 7
END = 198
TEXTS = [list(prompt) for prompt in PROMPTS]
DEBIAS = {"control": "self-debias@1", "prefixes": [[11, 12, 13], [14]], "decay_constant": 300.0}
SOURCE = os.environ.get("MORALGUARD_SGLANG_SOURCE")
contract = pytest.mark.skipif(not SOURCE, reason="MORALGUARD_SGLANG_SOURCE doesn't name the folder of SGLang's sources")


class Req:
    """SGLang's ``Req``, the part that the guard reads."""

    def __init__(self, rid: str, prompt: list[int], custom_params: Any = None):
        self.rid, self.origin_input_ids, self.output_ids = rid, array("q", prompt), array("q")
        self.sampling_params = SimpleNamespace(temperature=1.0, custom_params=custom_params)
        self.eos_token_ids = {END}
        self.done = False

    def finished(self) -> bool:
        return self.done


class Server:
    """SGLang's steps, drawn greedily; the model is read anew for each."""

    def __init__(self, model: Any, guards: Any, rows: RequestRows | None = None):
        self.model, self.rows = model, RequestRows(guards) if rows is None else rows

    def step(self, requests: list[Req], lengths: list[int] | None = None, lag: int = 0) -> list[int]:
        """A token for each request; with a lag, the requests are shown without their newest tokens."""
        texts = [[*request.origin_input_ids, *request.output_ids] for request in requests]
        known = [len(text) for text in texts] if lengths is None else lengths
        with torch.inference_mode():
            logits = torch.cat([self.model(torch.tensor([text[:n]])).logits[:, -1] for text, n in zip(texts, known, strict=True)])
        late = [request.output_ids.pop() for request in requests for _ in range(lag)]
        with torch.inference_mode():
            self.rows.apply(logits, [Row(request, n) for request, n in zip(requests, known, strict=True)])
        for request, token in zip(requests, late, strict=False):
            request.output_ids.append(token)
        return [int(token) for token in logits.argmax(-1)]

    def run(self, requests: list[Req]) -> None:
        for request, token in zip(requests, self.step(requests), strict=True):
            request.output_ids.append(token)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    found = llama()
    found.generation_config.eos_token_id = END
    return found.requires_grad_(False)


def alone(guard: mg.Guard, text: list[int], new: int = NEW) -> list[int]:
    return guard.generate([text], max_new_tokens=new, do_sample=False).token_ids[0]


def served(model: Any, on_error: str = "closed") -> ServedGuards:
    policies = (
        ServedPolicy(id="open", policy={"controls": [{**DEBIAS, "decay_constant": 100.0}], "on_error": on_error}),
        ServedPolicy(id="strict", policy={"controls": [DEBIAS], "on_error": on_error}),
    )
    return ServedGuards(ServingConfig(policies=policies, default="open"), mg.load_model((model, None)))


@pytest.mark.parametrize("control", sorted(CONTROLS))
def test_requests_that_come_and_go_have_the_tokens_that_they_have_alone(model: Any, control: str) -> None:
    guard = mg.Guard(mg.Policy(controls=[CONTROLS[control]()]), (model, None))
    server, requests = Server(model, guard), [Req(f"r{i}", text) for i, text in enumerate(TEXTS)]
    server.run(requests[:2])
    server.run(requests[:2])
    server.run(requests[2:])  # a prefill batch of its own, as SGLang makes them
    for _ in range(NEW - 2):
        server.run([requests[3], requests[0], requests[2], requests[1]])
    for request, text in zip(requests, TEXTS, strict=True):
        expected = alone(guard, text)
        assert list(request.output_ids)[: len(expected)] == expected[: len(request.output_ids)]
    requests[0].done = True
    server.run(requests[1:])
    assert len(server.rows) == 3
    del requests[1]
    gc.collect()
    server.run(requests[1:])
    assert len(server.rows) == 2, "nobody holds the request any more"


def test_each_request_has_its_policy(model: Any) -> None:
    guards = served(model)
    asked = [None, {"moralguard": {"policy": "strict"}}, {"moralguard": '{"policy": "strict", "strength": 1.5}'}, {"another": 1}]
    requests = [Req(f"r{i}", text, custom) for i, (text, custom) in enumerate(zip(TEXTS, asked, strict=True))]
    server = Server(model, guards)
    for _ in range(NEW):
        server.run(requests)
    by_policy = [guards.guard("open"), guards.guard("strict"), guards.guard("strict", 1.5), guards.guard("open")]
    for request, text, guard in zip(requests, TEXTS, by_policy, strict=True):
        expected = alone(guard, text)
        assert list(request.output_ids)[: len(expected)] == expected


def test_a_request_that_cannot_be_admitted_ends_alone(model: Any) -> None:
    server = Server(model, served(model))
    requests = [Req("good", TEXTS[0]), Req("bad", TEXTS[1], {"moralguard": {"policy": "none"}})]
    image = torch.zeros(1, VOCAB)
    server.rows.apply(image, [Row(Req("image", [3, 10**9]), 2)])
    assert int(image.argmax()) == END, "what stands for an image is no token"
    expected = alone(served(model).guard("open"), TEXTS[0], 2)
    for _ in range(2):
        server.run(requests)
    assert list(requests[0].output_ids) == expected
    assert list(requests[1].output_ids) == [END, END]


def test_a_slot_is_told_by_the_request_and_not_by_its_name(model: Any) -> None:
    guard = mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()]), (model, None))
    server = Server(model, guard)
    first = Req("same", TEXTS[0])
    server.run([first])
    second = Req("same", TEXTS[2])
    for _ in range(3):
        server.run([second])
    assert list(second.output_ids) == alone(guard, TEXTS[2], 3)


def test_a_prompt_in_chunks(model: Any) -> None:
    guard = mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()]), (model, None))
    server, request, other = Server(model, guard), Req("long", TEXTS[0]), Req("short", TEXTS[1])
    server.step([request], lengths=[3])  # SGLang discards this token
    server.step([request, other], lengths=[5, 1])
    for _ in range(3):
        server.run([request])
    assert guard.counters.as_dict()["tokens_emitted"] == 4
    assert list(request.output_ids) == alone(guard, TEXTS[0], 3)


@pytest.mark.parametrize("on_error", ["closed", "open"])
def test_a_token_behind(model: Any, on_error: str) -> None:
    """The overlap schedule, should it run in spite of everything: tokens are missing from the request when it is sampled."""
    guards = served(model, on_error)
    server, request = Server(model, guards), Req("r", TEXTS[0])
    server.run([request])
    token = server.step([request], lag=1)[0]
    counted = guards.counters()["open"]
    if on_error == "closed":
        assert token == END
        assert counted["failed_closed"] == 1
    else:
        with torch.no_grad():
            text = torch.tensor([[*request.origin_input_ids, *request.output_ids]])
            assert token == int(model(text).logits[0, -1].argmax())
        assert (counted["unguarded_tokens"], counted["failed_closed"]) == (1, 0)
        request.output_ids.append(token)
        server.run([request])
        assert guards.counters()["open"]["unguarded_tokens"] == 1


@pytest.mark.parametrize("on_error", ["closed", "open"])
def test_a_control_that_fails(model: Any, on_error: str) -> None:
    guard = mg.Guard(mg.Policy(controls=[Failing()], on_error=on_error), (model, None))
    server, requests = Server(model, guard), [Req("a", TEXTS[0]), Req("b", TEXTS[2])]
    server.run(requests[:1])
    for _ in range(3):
        server.run(requests)
    counted = guard.counters.as_dict()
    if on_error == "closed":
        assert list(requests[0].output_ids[2:]) == [END, END]
        assert requests[1].output_ids[1] != END, "its neighbour went on until it failed, too"
        assert counted["failed_closed"] == 2
    else:
        assert END not in requests[0].output_ids
        assert counted["failed_open"] == 2


def test_rows_that_cannot_be_told_are_refused(model: Any) -> None:
    rows = RequestRows(mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()]), (model, None)))
    with pytest.raises(UnsupportedPathError, match="sampled 6 rows for 1 requests"):
        rows.apply(torch.zeros(6, VOCAB), [Row(Req("a", [1]), 1)])
    with pytest.raises(UnsupportedPathError, match="this way of decoding can't be guarded"):
        noted_rows(SimpleNamespace())
    with pytest.raises(PolicyError, match="has no end-of-text token"):
        RequestRows(mg.Guard(mg.Policy(), (llama(), None)))


@pytest.mark.parametrize(
    "name",
    ["speculative_algorithm", "overlap_schedule", "pipeline_parallel", "dp_attention", "disaggregation_mode", "dllm_algorithm"],
)
def test_modes_that_pass_the_guard_over_are_refused(name: str) -> None:
    refuse_modes({"speculative_algorithm": None, "overlap_schedule": False})
    with pytest.raises(UnsupportedPathError, match=name):
        refuse_modes({name: "on"})


def test_nothing_is_registered_without_the_operators_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry point is loaded wherever SGLang and moralguard are installed; it imports SGLang only if it is wanted."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    sglang.register()
    assert "sglang" not in sys.modules


def test_rows_are_noted_where_the_sampler_finds_them() -> None:
    batch = SimpleNamespace(reqs=[Req("a", [1]), Req("b", [2])])
    forward = SimpleNamespace(sampling_info=SimpleNamespace(), seq_lens_cpu=torch.tensor([1, 4]))
    assert note_rows(forward, None, batch, None, return_hidden_states_before_norm=False) is None
    assert [(row.request.rid, row.length) for row in noted_rows(forward.sampling_info)] == [("a", 1), ("b", 4)]
    assert note_rows(SimpleNamespace(sampling_info=None), None, batch) is None


# ---- what is relied on in SGLang's sources


def tree(path: str) -> ast.Module:
    return ast.parse((Path(str(SOURCE)) / path).read_text())


def definition(body: Any, name: str) -> Any:
    return next(node for node in body.body if getattr(node, "name", None) == name)


def arguments(function: Any) -> list[str]:
    return [argument.arg for argument in function.args.args]


def calls(node: Any) -> set[str]:
    return {ast.unparse(found.func) for found in ast.walk(node) if isinstance(found, ast.Call)}


def assigned(function: Any) -> set[str]:
    """Attributes of self that a method sets."""
    targets = [t for node in ast.walk(function) if isinstance(node, ast.Assign) for t in node.targets]
    targets += [node.target for node in ast.walk(function) if isinstance(node, ast.AnnAssign)]
    return {target.attr for target in targets if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"}


def fields(path: str) -> set[str]:
    return {
        node.target.id
        for node in ast.walk(tree(f"srt/arg_groups/fields/{path}"))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


@contract
def test_contract_of_the_sampler() -> None:
    module = tree("srt/layers/sampler.py")
    sampler = definition(module, "Sampler")
    assert arguments(definition(sampler, "__init__")) == ["self"]
    assert arguments(definition(sampler, "_preprocess_logits")) == ["self", "logits", "sampling_info"]
    assert "self._preprocess_logits" in calls(definition(sampler, "forward"))
    assert arguments(definition(module, "register_sampler_backend")) == ["backend", "factory"]
    assert "create_sampler" in calls(tree("srt/model_executor/model_runner.py"))


@contract
def test_contract_of_the_forward_pass() -> None:
    init = definition(definition(tree("srt/model_executor/forward_batch_info.py"), "ForwardBatch"), "init_new")
    assert arguments(init)[:3] == ["cls", "batch", "model_runner"]
    assert [ast.unparse(decorator) for decorator in init.decorator_list] == ["classmethod"]
    given = {keyword.arg: ast.unparse(keyword.value) for node in ast.walk(init) if isinstance(node, ast.Call) for keyword in node.keywords}
    assert given["sampling_info"] == "batch.sampling_info"
    assert given["seq_lens_cpu"] == "seq_lens_cpu"
    assert given["rids"] == "[req.rid for req in batch.reqs]", "rows are in the order of batch.reqs"
    copied = definition(definition(tree("srt/sampling/sampling_batch_info.py"), "SamplingBatchInfo"), "copy_for_forward")
    assert "dataclasses.replace" in calls(copied), "one a forward pass, so that notes don't mix"


@contract
def test_contract_of_requests() -> None:
    request = definition(tree("srt/managers/schedule_batch.py"), "Req")
    known = assigned(definition(request, "__init__"))
    assert {"rid", "origin_input_ids", "output_ids", "sampling_params", "eos_token_ids"} <= known
    assert definition(request, "finished")
    check = definition(definition(tree("srt/managers/tokenizer_manager.py"), "TokenizerManager"), "_validate_one_request")
    assert arguments(check) == ["self", "obj", "input_ids"]
    assert {"custom_params", "temperature"} <= {
        node.target.id
        for node in ast.walk(tree("srt/sampling/sampling_params.py"))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


@contract
def test_contract_of_settings() -> None:
    assert "disable_overlap_schedule" in fields("schedule.py")
    assert "speculative_algorithm" in fields("spec.py")
    assert "disaggregation_mode" in fields("disagg.py")
    assert {"dllm_algorithm", "sampling_backend"} <= fields("exec_.py")
    assert "model_path" in fields("model.py")
    context = tree("srt/runtime_context.py")
    for name in ("get_disagg", "get_exec", "get_model", "get_parallel", "get_schedule", "get_spec"):
        assert definition(context, name)
    assert definition(tree("srt/layers/dp_attention.py"), "is_dp_attention_enabled")
    assert "SGLANG_ENABLE_DELAY_SAMPLE" in (Path(str(SOURCE)) / "srt/environ.py").read_text()
    assert 'GENERAL_PLUGINS_GROUP = "sglang.srt.plugins"' in (Path(str(SOURCE)) / "srt/plugins/__init__.py").read_text()


@contract
def test_the_released_hook_registry_notes_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry needs no GPU: it is run as released, on a module of the documented shape."""
    spec = importlib.util.spec_from_file_location("hook_registry", Path(str(SOURCE)) / "srt/plugins/hook_registry.py")
    assert spec is not None
    assert spec.loader is not None
    released = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(released)

    class ForwardBatch:
        def __init__(self, batch: Any):
            self.sampling_info, self.seq_lens_cpu = batch.sampling_info, batch.seq_lens_cpu

        @classmethod
        def init_new(cls, batch: Any, model_runner: Any, *, return_hidden_states_before_norm: bool) -> ForwardBatch:
            return cls(batch)

    module = ModuleType("stands_for_sglang")
    module.ForwardBatch = ForwardBatch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stands_for_sglang", module)
    target = "stands_for_sglang.ForwardBatch.init_new"
    released.HookRegistry.register(target, note_rows, released.HookType.AFTER)
    released.HookRegistry.apply_hooks()
    assert target in released.HookRegistry._patched
    batch = SimpleNamespace(reqs=[Req("a", [1, 2])], sampling_info=SimpleNamespace(), seq_lens_cpu=torch.tensor([2]))
    made = ForwardBatch.init_new(batch, None, return_hidden_states_before_norm=False)
    assert isinstance(made, ForwardBatch)
    assert [(row.request.rid, row.length) for row in noted_rows(made.sampling_info)] == [("a", 2)]
