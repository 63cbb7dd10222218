"""Layer-wise projection and filters: a subspace is taken out of what named modules give, or a fitted network filters it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import numpy as np
from pydantic import Field, WithJsonSchema, field_validator, model_validator

from moralguard.backends.arrays import is_tensor, namespace
from moralguard.backends.capabilities import Capabilities
from moralguard.backends.tensor_files import load_arrays
from moralguard.controls.base import Control
from moralguard.controls.edited_pass import ONNX_ADVICE, BoundEdits
from moralguard.controls.nullspace import LAST, Basis, checked_basis, layer_of_pack, load_basis
from moralguard.errors import PolicyError
from moralguard.values import Value

if TYPE_CHECKING:
    from moralguard.backends.edit_rules import Edit
    from moralguard.backends.hf import LanguageModel

FilterSetting = Annotated[
    Any, WithJsonSchema({"type": "string", "description": "safetensors file: weight.0 [n, d], bias.0 [n], weight.1, ..."})
]
Module = Annotated[str, Field(min_length=1)] | Annotated[int, Field(ge=1)]


class LayerProjection(Control):
    """The base's logits are replaced by those of the same model whose named modules give edited states, at every position it reads.

    With a basis h' = a h + (1 - a) (h - U_out U_in^T (h - mu)): nullspace projection (Ravfogel et al. 2020, arXiv 2004.07667) with
    U_in = U_out orthonormal, LEACE (Belrose et al. 2023, arXiv 2306.03819) in general. With a filter h' = a h + (1 - a) f(h), f a
    small network (FairFil, Cheng et al. 2021, arXiv 2103.06413, which filters sentence vectors; here it filters every position's
    state). A subspace holds for the states it was fitted on, with ``moralguard fit subspace --layer N``; those behind the final norm
    are edited by ``NullspaceProjection`` without a pass of its own.

    Args:
        modules: where: names as in ``model.named_modules()``, or numbers of layers, 1 being the first block.
        basis: as ``NullspaceProjection.basis``: U f[d, r], (U_in, U_out, mu), a pack or a file.
        filter: in its place, a safetensors file with ``weight.i`` f[out, in] and ``bias.i`` f[out] for i = 0, 1, ..., or these as
            pairs: linear layers, d to d, ReLU between them.
        keep: a, the share of the **original** state that stays; 1 deactivates.
    """

    control_name: ClassVar[str] = "layer-projection"

    modules: Annotated[tuple[Module, ...], Field(min_length=1)]
    basis: Basis | None = None
    filter: FilterSetting | None = None
    keep: Annotated[float, Field(ge=0, le=1)] = 0.0

    @field_validator("basis", mode="before")
    @classmethod
    def _read_basis(cls, basis: Any) -> Any:
        if isinstance(basis, (str, Path)):
            load_basis(str(basis))  # broken files are told here and not at the first use
            return str(basis)
        return None if basis is None else checked_basis(basis)

    @field_validator("filter", mode="before")
    @classmethod
    def _read_filter(cls, given: Any) -> Any:
        if isinstance(given, (str, Path)):
            _load_filter(str(given))  # broken files are told here and not at the first use
            return str(given)
        return None if given is None else tuple((_as_array(weight), _as_array(bias)) for weight, bias in _pairs(given))

    @model_validator(mode="after")
    def _has_one(self) -> LayerProjection:
        if (self.basis is None) == (self.filter is None):
            raise PolicyError("layer-projection takes either a basis (a subspace to remove) or a filter, one of them")
        fitted = layer_of_pack(self.basis) if isinstance(self.basis, str) else None
        other = next((module for module in self.modules if isinstance(module, int) and fitted not in (None, module)), None)
        if other is not None:
            states = "that the head reads" if fitted == LAST else f"of layer {fitted}"
            raise PolicyError(f"pack {self.basis!r} was fitted on the states {states}, which aren't those of layer {other}; fit one for it")
        return self

    @property
    def active(self) -> bool:
        return self.keep != 1

    def scaled(self, factor: float) -> Self:
        return self.replaced(keep=max(0.0, 1 - (1 - self.keep) * factor))  # beyond the whole subspace there is nothing to remove

    @property
    def needs(self) -> Capabilities:
        return Capabilities(auxiliary=True, per_request=True, edits=True)

    def instead(self, missing: Any) -> str:
        return ONNX_ADVICE

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundEdits:
        from moralguard.backends.edits import layer_modules

        layers = layer_modules(lm) if any(isinstance(module, int) for module in self.modules) else {}
        unknown = next((module for module in self.modules if isinstance(module, int) and module not in layers), None)
        if unknown is not None:
            raise PolicyError(f"layer-projection names layer {unknown}, but {lm.name} has layers 1 to {len(layers)}")
        names = [layers[module] if isinstance(module, int) else module for module in self.modules]
        return BoundEdits(self, lm, dict.fromkeys(names, self.edit(lm)))

    def edit(self, lm: LanguageModel | None = None) -> Edit:
        """The edit of one module's output, for ``backends.edits.edited`` on any other model, too.

        Raises:
            PolicyError, ModelError: a file can't be read any more, a pack of another model than ``lm``, or a filter that isn't d to d.
        """
        import torch

        from moralguard.backends.edit_rules import Filter, Projection

        def tensor(array: Any) -> torch.Tensor:
            found: torch.Tensor = namespace("torch").float_array(array)
            return found if lm is None else found.to(lm.device)

        if self.filter is not None:
            layers = _load_filter(self.filter) if isinstance(self.filter, str) else self.filter
            return Filter(tuple((tensor(weight), tensor(bias)) for weight, bias in layers), strength=1 - self.keep)
        basis = load_basis(self.basis, lm)[0] if isinstance(self.basis, str) else self.basis
        u_in, u_out, mu = basis if isinstance(basis, tuple) else (basis, basis, None)
        return Projection(tensor(u_in), tensor(u_out), None if mu is None else tensor(mu), strength=1 - self.keep)


def _pairs(given: Any) -> list[Any]:
    if not isinstance(given, (list, tuple)) or not given or any(not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in given):
        raise PolicyError("a filter is a safetensors file, or pairs (weight [out, in], bias [out]) of one layer at least")
    return list(given)


def _as_array(value: Any) -> np.ndarray:
    try:
        return value.detach().float().cpu().numpy() if is_tensor(value) else np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise PolicyError(f"a filter holds a {type(value).__name__}; expected a tensor or an array") from error


def _load_filter(source: str) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """(weight, bias) of each layer of a file."""
    if not Path(source).is_file():
        raise PolicyError(f"filter {source!r} isn't there; expected a safetensors file with weight.0, bias.0, weight.1, ...")
    tensors = load_arrays(Path(source))
    wanted = [f"{part}.{index}" for index in range((len(tensors) + 1) // 2) for part in ("weight", "bias")]
    if not tensors or sorted(wanted) != sorted(tensors):
        raise PolicyError(f"{source} holds {', '.join(sorted(tensors)) or 'nothing'}; expected weight.0, bias.0, weight.1, bias.1, ...")
    return tuple((tensors[f"weight.{index}"], tensors[f"bias.{index}"]) for index in range(len(tensors) // 2))
