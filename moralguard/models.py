"""Loading a model from whatever names it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moralguard import demo_model
from moralguard.backends.arrays import is_language_model
from moralguard.errors import ModelError

if TYPE_CHECKING:
    import torch

    from moralguard.backends.hf import LanguageModel


def load_model(
    source: Any = demo_model.NAME,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """A causal LM, ready to be guarded.

    Args:
        source: "smollm2-135m" (the embedded demo model), a local folder, a GGUF file, a Hugging Face id, or (model, tokenizer); or an
            ONNX file, or a folder of one, which gives an ``OnnxLanguageModel`` and imports no torch.
        dtype: "auto" keeps what the weights are stored in; or "float32", "bfloat16", a torch dtype. ONNX models keep theirs.
        device: where to put it, such as "cpu" or "cuda"; a GPU where torch (for ONNX: onnxruntime) sees one, without it.
        trust_remote_code: run code that comes with the model. Only where you ask for it.

    Raises:
        ModelError: it can't be found, read, or isn't a causal LM; says what to do.
    """
    if is_language_model(source):
        known: LanguageModel = source
        return known
    if isinstance(source, (str, Path)) and _is_onnx(source):
        return _load_onnx(source, dtype, device)
    if not isinstance(source, (str, Path)):
        from moralguard.backends.hf import LanguageModel

        return LanguageModel(*source) if isinstance(source, tuple) and len(source) == 2 else LanguageModel(source)
    return _load_hugging_face(source, dtype, device, trust_remote_code)


def _is_onnx(source: str | Path) -> bool:
    from moralguard.backends.onnx.load import is_onnx_source

    return is_onnx_source(source)


def _load_onnx(source: str | Path, dtype: str | torch.dtype, device: str | torch.device | None) -> Any:
    from moralguard.backends.onnx.load import load_onnx

    if dtype != "auto":
        raise ModelError(f"dtype is {dtype}, but {str(source)!r} is an ONNX model, whose numbers were chosen at its export; leave it out")
    providers = None
    if device is not None:
        providers = ["CPUExecutionProvider"] if str(device) == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    return load_onnx(source, providers=providers)


def _load_hugging_face(
    source: str | Path, dtype: str | torch.dtype, device: str | torch.device | None, trust_remote_code: bool
) -> LanguageModel:
    import torch

    from moralguard.backends.hf import LanguageModel
    from moralguard.backends.hf_files import quiet_transformers, read_dtype, read_folder, read_gguf

    resolved = read_dtype(dtype)
    path = Path(source)
    name = str(source)
    with quiet_transformers():
        if name == demo_model.NAME:
            model, tokenizer = read_folder(str(demo_model.demo_model_folder()), resolved, False, name)
        elif path.suffix.lower() == ".gguf":
            if not path.is_file():
                raise ModelError(f"GGUF file {name!r} isn't there")
            model, tokenizer = read_gguf(path, resolved if isinstance(resolved, torch.dtype) else torch.float32)
        else:
            if path.exists() and not (path / "config.json").is_file():
                raise ModelError(f"{name!r} has no config.json; expected the folder of a Hugging Face model, or a .gguf or .onnx file")
            model, tokenizer = read_folder(name, resolved, trust_remote_code, name)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return LanguageModel(model.eval().to(where), tokenizer, name)
