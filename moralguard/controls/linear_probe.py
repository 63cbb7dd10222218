"""Linear probes of a model's own states: a margin that is positive on the wanted side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from moralguard.backends.numpy_arrays import float_array
from moralguard.errors import PolicyError
from moralguard.packs import read_pack

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel

Pooling = Literal["last", "mean"]


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """margin = weight . s + bias.

    Attributes:
        weight: f32[d]. bias: scalar.
        pooling: s is the state at the last token ("last"), or the mean over all tokens ("mean").
    """

    weight: NDArray[np.float32]
    bias: float
    pooling: Pooling

    def check(self, lm: LanguageModel, where: str) -> None:
        """
        Raises:
            PolicyError: its width isn't the model's.
        """
        if len(self.weight) != lm.width:
            raise PolicyError(f"{where} has W of {len(self.weight)}, but {lm.name} has hidden states of {lm.width}")


def probe_from(arrays: Any, pooling: Pooling, where: str) -> LinearProbe:
    """A probe of (W [d] or [1, d], b), arrays of numbers of any kind.

    Raises:
        PolicyError: they are something else, or aren't finite.
    """
    if not isinstance(arrays, (tuple, list)) or len(arrays) != 2:
        raise PolicyError(f"{where} is (W [d], b), an attribute-head or prefix-head pack, or a FactoredHead; got a {type(arrays).__name__}")
    try:
        weight, bias = (np.atleast_1d(float_array(part)) for part in arrays)
    except (TypeError, ValueError) as error:
        raise PolicyError(f"{where} is (W [d], b), arrays of numbers: {error}") from error
    if weight.size != weight.shape[-1] or bias.size != 1:
        raise PolicyError(f"{where} has W {weight.shape} and b {bias.shape}; expected W [d] and one number b")
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise PolicyError(f"{where} holds values that aren't finite")
    return LinearProbe(weight.reshape(-1).copy(), float(bias.reshape(-1)[0]), pooling)


def probe_of_pack(source: str, where: str, lm: LanguageModel | None = None) -> LinearProbe:
    """The probe of an attribute-head pack of two classes on the last layer: how much more its target's logit is than the other's.

    Raises:
        ModelError: the pack can't be read, or is of another model than ``lm``. PolicyError: its head is another.
    """
    pack = read_pack(source, "attribute-head")
    if lm is not None:
        pack.check(lm)
    tensors, settings = pack.arrays("head.safetensors"), pack.card.settings
    weight, target = tensors.get("weight"), settings.get("target")
    if weight is None or "bias" not in tensors or weight.ndim != 2 or weight.shape[0] != 2 or target not in (0, 1):
        raise PolicyError(f"{where} {source!r} isn't a linear head of two classes with a target; fit one with `moralguard fit head`")
    if settings.get("layer", -1) != -1:
        raise PolicyError(f"{where} {source!r} reads layer {settings['layer']}; expected a head on the last layer (-1): fit it there")
    bias = tensors["bias"]
    return probe_from((weight[target] - weight[1 - target], bias[target] - bias[1 - target]), settings.get("pooling", "mean"), where)
