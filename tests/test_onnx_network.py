"""The exported network against the one in torch."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moralguard.discriminator.encoder import EncoderConfig
from moralguard.discriminator.network import Network
from moralguard.discriminator.onnx_network import OnnxNetwork, export_network
from moralguard.errors import ModelError

for package in ("onnx", "onnxruntime"):
    pytest.importorskip(package, reason=f'{package} isn\'t installed; pip install "moralguard[onnx]"')

CONFIG = EncoderConfig(
    vocab_size=50,
    hidden_size=24,
    num_attention_heads=4,
    intermediate_size=48,
    layers=3,
    shared_layers=1,
    head_size=16,
    max_positions=40,
)


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return Network(CONFIG).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "network"
    export_network(network, path)
    return path


@pytest.fixture(scope="module")
def exported(folder: Path) -> OnnxNetwork:
    return OnnxNetwork(folder, threads=1)


def rows(lengths: list[int], pad: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random ids of these lengths and their mask, with ``pad`` more places at the right; padding has ids too, which mustn't count."""
    width = max(lengths) + pad
    ids = torch.randint(1, CONFIG.vocab_size, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    return ids, torch.arange(width) < torch.tensor(lengths)[:, None]


def assert_close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape
        torch.testing.assert_close(f, e, atol=1e-4, rtol=0.0)


CASES = [
    ([9], [4], 0),
    ([1], [1], 0),
    ([2, 7], [5, 3, 1], 0),
    ([5, 1, 12], [6], 3),
    ([40], [2, 8, 3, 3, 9], 0),
    ([8, 8, 3, 30, 17], [11, 2], 4),
]


@pytest.mark.parametrize(("texts", "values", "pad"), CASES)
def test_cached_agrees(network: Network, exported: OnnxNetwork, texts: list[int], values: list[int], pad: int) -> None:
    ids, mask = rows(texts, pad, 1)
    value_ids, value_mask = rows(values, pad, 2)
    encoded = network.encode(value_ids, value_mask, 0)
    assert encoded.states is not None
    vectors, sentences = encoded.states[:, 0], encoded.sentence
    assert_close(exported.value_vectors(value_ids, value_mask), (vectors, sentences))
    expected = network.cached_logits(network.encode(ids, mask, 1), vectors, sentences)
    assert_close(exported.cached_logits(ids, mask, vectors, sentences), expected)


@pytest.mark.parametrize(("texts", "values", "pad"), CASES)
def test_cross_agrees(network: Network, exported: OnnxNetwork, texts: list[int], values: list[int], pad: int) -> None:
    ids, mask = rows(texts, pad, 3)
    value_ids, value_mask = rows([values[i % len(values)] for i in range(len(texts))], pad, 4)
    expected = network.cross_logits(network.encode(ids, mask, 1, alone=False), network.encode(value_ids, value_mask, 0, alone=False))
    assert_close(exported.cross_logits(ids, mask, value_ids, value_mask), expected)


def test_numpy_in_numpy_out(exported: OnnxNetwork) -> None:
    ids, mask = rows([3, 5], 0, 5)
    vectors, sentences = exported.value_vectors(ids.numpy(), mask.numpy())
    relevance, broken = exported.cached_logits(ids.numpy(), mask.numpy(), vectors, sentences)
    for found, shape in ((vectors, (2, 24)), (sentences, (2, 24)), (relevance, (2, 2)), (broken, (2, 2))):
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.float32
        assert found.shape == shape


def test_from_arrays_is_the_exported_network(network: Network, exported: OnnxNetwork) -> None:
    arrays = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    built = OnnxNetwork.from_arrays(CONFIG, arrays, "0123", threads=1)
    assert built.fingerprint == "0123"
    (ids, mask), values = rows([3, 7], 2, 6), rows([4, 2], 0, 7)
    assert_close(
        built.cached_logits(ids, mask, *built.value_vectors(*values)), exported.cached_logits(ids, mask, *exported.value_vectors(*values))
    )
    assert_close(built.cross_logits(ids, mask, *values), exported.cross_logits(ids, mask, *values))
    del arrays["cross_head.out.weight"]
    with pytest.raises(ModelError, match=r"no array 'cross_head\.out\.weight'"):
        OnnxNetwork.from_arrays(CONFIG, arrays)


def test_an_export_of_an_earlier_format_is_refused(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    settings = copied / "network.json"
    settings.write_text(settings.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(ModelError, match="format 1"):
        OnnxNetwork(copied)


def test_weights_are_stored_once(network: Network, folder: Path) -> None:
    embeddings = network.encoder.words.weight.numpy().tobytes()
    assert (folder / "weights.bin").read_bytes().count(embeddings) == 1
    assert not any(embeddings in path.read_bytes() for path in folder.glob("*.onnx"))


@pytest.mark.parametrize("name", ["network.json", "weights.bin", "lower.onnx", "values.onnx", "cached.onnx", "cross.onnx"])
def test_missing_and_broken_files_are_named(folder: Path, tmp_path: Path, name: str) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copied / name).write_bytes(b"\x00broken")
    with pytest.raises(ModelError, match=name):
        OnnxNetwork(copied)
    (copied / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing"):
        OnnxNetwork(copied)


def test_unknown_provider(folder: Path) -> None:
    with pytest.raises(ModelError, match="NoSuchProvider"):
        OnnxNetwork(folder, providers=["NoSuchProvider"])


def test_without_onnxruntime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match=r'pip install "moralguard\[onnx\]"'):
        OnnxNetwork(folder)
