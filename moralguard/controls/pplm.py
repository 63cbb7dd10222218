"""PPLM: the KV cache is moved along the gradient of an attribute model before each token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, WithJsonSchema, field_validator, model_validator

from moralguard.backends.capabilities import Capabilities
from moralguard.backends.hf import ForwardOutput, LanguageModel
from moralguard.backends.kv_cache import KeyValue, cache_from, key_values
from moralguard.controls.base import BoundControl, Control
from moralguard.decoding.passes import Pass, PassView
from moralguard.decoding.step import Columns, Step
from moralguard.decoding.terms import Mix, Terms
from moralguard.errors import PolicyError
from moralguard.packs import read_pack
from moralguard.values import Value

_SMALL = 1e-15
# With gamma > 1 and a fresh norm a step has the length stepsize * ||g|| ** (1 - gamma), unbounded as g vanishes: norms are
# floored, which bounds it (at gamma 1.5 by 10,000 stepsize) and leaves every gradient larger than the floor as published (a tiny
# random Llama's are 1e-5 to 1e-1).
_NORM_FLOOR = 1e-8

Bags = Annotated[
    tuple[tuple[int | str, ...], ...],
    WithJsonSchema({"type": "array", "items": {"type": "array", "items": {"type": ["string", "integer"]}}}),
]
Head = Annotated[
    Any,
    WithJsonSchema({"type": ["string", "null"], "description": "pack folder or pack:NAME; (W [classes, d], b [classes]) from Python only"}),
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
    """

    control_name: ClassVar[str] = "pplm"

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

    @field_validator("head", mode="before")
    @classmethod
    def _read_head(cls, head: Any) -> Any:
        if head is None:
            return None
        # a pack is read in ``attribute``; the setting stays what a policy file can hold
        return str(head) if isinstance(head, (str, Path)) else _checked(head)

    @model_validator(mode="after")
    def _has_attribute(self) -> PPLM:
        if not self.bag_of_words and self.head is None:
            raise PolicyError("pplm has neither a bag_of_words nor a head; give at least one")
        self.attribute()
        return self

    def attribute(self, lm: LanguageModel | None = None) -> tuple[torch.Tensor, torch.Tensor, int] | None:
        """(W f32[classes, d], b f32[classes], target), read where ``head`` names a pack; None without a head.

        Raises:
            ModelError: the pack can't be read, or is of another model than ``lm``.
            PolicyError: its tensors aren't a linear head on the mean of the last states, or the head has no such class.
        """
        if self.head is None:
            return None
        target: Any = 1
        if isinstance(self.head, str):
            pack = read_pack(self.head, "attribute-head")
            if lm is not None:
                pack.check(lm)
            tensors = pack.tensors("head.safetensors")
            if not {"weight", "bias"} <= tensors.keys():
                raise PolicyError(f"{pack.folder} holds {', '.join(sorted(tensors))}; expected weight [classes, d] and bias [classes]")
            reads = pack.card.settings.get("layer", -1), pack.card.settings.get("pooling", "mean")
            if reads != (-1, "mean"):
                raise PolicyError(
                    f"{pack.folder} reads the states of layer {reads[0]}, pooled by {reads[1]!r}; pplm steers by a head on the mean of the "
                    "last states: fit it without other layers and poolings"
                )
            weight, bias = _checked((tensors["weight"], tensors["bias"]))
            target = pack.card.settings.get("target")
        else:
            weight, bias = self.head
        target = target if self.target is None else self.target
        if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < weight.shape[0]:
            raise PolicyError(f"pplm target is {target!r}, but the head has classes 0 to {weight.shape[0] - 1}")
        return weight, bias, target

    @property
    def active(self) -> bool:
        return self.stepsize != 0 and self.num_iterations != 0 and self.gm_scale != 0

    @property
    def needs(self) -> Capabilities:
        return Capabilities(grad=True, cache=True, auxiliary=True)

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundPPLM:
        return BoundPPLM(self, lm)


