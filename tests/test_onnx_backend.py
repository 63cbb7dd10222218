"""ONNX models against the PyTorch models of the same weights: every form of graph, the cache's operations, surgery, bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphs
import pytest
import torch
import transformers
from onnx import helper

from moralguard.backends import kv_cache
from moralguard.backends.capabilities import Capabilities
from moralguard.backends.hf import LanguageModel
from moralguard.backends.onnx import surgery
from moralguard.backends.onnx.load import is_onnx_source, load_onnx
from moralguard.backends.onnx.model import OnnxLanguageModel
from moralguard.backends.onnx.tokenizer import load_tokenizer
from moralguard.errors import ModelError, PromptError

VOCAB = 199


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Edited graphs go into a folder of the tests' own."""
    before = os.environ.get("MORALGUARD_CACHE")
    os.environ["MORALGUARD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["MORALGUARD_CACHE"]
    else:
        os.environ["MORALGUARD_CACHE"] = before


@pytest.fixture(scope="session")
def torch_model() -> Any:
    return onnx_graphs.llama()


@pytest.fixture(scope="session")
def reference(torch_model) -> LanguageModel:
    return LanguageModel(torch_model)


@pytest.fixture(scope="session")
def plain(torch_model, tmp_path_factory) -> Path:
    return onnx_graphs.plain(torch_model, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def external(plain, tmp_path_factory) -> Path:
    """The plain graph with its weights beside it."""
    target = tmp_path_factory.mktemp("external") / "model.onnx"
    onnx.save(onnx.load(plain), target, save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    return target


@pytest.fixture(scope="session")
def built(torch_model, tmp_path_factory) -> Path:
    pytest.importorskip("onnxruntime_genai")
    return onnx_graphs.genai(torch_model, tmp_path_factory.mktemp("genai"), include_hidden_states="true")


class Pair:
    """One batch on both models, pass by pass; every comparison is over what isn't padding."""

    def __init__(self, lm: OnnxLanguageModel, reference: LanguageModel, seed: int = 0, tolerance: float = 1e-4):
        self.lm, self.reference, self.tolerance = lm, reference, tolerance
        self.random = np.random.default_rng(seed)
        self.cache, self.other = lm.new_cache(), reference.new_cache()
        self.mask = np.zeros((0, 0), np.int64)

    def read(self, ids: np.ndarray, mask: np.ndarray, hidden: bool = True) -> Any:
        self.mask = mask
        tokens = ids.shape[1]
        positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, -tokens:]
        mine = self.lm.forward(cache=self.cache, input_ids=ids, attention_mask=mask, position_ids=positions, hidden=hidden, states=hidden)
        with torch.no_grad():
            theirs = self.reference.forward(
                cache=self.other,
                input_ids=torch.from_numpy(np.ascontiguousarray(ids)),
                attention_mask=torch.from_numpy(mask),
                position_ids=torch.from_numpy(positions),
                hidden=True,
                states=True,
            )
        seen = mask[:, -tokens:].astype(bool)
        self.near(mine.logits, theirs.logits)
        if hidden:
            self.near(mine.hidden, theirs.hidden)
            self.near(mine.head_logits, theirs.head_logits)
            self.near(mine.states[seen], theirs.states[seen])
            assert mine.states.shape == theirs.states.shape
        else:
            assert mine.hidden is None
            assert mine.states is None
        assert mine.logits.dtype == np.float32
        assert self.cache.length == mask.shape[1]
        assert self.cache.rows == len(mask)
        return mine

    def near(self, mine: np.ndarray, theirs: torch.Tensor) -> None:
        assert np.abs(mine - theirs.numpy()).max() < self.tolerance

    def prompt(self, padding: tuple[int, ...] = (3, 0, 1), width: int = 7, hidden: bool = True) -> None:
        mask = np.ones((len(padding), width), np.int64)
        for row, count in enumerate(padding):
            mask[row, :count] = 0
        self.read(self.random.integers(0, VOCAB, mask.shape), mask, hidden)

    def append(self, tokens: int = 1, hidden: bool = True) -> None:
        ids = self.random.integers(0, VOCAB, (len(self.mask), tokens))
        self.read(ids, np.concatenate([self.mask, np.ones_like(ids)], 1), hidden)

    def select(self, rows: list[int]) -> None:
        index = np.asarray(rows)
        self.cache.select_rows(index)
        kv_cache.select_rows(self.other, torch.from_numpy(index))
        self.mask = self.mask[index]

    def drop_newest(self, tokens: int) -> None:
        self.cache.drop_newest(tokens)
        kv_cache.drop_newest(self.other, tokens)
        self.mask = self.mask[:, : self.mask.shape[1] - tokens]

    def drop_padding(self) -> None:
        unused = int((self.mask.sum(0) == 0).sum())
        self.cache.drop_oldest(unused)
        kv_cache.drop_oldest(self.other, unused)
        self.mask = self.mask[:, unused:]

    def compare_caches(self) -> None:
        seen = self.mask.astype(bool)[:, None, :, None]
        for mine, theirs in zip(self.cache.key_values(), kv_cache.key_values(self.other), strict=True):
            for one, other in zip(mine, theirs, strict=True):
                assert one.shape == tuple(other.shape)
                self.near(np.asarray(one, np.float32) * seen, other * torch.from_numpy(seen))

    def whole_story(self) -> None:
        """Left padding, steps, reordering with a fork, cutting back, several tokens on a cache, dropped padding."""
        self.prompt()
        self.append()
        self.append()
        self.select([2, 0, 0, 1])
        self.append()
        self.drop_newest(2)
        self.append(3)
        self.compare_caches()
        self.select([1, 0])
        self.drop_padding()
        self.compare_caches()
        self.append(hidden=False)
        self.drop_newest(1)
        self.append()
        self.select([1])
        self.drop_padding()
        self.append(4)


@pytest.fixture(scope="session")
def exported(torch_model, tmp_path_factory) -> Path:
    pytest.importorskip("transformers.exporters")
    return onnx_graphs.exporters(torch_model, tmp_path_factory.mktemp("exporters"))


@pytest.mark.parametrize("form", ["plain", "external", "without hidden", "nameless", "merged", "tied", "gemm", "last"])
def test_the_same_numbers_as_pytorch(plain, external, reference, tmp_path, form):
    given = {"plain": plain, "external": external}
    made = {"without hidden": onnx_graphs.without_hidden, "nameless": onnx_graphs.nameless, "merged": onnx_graphs.merged}
    if form in given:
        source = given[form]
    elif form in made:
        source = made[form](plain, tmp_path)
    else:
        source = onnx_graphs.with_head(plain, tmp_path, form)
    lm = load_onnx(source.parent)
    Pair(lm, reference).whole_story()
    assert np.array_equal(lm.head.weight, reference.head.weight.numpy())
    assert (lm.head.scale, lm.head.softcap) == (1.0, None)
    assert lm.missing(Capabilities(hidden=True, history=True, auxiliary=True)) == []
    assert lm.missing(Capabilities(grad=True, cache=True, per_request=True)) == ["grad", "cache", "per_request"]


def test_prefill_and_decode_of_transformers_exporters(exported, reference):
    lm = load_onnx(exported)
    assert lm.first is not None
    Pair(lm, reference).whole_story()
    assert np.array_equal(lm.head.weight, reference.head.weight.numpy())


def test_genai_graph(built, reference):
    """GroupQueryAttention: no positions, one buffer for past and present, rows of a batch aligned on the left."""
    lm = load_onnx(built.parent)
    assert lm.runner.ports.grouped
    assert lm.runner.ports.positions is None
    assert lm.runner.hidden == "hidden_states"
    Pair(lm, reference).whole_story()
    assert np.array_equal(lm.head.weight, reference.head.weight.numpy())
    assert lm.eos_token_ids == {1}
    assert lm.context_length == 128
    assert lm.tokenizer.decode(lm.tokenizer("w5 w7")["input_ids"]) == "w5 w7"


def test_genai_buffer_is_written_in_place_and_grows(built, reference):
    pair = Pair(load_onnx(built), reference)
    pair.prompt(padding=(90, 0), width=100)
    places = [value.data_ptr() for value in pair.cache._values]
    pair.append(hidden=False)
    assert [value.data_ptr() for value in pair.cache._values] == places
    pair.append(27, hidden=False)  # to column 128, the buffer's end (and the model's)
    assert [value.data_ptr() for value in pair.cache._values] == places
    pair.drop_newest(30)
    pair.append()
    pair.compare_caches()


def test_genai_graph_with_logits_of_the_last_column_only(torch_model, reference, tmp_path):
    pytest.importorskip("onnxruntime_genai")
    lm = load_onnx(onnx_graphs.genai(torch_model, tmp_path, prune_lm_head="true"))
    pair = Pair(lm, reference)
    pair.prompt(padding=(6, 0, 3))
    pair.append()
    pair.compare_caches()


def test_padding_on_the_right_is_refused_by_a_genai_graph(built):
    lm = load_onnx(built)
    with pytest.raises(ModelError, match="padding on the left"):
        lm.forward(cache=lm.new_cache(), input_ids=np.ones((1, 3), np.int64), attention_mask=np.asarray([[1, 1, 0]]))


@pytest.mark.parametrize(("form", "scale", "softcap"), [("softcap", 1.0, 5.0), ("scale", 0.25, None), ("bias", 1.0, None)])
def test_the_form_of_the_head(plain, reference, tmp_path, form, scale, softcap):
    lm = load_onnx(onnx_graphs.with_head(plain, tmp_path, form))
    assert lm.head.scale == pytest.approx(scale)
    assert lm.head.softcap == (None if softcap is None else pytest.approx(softcap))
    found = lm.forward(cache=lm.new_cache(), input_ids=np.asarray([[3, 4], [5, 6]]), hidden=True)
    bias = np.linspace(-1, 1, VOCAB, dtype=np.float32) if form == "bias" else np.float32(0)
    before = found.hidden @ reference.head.weight.numpy().T + bias
    assert np.abs(found.head_logits - before).max() < 1e-4
    shift = lm.head.project(np.random.default_rng(0).normal(size=(32, 2)).astype(np.float32)).T
    expected = before + shift
    expected = 5 * np.tanh(expected / 5) if form == "softcap" else expected * np.float32(scale)
    assert np.abs(found.logits + lm.head.delta(found.head_logits, shift) - expected).max() < 1e-4


def test_float16(plain, reference, tmp_path):
    lm = load_onnx(onnx_graphs.half(plain, tmp_path))
    assert {slot.dtype for slot in lm.runner.ports.slots} == {np.dtype(np.float16)}
    Pair(lm, reference, tolerance=0.15).whole_story()
    assert lm.head.weight.dtype == np.float32
    assert np.abs(lm.head.weight - reference.head.weight.numpy()).max() < 1e-3


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_quantised_head(plain, reference, tmp_path, bits, symmetric):
    """The dequantised weight is what the graph multiplies with."""
    lm = load_onnx(onnx_graphs.quantised(onnx_graphs.without_hidden(plain, tmp_path / "bare"), tmp_path / "packed", bits, symmetric))
    assert lm.runner.places[0].node.op_type == "MatMulNBits"
    found = lm.forward(cache=lm.new_cache(), input_ids=np.asarray([[3, 4, 9], [5, 6, 8]]), hidden=True)
    assert np.abs(found.hidden @ lm.head.weight.T - found.logits).max() < 1e-4 * max(1, np.abs(found.logits).max())
    assert np.abs(lm.head.weight - reference.head.weight.numpy()).max() < (0.1 if bits == 4 else 0.01)


def test_quantised_genai_head(torch_model, tmp_path):
    pytest.importorskip("onnxruntime_genai")
    lm = load_onnx(onnx_graphs.genai(torch_model, tmp_path, "int4"))
    assert lm.runner.places[0].node.op_type == "MatMulNBits"
    found = lm.forward(cache=lm.new_cache(), input_ids=np.asarray([[3, 4, 9]]), hidden=True)
    # the builder lets the kernel round activations to 8 bits (accuracy_level 4), which the weight alone doesn't show
    assert np.abs(found.hidden @ lm.head.weight.T - found.logits).max() < 0.03 * np.abs(found.logits).max()


@pytest.mark.parametrize("form", ["plain", "merged", "gemm", "packed", "genai"])
def test_projection_in_the_graph(plain, tmp_path, request, form):
    """h - alpha (h U) U^T in front of the head, a strength for each row; hidden states stay those before it."""
    makers = {"merged": onnx_graphs.merged, "packed": onnx_graphs.quantised}
    if form == "genai":
        source = request.getfixturevalue("built")
    elif form == "gemm":
        source = onnx_graphs.with_head(plain, tmp_path, "gemm")
    else:
        source = makers[form](plain, tmp_path) if form in makers else plain
    lm = load_onnx(source)
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 3)))
    projected = lm.with_projection(basis.astype(np.float32))
    ids = np.asarray([[3, 4], [5, 6], [7, 8]])
    base = lm.forward(cache=lm.new_cache(), input_ids=ids, hidden=True)
    strength = np.asarray([0.0, 1.0, 0.5], np.float32)
    cache = projected.new_cache()
    found = projected.forward(cache=cache, input_ids=ids, hidden=True, strength=strength)
    moved = base.hidden - strength[:, None] * (base.hidden @ basis @ basis.T)
    assert np.abs(found.logits - moved @ lm.head.weight.T).max() < 1e-3
    assert np.abs(found.logits[0] - base.logits[0]).max() < 1e-5
    assert np.abs(found.logits[1] - base.logits[1]).max() > 0.1
    assert np.abs(found.hidden - base.hidden).max() < 1e-5
    without = projected.forward(cache=projected.new_cache(), input_ids=ids)
    assert np.abs(without.logits - base.logits).max() < 1e-5
    step = projected.forward(cache=cache, input_ids=np.asarray([[1], [1], [1]]), strength=1.0)
    assert step.logits.shape == (3, VOCAB)
    with pytest.raises(ModelError, match="with_projection"):
        lm.forward(cache=lm.new_cache(), input_ids=ids, strength=1.0)
    with pytest.raises(ModelError, match=r"f32\[32, r\]"):
        lm.with_projection(np.eye(5))


