"""The discriminator where torch isn't installed: the same numbers from onnxruntime and NumPy, and clear words about what needs torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import moralguard as mg
from moralguard.discriminator import onnx_path
from moralguard.discriminator.character_path import CharacterPath, save_character_path
from moralguard.discriminator.characters import CharacterConfig
from moralguard.discriminator.numpy_characters import NumpyCharacters, load_numpy_characters
from moralguard.discriminator.packs import NETWORK, shipped_folder
from moralguard.discriminator.stored_weights import fingerprint, load_arrays, read_network, stored_fingerprint
from moralguard.discriminator.torch_paths import TorchCharacters
from moralguard.discriminator.weights import load_network
from moralguard.errors import DataError, ModelError

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-5
TEXTS = [
    "You are a pathetic idiot and everyone laughs at you.",
    "Thank you so much for the soup, it was lovely.",
    "The committee met and talked about the roof. " * 12 + "You worthless idiot, shut up.",
    "",
    "x",
    "这些人都是垃圾，滚出去",
    "今天天气很好，我们去公园散步吧。😀",
    "中" * 300,
]
VALUES = ["The text does not insult anyone.", "no_hate", "文本不侮辱、贬低或冒犯任何人。", "A statement " + "that goes on " * 20 + "."]
CONTEXTS = ["", "Japan", "在学校"]

WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} isn't here")

sys.meta_path.insert(0, NoTorch())
"""

JUDGE = """
import json
import moralguard as mg
from moralguard.errors import DataError, GuardError

given = json.loads(sys.stdin.read())
judge = mg.Discriminator.load(**given["settings"])
found = []
for context in given["contexts"]:
    judged = judge.judge(given["texts"], given["values"], context)
    found.append({
        "probability": judged.probability.tolist(),
        "relevance": judged.relevance.tolist(),
        "valence": judged.valence.tolist(),
        "basis": [[[b.path, b.context, list(b.window), b.windows] for b in row] for row in judged.basis],
    })
explained = judge.judge([given["texts"][0], given["texts"][5]], given["values"][:1], spans=True)
assert judge.score(given["texts"][1], given["values"][0]).shape == (1, 1)
spans = [[[span.start, span.end, span.text, span.weight] for span in row[0]] for row in explained.spans]
loaded = sorted(name for name in sys.modules if name in ("torch", "transformers"))
print(json.dumps({"found": found, "spans": spans, "fingerprint": judge.fingerprint, "loaded": loaded}))
"""


def run(code: str, given: object = None) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    ran = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(given), capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


@pytest.fixture(scope="module")
def judge() -> mg.Discriminator:
    return mg.Discriminator.load()


def needs_onnx() -> None:
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason=f'{package} isn\'t installed; pip install "moralguard[onnx]"')


@pytest.mark.parametrize(("before", "settings"), [(WITHOUT_TORCH, {}), ("import sys\n", {"onnx": True})], ids=["no torch", "onnx=True"])
def test_it_judges_the_same_and_imports_no_torch(judge, before, settings):
    needs_onnx()
    given = {"texts": TEXTS, "values": VALUES, "contexts": CONTEXTS, "settings": settings}
    said = json.loads(run(before + JUDGE, given))
    assert said["loaded"] == []
    assert said["fingerprint"] == judge.fingerprint
    for context, found in zip(CONTEXTS, said["found"], strict=True):
        expected = judge.judge(TEXTS, VALUES, context)
        for name in ("probability", "relevance", "valence"):
            np.testing.assert_allclose(found[name], getattr(expected, name), atol=TOLERANCE, rtol=0, err_msg=f"{name}, {context!r}")
        assert found["basis"] == [[[b.path, b.context, list(b.window), b.windows] for b in row] for row in expected.basis]
    explained = judge.judge([TEXTS[0], TEXTS[5]], VALUES[:1], spans=True)
    for spans, expected in zip(said["spans"], explained.spans, strict=True):
        assert [span[:3] for span in spans] == [[span.start, span.end, span.text] for span in expected[0]]
        np.testing.assert_allclose([span[3] for span in spans], [span.weight for span in expected[0]], atol=2 * TOLERANCE)


