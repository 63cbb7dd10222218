"""The setting that names an expert, as every contrast of passes declares it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from moralguard.controls.experts import Prompt, Unconditional, is_expert_pack, read_expert_pack


def _read(expert: Any) -> Any:
    if is_expert_pack(expert):
        read_expert_pack(expert)  # a broken pack is told here and not at the first use
    if isinstance(expert, dict):
        return Unconditional(**expert) if "unconditional" in expert else Prompt(**expert)
    return expert


_SCHEMA = {
    "anyOf": [
        {"type": "string", "description": "pack, LoRA adapter or model folder, pack:NAME, GGUF or ONNX file, or Hugging Face id"},
        {"type": "object", "properties": {"prompt": {"type": ["string", "array"]}}, "required": ["prompt"]},
        {"type": "object", "properties": {"unconditional": {"const": True}}, "required": ["unconditional"]},
        {"type": "null"},
    ]
}
ExpertSetting = Annotated[Any, WithJsonSchema(_SCHEMA), BeforeValidator(_read)]
"""What ``experts.bind_expert`` takes, or None; in policy data ``{prompt: ...}``, ``{unconditional: true}``, a pack, a folder, a file or a
hub id."""
