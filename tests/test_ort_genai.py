"""The guard in onnxruntime-genai's Generator, against the guard's own loop."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_graphs
import pytest
import torch

import moralguard as mg
from moralguard.controls import BoundControl, Control, Dense, NullspaceProjection, SelfDebias, Terms
from moralguard.errors import ControlError, ModelError, PromptError, UnsupportedPathError
from moralguard.serving.ort_genai import GenaiGuard

og = pytest.importorskip("onnxruntime_genai")

EXAMPLE = str(Path(__file__).resolve().parent.parent / "examples" / "onnx_genai.py")
NEW = 10
PROMPTS = [[5, 17, 3], [7], [50, 2, 9, 14]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    # onnxruntime's GroupQueryAttention takes heads of multiples of 16, which this model has
    return str(onnx_graphs.genai(onnx_graphs.llama(), tmp_path_factory.mktemp("genai") / "genai", include_hidden_states="true").parent)


@pytest.fixture(scope="module")
def lm(folder: str) -> Any:
    return mg.load_model(folder)


@pytest.fixture(scope="module")
def model(folder: str) -> Any:
    return og.Model(folder)


def controls(lm: Any) -> dict[str, Control]:
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(lm.width, 3)))[0].astype(np.float32)
    return {
        "self_debias": SelfDebias(prefixes=((9, 8, 7), (1, 2)), decay_constant=300.0),
        "nullspace": NullspaceProjection(basis=torch.from_numpy(basis)),
    }


class BoundOnly(BoundControl["Only"]):
    def terms(self, step: Any) -> Terms:
        if bool((step.generated >= self.settings.fails_after).any()):
            raise ValueError("out of order")
        delta = step.arrays.full(tuple(step.logits.shape), 0.0, step.arrays.float32, step.logits)
        delta[:, self.settings.token] = 500.0
        return Terms((Dense(delta),))


class Only(Control):
    """Draws nothing but one token, until it fails."""

    control_name: ClassVar[str] = "only"
    any_arrays: ClassVar[bool] = True
    token: int
    fails_after: int = 1000

    @property
    def active(self) -> bool:
        return True

    def bind(self, lm: Any, values: Any) -> BoundOnly:
        return BoundOnly(self, lm)


@pytest.mark.parametrize("control", ["self_debias", "nullspace"])
def test_greedy_tokens_are_those_of_the_guards_own_loop(lm: Any, model: Any, control: str) -> None:
    guard = mg.Guard(mg.Policy(controls=[controls(lm)[control]]), lm)
    expected = guard.generate(PROMPTS, max_new_tokens=NEW, do_sample=False).token_ids
    served = GenaiGuard(guard, model)
    assert [served.generate(prompt, max_new_tokens=NEW, do_sample=False) for prompt in PROMPTS] == expected
    free = GenaiGuard(mg.Guard(mg.Policy(), lm), model)
    assert [free.generate(prompt, max_new_tokens=NEW, do_sample=False) for prompt in PROMPTS] != expected


def test_sampling_draws_from_the_guarded_law(lm: Any, model: Any) -> None:
    served = GenaiGuard(mg.Guard(mg.Policy(controls=[Only(token=11)]), lm), model)
    assert served.generate(PROMPTS[0], max_new_tokens=NEW, do_sample=True, temperature=1.5, random_seed=3) == [11] * NEW
    debiased = GenaiGuard(mg.Guard(mg.Policy(controls=[controls(lm)["self_debias"]]), lm), model)
    draws = [debiased.generate(PROMPTS[0], max_new_tokens=NEW, do_sample=True, top_k=0, random_seed=seed) for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


def test_a_stream_yields_as_it_goes_and_stops_at_the_end_of_the_text(lm: Any, model: Any) -> None:
    guard = mg.Guard(mg.Policy(controls=[controls(lm)["self_debias"]]), lm)
    stream = GenaiGuard(guard, model).stream(PROMPTS[0], max_new_tokens=NEW)
    assert isinstance(stream, Iterator)
    first = next(stream)
    assert guard.counters.as_dict()["tokens_emitted"] == 1
    stream.close()  # type: ignore[attr-defined]
    assert [first] == GenaiGuard(guard, model).generate(PROMPTS[0], max_new_tokens=1)
    end = min(lm.eos_token_ids)
    assert GenaiGuard(mg.Guard(mg.Policy(controls=[Only(token=end)]), lm), model).generate(PROMPTS[0], max_new_tokens=NEW) == [end]


def test_a_prompt_may_begin_with_the_padding_token(lm: Any, model: Any) -> None:
    guard = mg.Guard(mg.Policy(controls=[controls(lm)["self_debias"]]), lm)
    prompt = [lm.pad_token_id or 0, 5, 9]
    expected = guard.generate([prompt], max_new_tokens=NEW, do_sample=False).token_ids[0]
    assert GenaiGuard(guard, model).generate(prompt, max_new_tokens=NEW) == expected


def test_a_control_that_fails(lm: Any, model: Any) -> None:
    closed = mg.Guard(mg.Policy(controls=[Only(token=11, fails_after=2)]), lm)
    stream = GenaiGuard(closed, model).stream(PROMPTS[0], max_new_tokens=NEW)
    assert [next(stream), next(stream)] == [11, 11]
    with pytest.raises(ControlError, match="control 'only' failed in row 0 and the policy fails closed"):
        next(stream)
    opened = mg.Guard(mg.Policy(controls=[Only(token=11, fails_after=2)], on_error="open"), lm)
    assert len(GenaiGuard(opened, model).generate(PROMPTS[0], max_new_tokens=NEW)) == NEW
    assert opened.counters.as_dict()["failed_open"] == 1


def test_what_is_refused(lm: Any, model: Any) -> None:
    guard = mg.Guard(mg.Policy(controls=[controls(lm)["self_debias"]]), lm)
    for search in ({"num_beams": 2}, {"num_return_sequences": 3}):
        with pytest.raises(UnsupportedPathError, match=next(iter(search))):
            GenaiGuard(guard, model).stream(PROMPTS[0], max_new_tokens=NEW, **search)
    with pytest.raises(PromptError, match="is empty"):
        GenaiGuard(guard, model).stream([], max_new_tokens=NEW)
    with pytest.raises(ModelError, match="is a PyTorch model"):
        GenaiGuard(mg.Guard(mg.Policy(), (onnx_graphs.llama(), None)), model)


def test_the_example_runs_without_torch(folder: str) -> None:
    done = subprocess.run([sys.executable, EXAMPLE, folder], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == [*["unguarded", "guarded"] * 2, "guarded, sampled", "torch was imported"]
    assert lines[0].removeprefix("unguarded") != lines[1].removeprefix("guarded")
    assert lines[-1].endswith("False")
