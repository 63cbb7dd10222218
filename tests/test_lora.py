"""LoRA adapters as experts: hooks of our own give what PEFT's merged model gives, and leave the model alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from odd_models import PROMPTS, left_padded
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, gpt2, llama

import moralguard as mg
from moralguard.controls import DExperts, NullspaceProjection, Prompt, SelfDebias
from moralguard.errors import ModelError

NEW = 5
CLOSE = 1e-5
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],  # Conv1D: weights are [in, out]
    "gpt_neox": ["query_key_value"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj"],
}

Adapter = Callable[..., tuple[Path, Any]]


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    """(folder, merged model) of a random adapter of ``model``, both made by PEFT from copies."""

    def make(model: Any, family: str, seed: int = 1, **config: Any) -> tuple[Path, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            settings = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[family], "fan_in_fan_out": family == "gpt2"} | config
            wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **settings))
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.data = 0.4 * torch.randn_like(parameter)
        folder = tmp_path / f"{family}-{seed}-{len(list(tmp_path.iterdir()))}"
        wrapped.save_pretrained(folder)
        return folder, wrapped.eval().merge_and_unload()

    return make


def guard_of(model: Any, *controls: Any) -> mg.Guard:
    return mg.Guard(mg.Policy(controls=list(controls)), (model, None))


def scores(guard: mg.Guard, **settings: Any) -> torch.Tensor:
    """Probabilities f32[steps, R, V] under attach."""
    arguments = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_scores": True} | settings
    with guard.attach() as model:
        return torch.softmax(torch.stack(model.generate(**left_padded(PROMPTS), **arguments).scores), -1)


def hooks(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", TARGETS)
def test_adapter_is_peft_merged_model(family: str, mode: dict[str, Any], adapter: Adapter) -> None:
    model = FAMILIES[family]()
    names, weights = list(model.state_dict()), copy.deepcopy(model.state_dict())
    folder, merged = adapter(model, family)
    found = scores(guard_of(model, DExperts(expert=str(folder), alpha=1.5, filter_p=1.0)), **mode)
    expected = scores(guard_of(FAMILIES[family](), DExperts(expert=merged, alpha=1.5, filter_p=1.0)), **mode)
    base = scores(guard_of(FAMILIES[family]()), **mode)
    assert float((found - expected).abs().max()) < CLOSE
    assert float((found - base).abs().max()) > 0.01, "the adapter does nothing: this test would always pass"
    assert hooks(model) == 0
    assert list(model.state_dict()) == names, "no module was injected"
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in names)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_expert_and_anti_expert(family: str, adapter: Adapter) -> None:
    """Two adapters ride one forward with the base and with a prefix; each row goes through its own."""
    model = FAMILIES[family]()
    (plus, plus_model), (minus, minus_model) = adapter(model, family, seed=1), adapter(model, family, seed=2)
    beside = [SelfDebias(prefixes=[[9, 8]]), NullspaceProjection(basis=torch.eye(32)[:, :2])]

    def texts(one: Any, other: Any) -> list[list[int]]:
        guard = guard_of(model, DExperts(expert=one, anti_expert=other, alpha=1.0, filter_p=1.0), *beside)
        return guard.generate([list(p) for p in PROMPTS], max_new_tokens=12, seed=1, do_sample=True).token_ids

    assert texts(plus, minus) == texts(plus_model, minus_model)
    assert texts(minus, plus) == texts(minus_model, plus_model)
    assert texts(plus, minus) != texts(minus, plus)
    assert hooks(model) == 0


def test_anti_expert_alone_beside_a_prompt(adapter: Adapter) -> None:
    model = llama()
    folder, merged = adapter(model, "llama")
    found = scores(guard_of(model, DExperts(expert=Prompt([5, 6]), anti_expert=folder, alpha=1.0, filter_p=1.0)))
    expected = scores(guard_of(model, DExperts(expert=Prompt([5, 6]), anti_expert=merged, alpha=1.0, filter_p=1.0)))
    assert float((found - expected).abs().max()) < CLOSE


@pytest.mark.parametrize("config", [{"use_rslora": True}, {"r": 1}, {"lora_alpha": 64}, {"target_modules": ["up_proj"]}], ids=str)
def test_adapter_settings(config: dict[str, Any], adapter: Adapter) -> None:
    model = llama()
    folder, merged = adapter(model, "llama", **config)
    found = scores(guard_of(model, DExperts(expert=folder, alpha=1.0, filter_p=1.0)))
    expected = scores(guard_of(model, DExperts(expert=merged, alpha=1.0, filter_p=1.0)))
    assert float((found - expected).abs().max()) < CLOSE


def test_adapter_in_half_precision_weights(adapter: Adapter) -> None:
    """The adapter takes the model's dtype."""
    model = llama()
    folder, _ = adapter(model, "llama")
    guard = guard_of(model.to(torch.bfloat16), DExperts(expert=folder, alpha=1.0))
    assert len(guard.generate([[1, 2, 3]], max_new_tokens=3).token_ids[0]) == 3