def test_the_users_files_stay_as_they_are_and_edits_are_kept(plain, tmp_path):
    path = onnx_graphs.without_hidden(plain, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    lm = load_onnx(path)
    assert lm.runner.hidden == surgery.HIDDEN
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    kept = list(surgery.cache_folder().glob("*.onnx"))
    stamp = {file: file.stat().st_mtime_ns for file in kept}
    again = load_onnx(path)
    ids = np.asarray([[3, 4, 5]])
    first, second = (m.forward(cache=m.new_cache(), input_ids=ids, hidden=True) for m in (lm, again))
    assert np.array_equal(first.hidden, second.hidden)
    assert {file: file.stat().st_mtime_ns for file in surgery.cache_folder().glob("*.onnx")} == stamp
    smallest = min(file.stat().st_size for file in kept)
    assert smallest < path.stat().st_size  # weights are referred to, not copied


def test_identity(external, plain, torch_model, tmp_path):
    mine, other = load_onnx(external), load_onnx(plain)
    assert mine.fingerprint == other.fingerprint  # weights inside or beside: one model
    assert len(mine.fingerprint) == 16
    assert mine.tokenizer_hash is None
    assert mine.spell(7) == "<7>"
    folder = tmp_path / "model"
    shutil.copytree(plain.parent, folder)
    (folder / "moralguard.json").write_text(json.dumps({"fingerprint": "0123456789abcdef"}))
    onnx_graphs.word_tokenizer(folder, VOCAB)
    lm = load_onnx(folder)
    assert lm.fingerprint == "0123456789abcdef"
    theirs = LanguageModel(torch_model, transformers.AutoTokenizer.from_pretrained(folder))
    assert lm.tokenizer_hash == theirs.tokenizer_hash
    assert lm.pad_token_id == theirs.pad_token_id
    assert lm.eos_token_ids == theirs.eos_token_ids
    assert lm.context_length == theirs.context_length
    assert lm.width == theirs.width
    assert lm.spell(7) == "w7"


def test_which_sources_are_onnx(plain, tmp_path):
    assert is_onnx_source(plain)
    assert is_onnx_source(str(plain.parent))
    assert not is_onnx_source(tmp_path)
    assert not is_onnx_source("smollm2-135m")
    assert not is_onnx_source(object())
    shutil.copytree(plain.parent, tmp_path / "both")
    (tmp_path / "both" / "model.safetensors").write_bytes(b"")
    assert not is_onnx_source(tmp_path / "both")
    shutil.copytree(plain.parent, tmp_path / "hub" / "onnx")  # as repositories on the hub have it
    shutil.move(tmp_path / "hub" / "onnx" / "config.json", tmp_path / "hub" / "config.json")
    assert load_onnx(tmp_path / "hub").context_length == 128


CHAT = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] | trim }} {{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def test_tokenizer_as_transformers(plain, tmp_path):
    """The parts that the guard uses give what transformers' tokenizer gives."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(["the cat sat on the mat", "a dog is in the house"], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    theirs.chat_template = CHAT
    theirs.save_pretrained(tmp_path)
    mine = load_tokenizer(tmp_path / "model.onnx")
    for text in ("the cat", " is in", "caf\u00e9 \u4f60\u597d \U0001f600", ""):
        ids = theirs(text)["input_ids"]
        assert mine(text)["input_ids"] == ids
        assert mine(text, add_special_tokens=False)["input_ids"] == theirs(text, add_special_tokens=False)["input_ids"]
        for skip in (True, False):
            assert mine.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert mine(["the", "cat"])["input_ids"] == theirs(["the", "cat"])["input_ids"]
    assert mine.get_vocab() == theirs.get_vocab()
    assert len(mine) == len(theirs)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "bos_token", "eos_token"):
        assert getattr(mine, name) == getattr(theirs, name)
    assert set(mine.all_special_ids) == set(theirs.all_special_ids)
    assert mine.convert_ids_to_tokens([5, 6]) == theirs.convert_ids_to_tokens([5, 6])
    assert mine.convert_tokens_to_ids("</s>") == 1
    chat = [{"role": "system", "content": " be kind "}, {"role": "user", "content": "hi"}]
    for prompt in (True, False):
        wanted = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert mine.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt) == wanted
        assert mine.apply_chat_template(chat, add_generation_prompt=prompt) == theirs(wanted, add_special_tokens=False)["input_ids"]
    assert load_tokenizer(plain) is None


def test_chat_templates_are_rendered_in_a_sandbox(tmp_path):
    onnx_graphs.word_tokenizer(tmp_path, 20)
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(PromptError, match="refuses"):
        load_tokenizer(tmp_path / "model.onnx").apply_chat_template([{"role": "user", "content": "x"}])


NO_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(name + " must not be imported")
sys.meta_path.insert(0, Refuse())
import numpy as np
from moralguard.backends.onnx.load import load_onnx
lm = load_onnx(sys.argv[1])
cache = lm.new_cache()
found = lm.forward(cache=cache, input_ids=np.asarray([[3, 4, 5], [6, 7, 8]]), hidden=True)
cache.select_rows(np.asarray([1]))
found = lm.forward(cache=cache, input_ids=np.asarray([[9]]), hidden=True)
assert found.hidden.shape == (1, 32), found.hidden.shape
assert lm.head.project(np.eye(32, dtype=np.float32)).shape == (199, 32)
assert lm.fingerprint and lm.tokenizer("w3")["input_ids"] == [3]
assert not [name for name in sys.modules if name.split(".")[0] in ("torch", "transformers")]
print("done")
"""


def test_a_graph_runs_without_torch_and_transformers(plain, tmp_path):
    path = onnx_graphs.without_hidden(plain, tmp_path)
    onnx_graphs.word_tokenizer(tmp_path, VOCAB)
    found = subprocess.run([sys.executable, "-c", NO_TORCH, str(path)], capture_output=True, text=True, timeout=500, check=False)
    assert found.stdout.strip() == "done", found.stderr


# bad input


def _refused(source: Any, *words: str, **arguments: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_onnx(source, **arguments)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def test_no_such_file_and_no_graph(tmp_path):
    _refused(tmp_path / "absent.onnx", "isn't there", ".onnx file or a folder")
    _refused(tmp_path, "holds no .onnx file", "moralguard export")


def test_an_encoder(tmp_path):
    _refused(onnx_graphs.encoder(tmp_path), "an encoder", "last_hidden_state", "moralguard export")


def test_a_graph_without_cache(tmp_path):
    _refused(onnx_graphs.encoder(tmp_path, logits=True), "no keys and values", "decoder without its cache", "text-generation-with-past")


def test_an_encoder_decoder(tmp_path, plain):
    model = onnx.load(plain)
    model.graph.input.append(helper.make_tensor_value_info("encoder_hidden_states", onnx.TensorProto.FLOAT, ["b", "t", 8]))
    onnx.save(model, tmp_path / "model.onnx")
    _refused(tmp_path, "encoder_hidden_states", "decoder-only")


def test_an_input_that_means_nothing(tmp_path, plain):
    model = onnx.load(plain)
    model.graph.input.append(helper.make_tensor_value_info("conv_state", onnx.TensorProto.FLOAT, ["b", 8, 3]))
    onnx.save(model, tmp_path / "model.onnx")
    _refused(tmp_path, "conv_state ['b', 8, 3]", "recurrent")


def _prompt_only(plain: Path, folder: Path) -> Path:
    """A graph that starts a text and can't go on."""
    model = onnx.load(onnx_graphs.without_hidden(plain, folder))
    random = np.zeros((1, 1, 0, 16), np.float32)
    for value in [v for v in model.graph.input if v.name.startswith("past")]:
        model.graph.input.remove(value)
        model.graph.initializer.append(onnx.numpy_helper.from_array(random, value.name))
    (folder / "model.onnx").unlink()
    onnx.save(model, folder / "prefill.onnx")
    return folder / "prefill.onnx"


def test_only_the_graph_of_the_prompt(tmp_path, plain):
    _refused(_prompt_only(plain, tmp_path), "none that reads past keys and values")


def test_two_graphs_with_caches_of_different_forms(tmp_path, plain, built):
    shutil.copytree(built.parent, tmp_path, dirs_exist_ok=True)
    shutil.move(tmp_path / "model.onnx", tmp_path / "decode.onnx")
    (tmp_path / "genai_config.json").unlink()
    (tmp_path / "prompt").mkdir()
    shutil.copy(_prompt_only(plain, tmp_path / "prompt"), tmp_path)
    _refused(tmp_path, "GroupQueryAttention in one of them only", "ort_fusions")


def test_several_graphs_of_which_none_is_named(tmp_path, plain):
    for name in ("model_q4.onnx", "model_fp16.onnx"):
        shutil.copy(plain, tmp_path / name)
    _refused(tmp_path, "model_fp16.onnx, model_q4.onnx", "name the file")


def test_a_cache_folder_that_can_not_be_written(plain, reference, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MORALGUARD_CACHE", str(tmp_path / "file"))
    Pair(load_onnx(onnx_graphs.without_hidden(plain, tmp_path / "bare")), reference).prompt()


def test_missing_external_data(external, tmp_path):
    shutil.copy(external, tmp_path)
    _refused(tmp_path, "'model.onnx.data'", "copy that file")


def test_external_data_cut_short(external, tmp_path):
    shutil.copytree(external.parent, tmp_path, dirs_exist_ok=True)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])
    _refused(tmp_path, "model.onnx.data is cut short", "Copy or export")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_file(plain, tmp_path, part):
    content = plain.read_bytes()
    (tmp_path / "model.onnx").write_bytes(content[: int(len(content) * part)])
    _refused(tmp_path, "cut short or damaged", "Copy or export it again")


def test_a_file_that_is_no_onnx(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    _refused(tmp_path, "cut short or damaged")


def test_another_opset(plain, tmp_path):
    model = onnx.load(plain)
    next(o for o in model.opset_import if not o.domain).version = 999
    onnx.save(model, tmp_path / "model.onnx")
    _refused(tmp_path, "version of ONNX", "--opset")


def test_another_ir_version(plain, tmp_path):
    model = onnx.load(plain)
    model.ir_version = 99
    onnx.save(model, tmp_path / "model.onnx")
    _refused(tmp_path, "version of ONNX")


def test_a_head_that_is_not_found(plain, tmp_path):
    """Such a model runs; what needs its hidden states is refused."""
    lm = load_onnx(onnx_graphs.with_head(plain, tmp_path, "unknown"))
    ids = np.asarray([[3, 4]])
    assert lm.forward(cache=lm.new_cache(), input_ids=ids).logits.shape == (1, VOCAB)
    assert lm.head is None
    assert lm.missing(Capabilities(hidden=True, history=True)) == ["hidden"]
    assert lm.width == 32  # config.json says so
    with pytest.raises(ModelError, match=r"head of .* isn't found.*moralguard export"):
        lm.forward(cache=lm.new_cache(), input_ids=ids, hidden=True)
    with pytest.raises(ModelError, match="can't be found"):
        lm.with_projection(np.zeros((32, 1), np.float32))


def test_a_graph_that_fails_when_it_runs(plain, tmp_path):
    """Found when the model is loaded, not at the first prompt."""
    model = onnx.load(plain)
    table = next(t for t in model.graph.initializer if t.name.endswith("norm.weight"))
    table.CopyFrom(onnx.numpy_helper.from_array(np.ones(31, np.float32), table.name))
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "model.onnx")
    _refused(tmp_path, "onnxruntime")


def test_a_graph_without_mask_reads_rows_of_one_length(plain, reference, tmp_path):
    lm = load_onnx(onnx_graphs.without_mask(plain, tmp_path))
    assert not lm.takes_padding
    pair = Pair(lm, reference)
    pair.prompt(padding=(0, 0))
    pair.append()
    with pytest.raises(ModelError, match="takes no attention mask"):
        lm.forward(cache=lm.new_cache(), input_ids=np.asarray([[1, 2]]), attention_mask=np.asarray([[0, 1]]))


def test_a_graph_that_reads_padding(plain, tmp_path):
    _refused(onnx_graphs.without_mask(plain, tmp_path, keep_input=True), "doesn't leave out padding")


def test_settings_that_are_no_json(plain, tmp_path):
    shutil.copy(plain, tmp_path)
    (tmp_path / "config.json").write_text("{")
    _refused(tmp_path, "config.json can't be read as JSON")


def test_a_provider_that_is_not_there(plain):
    _refused(plain, "has no NoSuchProvider", providers=["NoSuchProvider"])


def test_packages_that_are_not_installed(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    _refused(plain, 'pip install "moralguard[onnx]"')
    monkeypatch.setitem(sys.modules, "onnx", None)
    _refused(plain, 'pip install "moralguard[onnx]"')
