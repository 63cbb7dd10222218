"""vLLM's two ways of naming requests, driven as its interfaces say, against the same requests alone (vLLM itself: test_vllm.py)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, llama

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.errors import PolicyError, UnsupportedPathError
from moralguard.serving import vllm_head
from moralguard.serving.config import ServingConfig
from moralguard.serving.vllm_requests import admit
from moralguard.serving.vllm_v1 import BatchRequests
from moralguard.serving.vllm_v2 import SlotRequests
from moralguard.serving.vllm_worker import Worker

NEW = 8
POLICIES = {
    "debias": {"controls": [{"control": "self-debias@1", "prefixes": [[9, 8, 7], [4]], "decay_constant": 200}]},
    "contrast": {
        "controls": [{"control": "dexperts@1", "expert": {"prompt": [3]}, "anti_expert": {"prompt": [9, 8, 7]}, "alpha": 1.5}],
        "gate": {"min_entropy": 1.0, "stay_open": True},
    },
}
Direction = Enum("Direction", ["UNIDIRECTIONAL", "SWAP"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("model")
    model = llama()
    model.generation_config.eos_token_id = model.config.eos_token_id = 2
    model.save_pretrained(path)
    return str(path)


def vllm_config(folder: str, **more: Any) -> Any:
    model = SimpleNamespace(model=folder, dtype=torch.float32, get_vocab_size=lambda: VOCAB, logprobs_mode="raw_logprobs")
    parts = {
        "model_config": model,
        "device_config": SimpleNamespace(device_type="cpu"),
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=1),
        "speculative_config": None,
    }
    return SimpleNamespace(**parts | more)


def serving(policies: dict[str, Any] = POLICIES, **more: Any) -> ServingConfig:
    return ServingConfig(policies=[{"id": name, "policy": policy} for name, policy in policies.items()], **more)


def params(policy: str | None = None, **more: Any) -> Any:
    extra = None if policy is None else {"moralguard": json.dumps({"policy": policy})}
    return SimpleNamespace(**{"extra_args": extra, "temperature": 0.0, "prompt_logprobs": None} | more)


class Engine:
    """The part of vLLM that both runners share: a model, running requests, greedy draws."""

    def __init__(self, folder: str):
        self.lm = mg.load_model(folder, dtype="float32")
        self.prompts: dict[int, list[int]] = {}
        self.outputs: dict[int, list[int]] = {}
        self.policies: dict[int, str | None] = {}

    def logits(self, ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return self.lm.forward(cache=self.lm.new_cache(), input_ids=torch.tensor([ids])).logits[0]

    def expected(self, request: int) -> list[int]:
        policy = self.policies[request]
        lm = LanguageModel(self.lm.model, None)
        lm.eos_token_ids = frozenset()
        guard = mg.Guard({"controls": []} if policy is None else POLICIES[policy], lm)
        return guard.generate([self.prompts[request]], max_new_tokens=NEW, do_sample=False).token_ids[0]

    def check(self) -> None:
        assert any(self.outputs.values())
        for request, tokens in self.outputs.items():
            assert tokens == self.expected(request)[: len(tokens)]


def requests(chance: Random, engine: Engine, count: int = 7) -> Iterator[int]:
    for request in range(count):
        engine.prompts[request] = [chance.randrange(3, VOCAB) for _ in range(chance.randint(1, 9))]
        engine.outputs[request] = []
        engine.policies[request] = chance.choice([*POLICIES, None])
        yield request


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_persistent_batch_of_v1(seed: int, asynchronous: bool, folder: str) -> None:
    """Requests are added, removed, moved and preempted; prompts are read in two chunks; placeholders stand for tokens on their way."""
    chance, engine = Random(seed), Engine(folder)
    running = BatchRequests(Worker(serving(), vllm_config(folder)))
    coming, batch, parked, half = list(requests(chance, engine)), [], [], set()
    lists: dict[int, list[int]] = {request: [] for request in coming}
    for _ in range(40):
        removed, added, moved = [], [], []
        for index in [i for i, request in enumerate(batch) if len(engine.outputs[request]) >= NEW or chance.random() < 0.1]:
            request = batch[index]
            removed.append(index)
            if len(engine.outputs[request]) < NEW:
                parked.append(request)
            batch[index] = None
        for _ in range(chance.randint(0, 2)):
            if coming or parked:
                request = parked.pop() if (parked and chance.random() < 0.5) or not coming else coming.pop()
                lists[request] = list(engine.outputs[request])  # asynchronous scheduling hands over a new list
                index = next((i for i, other in enumerate(batch) if other is None), len(batch))
                if index in removed and chance.random() < 0.5:
                    removed.remove(index)  # an added request may replace one that nobody said was removed
                batch[index : index + 1] = [request]
                added.append((index, params(engine.policies[request]), engine.prompts[request], lists[request]))
        while None in batch:  # condensed, from the end
            last, hole = len(batch) - 1, batch.index(None)
            if batch[last] is not None:
                moved.append((last, hole, Direction.UNIDIRECTIONAL))
                batch[hole] = batch[last]
            batch.pop()
        if len(batch) > 1 and chance.random() < 0.3:
            one, other = chance.sample(range(len(batch)), 2)
            batch[one], batch[other] = batch[other], batch[one]
            moved.append((one, other, Direction.SWAP))
        changed = removed or added or moved
        running.update(
            SimpleNamespace(batch_size=len(batch), removed=sorted(removed, reverse=True), added=added, moved=moved) if changed else None
        )
        if not batch:
            continue
        for request in batch:  # the placeholders are filled before the logits are guarded
            lists[request][:] = engine.outputs[request]
        unread = {request for request in batch if not engine.outputs[request] and request not in half and len(engine.prompts[request]) > 2}
        half |= unread
        rows = [engine.prompts[r][:2] if r in unread else engine.prompts[r] + engine.outputs[r] for r in batch]
        logits = torch.stack([engine.logits(ids) for ids in rows])
        running.apply(logits, None)
        for request, token in zip(batch, logits.argmax(-1).tolist(), strict=True):
            if request not in unread:
                engine.outputs[request].append(token)
                lists[request].append(-1 if asynchronous else token)
    engine.check()
    assert sum(len(tokens) == NEW for tokens in engine.outputs.values()) > 3
    assert all(count["failed_closed"] == 0 for count in running.worker.guards.counters().values())


@pytest.mark.parametrize("seed", range(5))
def test_the_slots_of_v2(seed: int, folder: str) -> None:
    """Rows come in any order, slots are used again, a preempted request is added again with what it had generated."""
    chance, engine = Random(seed), Engine(folder)
    slots, width = 4, 40
    tokens = torch.zeros(slots, width, dtype=torch.int32)
    states = SimpleNamespace(prompt_len=SimpleNamespace(np=np.zeros(slots, np.int32)), all_token_ids=SimpleNamespace(gpu=tokens))
    running = SlotRequests(Worker(serving(), vllm_config(folder)), states)
    coming, held, half = list(requests(chance, engine)), {}, set()
    for _ in range(40):
        for slot, request in list(held.items()):
            if len(engine.outputs[request]) >= NEW:
                del held[slot]
            elif chance.random() < 0.08:
                coming.append(held.pop(slot))
        free = [slot for slot in range(slots) if slot not in held]
        if free and coming:
            slot, request = chance.choice(free), coming.pop()
            held[slot] = request
            guarded = running.add(slot, params(engine.policies[request]))
            assert guarded == (engine.policies[request] is not None)
            states.prompt_len.np[slot] = len(engine.prompts[request])
        scheduled = chance.sample(sorted(held), len(held))
        if not scheduled:
            continue
        rows, seen = [], []
        for slot in scheduled:
            ids = engine.prompts[held[slot]] + engine.outputs[held[slot]]
            tokens[slot, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            if len(engine.prompts[held[slot]]) > 2 and held[slot] not in half:
                half.add(held[slot])
                ids = ids[:2]
            rows.append(engine.logits(ids))
            seen.append(len(ids))
        logits = torch.stack(rows)
        running.apply(logits, SimpleNamespace(idx_mapping_np=np.array(scheduled), seq_lens_upper_bound_np=np.array(seen)))
        for slot, length, token in zip(scheduled, seen, logits.argmax(-1).tolist(), strict=True):
            if length >= len(engine.prompts[held[slot]]):
                engine.outputs[held[slot]].append(token)
    engine.check()
    assert sum(len(found) == NEW for found in engine.outputs.values()) > 3


def test_rows_of_unguarded_requests_are_left_as_they_are(folder: str) -> None:
    running = BatchRequests(Worker(serving(), vllm_config(folder)))
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    running.update(SimpleNamespace(removed=[], added=[(0, params(), [5], []), (1, params("debias"), [5, 6], [])], moved=[]))
    running.apply(logits, None)
    assert torch.equal(logits[0], before[0])
    assert not torch.equal(logits[1], before[1])
    assert len(running.worker.running) == 1


def test_a_failing_control_ends_its_request_with_the_end_of_text(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    running = BatchRequests(Worker(serving(), vllm_config(folder)))
    guard = running.worker.guards.guard("debias")
    added = [(0, params("debias"), [5], []), (1, params("contrast"), [5, 6], [])]
    running.update(SimpleNamespace(removed=[], added=added, moved=[]))

    def broken(step: Any) -> Any:
        raise ValueError("broken")

    monkeypatch.setattr(guard.controls[0], "terms", broken)
    for _ in range(2):
        logits = torch.randn(2, VOCAB)
        running.apply(logits, None)
        assert logits[0].argmax() == 2
        assert torch.isneginf(logits[0]).sum() == VOCAB - 1
        assert not torch.isneginf(logits[1]).all()
        for _, _, _, output in added:
            output.append(9)
    assert guard.counters.failed_closed == 1


def test_a_request_whose_gate_is_forgotten_ends(folder: str) -> None:
    """It came back with tokens that this worker never saw it generate."""
    worker = Worker(serving(), vllm_config(folder))
    guard = worker.guards.guard("contrast")
    slot = worker.start(guard, [5, 6], [7, 8])
    logits = torch.randn(1, VOCAB)
    worker.step(logits, [0], {slot: [7, 8]}, {})
    assert logits[0].argmax() == 2
    assert guard.counters.failed_closed == 1
    remembered = worker.start(guard, [5, 6], [])
    for tokens in ([], [7]):
        worker.step(torch.randn(1, VOCAB), [0], {remembered: tokens}, {})
    worker.stop(remembered, [7, 8])
    logits = torch.randn(1, VOCAB)
    worker.step(logits, [0], {worker.start(guard, [5, 6], [7, 8]): [7, 8]}, {})
    assert not torch.isneginf(logits).all()
    assert guard.counters.failed_closed == 1


@pytest.mark.parametrize("prompt", [[], [5, VOCAB + 7]], ids=["empty", "image placeholder"])
def test_a_prompt_that_the_guard_cannot_read_ends_its_request(prompt: list[int], folder: str) -> None:
    worker = Worker(serving(), vllm_config(folder))
    slot, other = (worker.start(worker.guards.guard("debias"), ids, []) for ids in (prompt, [5]))
    logits = torch.randn(2, VOCAB)
    worker.step(logits, [0, 1], {slot: [], other: []}, {})
    assert logits[0].argmax() == 2
    assert not torch.isneginf(logits[1]).any()
    assert worker.guards.guard("debias").counters.failed_closed == 1


def test_a_request_that_failed_stays_ended_when_it_comes_back(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(serving(), vllm_config(folder))
    guard = worker.guards.guard("debias")
    slot = worker.start(guard, [5, 6], [])
    with monkeypatch.context() as patched:
        patched.setattr(guard.controls[0], "terms", lambda step: 1 / 0)
        worker.step(torch.randn(1, VOCAB), [0], {slot: []}, {})
    worker.stop(slot, [2])
    logits = torch.randn(1, VOCAB)
    worker.step(logits, [0], {worker.start(guard, [5, 6], [2]): [2]}, {})
    assert logits[0].argmax() == 2
    assert torch.isneginf(logits[0]).sum() == VOCAB - 1
    assert guard.counters.failed_closed == 1


def test_hidden_states_from_the_head(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the head's states the guard runs no pass of its own for them; a step without them fails closed."""
    from odd_models import basis

    policy = mg.Policy(controls=[mg.controls.NullspaceProjection(basis=basis())])
    monkeypatch.setattr(ServingConfig, "policy", lambda self, policy_id: policy)
    engine = Engine(folder)
    found = {}
    for given in (False, True):
        monkeypatch.setenv(vllm_head.SWITCH, "1" if given else "0")
        worker = Worker(serving({"gender": "detox"}), vllm_config(folder))
        guard = worker.guards.guard("gender")
        slot = worker.start(guard, [5, 6, 7], [])
        with torch.inference_mode():
            output = engine.lm.forward(cache=engine.lm.new_cache(), input_ids=torch.tensor([[5, 6, 7]]), hidden=True)
        logits = output.logits.clone()
        vllm_head.newest.hidden, vllm_head.newest.logits = output.hidden, output.head_logits
        worker.step(logits, [0], {slot: []}, {})
        found[given] = logits
        assert not torch.allclose(logits.softmax(-1), output.logits.softmax(-1), atol=1e-4)
    assert torch.allclose(found[True].softmax(-1), found[False].softmax(-1), atol=1e-5)
    logits = output.logits.clone()
    worker.step(logits, [0], {slot: [8]}, {})  # the head's states were taken before
    assert logits[0].argmax() == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"speculative_config": object()}, "speculative decoding"),
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=2, tensor_parallel_size=1)}, "pipeline parallelism"),
    ],
)
def test_set_ups_that_would_go_past_the_guard_are_refused(more: dict[str, Any], message: str, folder: str) -> None:
    with pytest.raises(UnsupportedPathError, match=message):
        Worker(serving(), vllm_config(folder, **more))


