"""transformers' continuous batching under the guard, against the same requests alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import transformers
from odd_models import CONTROLS, PROMPTS
from packaging.version import Version
from tiny_models import VOCAB, llama
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import cb_logits_processors
from transformers.generation.continuous_batching.requests import RequestState

import moralguard as mg
from moralguard.controls import BoundControl, Control, Dense, Terms
from moralguard.errors import PolicyError, PromptError, UnsupportedPathError
from moralguard.serving import hf_batching
from moralguard.serving.config import ServedPolicy, ServingConfig
from moralguard.serving.guards import ServedGuards
from moralguard.serving.hf_batching import BatchingProcessor, guarded_batching

NEW = 8
TEXTS = [*(list(prompt) for prompt in PROMPTS), [8] * 11, [3], [90, 14, 2, 77]]
DEBIAS = {"control": "self-debias@1", "prefixes": [[11, 12, 13], [14]], "decay_constant": 300.0}


covered = pytest.mark.skipif(Version(transformers.__version__) < Version("5.19"), reason="guarded_batching refuses older versions")


def test_versions_that_leave_the_guard_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr(hf_batching, "_OLDEST", Version("99"))
    with (
        pytest.raises(UnsupportedPathError, match="draws tokens past the guard; it is covered from 99 on"),
        guarded_batching(model, mg.Guard({"controls": [DEBIAS]}, (model, None))),
    ):
        pass


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return llama()


def greedy(**others: Any) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0} | others)


def small(**others: Any) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**{"page_size": 16, "num_blocks": 32, "max_batch_tokens": 64} | others)


def batched(model: Any, texts: list[list[int]], **others: Any) -> list[Any]:
    return list(model.generate_batch(texts, generation_config=greedy(), continuous_batching_config=small(**others)).values())


def alone(guard: mg.Guard, texts: list[list[int]], new: int = NEW) -> list[list[int]]:
    return [guard.generate([text], max_new_tokens=new, do_sample=False).token_ids[0] for text in texts]


class Failing(Control):
    """Raises for requests of the given prompt length, once they have generated two tokens."""

    control_name: ClassVar[str] = "failing"
    length: int

    @property
    def active(self) -> bool:
        return True

    def bind(self, lm: Any, values: Any) -> BoundFailing:
        return BoundFailing(self, lm)


class BoundFailing(BoundControl["Failing"]):
    def terms(self, step: Any) -> Terms:
        lengths = step.mask.sum(-1) - step.generated
        if bool(((lengths == self.settings.length) & (step.generated >= 2)).any()):
            raise ValueError("out of order")
        delta = torch.zeros(step.rows, VOCAB)
        delta[:, 5] = 1.0
        return Terms((Dense(delta),))


@covered
@pytest.mark.parametrize("control", sorted(CONTROLS))
def test_each_request_has_the_tokens_that_it_has_alone(model: Any, control: str) -> None:
    guard = mg.Guard(mg.Policy(controls=[CONTROLS[control]()]), (model, None))
    free = [output.generated_tokens for output in batched(model, TEXTS)]
    expected = alone(guard, TEXTS)
    guard = mg.Guard(guard.policy, (model, None))
    with guarded_batching(model, guard):
        found = batched(model, TEXTS, max_requests_per_batch=4)  # the others wait until one is over
    assert [output.generated_tokens for output in found] == expected
    assert expected != free
    counted = guard.counters.as_dict()
    assert counted["requests"] == len(TEXTS)
    assert counted["rows_guarded"] == counted["tokens_emitted"] == len(TEXTS) * NEW
    assert counted["failed_closed"] == counted["failed_open"] == counted["unguarded_tokens"] == 0


@covered
def test_requests_that_are_preempted_come_back_as_they_were(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache too small for all: transformers puts requests back into the queue and reads them anew."""
    preempted, inherited = [], RequestState.create_equivalent_initial_request
    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", lambda self: [preempted.append(self), inherited(self)][1])
    guard = mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()]), (model, None))
    texts = [[5 + i, 17, 3, 101, 44, 9] for i in range(4)]
    with guarded_batching(model, guard):
        found = model.generate_batch(
            texts,
            generation_config=greedy(max_new_tokens=30),
            continuous_batching_config=small(page_size=4, num_blocks=24, allow_block_sharing=False),
        )
    assert [output.generated_tokens for output in found.values()] == alone(guard, texts, 30)
    assert preempted


