"""Loading a model from whatever names it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from moralguard import demo_model
from moralguard.backends.hf import LanguageModel
from moralguard.errors import ModelError


def load_model(
    source: Any = demo_model.NAME,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """A causal LM, ready to be guarded.

    Args:
        source: "smollm2-135m" (the embedded demo model), a local folder, a GGUF file, a Hugging Face id, or (model, tokenizer).
        dtype: "auto" keeps what the weights are stored in; or "float32", "bfloat16", a torch dtype.
        device: where to put it; the CPU, or a GPU where torch sees one.
        trust_remote_code: run code that comes with the model. Only where you ask for it.

    Raises:
        ModelError: it can't be found, read, or isn't a causal LM; says what to do.
    """
    if isinstance(source, LanguageModel):
        return source
    if isinstance(source, tuple) and len(source) == 2:
        return LanguageModel(*source)
    if not isinstance(source, (str, Path)):
        return LanguageModel(source)
    resolved = _read_dtype(dtype)
    path = Path(source)
    name = str(source)
    with quiet_transformers():
        if name == demo_model.NAME:
            model, tokenizer = _read_folder(str(demo_model.demo_model_folder()), resolved, False, name)
        elif path.suffix.lower() == ".gguf":
            if not path.is_file():
                raise ModelError(f"GGUF file {name!r} isn't there")
            model, tokenizer = read_gguf(path, resolved if isinstance(resolved, torch.dtype) else torch.float32)
        else:
            if path.exists() and not (path / "config.json").is_file():
                raise ModelError(f"{name!r} has no config.json; expected the folder of a Hugging Face model, or a .gguf file")
            model, tokenizer = _read_folder(name, resolved, trust_remote_code, name)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return LanguageModel(model.eval().to(where), tokenizer, name)


def read_gguf(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file, dequantised."""
    arguments = {"gguf_file": path.name}
    try:
        # transformers draws its conversion bar whatever its verbosity
        with redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=dtype, **arguments)
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **arguments)
    except Exception as error:  # transformers, gguf and tokenizers each raise types of their own here
        raise ModelError(f"{path} can't be read as a GGUF model: {_first_line(error)}") from error
    return model.eval(), tokenizer


def _read_folder(source: str, dtype: torch.dtype | str, trust_remote_code: bool, name: str) -> tuple[Any, Any]:
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # huggingface_hub, safetensors and transformers each raise types of their own here
        raise ModelError(
            f"{name!r} can't be loaded as a causal LM: {_first_line(error)}. Expected {demo_model.NAME!r}, a local folder, a .gguf "
            "file or a Hugging Face id that this machine can reach"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        if Path(source).is_dir() and not list(Path(source).glob("token*")):
            return model, None  # a folder of weights alone: prompts are token ids
        raise ModelError(f"the tokenizer of {name!r} can't be loaded: {_first_line(error)}") from error
    return model, tokenizer


def _read_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ModelError(f"dtype {dtype!r} isn't one of torch's; expected auto, float32, bfloat16 or float16")
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"[:300]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own loading bars and advice, which are put back afterwards."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
