"""Reading Hugging Face models: folders, ids and GGUF files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from moralguard.errors import ModelError

_DEMO = "smollm2-135m"


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


def read_folder(source: str, dtype: torch.dtype | str, trust_remote_code: bool, name: str) -> tuple[Any, Any]:
    """Model and tokenizer (None where a folder has none) of a folder or an id; ``name`` is what messages call it."""
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=trust_remote_code)
    except Exception as error:  # huggingface_hub, safetensors and transformers each raise types of their own here
        raise ModelError(
            f"{name!r} can't be loaded as a causal LM: {_first_line(error)}. Expected {_DEMO!r}, a local folder, a .gguf "
            "or .onnx file or a Hugging Face id that this machine can reach"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        if Path(source).is_dir() and not list(Path(source).glob("token*")):
            return model, None  # a folder of weights alone: prompts are token ids
        raise ModelError(f"the tokenizer of {name!r} can't be loaded: {_first_line(error)}") from error
    return model, tokenizer


def read_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A torch dtype, or "auto"."""
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
