"""PPLM: what the model knows of the text is moved along the gradient of an attribute model before each token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from moralguard.backends.arrays import Array, namespace_of
from moralguard.backends.capabilities import Capabilities
from moralguard.controls.attribute_head import Head, checked_head, read_attribute_head
from moralguard.controls.base import BoundControl, Control
from moralguard.controls.conflicts import Thing, things
from moralguard.errors import PolicyError
from moralguard.values import Value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moralguard.backends.hf import LanguageModel

Bags = Annotated[
    tuple[tuple[int | str, ...], ...],
    WithJsonSchema({"type": "array", "items": {"type": "array", "items": {"type": ["string", "integer"]}}}),
]


class PPLM(Control):
    """Plug and Play Language Models: gradient steering of the key-value history.

    Dathathri et al. 2020 (arXiv 1912.02164), section 3. Per token, for every layer l: Delta_l -= stepsize * g_l / ||g_l|| ** gamma,
    ``num_iterations`` times, g the gradient of the attribute loss plus kl_scale * KL(perturbed || unperturbed); the perturbed cache
    is kept for later tokens; the law is perturbed ** gm_scale * unperturbed ** (1 - gm_scale).

    Norms (one a layer, over keys and values together) and losses are kept per row, so that a batch gives what each row gives
    alone. Bag of words: the norm is the running maximum over iterations and tokens. Head, or both: a fresh norm each iteration.
    Deviations from the authors' code: a window covers the **most recent** positions, as the paper says (the code marks the oldest,
    its issue 31); padding is told by the mask, not by token id 0; vanishing norms are floored where gamma > 1.

    ``scope="hidden"`` is a variant of our own, no method of the paper: only the last hidden state is moved, Delta -= stepsize * g /
    ||g|| ** gamma with the gradient of the same losses worked out by hand (``pplm_hidden``), and the token's law is that of the head
    on the moved state. It needs no gradient through the model, so it runs on every backend and costs a few products with the
    unembedding a token; but later tokens don't see the change, and the head's loss looks at the states so far, not ahead.

    Args:
        bag_of_words: bags of token ids or words; words are read with a leading space, and those of several tokens are dropped.
        head: (W [classes, d], b [classes]), a linear classifier of the mean last hidden state; W [d] is a logistic one. Or a pack
            of one (folder or ``pack:NAME``).
        target: the class of the head that is sought; None takes the pack's own, 1 where there is no pack.
        stepsize: alpha of the paper; 0 deactivates.
        num_iterations: gradient steps a token; 0 deactivates.
        gamma: exponent of the norm.
        kl_scale: weight of the KL term.
        gm_scale: weight of the perturbed law in the geometric mean.
        window_length: most recent positions that may change; 0 is all.
        decay: weights 1/window_length ... 1 over the window, the newest largest.
        horizon_length: how many expected next tokens the head's loss looks ahead.
        grad_length: from this generated token on nothing is perturbed any more.
        scope: "cache" as published (PyTorch models), or "hidden"; window_length, decay and horizon_length belong to "cache".
    """

    control_name: ClassVar[str] = "pplm"
    any_arrays: ClassVar[bool] = True

    bag_of_words: Bags | None = None
    head: Head = None
    target: Annotated[int, Field(ge=0)] | None = None
    stepsize: Annotated[float, Field(ge=0)] = 0.02
    num_iterations: Annotated[int, Field(ge=0)] = 3
    gamma: Annotated[float, Field(ge=0)] = 1.5
    kl_scale: Annotated[float, Field(ge=0)] = 0.01
    gm_scale: Annotated[float, Field(ge=0, le=1)] = 0.9
    window_length: Annotated[int, Field(ge=0)] = 0
    decay: bool = False
    horizon_length: Annotated[int, Field(ge=1)] = 1
    grad_length: Annotated[int, Field(ge=0)] = 10000
    scope: Literal["cache", "hidden"] = "cache"

    @field_validator("head", mode="before")
    @classmethod
    def _read_head(cls, head: Any) -> Any:
        if head is None:
            return None
        # a pack is read in ``attribute``; the setting stays what a policy file can hold
        return str(head) if isinstance(head, (str, Path)) else checked_head(head)

    @model_validator(mode="after")
    def _has_attribute(self) -> PPLM:
        if not self.bag_of_words and self.head is None:
            raise PolicyError("pplm has neither a bag_of_words nor a head; give at least one")
        for name in ("window_length", "decay", "horizon_length") if self.scope == "hidden" else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise PolicyError(f'pplm with scope "hidden" moves the last hidden state alone, where {name} means nothing; leave it out')
        self.attribute()
        return self

    def attribute(self, lm: LanguageModel | None = None) -> tuple[Array, Array, int] | None:
        """(W f32[classes, d], b f32[classes], target), read where ``head`` names a pack; None without a head.

        As the model's kind of arrays, on its device; without a model as they were given, a pack's as NumPy arrays.

        Raises:
            ModelError: the pack can't be read, or is of another model than ``lm``.
            PolicyError: its tensors aren't a linear head on the mean of the last states, or the head has no such class.
        """
        if self.head is None:
            return None
        return read_attribute_head(self.head, self.target, self.control_name, lm)

    def bags(self, lm: LanguageModel) -> list[Array]:
        """Token ids i64[n] of every bag, on the model's device.

        Raises:
            PolicyError: an id is outside the vocabulary, or a bag has no word of a single token.
        """
        return [_bag_ids(lm, bag, i) for i, bag in enumerate(self.bag_of_words or ())]

    @property
    def active(self) -> bool:
        return self.stepsize != 0 and self.num_iterations != 0 and self.gm_scale != 0

    def scaled(self, factor: float) -> Self:
        return self.replaced(stepsize=self.stepsize * factor)

    @property
    def seeks(self) -> tuple[Thing, ...]:
        words = (word for bag in self.bag_of_words or () for word in bag if isinstance(word, str))
        return things("word", *(word.strip().casefold() for word in words))

    @property
    def needs(self) -> Capabilities:
        if self.scope == "hidden":
            return Capabilities(hidden=True, auxiliary=self.head is not None)
        return Capabilities(grad=True, cache=True, auxiliary=True)

    def instead(self, missing: Sequence[str]) -> str:
        if self.scope == "hidden":
            return super().instead(missing)
        return (
            'perturbing the key-value cache (scope="cache") needs a PyTorch model with a plain cache; scope="hidden" steers the last '
            "hidden state and runs on every backend"
        )

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundControl[PPLM]:
        if self.scope == "hidden":
            from moralguard.controls.pplm_hidden import HiddenPPLM

            return HiddenPPLM(self, lm)
        from moralguard.controls.pplm_cache import BoundPPLM

        return BoundPPLM(self, lm)


def _bag_ids(lm: LanguageModel, bag: tuple[int | str, ...], index: int) -> Array:
    ids: dict[int, None] = {}
    for word in bag:
        if isinstance(word, int):
            if not 0 <= word < lm.vocab_size:
                raise PolicyError(f"pplm bag {index} holds token id {word}, outside the vocabulary of {lm.name} (0 to {lm.vocab_size - 1})")
            ids[word] = None
            continue
        if lm.tokenizer is None:
            raise PolicyError(f"pplm bag {index} holds the word {word!r}, but {lm.name} was given without a tokenizer; give token ids")
        tokens = lm.tokenizer(" " + word.strip(), add_special_tokens=False)["input_ids"]
        if len(tokens) == 1:
            ids[int(tokens[0])] = None
    if not ids:
        raise PolicyError(f"pplm bag {index} has no word of a single token in the vocabulary of {lm.name}; give shorter words or token ids")
    return namespace_of(lm).integers(list(ids), lm)
