"""The setting that names an expert, as every contrast of passes declares it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from moralguard.controls.dexperts import Expert
from moralguard.controls.experts import Prompt, is_expert_pack, read_expert_pack


def _read(expert: Any) -> Any:
    if is_expert_pack(expert):
        read_expert_pack(expert)  # a broken pack is told here and not at the first use
    return Prompt(**expert) if isinstance(expert, dict) else expert


ExpertSetting = Annotated[Expert, BeforeValidator(_read)]
"""What ``experts.bind_expert`` takes, or None; in policy data ``{prompt: ...}``, a pack, a folder, a file or a hub id."""