def test_two_threads_with_different_adapters(adapter: Adapter) -> None:
    """Hooks of one thread leave the other's passes alone."""
    model = llama()
    guards = [guard_of(model, DExperts(expert=adapter(model, "llama", seed=seed)[0], alpha=1.5)) for seed in (1, 2)]

    def run(index: int) -> list[list[int]]:
        return guards[index % 2].generate([list(p) for p in PROMPTS], max_new_tokens=12, seed=index, do_sample=True).token_ids

    expected = [run(i) for i in range(8)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(8))) == expected
    assert hooks(model) == 0


def test_hooks_are_gone_after_a_failed_forward(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    guard = guard_of(model, DExperts(expert=adapter(model, "llama")[0], alpha=1.5))
    monkeypatch.setattr(model.model.norm, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        guard.generate([[1, 2]], max_new_tokens=2)
    assert hooks(model) == 0


# --- Adapters that don't fit ----------------------------------------------------------------------------------------------------


def refusal(model: Any, folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        guard_of(model, DExperts(expert=folder))
    assert hooks(model) == 0
    return str(caught.value)


def test_adapter_of_another_architecture(adapter: Adapter) -> None:
    message = refusal(llama(), adapter(gpt2(), "gpt2")[0])
    assert "another model" in message


def test_adapter_of_another_width(adapter: Adapter, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, _ = adapter(llama(), "llama", target_modules=["q_proj"])
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: (v[:, :-8].clone() if "lora_A" in k else v) for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    message = refusal(llama(), folder)
    assert "24" in message
    assert "32" in message


def test_adapter_with_more_layers(adapter: Adapter) -> None:
    assert "layers.2" in refusal(llama(layers=2), adapter(llama(layers=4), "llama")[0])


def test_adapter_turned_around(adapter: Adapter) -> None:
    """A maps from the module's input, B to its output: the other way round is another model's, even if the numbers are the same."""
    from safetensors.torch import load_file, save_file

    folder, _ = adapter(llama(), "llama", target_modules=["down_proj"])
    tensors = load_file(folder / "adapter_model.safetensors")
    swapped = {
        name: tensors[name.replace("lora_A", "x").replace("lora_B", "lora_A").replace("x", "lora_B")].T.contiguous() for name in tensors
    }
    save_file(swapped, folder / "adapter_model.safetensors")
    assert "down_proj" in refusal(llama(), folder)


NOT_PLAIN = [
    {"peft_type": "LOHA"},
    {"use_dora": True},
    {"bias": "all"},
    {"rank_pattern": {"q_proj": 8}},
    {"modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("change", NOT_PLAIN, ids=str)
def test_adapter_that_is_not_plain_lora(change: dict[str, Any], adapter: Adapter) -> None:
    folder, _ = adapter(llama(), "llama")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    message = refusal(llama(), folder)
    assert "plain LoRA" in message
    assert str(next(iter(change))) in message or str(next(iter(change.values()))) in message, "names what is unsupported"


def test_adapter_of_the_embeddings(adapter: Adapter) -> None:
    """PEFT stores those in another form; the message doesn't put it down to another model."""
    message = refusal(llama(), adapter(llama(), "llama", target_modules=["embed_tokens"])[0])
    assert "embed_tokens" in message
    assert "doesn't have" not in message


def test_adapter_without_weights(adapter: Adapter) -> None:
    folder, _ = adapter(llama(), "llama")
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refusal(llama(), folder)


def test_adapter_with_a_broken_card(adapter: Adapter) -> None:
    folder, _ = adapter(llama(), "llama")
    (folder / "adapter_config.json").write_text("{not json")
    assert "adapter_config.json" in refusal(llama(), folder)


def test_adapter_with_broken_weights(adapter: Adapter) -> None:
    folder, _ = adapter(llama(), "llama")
    (folder / "adapter_model.safetensors").write_bytes(b"not safetensors")
    assert "adapter_model.safetensors" in refusal(llama(), folder)
