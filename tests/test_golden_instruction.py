"""In-context value instructions against their formula in float64 NumPy: z + w (z_instructed - z)."""

from __future__ import annotations

import doctest

import control_runs
import numpy as np
import oracles
import pytest
import tiny_models
import torch
from odd_models import byte_llama, byte_tokenizer
from oracles import TOLERANCE, Reference, check_greedy, distance, run_attached
from scipy.special import log_softmax

import moralguard as mg
from moralguard.controls import Instruction, instruction
from moralguard.controls.instruction import instruction_of
from moralguard.controls.registry import read_control, write_control
from moralguard.errors import PolicyError
from moralguard.values import Value

RAGGED = [[8], [5, 9, 20, 7, 33, 41, 2], [100, 3, 77]]
TOLD = (60, 61, 62, 9)
VALUES = (
    Value(id="kind", statement="The text does not insult anyone."),
    Value(id="safe", statement="The text threatens nobody.", priority=2),
)


@pytest.fixture(autouse=True)
def _one_thread():
    with oracles.one_thread():
        yield


def guard_of(model, *controls):
    return mg.Guard(mg.Policy(controls=list(controls)), (model, None))


def instructed(base, *, w=1.0, told=TOLD):
    """The law of the text so far, and of the text behind the instruction, in one."""

    def law(ids):
        z, z_instructed = base.logits(ids).numpy(), base.logits([*told, *ids]).numpy()
        return torch.from_numpy(log_softmax(z + w * (z_instructed - z)))

    return law


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("w", [0.4, 1.0, 2.5])
def test_the_law(family, w):
    model = tiny_models.FAMILIES[family](0)
    check_greedy(guard_of(model, Instruction(text=TOLD, w=w)), model, instructed(Reference(model), w=w), RAGGED)


def test_at_weight_1_it_is_the_model_that_was_told():
    model = tiny_models.llama(0)
    base = Reference(model)
    check_greedy(guard_of(model, Instruction(text=TOLD)), model, lambda ids: base.log_law([*TOLD, *ids]), RAGGED)


@pytest.mark.parametrize("mistake", [{"w": 1.1}, {"told": TOLD[:-1]}, {"w": 0.0}], ids=["w", "text", "nothing told"])
def test_a_wrong_oracle_disagrees(mistake):
    model = tiny_models.llama(0)
    run = run_attached(guard_of(model, Instruction(text=TOLD)), model, RAGGED)
    assert distance(run, instructed(Reference(model), **mistake), RAGGED) > 10 * TOLERANCE


CONTROLS = {"plain": lambda numpy: Instruction(text=TOLD), "stronger": lambda numpy: Instruction(text=TOLD, w=1.8)}


@pytest.mark.parametrize("settings", CONTROLS.values(), ids=CONTROLS)
class TestEverywhere(control_runs.OnEveryPath):
    """``CONTROLS`` along every path."""


def test_a_removed_token_stays_removed():
    base = torch.zeros(1, tiny_models.VOCAB)
    base[0, 3] = -np.inf
    guarded = guard_of(tiny_models.llama(0), Instruction(text=TOLD, w=2.0)).logits_processor()(torch.tensor([[1, 2]]), base)
    assert np.isneginf(guarded[0, 3])
    assert torch.isfinite(guarded[0]).sum() == tiny_models.VOCAB - 1


class TestDerivedText:
    def test_values_are_stated_by_priority(self):
        assert instruction_of(VALUES) == (
            "Write a text that keeps these principles, the first before the others where they conflict:\n"
            "1. The text threatens nobody.\n2. The text does not insult anyone.\n\n"
        )

    def test_the_example_in_the_docstring(self):
        assert doctest.testmod(instruction).failed == 0
        assert doctest.testmod(instruction).attempted == 1

    def test_it_acts_like_the_same_text_given(self):
        model, prompts = (byte_llama(), byte_tokenizer()), ["I say", "no one"]
        derived = mg.Guard(mg.Policy(values=VALUES[:1], controls=[Instruction()]), model)
        given = mg.Guard(mg.Policy(controls=[Instruction(text=instruction_of(VALUES[:1]))]), model)
        plain = mg.Guard(mg.Policy(controls=[]), model)
        texts = [guard.generate(prompts, max_new_tokens=6).token_ids for guard in (derived, given, plain)]
        assert texts[0] == texts[1] != texts[2]

    def test_in_a_chat_it_stands_inside_the_first_turn(self):
        template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
        model = (byte_llama(), byte_tokenizer(template))
        guard = mg.Guard(mg.Policy(controls=[Instruction(text="Be kind.")]), model)
        chat = [{"role": "user", "content": "Hi"}]
        mine = guard.generate([chat], max_new_tokens=6).token_ids
        told = mg.Guard(mg.Policy(controls=[]), model).generate("<user>Be kind.Hi</><me>", max_new_tokens=6).token_ids
        assert mine == told


def test_policy_data():
    data = {"control": "instruction@1", "text": "Be kind.\n", "w": 1.5}
    assert write_control(read_control(data)) == data
    assert read_control({"control": "instruction"}).scaled(2).w == 2.0


BAD = {
    "nothing to tell": (Instruction(), (tiny_models.llama, None), "names no value to derive one from"),
    "no tokenizer": (Instruction(text="Be kind."), (tiny_models.llama, None), "was given without a tokenizer"),
    "ids outside the vocabulary": (Instruction(text=(5, 1000)), (tiny_models.llama, None), "token id 1000, outside the vocabulary"),
    "nothing told": (Instruction(text=""), (byte_llama, byte_tokenizer), "an empty Prompt is the base itself"),
}


@pytest.mark.parametrize(("control", "model", "message"), BAD.values(), ids=BAD)
def test_bad_settings_are_told_when_the_guard_is_built(control, model, message):
    build, tokenizer = model
    with pytest.raises(PolicyError, match=message):
        mg.Guard(mg.Policy(controls=[control]), (build(), None if tokenizer is None else tokenizer()))


def test_a_negative_weight_is_refused():
    with pytest.raises(PolicyError, match="greater than or equal to 0"):
        Instruction(text="x", w=-1)


@pytest.mark.smollm
def test_the_demo_model_is_told_in_its_own_system_turn():
    lm = mg.load_model("smollm2-135m")
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": "Greet me."}]
    told = [{"role": "system", "content": "Answer in capital letters.\n"}, chat[1]]
    guard = mg.Guard(mg.Policy(controls=[Instruction(text="Answer in capital letters.\n")]), lm)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert guard.generate([chat], **settings).token_ids == mg.Guard(mg.Policy(controls=[]), lm).generate([told], **settings).token_ids