@pytest.mark.parametrize("mode", ["cached", "cross"])
def test_both_readings_are_the_same(mode):
    needs_onnx()
    expected = mg.Discriminator.load(mode=mode).judge(TEXTS, VALUES, "Japan")
    found = mg.Discriminator.load(mode=mode, onnx=True).judge(TEXTS, VALUES, "Japan")
    for name in ("probability", "relevance", "valence"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=TOLERANCE, rtol=0)


def test_many_values_and_many_texts(judge, monkeypatch):
    needs_onnx()
    monkeypatch.setattr(onnx_path, "PAIRS_A_BATCH", 100)
    free = mg.Discriminator.load(onnx=True)
    values = [f"The text does not mention the number {i}." for i in range(70)]  # more than are encoded at once
    found = free.score(TEXTS, values)
    np.testing.assert_allclose(found, judge.score(TEXTS, values), atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(free.score(TEXTS, values), found)
    np.testing.assert_allclose(free.score(TEXTS[0], values[7]), found[:1, 7:8], atol=TOLERANCE, rtol=0)
    assert free.score([], values).shape == (0, 70)


def test_what_needs_torch_says_so(tmp_path, judge):
    needs_onnx()
    code = """
import moralguard as mg
from moralguard.errors import DataError, GuardError, ModelError
from moralguard.discriminator.discriminator import shipped_discriminator
from moralguard.discriminator.prefix import TextPrefixScorer

judge = shipped_discriminator()
examples = [("tea please", False), ("a pot of tea", False), ("bread", True), ("milk", True)]
tries = [
    lambda: judge.adapt("no tea", examples),
    lambda: judge.explain("You idiot", "no_insult", method="gradient"),
    lambda: judge.export_onnx("nowhere"),
    lambda: mg.Discriminator.load(adaptations=["pack"]),
    lambda: mg.Discriminator.load(device="cuda"),
    lambda: mg.Discriminator.load(dtype="bfloat16"),
]
for attempt in tries:
    try:
        attempt()
    except (DataError, ModelError) as error:
        print(type(error).__name__, str(error))
scorer = TextPrefixScorer(judge, "no_insult")
assert scorer.extend(scorer.start(), "You are an idiot").probability.shape == (1,)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    lines = run(WITHOUT_TORCH + code).splitlines()
    assert len(lines) == 6
    assert all("install torch" in line for line in lines)
    assert "occlusion" in lines[1]


def test_importing_the_modules_imports_no_torch():
    names = ("discriminator", "judgement", "windows", "tokens", "paths", "han_path", "packs", "prefix", "onnx_network", "numpy_characters")
    code = "import sys, importlib\n" + "".join(f'importlib.import_module("moralguard.discriminator.{name}")\n' for name in names)
    assert run(code + 'print([name for name in ("torch", "transformers") if name in sys.modules])').strip() == "[]"


def test_without_onnxruntime_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r'pip install "moralguard\[onnx\]"'):
        mg.Discriminator.load(onnx=True)


@pytest.mark.parametrize(("setting", "value"), [("device", "cuda"), ("dtype", "bfloat16"), ("dtype", torch.bfloat16)])
def test_another_device_or_dtype_is_refused(setting, value):
    with pytest.raises(ModelError, match="CPU in float32"):
        mg.Discriminator.load(onnx=True, **{setting: value})


def test_adaptations_are_refused():
    with pytest.raises(DataError, match="takes no adaptations"):
        mg.Discriminator.load(onnx=True, adaptations=["pack"])


@pytest.mark.parametrize("name", ["network.safetensors", "characters.safetensors", "settings.json", "characters.json", "tokenizer.json"])
def test_broken_files_are_named(tmp_path, name):
    needs_onnx()
    for path in shipped_folder().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: 200 if path.name == name else None])
    with pytest.raises(ModelError, match=str(tmp_path)):
        mg.Discriminator.load(tmp_path, onnx=True)
    (tmp_path / name).unlink()
    with pytest.raises(ModelError, match=name):
        mg.Discriminator.load(tmp_path, onnx=True)


def test_weights_and_fingerprint_are_those_of_torch(judge):
    path = shipped_folder() / NETWORK
    config, arrays = read_network(path)
    network = load_network(path)
    assert config == network.config
    state = network.state_dict()
    assert arrays.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(arrays[name], tensor.numpy(), err_msg=name)
    assert stored_fingerprint(path) == judge.fingerprint
    # the rounding to bfloat16 is torch's, ties included
    numbers = torch.cat([torch.randn(4096) * 10.0 ** torch.arange(-20, 12).repeat_interleave(128), torch.arange(0, 3, 2**-9)])
    assert fingerprint([("a", numbers.numpy())]) == fingerprint([("a", numbers.bfloat16().float().numpy())])
    assert fingerprint([("a", numbers.numpy())]) != fingerprint([("a", (numbers * 1.01).numpy())])


@pytest.fixture(scope="module")
def characters(tmp_path_factory) -> tuple[TorchCharacters, NumpyCharacters]:
    config = CharacterConfig(characters=64, bigrams=128, bag=256, character_width=16, bigram_width=8, width=24, lexical_width=8, blocks=3)
    torch.manual_seed(0)
    model = CharacterPath(config)
    for parameter in model.parameters():  # norms and biases too, or a forgotten one wouldn't show
        parameter.data += 0.1 * torch.randn_like(parameter)
    for table in (model.characters, model.bigrams, model.bag):
        table.weight.data[0] = 0.0  # what padding reads
    model.calibration.copy_(torch.tensor([1.3, -0.4]))
    folder = tmp_path_factory.mktemp("characters")
    save_character_path(model, folder / "weights", folder / "sizes")
    model.load_state_dict({name: torch.from_numpy(array).float() for name, array in load_arrays(folder / "weights").items()})
    return TorchCharacters(model.eval()), load_numpy_characters(folder / "weights", folder / "sizes")


def test_the_character_network_in_numpy_is_the_one_in_torch(characters):
    there, here = characters
    texts = ["你好", "今天天气不错😀，我们去公园吧", "", "abc", "中" * 400, "e\u0301 ok"]
    sentences = np.random.default_rng(0).normal(size=(3, 384)).astype(np.float32)
    sentences /= np.linalg.norm(sentences, axis=1, keepdims=True)
    statements = ["不冒犯他人", "不含脏话"]
    for statement in statements:
        np.testing.assert_allclose(here.statement(statement), there.statement(statement).numpy(), atol=2e-5)
    np.testing.assert_allclose(here.sentence(sentences), there.sentence(sentences).numpy(), atol=2e-5)
    found = here.logits(texts, [*map(here.statement, statements), here.sentence(sentences)])
    expected = there.logits(texts, [*map(there.statement, statements), there.sentence(sentences)])
    for f, e in zip(found, expected, strict=True):
        assert f.shape == (6, 5)
        assert f.dtype == np.float64
        np.testing.assert_allclose(f, e, atol=1e-4)
    np.testing.assert_allclose(here.features(texts), there.features(texts), atol=2e-5)


def test_neighbours_do_not_matter_to_it(characters):
    _, here = characters
    texts, vectors = ["你好", "今天天气不错，我们去公园吧", "滚"], [here.statement("不冒犯他人")]
    together = here.logits(texts, vectors)
    alone = [here.logits([text], vectors) for text in texts]
    for part in (0, 1):
        np.testing.assert_allclose(together[part], np.concatenate([item[part] for item in alone]), atol=1e-5)
