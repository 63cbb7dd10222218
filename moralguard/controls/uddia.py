"""UDDIA: before each token the biases of the top layers are tuned against toxicity and group bias, and put back after it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, WithJsonSchema, field_validator, model_validator

from moralguard.backends.capabilities import Capabilities
from moralguard.backends.numpy_arrays import float_array
from moralguard.backends.tensor_files import load_arrays
from moralguard.controls.attribute_head import Head, checked_head, read_attribute_head
from moralguard.controls.base import BoundControl, Control
from moralguard.errors import PolicyError
from moralguard.values import Value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moralguard.backends.hf import LanguageModel

Word = int | str
Pairs = Annotated[
    tuple[tuple[Word, Word], ...],
    WithJsonSchema({"type": "array", "items": {"type": "array", "items": {"type": ["string", "integer"]}, "minItems": 2, "maxItems": 2}}),
]
Frequencies = Annotated[
    Any, WithJsonSchema({"type": ["string", "null"], "description": "safetensors file with `frequencies` [V]; arrays from Python only"})
]


class UDDIA(Control):
    """Inference-time adaptive optimization of biases, for detoxifying, debiasing, or both.

    Yang et al. 2023 (arXiv 2210.04492). For each token, Adam changes the biases of the top T0 layers, ``steps`` times from their own
    values, along the gradient of

        CE(head(mean of the states so far, the newest, and one expected next), target)
          + bias_weight * sum_x p(x) [KL(p(a|x, c) || p(a|x)) + 1/2 sum_a p(a|x) log 2 p(a|x)]   (``group_polarity``)

    the second part only where |H(p, p(x|a=0)) - H(p, p(x|a=1))| > ``hellinger``. The newest token is then read on the clean history with
    the tuned biases, the law is tuned ** gm_scale * untuned ** (1 - gm_scale), and the biases are as they were. Where the perplexity
    of the text exceeds ``max_perplexity`` the token is done again with redo_step layers fewer, down to 1 at least; of attempts that
    all exceed it the one of the least perplexity stands.

    A row has biases and a number of layers of its own: a bias is an offset on the module's output, so that all rows share a forward.

    Deviations from the authors' code: its debiasing loss is overwritten by the whole loss and, Adam not caring for scale, never
    acts; here it acts as the paper means it. Theirs regenerates a whole text of a given length; here each token is done
    again before it is drawn, by the perplexity of the generated tokens under the base, the next one expected under the law in
    question (as it isn't drawn yet), so each token starts from T0. Linear layers without a bias (Llama's) get one of zero; norms
    are tuned only where they have one. The final norm belongs to no layer and isn't tuned; theirs is. Without ``frequencies`` tokens
    have 1 / max(id, 300), Zipf's law over the order of a byte-pair vocabulary; theirs are OpenWebText's. And ``components``.

    Args:
        head: (W [classes, d], b [classes]), a linear classifier of the mean last hidden state; W [d] is a logistic one. Or a pack of
            one (folder or ``pack:NAME``). None: no detoxifying.
        target: the class of the head that is sought; None takes the pack's own, 1 where there is no pack.
        pairs: words of two groups, such as (woman, man), whose embeddings give the direction between the groups: words (read with a
            leading space) or token ids. None: no debiasing.
        frequencies: f[V], how frequent each token is in general, or a safetensors file of them.
        components: principal components of the embeddings that are left out first, with their mean; 0 is as published.
        lr: Adam's learning rate; 0 deactivates.
        steps: of Adam a token; 0 deactivates.
        epsilon: Adam's, its default. A first step is lr g / (|g| + epsilon), nearly the sign of g: where a gradient is within the model's
            rounding of 0, its bias may move either way, and a text in another batch come out otherwise. 1e-6 settles that.
        top_layers: T0; a model that has fewer is tuned in all its layers. 0 deactivates.
        redo_step: Delta T.
        max_perplexity: TH; None never does a token again.
        gm_scale: weight of the tuned law in the geometric mean; 0 deactivates.
        hellinger: the difference of distances over which the law counts as biased.
        bias_weight: of the debiasing loss.
    """

    control_name: ClassVar[str] = "uddia"

    head: Head = None
    target: Annotated[int, Field(ge=0)] | None = None
    pairs: Pairs | None = None
    frequencies: Frequencies = None
    components: Annotated[int, Field(ge=0)] = 1
    lr: Annotated[float, Field(ge=0)] = 0.06
    steps: Annotated[int, Field(ge=0)] = 1
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    top_layers: Annotated[int, Field(ge=0)] = 18
    redo_step: Annotated[int, Field(ge=1)] = 3
    max_perplexity: Annotated[float, Field(gt=1)] | None = 30.0
    gm_scale: Annotated[float, Field(ge=0, le=1)] = 0.9
    hellinger: Annotated[float, Field(ge=0, le=1)] = 0.1
    bias_weight: Annotated[float, Field(ge=0)] = 0.05

    @field_validator("head", mode="before")
    @classmethod
    def _read_head(cls, head: Any) -> Any:
        if head is None:
            return None
        return str(head) if isinstance(head, (str, Path)) else checked_head(head)

    @field_validator("frequencies", mode="before")
    @classmethod
    def _read_frequencies(cls, frequencies: Any) -> Any:
        if frequencies is None:
            return None
        return str(frequencies) if isinstance(frequencies, (str, Path)) else _checked_frequencies(frequencies, "uddia frequencies")

    @model_validator(mode="after")
    def _has_an_aim(self) -> UDDIA:
        if self.head is None and not self.pairs:
            raise PolicyError("uddia has neither a head (against toxicity) nor pairs (against bias between two groups); give at least one")
        if self.head is not None:
            read_attribute_head(self.head, self.target, self.control_name)
        for name in () if self.pairs else ("frequencies", "components", "hellinger", "bias_weight"):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value is not None and (default is None or value != default):
                raise PolicyError(f"uddia's {name} belongs to the debiasing loss, which needs `pairs`, words of two groups")
        return self

    def token_frequencies(self) -> NDArray[np.float32] | None:
        """f32[V], read where ``frequencies`` names a file; None where none are given.

        Raises:
            ModelError: the file isn't a whole safetensors file. PolicyError: it holds something else.
        """
        if not isinstance(self.frequencies, str):
            given: NDArray[np.float32] | None = self.frequencies
            return given
        tensors = load_arrays(Path(self.frequencies))
        if "frequencies" not in tensors:
            raise PolicyError(f"{self.frequencies} holds {', '.join(sorted(tensors)) or 'nothing'}; expected `frequencies` [V]")
        return _checked_frequencies(tensors["frequencies"], f"uddia frequencies ({self.frequencies})")

    @property
    def active(self) -> bool:
        return all((self.lr, self.steps, self.top_layers, self.gm_scale, self.head is not None or self.bias_weight))

    def scaled(self, factor: float) -> Self:
        return self.replaced(lr=self.lr * factor)

    @property
    def needs(self) -> Capabilities:
        return Capabilities(grad=True, cache=True, auxiliary=True)

    def instead(self, missing: Sequence[str]) -> str:
        return (
            'tuning biases needs gradients through a PyTorch model with a plain cache; pplm with scope "hidden" climbs the same head on '
            "every backend"
        )

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundControl[UDDIA]:
        from moralguard.controls.uddia_tuning import BoundUDDIA

        return BoundUDDIA(self, lm)


def _checked_frequencies(frequencies: Any, where: str) -> NDArray[np.float32]:
    """f32[V], finite, none negative, not all 0."""
    try:
        found: NDArray[np.float32] = float_array(frequencies)
    except (TypeError, ValueError) as error:
        raise PolicyError(f"{where} are numbers [V], one a token, or a safetensors file: {error}") from error
    if found.ndim != 1 or not np.isfinite(found).all() or (found < 0).any() or not found.any():
        raise PolicyError(f"{where} have shape {found.shape}; expected finite numbers [V] of at least 0, not all 0")
    return found
