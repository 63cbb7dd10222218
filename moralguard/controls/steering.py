"""Steering: the states of chosen layers are moved along a fitted vector, or freed of its direction, while the model reads the text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, WithJsonSchema, field_validator, model_validator

from moralguard.backends.capabilities import Capabilities
from moralguard.controls.base import Control
from moralguard.controls.conflicts import Thing, things
from moralguard.controls.edited_pass import ONNX_ADVICE, BoundEdits
from moralguard.controls.layer_vectors import checked_vectors, layer_of, load_vectors
from moralguard.errors import PolicyError
from moralguard.values import Value

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel

Vectors = Annotated[
    Any, WithJsonSchema({"type": ["string", "object"], "description": "pack folder, pack:NAME, safetensors file, or {layer: [numbers]}"})
]


class SteeringVectors(Control):
    """The base's logits are replaced by those of the same model whose states are edited at every position it reads.

    Addition, h' = h + strength v at a layer: contrastive activation addition (Rimsky et al. 2023, arXiv 2312.06681) with v the mean
    difference between texts that keep a value and texts that don't, or representation engineering (Zou et al. 2023, arXiv
    2310.01405) with v the first principal direction of the differences. Ablation, h' = h - strength (h . u) u with u = v / |v|:
    directional ablation (Arditi et al. 2024, arXiv 2406.11717).

    Layers are counted as states are: 1 is behind the first block, one more than in the papers. Deviations: contrastive activation
    addition adds at the positions behind the prompt, here every position is edited (as in representation engineering); directional
    ablation also edits the output of each attention, here that of whole blocks. The control replaces what transformers' own
    processors made of the base's logits, but for the tokens they removed.

    Args:
        vectors: a pack of ``moralguard fit vector``, a safetensors file with ``layer.N`` f[d], or {layer: v f[d]}.
        layers: where the vectors act: at these of their layers. A single vector may act at any layer, or at "all". None is each at
            its own, but for the ablation of a single vector, which is at all layers (the paper's).
        strength: of either sign; 0 deactivates, 1 is the whole vector, or the whole ablation.
        operation: "add" or "ablate".
        keep_norm: ours: an edited state is scaled back to the length it had.
    """

    control_name: ClassVar[str] = "steering"

    vectors: Vectors
    layers: tuple[Annotated[int, Field(ge=1)], ...] | Literal["all"] | None = None
    strength: float = 1.0
    operation: Literal["add", "ablate"] = "add"
    keep_norm: bool = False

    @field_validator("vectors", mode="before")
    @classmethod
    def _read_vectors(cls, vectors: Any) -> Any:
        if isinstance(vectors, (str, Path)):
            load_vectors(str(vectors))  # broken files are told here and not at the first use
            return str(vectors)
        if not isinstance(vectors, Mapping):
            raise PolicyError(f"steering vectors are a {type(vectors).__name__}; expected a pack, a file, or {{layer: vector}}")
        return checked_vectors({layer_of(name): vector for name, vector in vectors.items()})

    @model_validator(mode="after")
    def _check_layers(self) -> SteeringVectors:
        known = self.arrays()
        if self.layers == ():
            raise PolicyError("steering has an empty list of layers; leave `layers` out, name some, or set strength to 0")
        if isinstance(self.layers, tuple) and len(known) > 1 and (strange := sorted(set(self.layers) - set(known))):
            raise PolicyError(f"steering has no vector for layer {strange[0]}; it has layers {', '.join(map(str, known))}")
        if self.layers == "all" and len(known) > 1:
            raise PolicyError(f"steering has {len(known)} vectors, and only a single one can act at all layers; give that one alone")
        return self

    def arrays(self, lm: LanguageModel | None = None) -> dict[int, np.ndarray]:
        """{layer: v f32[d]}, read where ``vectors`` names a pack or file, in the order of layers.

        Raises:
            PolicyError, ModelError: it can't be read any more, or is a pack of another model than ``lm``.
        """
        found = load_vectors(self.vectors, lm) if isinstance(self.vectors, str) else checked_vectors(self.vectors)
        return {layer: np.asarray(found[layer], dtype=np.float32) for layer in sorted(found)}

    @property
    def active(self) -> bool:
        return self.strength != 0

    def scaled(self, factor: float) -> Self:
        return self.replaced(strength=self.strength * factor)

    @property
    def seeks(self) -> tuple[Thing, ...]:
        return things("vectors", self.vectors) if self.operation == "add" and self.strength > 0 else ()

    @property
    def avoids(self) -> tuple[Thing, ...]:
        return things("vectors", self.vectors) if self.operation == "add" and self.strength < 0 else ()

    @property
    def needs(self) -> Capabilities:
        return Capabilities(auxiliary=True, per_request=True, edits=True)

    def instead(self, missing: Any) -> str:
        return ONNX_ADVICE

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundEdits:
        import torch

        from moralguard.backends.edit_rules import Ablation, Addition
        from moralguard.backends.edits import layer_modules

        known, names = self.arrays(lm), layer_modules(lm)
        single = next(iter(known.values())) if len(known) == 1 else None
        everywhere = self.layers == "all" or (self.layers is None and self.operation == "ablate" and single is not None)
        own = list(dict.fromkeys(self.layers)) if isinstance(self.layers, tuple) else list(known)
        chosen = list(names) if everywhere else own
        wrong = next((layer for layer in chosen if layer not in names), None)
        if wrong is not None:
            raise PolicyError(f"steering names layer {wrong}, but {lm.name} has layers 1 to {len(names)}")
        rule = Addition if self.operation == "add" else Ablation
        vectors = {layer: known[layer] if single is None else single for layer in chosen}
        edits = {
            names[layer]: rule(torch.from_numpy(vector).to(lm.device), strength=self.strength, keep_norm=self.keep_norm)
            for layer, vector in vectors.items()
        }
        return BoundEdits(self, lm, edits)