def test_policies_and_models_that_do_not_fit_are_refused(folder: str) -> None:
    pplm = {"steered": {"controls": [{"control": "pplm@1", "bag_of_words": [[5, 6]]}]}}
    with pytest.raises(PolicyError, match="needs grad, cache, which vLLM doesn't offer"):
        Worker(serving(pplm), vllm_config(folder))
    other = vllm_config(folder)
    other.model_config.get_vocab_size = lambda: VOCAB - 1
    with pytest.raises(PolicyError, match="name the same model"):
        Worker(serving(), other)


def test_raw_log_probabilities_are_warned_of(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Worker(serving(), vllm_config(folder))
    assert "processed_logprobs" in caplog.text


def test_requests_are_checked_at_admission() -> None:
    assert admit(serving(), params()) == (None, 1.0)
    assert admit(serving(), params("debias")) == ("debias", 1.0)
    assert admit(serving(default="debias"), SimpleNamespace(extra_args=None)) == ("debias", 1.0)
    with pytest.raises(PolicyError, match="no policy 'debiass' is served; did you mean 'debias'"):
        admit(serving(), params("debiass"))
    with pytest.raises(PolicyError, match="prompt_logprobs"):
        admit(serving(), params("debias", prompt_logprobs=1))


def test_columns_that_pad_the_vocabulary_are_never_drawn(folder: str) -> None:
    config = vllm_config(folder)
    config.model_config.get_vocab_size = lambda: VOCAB + 5
    worker = Worker(serving(), config)
    slot = worker.start(worker.guards.guard("debias"), [5, 6], [])
    logits = torch.zeros(1, VOCAB + 5)
    worker.step(logits, [0], {slot: []}, {})
    assert torch.isneginf(logits[0, VOCAB:]).all()


def test_the_operators_file_is_read_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serving.json"
    monkeypatch.setenv("MORALGUARD_SERVING", str(file))
    for name in ("first", "second"):
        file.write_text(json.dumps({"policies": [{"id": name, "policy": "detox"}]}))

        os.utime(file, ns=(1, 10**9 if name == "first" else 2 * 10**9))
        assert ServingConfig.from_environment().policies[0].id == name
        assert ServingConfig.from_environment() is ServingConfig.from_environment()