class BoundPPLM(BoundControl[PPLM]):
    def __init__(self, settings: PPLM, lm: LanguageModel):
        # The clean pass: the request's own text on the base's weights, which in the own loop is the base row itself.
        self.clean = Pass(lm, states=settings.head is not None)
        super().__init__(settings, lm, (self.clean,))
        if any(parameter.is_inference() for parameter in lm.model.parameters()):
            raise PolicyError(f"pplm needs gradients, but {lm.name} was built inside torch.inference_mode(); load it outside")
        self.bags = [_bag_ids(lm, bag, i).to(lm.device) for i, bag in enumerate(settings.bag_of_words or ())]
        self.head: tuple[torch.Tensor, torch.Tensor] | None = None
        attribute = settings.attribute(lm)
        if attribute is not None:
            weight, bias, self.target = attribute
            if weight.shape[1] != lm.width:
                raise PolicyError(f"pplm head has W {tuple(weight.shape)}, but {lm.name} has hidden states of {lm.width}")
            self.head = (weight.to(lm.device), bias.to(lm.device))

    def columns(self, step: Step) -> Columns:
        view = step.of(self.clean)
        columns = {"mask": view.mask[:, :-1], "norm": torch.zeros(step.rows, 0, device=self.lm.device)}
        pairs = [(keys[:, :, :-1], values[:, :, :-1]) for keys, values in view.key_values()]
        return columns | _pack(pairs)

    def terms(self, step: Step) -> Terms:
        view = step.of(self.clean)
        past, mask = _unpack(step.columns), step.columns["mask"]
        last = step.history[:, -1:]
        norm = step.columns["norm"]
        if mask.shape[1]:
            past, norm = self._perturb(step, view, past, mask, last, norm)
        with torch.no_grad():
            output, extended = self._read(past, mask, last)
        gm = step.weight(self.settings.gm_scale)
        # so that division by the temperature gives softmax(z_p / T) ** gm * softmax(z) ** (1 - gm)
        base_weight = step.temperature * (1 - gm) - 1
        carry = {"norm": norm} | _pack(extended)
        return Terms((Mix((output.logits,), (gm,), base_weight),), carry=carry)

    def commit(self, step: Step, carry: Columns, tokens: torch.Tensor) -> Columns:
        mask = step.columns["mask"]
        return carry | {"mask": torch.cat([mask, mask.new_ones(mask.shape[0], 1)], -1)}

    def _read(self, past: list[KeyValue], mask: torch.Tensor, last: torch.Tensor) -> tuple[ForwardOutput, list[KeyValue]]:
        """The last token read with this past: logits at it, and the past extended by it."""
        cache = cache_from(past)
        whole = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], -1)
        output = self.lm.forward(
            cache=cache,
            input_ids=last,
            attention_mask=None if bool(whole.all()) else whole,
            position_ids=mask.sum(-1, keepdim=True),
            hidden=self.head is not None,
        )
        return output, key_values(cache)

    def _perturb(
        self,
        step: Step,
        view: PassView,
        past: list[KeyValue],
        mask: torch.Tensor,
        last: torch.Tensor,
        norm: torch.Tensor,
    ) -> tuple[list[KeyValue], torch.Tensor]:
        """past + Delta, and the norms to keep."""
        settings = self.settings
        weights = self._position_weights(mask)
        stepsize = torch.where(step.generated < settings.grad_length, settings.stepsize, 0.0).float()
        running = self.head is None  # bag of words alone: the norm is a running maximum
        delta = [(torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)) for k, v in past]
        for _ in range(settings.num_iterations):
            leaves = [part.detach().requires_grad_() for pair in delta for part in pair]
            with torch.enable_grad():
                moved = [(k + leaves[2 * i].to(k.dtype), v + leaves[2 * i + 1].to(v.dtype)) for i, (k, v) in enumerate(past)]
                output, _ = self._read(moved, mask, last)
                loss = self._loss(output, view, mask).sum()
            gradients = torch.autograd.grad(loss, leaves)
            weighted = [g.float() * weights for g in gradients]
            square = [(g * g).sum(dim=(1, 2, 3)) for g in weighted]
            fresh = torch.stack([square[2 * i] + square[2 * i + 1] for i in range(len(past))], dim=-1).sqrt()  # [R, layers]
            norm = torch.maximum(norm, fresh) if running and norm.shape[1] else fresh + _SMALL
            divisor = norm.clamp_min(_NORM_FLOOR) if settings.gamma > 1 else norm
            step_of = stepsize[:, None] / divisor**settings.gamma
            delta = [
                (
                    dk - step_of[:, i, None, None, None] * weighted[2 * i],
                    dv - step_of[:, i, None, None, None] * weighted[2 * i + 1],
                )
                for i, (dk, dv) in enumerate(delta)
            ]
        perturbed = [(k + dk.to(k.dtype), v + dv.to(v.dtype)) for (k, v), (dk, dv) in zip(past, delta, strict=True)]
        return perturbed, norm

    def _loss(self, output: ForwardOutput, view: PassView, mask: torch.Tensor) -> torch.Tensor:
        """Attribute loss plus KL of each row, f32[R]."""
        settings = self.settings
        p = torch.softmax(output.logits, -1)
        loss = p.new_zeros(p.shape[0])
        for bag in self.bags:
            loss = loss - torch.log(p[:, bag].sum(-1))
        if self.head is not None:
            weight, bias = self.head
            logits = self._mean_state(output, p, view, mask) @ weight.T + bias
            loss = loss - torch.log_softmax(logits, -1)[:, self.target]
        if settings.kl_scale > 0:
            q = torch.softmax(view.logits, -1)
            q = q + _SMALL * (q <= _SMALL)
            corrected = p + _SMALL * (p <= _SMALL)
            loss = loss + settings.kl_scale * (corrected * (corrected / q).log()).sum(-1)
        return loss

    def _mean_state(self, output: ForwardOutput, p: torch.Tensor, view: PassView, mask: torch.Tensor) -> torch.Tensor:
        """h_bar f32[R, d]: mean of the last hidden states so far and of ``horizon_length`` expected next ones.

        Only the expected tokens carry gradient, through p; they are read on the clean cache.
        """
        if output.hidden is None:
            raise RuntimeError("the head needs hidden states")
        length = mask.sum(-1)
        total = view.hidden_sum + output.hidden.detach().float()
        embeddings = self.lm.model.get_input_embeddings().weight
        expected = (p.to(embeddings.dtype) @ embeddings)[:, None]
        cache, seen = cache_from(view.key_values()), view.mask
        for ahead in range(self.settings.horizon_length):
            seen = torch.cat([seen, seen.new_ones(seen.shape[0], 1)], -1)
            future = self.lm.forward(
                cache=cache,
                inputs_embeds=expected,
                attention_mask=None if bool(seen.all()) else seen,
                position_ids=length[:, None] + 1 + ahead,
                hidden=True,
            )
            if future.hidden is not None:
                total = total + future.hidden.float()
        return total / (length + 1 + self.settings.horizon_length)[:, None]

    def _position_weights(self, mask: torch.Tensor) -> torch.Tensor:
        """Weight of every past position, f32[R, 1, W, 1]: 0 at padding and outside the window."""
        width, window = mask.shape[1], self.settings.window_length
        weights = mask.float()
        if 0 < window < width:
            age = torch.arange(width - 1, -1, -1, device=mask.device)  # 0 is the newest
            recent = (age < window).float()
            if self.settings.decay:
                recent = recent * (window - age).clamp(min=0) / window
            # rows no longer than the window change everywhere
            weights = torch.where((mask.sum(-1) > window)[:, None], weights * recent, weights)
        return weights[:, None, :, None]


