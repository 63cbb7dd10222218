"""Exported graphs against the models that they came from, what can't be exported, and what the command writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from odd_models import BYTE_VOCAB, SHAPE, byte_tokenizer, gemma2, left_padded
from tiny_models import VOCAB, gpt2, gpt_neox, llama, qwen2
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from typer.testing import CliRunner

from moralguard.backends.hf import LanguageModel
from moralguard.backends.lora import LoraAdapter, apply_adapters
from moralguard.cli import app
from moralguard.errors import ModelError
from moralguard.export.comparison import check, compare
from moralguard.export.decoder import FlatDecoder
from moralguard.export.folder import Export, export_model
from moralguard.export.merged import merge_adapter

PROMPTS = [[5, 17, 3, 101, 44], [7], [150, 2, 9]]
NEW = 8


def opt() -> Any:
    """Learned positions from the mask, and a head narrower than the layers."""
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16, init_std=0.25
    )
    return _seeded(OPTForCausalLM, config)


def bloom() -> Any:
    """ALiBi: no positions at all."""
    return _seeded(BloomForCausalLM, BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.25))


def qwen3() -> Any:
    """Norms on queries and keys, heads wider than the model."""
    return _seeded(Qwen3ForCausalLM, Qwen3Config(**SHAPE, vocab_size=VOCAB, head_dim=16))


def mixtral() -> Any:
    """Two experts of four for every token."""
    return _seeded(MixtralForCausalLM, MixtralConfig(**SHAPE, vocab_size=VOCAB, num_local_experts=4, num_experts_per_tok=2))


def _seeded(model_class: Any, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


MODELS = {"llama": llama, "gpt2": gpt2, "qwen3": qwen3, "gemma2": gemma2, "opt": opt, "bloom": bloom, "mixtral": mixtral}
OPTIONS = {"gpt_neox": (gpt_neox, {"logits": "all"}), "qwen2": (qwen2, {"dtype": "float16", "opset": 18})}


@pytest.fixture(scope="module", params=[*MODELS, *OPTIONS])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Export]:
    make, options = OPTIONS.get(request.param) or (MODELS[request.param], {})
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config._attn_implementation
    torch.set_num_threads(1)
    done = export_model(LanguageModel(model, None, request.param), tmp_path_factory.mktemp("export") / request.param, **options)
    assert model.config._attn_implementation == before[1]
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return model, done


def card(done: Export) -> dict[str, Any]:
    return json.loads((done.folder / "moralguard.json").read_text())


def decode(folder: Path, prompts: list[list[int]], steps: int) -> tuple[list[list[int]], np.ndarray, np.ndarray]:
    """(greedy tokens, last step's logits f32[R, V], last step's hidden states f32[R, d]) of onnxruntime alone."""
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    width = max(map(len, prompts))
    ids = np.array([[0] * (width - len(row)) + row for row in prompts], np.int64)
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in prompts], np.int64)
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    past = {
        entry.name: np.zeros((len(prompts), entry.shape[1], 0, entry.shape[3]), kinds[entry.type])
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values.")
    }
    tokens: list[list[int]] = [[] for _ in prompts]
    for _ in range(steps):
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        outputs = session.run(None, {name: feeds[name] for name in names})
        found = dict(zip([entry.name for entry in session.get_outputs()], outputs, strict=True))
        past = {name: found[name.replace("past_key_values.", "present.")] for name in past}
        logits = found["logits"][:, -1].astype(np.float32)
        ids = logits.argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones((len(prompts), 1), np.int64)], 1)
        for row, token in zip(tokens, ids[:, 0].tolist(), strict=True):
            row.append(token)
    return tokens, logits, found["last_hidden_state"][:, -1].astype(np.float32)


def test_greedy_tokens_are_those_of_generate(exported: tuple[Any, Export]) -> None:
    model, done = exported
    if card(done)["dtype"] == "float16":
        pytest.skip("rounding decides between near tokens")
    inputs = left_padded(PROMPTS)
    theirs = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert decode(done.folder, PROMPTS, NEW)[0] == theirs.tolist()


def test_the_hidden_state_is_the_heads_input(exported: tuple[Any, Export]) -> None:
    model, done = exported
    _, logits, hidden = decode(done.folder, PROMPTS, 2)
    head = model.get_output_embeddings()
    with torch.no_grad():
        raw = head(torch.from_numpy(hidden)).float()
        cap = getattr(model.config, "final_logit_softcapping", None)
        raw = raw if cap is None else cap * torch.tanh(raw / cap)
    largest = np.abs(logits).max()
    assert np.abs(raw.numpy() - logits).max() < (1e-4 if card(done)["dtype"] == "float32" else 1e-2 * largest)


def test_the_card_says_which_model_it_is(exported: tuple[Any, Export]) -> None:
    model, done = exported
    found = card(done)
    assert found["fingerprint"] == LanguageModel(model, None).fingerprint
    assert found["tokenizer_hash"] is None
    assert found["adapter"] is None
    assert found["difference"]["logits"] == done.difference.logits
    assert done.difference.logits < (1e-4 if found["dtype"] == "float32" else 1e-2 * done.difference.largest_logit)
    assert json.loads((done.folder / "config.json").read_text())["dtype"] == found["dtype"]
    assert {path.name for path in done.folder.iterdir()} == {
        *("model.onnx", "model.onnx.data", "moralguard.json", "config.json", "generation_config.json")
    }


def test_logits_of_every_position_where_asked_for(exported: tuple[Any, Export]) -> None:
    _, done = exported
    session = onnxruntime.InferenceSession(str(done.folder / "model.onnx"), providers=["CPUExecutionProvider"])
    logits, hidden = session.get_outputs()[:2]
    every = card(done)["logits"] == "all"
    assert (logits.name, hidden.name) == ("logits", "last_hidden_state")
    # OPT, BLOOM and the rest all take logits_to_keep; one position is the default
    assert every == (logits.shape[1] != 1)
    assert logits.shape[2] == VOCAB
    assert [entry.name for entry in session.get_inputs()[:2]] == ["input_ids", "attention_mask"]


def test_another_models_graph_is_told(exported: tuple[Any, Export]) -> None:
    """The check on the spot would see a wrong weight."""
    model, done = exported
    decoder = FlatDecoder(model, card(done)["logits"]).eval()
    names = decoder.names(model.config.get_text_config().num_hidden_layers)
    kind = {"float32": torch.float32, "float16": torch.float16}[card(done)["dtype"]]
    check(compare(done.folder / "model.onnx", decoder, names, seed=1), kind, "it")
    weight = next(module for name, module in model.named_modules() if name.endswith(("o_proj", "c_proj", "out_proj", "dense"))).weight
    kept = weight.data.clone()
    try:
        weight.data[0, ::3] += 1.0  # not the same for all outputs, which a layer norm would take out again
        with pytest.raises(ModelError, match="isn't the model: with left padding and a cache its logits differ by"):
            check(compare(done.folder / "model.onnx", decoder, names), kind, "it")
    finally:
        weight.data.copy_(kept)


def test_the_guard_loads_it_as_the_model_it_came_from(exported: tuple[Any, Export]) -> None:
    from moralguard.backends.onnx.load import load_onnx

    model, done = exported
    lm, reference = load_onnx(done.folder), LanguageModel(model, None)
    assert (lm.fingerprint, lm.vocab_size, lm.width) == (reference.fingerprint, reference.vocab_size, reference.head.weight.shape[1])
    ids = np.array([[5, 17, 3, 101]])
    found = lm.forward(cache=lm.new_cache(), input_ids=ids, hidden=True, states=True)
    expected = reference.forward(cache=reference.new_cache(), input_ids=torch.from_numpy(ids), hidden=True)
    tolerance = 1e-4 if card(done)["dtype"] == "float32" else 0.1
    assert np.abs(found.logits - expected.logits.detach().numpy()).max() < tolerance
    assert np.abs(found.hidden - expected.hidden.detach().numpy()).max() < tolerance
    assert found.states.shape == (1, 4, lm.width)


def random_adapter(model: Any, names: list[str], seed: int = 1) -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for name in names:
        module = model.get_submodule(name)
        rows, columns = module.weight.shape
        if type(module).__name__ == "Conv1D":
            rows, columns = columns, rows
        a, b = torch.randn(3, columns, generator=generator), torch.randn(rows, 3, generator=generator)
        weights.append((module, 0.4 * a, 0.4 * b, 0.7))
    return LoraAdapter("random", tuple(weights))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (llama(), ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]),
        (gpt2(), ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"]),
        (qwen2(), ["model.layers.0.self_attn.v_proj", "lm_head"]),  # the head's weight is the embeddings'
    ],
    ids=["llama", "gpt2", "qwen2-tied-head"],
)
def test_a_merged_adapter_is_the_adapter_as_hooks(model: Any, names: list[str]) -> None:
    lm = LanguageModel(model, None)
    fingerprint, adapter = lm.fingerprint, random_adapter(model, names)
    merged = merge_adapter(lm, adapter)
    inputs = left_padded(PROMPTS)
    with torch.no_grad():
        with apply_adapters([adapter] * len(PROMPTS)):
            hooked = model(**inputs).logits
        assert torch.allclose(merged(**inputs).logits, hooked, atol=1e-5)
        assert not torch.allclose(model(**inputs).logits, hooked, atol=1e-2)
    assert LanguageModel(model, None).fingerprint == fingerprint
    assert LanguageModel(merged, None).fingerprint != fingerprint


def save_adapter(model: Any, folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter)
    wrapped.save_pretrained(folder)
    return folder


def test_the_command_writes_an_expert_with_its_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = llama(vocab=BYTE_VOCAB), byte_tokenizer()
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    adapter = save_adapter(llama(vocab=BYTE_VOCAB), tmp_path / "adapter")
    arguments = ["export", str(tmp_path / "source"), str(tmp_path / "deep" / "out"), "--adapter", str(adapter)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "logits within" in done.output
    found = json.loads((tmp_path / "deep" / "out" / "moralguard.json").read_text())
    source = LanguageModel(model, tokenizer)
    assert found["adapter"] == {"name": "adapter", "base_fingerprint": source.fingerprint}
    assert found["source"] == "source"
    assert found["tokenizer_hash"] == source.tokenizer_hash
    assert found["fingerprint"] != source.fingerprint
    assert (tmp_path / "deep" / "out" / "tokenizer.json").is_file()
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "deep" / "out").glob("*.json"))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, ModelError)
    assert "is there already" in str(again.exception)


def mamba() -> Any:
    return MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()


def dynamic_rope() -> Any:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=VOCAB, rope_parameters=rope)).eval()


class Branching(LlamaForCausalLM):
    """A forward pass that looks at its data, which no graph can follow."""

    def forward(self, input_ids: torch.Tensor, **arguments: Any) -> Any:
        if int(input_ids.sum()) % 2:
            return super().forward(input_ids=input_ids + 0, **arguments)
        return super().forward(input_ids=input_ids, **arguments)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (mamba, {}, r"MambaForCausalLM\) can't be exported: its layers \(linear_attention\) keep more than keys and values"),
        (dynamic_rope, {}, "rotary positions are of type dynamic, whose angles change with the length"),
        (lambda: Branching(llama().config).eval(), {}, r"Branching\) can't be exported: PyTorch can't trace it .*: GuardOnDataDependent"),
        (llama, {"dtype": "int4"}, "dtype 'int4' can't be exported; expected one of float32, float16"),
        (llama, {"opset": 9}, "opset 9 can't be exported; expected one from 18 to 23"),
        (llama, {"logits": "some"}, "expected last or all"),
        (llama, {"adapter": "nowhere"}, "'nowhere' isn't an adapter; expected pack:NAME"),
        (llama, {"adapter": "pack:smollm2-135m/toxic"}, "was fitted on smollm2-135m, which isn't tiny"),
        (llama, {"adapter": "pack:smollm2-135m/offence-head"}, "is a pack of kind 'prefix-head'; expected one of kind 'lora-expert'"),
    ],
    ids=["recurrent", "dynamic-rope", "branch", "dtype", "opset", "logits", "no-adapter", "other-model", "other-kind"],
)
def test_what_cannot_be_exported_says_why(make: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        export_model(LanguageModel(make(), None, "tiny"), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []
