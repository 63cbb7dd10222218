"""Linear heads on the mean last hidden state, which PPLM and UDDIA climb: read from a pack, a module or arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import WithJsonSchema

from moralguard.backends.arrays import Array, is_tensor, namespace, namespace_of
from moralguard.errors import PolicyError
from moralguard.packs import read_pack

if TYPE_CHECKING:
    from moralguard.backends.hf import LanguageModel

Head = Annotated[
    Any,
    WithJsonSchema({"type": ["string", "null"], "description": "pack folder or pack:NAME; (W [classes, d], b [classes]) from Python only"}),
]


def read_attribute_head(head: Any, target: int | None, name: str, lm: LanguageModel | None = None) -> tuple[Array, Array, int]:
    """(W f32[classes, d], b f32[classes], target), read where ``head`` names a pack.

    As the model's kind of arrays, on its device; without a model as they were given, a pack's as NumPy arrays.

    Args:
        head: the name of a pack, or what ``checked_head`` gave. target: the class sought; None takes the pack's, 1 without a pack.
        name: the control's, for messages.

    Raises:
        ModelError: the pack can't be read, or is of another model than ``lm``.
        PolicyError: its tensors aren't a linear head on the mean of the last states, or the head has no such class.
    """
    known: Any = 1
    if isinstance(head, str):
        pack = read_pack(head, "attribute-head")
        if lm is not None:
            pack.check(lm)
        tensors = pack.arrays("head.safetensors")
        if not {"weight", "bias"} <= tensors.keys():
            raise PolicyError(f"{pack.folder} holds {', '.join(sorted(tensors))}; expected weight [classes, d] and bias [classes]")
        reads = pack.card.settings.get("layer", -1), pack.card.settings.get("pooling", "mean")
        if reads != (-1, "mean"):
            raise PolicyError(
                f"{pack.folder} reads the states of layer {reads[0]}, pooled by {reads[1]!r}; {name} steers by a head on the mean of the "
                "last states: fit it without other layers and poolings"
            )
        weight, bias = checked_head((tensors["weight"], tensors["bias"]))
        known = pack.card.settings.get("target")
    else:
        weight, bias = head
    sought = known if target is None else target
    if not isinstance(sought, int) or isinstance(sought, bool) or not 0 <= sought < weight.shape[0]:
        raise PolicyError(f"{name} target is {sought!r}, but the head has classes 0 to {weight.shape[0] - 1}")
    if lm is None:
        return weight, bias, sought
    arrays = namespace_of(lm)
    if weight.shape[1] != lm.width:
        raise PolicyError(f"{name} head has W {tuple(weight.shape)}, but {lm.name} has hidden states of {lm.width}")
    return arrays.float_array(weight, lm), arrays.float_array(bias, lm), sought


def checked_head(head: Any) -> tuple[Array, Array]:
    """(W f32[classes, d], b f32[classes]), once it is known to be a head; tensors stay tensors, the rest becomes NumPy arrays.

    Raises:
        PolicyError: it isn't (W, b) of fitting shapes and finite numbers, nor a torch.nn.Linear.
    """
    if is_tensor(getattr(head, "weight", None)):  # a torch.nn.Linear
        weight = head.weight
        head = (weight, head.bias if head.bias is not None else namespace("torch").full((weight.shape[0],), 0.0, weight.dtype))
    if not isinstance(head, (tuple, list)) or len(head) != 2:
        raise PolicyError("head is (W [classes, d], b [classes]), a torch.nn.Linear or a pack")
    try:
        arrays = namespace("torch" if any(is_tensor(part) for part in head) else "numpy")
        weight, bias = (arrays.copy_of(arrays.float_array(part)) for part in head)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PolicyError(f"head is (W [classes, d], b [classes]), arrays of numbers: {error}") from error
    if not bool(arrays.isfinite(weight).all() and arrays.isfinite(bias).all()):
        raise PolicyError("head holds values that aren't finite")
    if weight.ndim == 1 or weight.shape[0] == 1:  # a logistic head: its logit against 0
        weight, bias = weight.reshape(-1), bias.reshape(-1)[0]
        weight, bias = arrays.stack([weight - weight, weight]), arrays.stack([bias - bias, bias])
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise PolicyError(f"head has W {tuple(weight.shape)} and b {tuple(bias.shape)}; expected W [classes, d] and b [classes]")
    return (weight, bias)
