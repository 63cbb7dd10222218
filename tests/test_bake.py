"""A nullspace projection as weights, against the guard that does the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from odd_models import basis, byte_llama, byte_tokenizer
from tiny_models import gpt2, llama
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.cli import app
from moralguard.controls import NullspaceProjection, SelfDebias
from moralguard.errors import ModelError, PolicyError
from moralguard.export.bake import bake

PROMPTS = torch.tensor([[5, 17, 3], [101, 44, 9]])


def policy(**more: Any) -> mg.Policy:
    return mg.Policy(controls=[NullspaceProjection(basis=basis(), **more)])


def laws(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPTS).logits[:, -1].softmax(-1)


def guarded(model: Any, keep: float) -> torch.Tensor:
    guard = mg.Guard(policy(keep=keep), (model, None))
    with guard.attach():
        found = model.generate(PROMPTS, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_scores=True)
    return found.scores[0].softmax(-1)


@pytest.mark.parametrize("keep", [0.0, 0.25])
@pytest.mark.parametrize("factory", [llama, gpt2], ids=["untied", "tied"])
def test_a_baked_checkpoint_gives_the_guards_law(factory: Any, keep: float, tmp_path: Path) -> None:
    model = factory()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = guarded(model, keep)
    assert not torch.allclose(wanted, laws(model), atol=1e-3)
    folder = bake(LanguageModel(model, None), policy(keep=keep), tmp_path / "baked")
    baked = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(laws(baked), wanted, atol=1e-5)
    assert torch.equal(baked.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert baked.config.tie_word_embeddings is False


@pytest.mark.parametrize("factory", [llama, gpt2], ids=["untied", "tied"])
def test_the_adapter_is_one_that_peft_reads(factory: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = factory()
    wanted = guarded(model, 0.25)
    folder = bake(LanguageModel(model, None), policy(keep=0.25), tmp_path / "lora", "lora")
    adapted = peft.PeftModel.from_pretrained(factory(), str(folder))
    assert torch.allclose(laws(adapted), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (mg.Policy(controls=[SelfDebias(prefixes=[[3]])]), "has self-debias"),
        (mg.Policy(controls=[NullspaceProjection(basis=basis())], gate={"first_tokens": 3}), "has a gate"),
        (mg.Policy(controls=[]), "removes nothing"),
        (policy(keep=1.0), "removes nothing"),
        (policy(adaptive=True, direction=basis()[:, 0]), "adaptive: false"),
        (mg.Policy(controls=[NullspaceProjection(basis=(basis(), basis(), basis()[:, 0]))]), "moves the mean"),
        (mg.Policy(controls=[NullspaceProjection(basis=basis()), NullspaceProjection(basis=basis(seed=1))]), "2 projections"),
    ],
)
def test_policies_that_cannot_be_baked(made: mg.Policy, message: str, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=message):
        bake(LanguageModel(llama(), None), made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("mine")
    with pytest.raises(ModelError, match="isn't empty"):
        bake(LanguageModel(llama(), None), policy(), tmp_path)
    with pytest.raises(ModelError, match="expected checkpoint or lora"):
        bake(LanguageModel(llama(), None), policy(), tmp_path / "out", "both")  # type: ignore[arg-type]


def test_from_the_command_line(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = byte_llama()
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    save_file({"basis": basis(width=model.config.hidden_size).contiguous()}, tmp_path / "basis.safetensors")
    (tmp_path / "policy.yaml").write_text(f"controls:\n  - {{control: nullspace@1, basis: {tmp_path / 'basis.safetensors'}}}\n")
    arguments = ["bake", str(tmp_path / "model"), str(tmp_path / "out"), "--policy", str(tmp_path / "policy.yaml")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert mg.Guard({"controls": []}, tmp_path / "out").generate("abc", max_new_tokens=2).texts
    assert CliRunner().invoke(app, arguments).exit_code != 0, "the folder is no longer empty"
