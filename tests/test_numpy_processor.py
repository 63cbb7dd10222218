"""The guard as a logits processor of somebody else's loop over an ONNX model, against the guard's own loop and against PyTorch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from odd_models import byte_llama, byte_tokenizer, left_padded

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.controls import DExperts, NullspaceProjection, Prompt, SelfDebias
from moralguard.errors import BypassError, PromptError, UnsupportedPathError
from moralguard.export.folder import export_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PROMPTS = [[5, 17, 3, 101, 44], [7], [150, 2, 9]]
NEW = 6


@pytest.fixture(scope="module")
def torch_model() -> Any:
    return byte_llama()


@pytest.fixture(scope="module")
def folder(torch_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return export_model(LanguageModel(torch_model, byte_tokenizer(), "tiny"), tmp_path_factory.mktemp("onnx") / "model").folder


@pytest.fixture(scope="module")
def lm(folder: Path) -> Any:
    return mg.load_model(folder)


def controls() -> list[Any]:
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 3)))[0].astype(np.float32)
    return [
        SelfDebias(prefixes=((9, 8, 7), (1, 2))),
        DExperts(expert=Prompt([4, 5, 6]), anti_expert=Prompt([11]), alpha=1.5),
        NullspaceProjection(basis=torch.from_numpy(basis)),
    ]


def policy() -> mg.Policy:
    return mg.Policy(controls=controls()[:2])


@pytest.fixture(scope="module")
def guard(lm: Any) -> mg.Guard:
    return mg.Guard(policy(), lm)


def own_loop(lm: Any, processor: Any, prompt: list[int], steps: int, kind: Any = np.asarray) -> list[int]:
    """Greedy tokens of a loop that knows nothing of the guard but the processor."""
    cache, ids, fresh = lm.new_cache(), list(prompt), list(prompt)
    for _ in range(steps):
        logits = lm.forward(cache=cache, input_ids=np.array([fresh])).logits
        scores = processor(kind(np.array([ids])), kind(logits))
        fresh = [int(scores[0].argmax())]
        ids += fresh
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_a_loop_of_ones_own_gives_the_guards_tokens(guard: mg.Guard, kind: Any) -> None:
    expected = guard.generate(PROMPTS, max_new_tokens=NEW, do_sample=False).token_ids
    processor = guard.logits_processor()  # one for all prompts, one after the other
    assert [own_loop(guard.lm, processor, prompt, NEW, kind) for prompt in PROMPTS] == expected
    free = mg.Guard(mg.Policy(), guard.lm).generate(PROMPTS, max_new_tokens=NEW, do_sample=False).token_ids
    assert free != expected


def test_a_control_that_reads_hidden_states_is_refused(lm: Any) -> None:
    guard = mg.Guard(mg.Policy(controls=controls()[2:]), lm)
    with pytest.raises(UnsupportedPathError, match="needs hidden, which a logits processor doesn't get"):
        guard.logits_processor()


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams", "several"])
def test_generate_over_a_session_is_generate_over_pytorch(guard: mg.Guard, folder: Path, torch_model: Any, mode: dict[str, Any]) -> None:
    """transformers' generate over the example's model; padded rows, told by the mask."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | mode
    inputs = left_padded(PROMPTS)
    reference = mg.Guard(policy(), (torch_model, None))
    expected = torch_model.generate(**inputs, **settings, logits_processor=[reference.logits_processor()])
    model = example("onnx_generate").OrtCausalLM(str(folder))
    found = model.generate(**inputs, **settings, logits_processor=[guard.logits_processor()])
    assert found.tolist() == expected.tolist()
    assert model.generate(**inputs, **settings).tolist() != found.tolist()


def test_scores_keep_their_kind_and_a_row_that_nothing_touches(lm: Any) -> None:
    quiet = mg.Guard(mg.Policy(), lm).logits_processor()
    scores = np.random.default_rng(0).normal(size=(2, lm.vocab_size)).astype(np.float32)
    assert quiet(np.array([[1, 2], [3, 4]]), scores) is scores
    processor = mg.Guard(policy(), lm).logits_processor()
    half = processor(np.array([[1, 2], [3, 4]], np.int32), scores.astype(np.float16))
    assert half.dtype == np.float16
    tensor = processor(torch.tensor([[1, 2], [3, 4]]), torch.from_numpy(scores).double())
    assert tensor.dtype == torch.float64
    assert torch.allclose(tensor.exp().sum(-1), torch.ones(2, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_listed_twice_acts_once(lm: Any, kind: Any) -> None:
    """Two processors of one guard, one after the other in each step; another guard's acts too."""
    guard, other = mg.Guard(policy(), lm), mg.Guard(policy(), lm)

    def chained(*processors: Any) -> Any:
        def call(ids: Any, scores: Any) -> Any:
            for processor in processors:
                scores = processor(ids, scores)
            return scores

        return call

    once = own_loop(lm, guard.logits_processor(), PROMPTS[0], NEW, kind)
    counted = guard.counters.as_dict()
    assert own_loop(lm, chained(guard.logits_processor(), guard.logits_processor()), PROMPTS[0], NEW, kind) == once
    assert guard.counters.as_dict() == {key: 2 * count for key, count in counted.items()}, "the second one counted too"
    ids, scores = kind(np.array([PROMPTS[0]])), kind(np.random.default_rng(0).normal(size=(1, lm.vocab_size)).astype(np.float32))
    first = guard.logits_processor()(ids, scores)
    assert other.logits_processor()(ids, first) is not first


def test_padding_is_told_by_the_mask_or_the_pad_token(lm: Any) -> None:
    ids = np.array([[0, 0, 7], [5, 17, 3]])
    scores = np.random.default_rng(0).normal(size=(2, lm.vocab_size)).astype(np.float32)
    alone = mg.Guard(policy(), lm).logits_processor()(ids[:1, 2:], scores[:1])
    masked = mg.Guard(policy(), lm).logits_processor(attention_mask=np.array([[0, 0, 1], [1, 1, 1]]))(ids, scores)
    assert np.allclose(masked[:1], alone, atol=1e-4)
    with pytest.raises(PromptError, match="attention_mask has 2 rows, but input_ids has 3"):
        mg.Guard(policy(), lm).logits_processor(attention_mask=np.ones((2, 3)))(np.ones((3, 2), np.int64), scores[[0, 0, 0]])


class EverySecond:
    """Hands only every second call on."""

    def __init__(self, processor: Any):
        self.processor, self.calls = processor, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.processor(input_ids, scores) if self.calls % 2 else scores


def test_skipped_tokens_are_a_bypass(guard: mg.Guard, folder: Path) -> None:
    model = example("onnx_generate").OrtCausalLM(str(folder))
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(BypassError, match="1 positions of 3 rows were generated without the guard, which was called for 1 before"):
        model.generate(**left_padded(PROMPTS), **settings, logits_processor=[EverySecond(guard.logits_processor())])


def test_no_ids_are_a_prompt_error(guard: mg.Guard) -> None:
    scores = np.zeros((1, guard.lm.vocab_size), np.float32)
    with pytest.raises(PromptError, match="given no ids"):
        guard.logits_processor()(np.zeros((1, 0), np.int64), scores)