@covered
def test_requests_that_come_while_others_run_each_under_its_policy(model: Any) -> None:
    config = ServingConfig(
        policies=(
            ServedPolicy(id="open", policy={"controls": [{**DEBIAS, "decay_constant": 100.0}]}),
            ServedPolicy(id="strict", policy={"controls": [DEBIAS]}),
        ),
        default="open",
    )
    guards = ServedGuards(config, mg.load_model((model, None)))
    wanted = [None, '{"policy": "strict"}', '{"policy": "strict", "strength": 1.5}', None]
    with guarded_batching(model, guards):
        manager = model.init_continuous_batching(greedy(), small())
        manager.start()
        try:
            with pytest.raises(PolicyError, match="no policy 'strictest' is served; did you mean 'strict'"):
                manager.add_request(TEXTS[0], moralguard='{"policy": "strictest"}')
            cancelled = manager.add_request(TEXTS[4], request_id="gone", max_new_tokens=100)
            found, names = {}, []
            for text, asked in zip(TEXTS, wanted, strict=False):
                names.append(manager.add_request(text, **({} if asked is None else {"moralguard": asked})))
            manager.cancel_request(cancelled)
            while len(found) < len(names):
                result = manager.get_result(timeout=20)
                assert result is not None
                found[result.request_id] = result
            processor = manager.logit_processor.logits_processor[0]
        finally:
            manager.stop()
    by_policy = [guards.guard("open"), guards.guard("strict"), guards.guard("strict", 1.5), guards.guard("open")]
    for name, text, guard in zip(names, TEXTS, by_policy, strict=False):
        assert found[name].generated_tokens == alone(guard, [text])[0]
    assert "gone" not in processor._slots, "a cancelled request was forgotten"


@covered
@pytest.mark.parametrize("on_error", ["closed", "open"])
def test_a_control_that_fails_ends_its_own_request_only(model: Any, on_error: str) -> None:
    bad = 2
    guard = mg.Guard(mg.Policy(controls=[Failing(length=len(TEXTS[bad]))], on_error=on_error), (model, None))
    with guarded_batching(model, guard):
        found = batched(model, TEXTS[:4])
    healthy = mg.Guard(mg.Policy(controls=[Failing(length=-1)]), (model, None))
    expected = alone(healthy, TEXTS[:4])
    for i, (output, tokens) in enumerate(zip(found, expected, strict=True)):
        if i != bad:
            assert output.generated_tokens == tokens
            assert output.error is None
    counted = guard.counters.as_dict()
    if on_error == "closed":
        assert found[bad].generated_tokens == expected[bad][:2]
        assert "control 'failing' failed and the policy fails closed: ValueError: out of order" in str(found[bad].error)
        assert (counted["failed_closed"], counted["failed_open"]) == (1, 0)
    else:
        assert len(found[bad].generated_tokens) == NEW
        assert found[bad].error is None
        assert (counted["failed_closed"], counted["failed_open"]) == (0, 1)


@covered
def test_the_model_is_afterwards_as_it_was(model: Any) -> None:
    guard = mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()]), (model, None))
    before, known = dict(vars(model)), dict(cb_logits_processors.CLASSIC_TO_CB_PROCESSORS_MAP)
    free = [output.generated_tokens for output in batched(model, TEXTS[:2])]
    with guarded_batching(model, guard):
        batched(model, TEXTS[:2])
        model.generate_batch(TEXTS[:2], generation_config=greedy(), continuous_batching_config=small(), persistent_manager=True)
    with pytest.raises(ZeroDivisionError), guarded_batching(model, guard):
        1 // 0  # noqa: B018
    assert vars(model).keys() == before.keys()
    assert known == cb_logits_processors.CLASSIC_TO_CB_PROCESSORS_MAP
    assert [output.generated_tokens for output in batched(model, TEXTS[:2])] == free
    assert guard.counters.as_dict()["requests"] == 4


