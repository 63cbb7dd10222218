"""The guard in llama-cpp-python: the callable with arrays as llama.cpp hands them in, and the library itself where it is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy_model import NumpyModel
from odd_models import BYTE_VOCAB, CONTROLS, byte_llama, byte_tokenizer
from tiny_gguf import END, write_gguf

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.controls import BoundControl, Control, Dense, Terms
from moralguard.errors import BypassError, ControlError, ModelError, UnsupportedPathError
from moralguard.serving.llamacpp import CompletionProcessor, LlamaGuard

EXAMPLE = str(Path(__file__).resolve().parent.parent / "examples" / "llamacpp_generate.py")
NEW = 8
PROMPTS = [[5, 17, 3, 101, 44], [7], [150, 2, 9]]
installed = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python isn't installed")


class BoundFailing(BoundControl["Failing"]):
    def terms(self, step: Any) -> Terms:
        if bool((step.generated >= 2).any()):
            raise ValueError("out of order")
        delta = step.arrays.full((step.rows, BYTE_VOCAB), 0.0, step.arrays.float32, step.logits)
        delta[:, 40] = 1.0
        return Terms((Dense(delta),))


class Failing(Control):
    """Raises once a request has generated two tokens."""

    control_name: ClassVar[str] = "failing"
    any_arrays: ClassVar[bool] = True

    @property
    def active(self) -> bool:
        return True

    def bind(self, lm: Any, values: Any) -> BoundFailing:
        return BoundFailing(self, lm)


class Buffers:
    """llama.cpp's memory: one buffer of ids and one of (id, logit, p) triples, of which a processor is given views."""

    def __init__(self) -> None:
        self.ids = np.zeros(128, np.intc)
        self.data = np.recarray(BYTE_VOCAB, dtype=np.dtype([("id", np.intc), ("logit", np.single), ("p", np.single)], align=True))

    def draw(self, processors: list[Any], history: list[int], logits: np.ndarray) -> int:
        """As ``Llama._init_sampler`` calls them; then everything is overwritten, as the next step does."""
        self.ids[: len(history)] = history
        self.data.logit[:] = logits
        for processor in processors:
            self.data.logit[:] = processor(self.ids[: len(history)], self.data.logit)
        token = int(self.data.logit.argmax())
        self.ids[:] = -7
        self.data.logit[:] = np.nan
        return token


def loop(lm: Any, processor: CompletionProcessor, prompt: list[int], steps: int = NEW) -> list[int]:
    memory, cache, history, fresh = Buffers(), lm.new_cache(), list(prompt), list(prompt)
    for _ in range(steps):
        given = np.array([fresh]) if getattr(lm, "arrays", "torch") == "numpy" else torch.tensor([fresh])
        with torch.no_grad():
            logits = np.asarray(lm.forward(cache=cache, input_ids=given).logits[0])
        fresh = [memory.draw([processor], history, logits)]
        history += fresh
    return history[len(prompt) :]


def model_of(kind: str) -> Any:
    torch.set_num_threads(1)
    return NumpyModel(byte_llama()) if kind == "numpy" else LanguageModel(byte_llama(), byte_tokenizer(), "tiny")


@pytest.fixture(scope="module", params=["torch", "numpy"])
def lm(request: pytest.FixtureRequest) -> Any:
    return model_of(request.param)


@pytest.mark.parametrize(
    ("kind", "control"),
    [*(("torch", control) for control in ("fudge", "nullspace", "pplm", "self_debias")), ("numpy", "nullspace"), ("numpy", "self_debias")],
)
def test_views_that_are_overwritten_give_the_guards_tokens(kind: str, control: str) -> None:
    """Controls of hidden states and of gradients, too: the guard reads the text itself."""
    lm = model_of(kind)
    guard = mg.Guard(mg.Policy(controls=[CONTROLS[control]()]), lm)
    expected = guard.generate(PROMPTS, max_new_tokens=NEW, do_sample=False).token_ids
    assert [loop(lm, CompletionProcessor(guard, END), prompt) for prompt in PROMPTS] == expected
    assert expected != mg.Guard(mg.Policy(), lm).generate(PROMPTS, max_new_tokens=NEW, do_sample=False).token_ids


def test_a_prompt_may_begin_with_the_padding_token(lm: Any) -> None:
    guard = mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()]), lm)
    prompt = [lm.pad_token_id or 0, 5, 9]
    assert loop(lm, CompletionProcessor(guard, END), prompt) == guard.generate([prompt], max_new_tokens=NEW, do_sample=False).token_ids[0]


def test_a_failure_ends_the_text_and_is_raised_outside(lm: Any) -> None:
    """Inside the callback an exception would be printed and the token drawn from the unguarded logits."""
    guard = mg.Guard(mg.Policy(controls=[Failing()]), lm)
    processor = CompletionProcessor(guard, END)
    tokens = loop(lm, processor, PROMPTS[0])
    healthy = mg.Guard(mg.Policy(controls=[Failing()], on_error="open"), lm)
    assert tokens[2:] == [END] * (NEW - 2)
    with pytest.raises(ControlError, match="control 'failing' failed in row 0 and the policy fails closed: ValueError: out of order"):
        processor.check()
    assert guard.counters.as_dict()["failed_closed"] == 1
    opened = CompletionProcessor(healthy, END)
    assert loop(lm, opened, PROMPTS[0])[:2] == tokens[:2]
    assert not opened.check()
    assert healthy.counters.as_dict()["failed_open"] == 1