def _checked(head: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(W f32[classes, d], b f32[classes]), once it is known to be a head."""
    if isinstance(head, torch.nn.Linear):
        head = (head.weight, head.bias if head.bias is not None else torch.zeros(head.weight.shape[0]))
    if not isinstance(head, (tuple, list)) or len(head) != 2:
        raise PolicyError("head is (W [classes, d], b [classes]), a torch.nn.Linear or a pack")
    try:
        weight, bias = (torch.as_tensor(part).detach().to(device="cpu", dtype=torch.float32).clone() for part in head)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PolicyError(f"head is (W [classes, d], b [classes]), arrays of numbers: {error}") from error
    if not bool(torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise PolicyError("head holds values that aren't finite")
    if weight.ndim == 1 or weight.shape[0] == 1:  # a logistic head: its logit against 0
        weight = torch.stack([torch.zeros_like(weight.reshape(-1)), weight.reshape(-1)])
        bias = torch.stack([torch.zeros(()), bias.reshape(-1)[0]])
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise PolicyError(f"head has W {tuple(weight.shape)} and b {tuple(bias.shape)}; expected W [classes, d] and b [classes]")
    return (weight, bias)


def _bag_ids(lm: LanguageModel, bag: tuple[int | str, ...], index: int) -> torch.Tensor:
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
    return torch.tensor(list(ids))


def _pack(pairs: list[KeyValue]) -> Columns:
    return {f"{side}.{i}": tensor for i, pair in enumerate(pairs) for side, tensor in zip(("key", "value"), pair, strict=True)}


def _unpack(columns: Columns) -> list[KeyValue]:
    layers = sum(name.startswith("key.") for name in columns)
    return [(columns[f"key.{i}"], columns[f"value.{i}"]) for i in range(layers)]