REFUSED: dict[str, Callable[[Any], Any]] = {
    "use_async_batching": lambda model: model.init_continuous_batching(greedy(), small(use_async_batching=True)),
    "use_cuda_graph": lambda model: model.init_continuous_batching(greedy(), small(use_cuda_graph=(False, True))),
    "decode_compile_config": lambda model: model.init_continuous_batching(greedy(), small(decode_compile_config=CompileConfig())),
    "compile_config": lambda model: model.init_continuous_batching(greedy(compile_config=CompileConfig()), small()),
    "num_beams": lambda model: model.init_continuous_batching(greedy(num_beams=2), small()),
}


@covered
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_settings_that_hide_tokens_from_the_guard_are_refused(model: Any, name: str) -> None:
    guard = mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()]), (model, None))
    with guarded_batching(model, guard), pytest.raises(UnsupportedPathError, match=name):
        REFUSED[name](model)


@covered
def test_what_else_is_refused(model: Any) -> None:
    guard = mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()]), (model, None))
    with pytest.raises(UnsupportedPathError, match="another model"), guarded_batching(llama(seed=1), guard):
        pass
    with guarded_batching(model, guard), pytest.raises(UnsupportedPathError, match="already guarded"), guarded_batching(model, guard):
        pass
    with guarded_batching(model, guard):
        manager = model.init_continuous_batching(greedy(), small())
        with pytest.raises(PolicyError, match="requests may not choose"):
            manager.add_request([1, 2], moralguard='{"policy": "x"}')
        with pytest.raises(PromptError, match="has no tokens"):
            manager.add_request([])
        with pytest.raises(PromptError, match="holds id 199, which is no token"):
            manager.add_request([5, 199])
    eager = llama()
    eager.set_attn_implementation("eager")
    with guarded_batching(eager, mg.Guard(guard.policy, (eager, None))), pytest.raises(UnsupportedPathError, match="eager attention"):
        eager.init_continuous_batching(greedy(), small())
    model.generate_batch(TEXTS[:1], generation_config=greedy(), continuous_batching_config=small(), persistent_manager=True)
    with pytest.raises(UnsupportedPathError, match="keeps a manager"), guarded_batching(model, guard):
        pass
    model.destroy_cached_continuous_batching_manager()


@covered
@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_attach_refuses_continuous_batching(model: Any, name: str) -> None:
    guard = mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()]), (model, None))
    with guard.attach(model), pytest.raises(UnsupportedPathError, match=f"{name} never calls logits processors of the user"):
        getattr(model, name)([[1, 2]])


@covered
def test_a_name_that_is_used_again_is_another_request(model: Any) -> None:
    guard = mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()]), (model, None))
    with guarded_batching(model, guard):
        manager = model.init_continuous_batching(greedy(), small())
        manager.start()
        try:
            for text in TEXTS[:3]:
                manager.add_request(text, request_id="same")
                assert manager.get_result(timeout=20).generated_tokens == alone(guard, [text])[0]
        finally:
            manager.stop()


@covered
def test_prompts_that_are_read_in_pieces(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch then has rows of requests that get no token in it."""
    shapes, inherited = [], BatchingProcessor.__call__

    def watched(self: BatchingProcessor, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        shapes.append((len(self._states), len(scores)))
        return inherited(self, scores, tensor_arg)

    monkeypatch.setattr(BatchingProcessor, "__call__", watched)
    texts = [[7 + i % 90 for i in range(50)], TEXTS[0], [9 + i % 80 for i in range(41)], TEXTS[1]]
    guard = mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()]), (model, None))
    with guarded_batching(model, guard):
        found = batched(model, texts, max_batch_tokens=16)
    counted = guard.counters.as_dict()
    assert [output.generated_tokens for output in found] == alone(guard, texts)
    assert counted["rows_guarded"] == counted["tokens_emitted"] == len(texts) * NEW
    assert any(requests < rows for requests, rows in shapes)


@covered
def test_several_sequences_of_one_prompt(model: Any) -> None:
    """transformers forks a request once its prompt was read: the children have its first token."""
    guard = mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()]), (model, None))
    with guarded_batching(model, guard):
        config = greedy(num_return_sequences=2, do_sample=True, top_k=1)  # which is greedy
        found = model.generate_batch(TEXTS[:2], generation_config=config, continuous_batching_config=small())
    expected = alone(guard, TEXTS[:2])
    assert [output.generated_tokens for output in found.values()] == [expected[0], expected[0], expected[1], expected[1]]
    assert guard.counters.as_dict()["unguarded_tokens"] == 0