def test_an_error_outside_of_any_control(lm: Any) -> None:
    """Here a text longer than the context of the guard's passes."""
    scores = np.zeros(BYTE_VOCAB, np.single)
    for on_error in ("closed", "open"):
        guard = mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()], on_error=on_error), lm)
        processor = CompletionProcessor(guard, END)
        found = processor(np.ones(500, np.intc), scores)
        counted = guard.counters.as_dict()
        if on_error == "closed":
            assert (found.argmax(), counted["failed_closed"]) == (END, 1)
            with pytest.raises(Exception, match="context"):
                processor.check()
        else:
            assert (found == scores).all()
            assert (counted["failed_open"], counted["unguarded_tokens"]) == (1, 1)


def test_tokens_that_were_not_guarded_are_found(lm: Any) -> None:
    guard = mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()]), lm)
    processor = CompletionProcessor(guard, END)
    loop(lm, processor, PROMPTS[0], 3)
    processor.verify(3)
    with pytest.raises(BypassError, match="2 of 5 tokens were drawn without the guard"):
        processor.verify(5)


class Model:
    """The facts that ``LlamaGuard`` asks of a Llama."""

    def __init__(self, vocabulary: int, draft_model: Any = None):
        self.vocabulary, self.draft_model = vocabulary, draft_model

    def n_vocab(self) -> int:
        return self.vocabulary

    def token_eos(self) -> int:
        return END


def test_another_vocabulary_and_a_draft_model_are_refused(lm: Any) -> None:
    guard = mg.Guard(mg.Policy(controls=[CONTROLS["self_debias"]()]), lm)
    with pytest.raises(ModelError, match=r"llama\.cpp's model has 100 tokens, .* has 258"):
        LlamaGuard(guard, Model(100))
    with pytest.raises(UnsupportedPathError, match="draft model"):
        LlamaGuard(guard, Model(BYTE_VOCAB, draft_model=object()))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """llama.cpp's model, and the PyTorch model of the same weights."""
    import llama_cpp

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model = write_gguf(path)
    llama = llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, logits_all=True, verbose=False)
    return llama, LanguageModel(model, byte_tokenizer(), "tiny")


def tokens_of(llama: Any, prompt: list[int], call: Any, **settings: Any) -> list[int]:
    """The ids that a completion added and llama.cpp read (it adds more where a character is unfinished)."""
    call(prompt, max_tokens=NEW, temperature=0.0, **settings)
    return [int(i) for i in llama._input_ids[len(prompt) :]][: NEW - 1]


@installed
@pytest.mark.parametrize("control", ["fudge", "nullspace", "pplm", "self_debias"])
def test_llama_cpp_gives_the_guards_tokens(tiny: tuple[Any, Any], control: str) -> None:
    llama, lm = tiny
    guard = mg.Guard(mg.Policy(controls=[CONTROLS[control]()]), lm)
    served = LlamaGuard(guard, llama)
    for prompt in PROMPTS:
        expected = guard.generate([prompt], max_new_tokens=NEW, do_sample=False).token_ids[0]
        found = tokens_of(llama, prompt, served.create_completion)
        assert found == expected[: NEW - 1]
        biased = tokens_of(llama, prompt, served.create_completion, logit_bias={201: 0.0})
        assert biased == found, "logit_bias makes llama-cpp-python forget processors"


@installed
def test_llama_cpp_ends_a_completion_that_fails(tiny: tuple[Any, Any]) -> None:
    llama, lm = tiny
    served = LlamaGuard(mg.Guard(mg.Policy(controls=[Failing()]), lm), llama)
    with pytest.raises(ControlError, match="out of order"):
        served.create_completion(PROMPTS[0], max_tokens=NEW, temperature=0.0)
    with pytest.raises(ControlError, match="out of order"):
        list(served.create_completion(PROMPTS[0], max_tokens=NEW, temperature=0.0, stream=True))
    with pytest.raises(ControlError, match="out of order"):
        served.create_chat_completion([{"role": "user", "content": "a"}], max_tokens=NEW, temperature=0.0)
    opened = LlamaGuard(mg.Guard(mg.Policy(controls=[Failing()], on_error="open"), lm), llama)
    assert opened.create_completion(PROMPTS[0], max_tokens=NEW, temperature=0.0)["usage"]["completion_tokens"] == NEW


@installed
def test_the_example_runs(tmp_path: Path) -> None:
    """The guard's own passes here run on what transformers reads from the same GGUF file."""
    write_gguf(tmp_path / "tiny.gguf")
    done = subprocess.run([sys.executable, EXAMPLE, str(tmp_path / "tiny.gguf")], capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert b"guarded, chat:" in done.stdout
    assert b"'rows_guarded'" in done.stdout
