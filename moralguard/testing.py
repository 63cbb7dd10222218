"""Checks for anyone's control: the invariants that a guard relies on, run against one control on a small model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NoReturn

import torch

from moralguard.backends.hf import LanguageModel
from moralguard.backends.hf_files import quiet_transformers
from moralguard.backends.prompts import PromptLike, encode_prompt
from moralguard.controls.base import BoundControl, Control
from moralguard.controls.registry import control_class, control_names, write_control
from moralguard.decoding.loop import grad_mode
from moralguard.decoding.outcome import Outcome
from moralguard.decoding.passes import Pass
from moralguard.decoding.rectification import rectify
from moralguard.decoding.session import Session
from moralguard.decoding.step import Columns, Step
from moralguard.decoding.terms import Attenuation, Dense, Keep, LowRank, Mix, Only, Sparse, Terms
from moralguard.errors import PolicyError, PromptError
from moralguard.guard import Guard
from moralguard.models import load_model
from moralguard.policy import Policy
from moralguard.values import Value

# Tokens that are decoded; every step of them is checked.
_TOKENS = 4
# Log-probabilities may differ by this, plus a multiple of the model's own rounding between a row alone and in a batch.
_TOLERANCE = 2e-3
_NOISE_FACTOR = 20.0
_TEXTS = ("The weather today is", "She told me that the people who live next door are", "My friend")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# For controls that derive their prompts from the policy's values.
_VALUES = (Value(id="respectful", statement="The text does not insult anyone."),)


class InvariantError(AssertionError):
    """A control breaks a rule that the guard relies on; the message names the control, the rule and the place."""


def check_control(control: Control, *, model: Any = None, prompts: Sequence[PromptLike] | None = None) -> None:
    """Run a control for a few tokens and check what every control must keep.

    Settings are frozen and survive a policy file (where they hold no tensor or function). An inactive control changes nothing. For
    an active one: ``terms`` is well formed, pure and repeatable; rows don't depend on their neighbours, nor on left padding; state
    follows its request when rows are reordered; a base -inf stays -inf; rows it leaves alone are bit-identical; listed twice it acts
    once; ``guard.generate`` and ``model.generate`` under the guard give the same greedy tokens; the model is left as it was.

    Args:
        control: settings, as in a policy.
        model: whatever ``Guard`` takes; None builds a tiny random Llama without a tokenizer (vocabulary 128, hidden size 32), on
            which words and text prefixes can't be read: give token ids in the settings, or a model with a tokenizer.
        prompts: at least two, of different lengths in tokens.

    Raises:
        InvariantError: the first rule that is broken.
        PolicyError: the control itself refuses the model.
    """
    if not isinstance(control, Control):
        raise InvariantError(f"{control!r} is a {type(control).__name__}; expected an object of a subclass of moralguard.controls.Control")
    lm = load_model(tiny_model() if model is None else model)
    _Check(control, lm, _encode(lm, prompts)).run()


def tiny_model() -> Any:
    """A random Llama of two layers, the same each time; the caller's random state stays as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.25,  # with the usual .02 the law is nearly uniform, and hides mistakes
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def _encode(lm: LanguageModel, prompts: Sequence[PromptLike] | None) -> list[list[int]]:
    if prompts is None:
        if lm.tokenizer is not None:
            prompts = _TEXTS
        else:
            ids = torch.randint(lm.vocab_size, (16,), generator=torch.Generator().manual_seed(0)).tolist()
            prompts = [ids[:3], ids[3:8], ids[8:16]]
    rows = [encode_prompt(lm, prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
    if len({len(row) for row in rows}) < 2:
        raise PromptError("check_control needs at least two prompts of different lengths in tokens, or padding would go untested")
    return rows


@dataclass(frozen=True)
class _Walk:
    """A greedy run of the batch: tokens of each row, and how far the first was ahead of the second (in logits)."""

    tokens: list[list[int]]
    leads: list[list[float]]


class _Check:
    def __init__(self, control: Control, lm: LanguageModel, prompts: list[list[int]]):
        self.control, self.lm, self.prompts = control, lm, prompts

    def fail(self, what: str, cause: Exception | None = None) -> NoReturn:
        raise InvariantError(f"{self.control.versioned_name()}: {what}") from cause

    def run(self) -> None:
        self.frozen()
        self.round_trip()
        _ = self.lm.head  # runs the model once to find its head: before the snapshot, as it is no work of the control's
        before = _snapshot(self.lm.model)
        if not self.control.active:
            self.inactive()
        else:
            guard = self.guard(self.control)
            if len(guard.controls) != 1:
                self.fail("`active` is True and then False: it must depend on the settings alone")
            walk = self.walk(guard.controls[0])
            self.generation(guard, walk)
        self.model_unchanged(before)

    def guard(self, *controls: Control) -> Guard:
        return Guard(Policy(name="check", values=_VALUES, controls=controls), self.lm)

    # --- settings -------------------------------------------------------------------------------------------------------------

    def frozen(self) -> None:
        if not type(self.control).model_config.get("frozen"):
            self.fail("its settings aren't frozen: a guard is shared by threads; don't override model_config['frozen']")
        # the control's own settings first, those of every control behind them
        for name in sorted(type(self.control).model_fields, key=lambda name: name in Control.model_fields):
            try:
                setattr(self.control, name, getattr(self.control, name))
            except (ValueError, TypeError, AttributeError):
                continue
            self.fail(f"setting {name!r} can be assigned: settings must be frozen, as a guard is shared by threads")

    def round_trip(self) -> None:
        known = control_names()
        name = self.control.versioned_name()
        if self.control.control_name in known and control_class(name) is not type(self.control):
            self.fail(f"its name belongs to {known[self.control.control_name]}: choose another control_name")
        try:
            data = write_control(self.control)
        except PolicyError:
            return  # it holds a tensor, a model or a function, which no policy file does
        plain = json.loads(json.dumps(data))
        try:
            if self.control.control_name in known:
                read = Policy.load({"controls": [plain]}).effective_controls()[0]
            else:  # not installed as an entry point: a policy can't name it yet
                read = type(self.control)(**{key: value for key, value in plain.items() if key != "control"})
            again = write_control(read)
        except PolicyError as error:
            self.fail(f"its policy data {plain} can't be read back: {error}", error)
        if json.loads(json.dumps(again)) != plain:
            self.fail(f"its settings change when they are written to a policy and read back: {plain} became {again}")

    def inactive(self) -> None:
        guard, plain = self.guard(self.control), self.guard()
        for settings in ({"do_sample": False}, {"do_sample": True, "temperature": 1.0}):
            mine = guard.generate(self.prompts, seed=0, max_new_tokens=_TOKENS, **settings).token_ids
            if mine != plain.generate(self.prompts, seed=0, max_new_tokens=_TOKENS, **settings).token_ids:
                self.fail("`active` is False, but the text differs from that of an empty policy")
        if guard.controls or guard.counters.rows_touched:
            self.fail("`active` is False, but the guard runs it: `active` must depend on the settings alone")

    # --- steps ----------------------------------------------------------------------------------------------------------------

    def walk(self, bound: BoundControl[Any]) -> _Walk:
        tokens: list[list[int]] = [[] for _ in self.prompts]
        leads: list[list[float]] = [[] for _ in self.prompts]
        with grad_mode((bound,)):
            batch = Session(self.lm, (bound,), self.prompts, own_base=True)
            alone = [Session(self.lm, (bound,), [prompt], own_base=True) for prompt in self.prompts]
            for index in range(_TOKENS):
                noise = max(_gap_of_laws(self.base(batch)[i : i + 1], self.base(one)) for i, one in enumerate(alone))
                self.check_step(bound, self.step_of(batch, bound), noise, f"step {index}")
                outcome = self.outcome(batch)
                for i, one in enumerate(alone):
                    self.same_law(
                        outcome.logits[i : i + 1],
                        self.outcome(one).logits,
                        outcome.base[i : i + 1],
                        noise,
                        f"step {index}, row {i}: the law differs between the request alone and in a left-padded batch: neighbours and "
                        "padding must not matter (step.mask tells padding, columns keep state)",
                    )
                drawn = outcome.logits.argmax(-1)
                top = outcome.logits.topk(2, dim=-1).values
                for i, token in enumerate(drawn.tolist()):
                    tokens[i].append(token)
                    leads[i].append(float(top[i, 0] - top[i, 1]))
                for session, chosen in ((batch, drawn), *((one, drawn[i : i + 1]) for i, one in enumerate(alone))):
                    self.advance(session, bound, chosen)
            self.reordered(batch)
        return _Walk(tokens, leads)

    def base(self, session: Session) -> torch.Tensor:
        return session.table.view(Pass(self.lm)).logits

    def outcome(self, session: Session) -> Outcome:
        outcome = session.step()
        if outcome.failures:
            error = outcome.failures[0].error
            self.fail(f"it raised {type(error).__name__}: {error}", error)
        return outcome

    def step_of(self, session: Session, bound: BoundControl[Any]) -> Step:
        """The step that the session is at, with logits that nobody else holds."""
        base = session.table.view(Pass(self.lm))
        captured = base.group.hidden is not None
        step = Step(
            logits=base.logits.clone(),
            temperature=torch.ones(session.rows, device=base.logits.device),
            history=session.history,
            mask=session.mask,
            generated=session.generated,
            hidden=base.hidden if captured else None,
            head_logits=base.head_logits if captured else None,
            view=session.table.view,
        )
        columns = session.columns[0]
        if columns is None:
            columns = self.call(bound.columns, step, "columns")
            self.check_columns(columns, step.rows, "columns()")
        return replace(step, columns=columns)

    def call(self, method: Callable[[Step], Any], step: Step, what: str) -> Any:
        try:
            return method(step)
        except Exception as error:
            self.fail(f"{what} raised {type(error).__name__}: {error} ({step.rows} rows)", error)

    def terms(self, bound: BoundControl[Any], step: Step) -> Terms:
        terms = self.call(bound.terms, step, "terms")
        problem = _problem_of(terms, step)
        if problem:
            self.fail(f"terms isn't well formed: {problem}")
        return terms

    def check_step(self, bound: BoundControl[Any], step: Step, noise: float, where: str) -> None:
        base = step.logits.clone()
        seen = _tensors_of(step, bound.passes)
        copies = {name: tensor.clone() for name, tensor in seen.items()}
        terms = self.terms(bound, step)
        first = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in _flat(terms).items()}
        guarded = rectify(step.logits, [terms]).logits
        if terms.rows is not None:
            changed = ~terms.rows & ~_same_bits(guarded, base)
            if bool(changed.any()):
                row = int(changed.nonzero()[0])
                self.fail(f"{where}, row {row}: terms.rows is False there, but the row isn't bit-identical to the base")
        for name, tensor in seen.items():
            if not _equal(tensor, copies[name]):
                self.fail(f"{where}: terms wrote to the step's {name}; work on a copy, others read it too")
        self.same_again(bound, step, first, where)
        for row in range(step.rows):
            single = step.row(row)
            law = rectify(single.logits, [self.terms(bound, single)]).logits
            what = f"{where}, row {row}: terms of the row alone differ from its terms in the batch: a row depends on itself alone"
            self.same_law(guarded[row : row + 1], law, base[row : row + 1], noise, what)
        self.check_veto(bound, step, where)
        self.same_again(bound, step, first, where)

    def same_again(self, bound: BoundControl[Any], step: Step, first: dict[str, Any], where: str) -> None:
        again = _flat(self.terms(bound, step))
        names = sorted(name for name in first.keys() | again.keys() if not _equal(first.get(name), again.get(name)))
        if names:
            self.fail(f"{where}: terms called twice differ ({', '.join(names)}): terms must be a pure function of the step")

    def check_veto(self, bound: BoundControl[Any], step: Step, where: str) -> None:
        """The base removes its most probable token and some others; they must stay removed."""
        logits = step.logits.clone()
        logits.scatter_(-1, logits.argmax(-1, keepdim=True), float("-inf"))
        logits[:, ::7] = float("-inf")
        vetoed = torch.isneginf(logits)
        masked = replace(step, logits=logits)
        guarded = rectify(masked.logits, [self.terms(bound, masked)]).logits
        if not bool(torch.isneginf(guarded[vetoed]).all()):
            self.fail(f"{where}: a token that the base had removed (-inf) came back")

    def same_law(self, one: torch.Tensor, other: torch.Tensor, base: torch.Tensor, noise: float, what: str) -> None:
        """Fail unless two rows of guarded logits give one law, up to rounding; so does a token on the boundary of a filter."""
        tolerance = _TOLERANCE + _NOISE_FACTOR * noise
        kept_one, kept_other = ~torch.isneginf(one), ~torch.isneginf(other)
        for kept, ours in ((kept_one, kept_other), (kept_other, kept_one)):
            extra = kept & ~ours
            if bool(extra.any()):
                boundary = base.masked_fill(~ours, float("inf")).min()
                if bool(((base[extra] - boundary).abs() > noise * _NOISE_FACTOR + 1e-5).any()):
                    self.fail(f"{what} (token {int(extra.nonzero()[0, -1])} is kept in one and removed in the other)")
        both = kept_one & kept_other
        gap = _gap_of_laws(one.masked_fill(~both, float("-inf")), other.masked_fill(~both, float("-inf")))
        if not gap <= tolerance:
            self.fail(f"{what} (log-probabilities differ by {gap:.3g})")

    def advance(self, session: Session, bound: BoundControl[Any], tokens: torch.Tensor) -> None:
        before = session.columns[0]
        for failure in session.commit(tokens):
            self.fail(f"commit raised {type(failure.error).__name__}: {failure.error}", failure.error)
        after = session.columns[0]
        if before is not None and after is not None:
            self.check_columns(after, session.rows, "commit()")
            if before.keys() != after.keys():
                self.fail(f"commit changed the columns from {sorted(before)} to {sorted(after)}: keep every column, empty if need be")
        session.advance()

    def check_columns(self, columns: Columns, rows: int, where: str) -> None:
        for name, value in columns.items():
            if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape[0] != rows:
                shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                self.fail(f"{where} gives column {name!r} as {shape}; expected a tensor with one row a request ({rows})")

    def reordered(self, session: Session) -> None:
        """Forks and drops rows, as beams and ended requests do."""
        before = self.outcome(session)
        # without the longest row, so that its neighbours' padding may go too
        longest = max(range(session.rows), key=lambda row: len(self.prompts[row]))
        others = [row for row in range(session.rows) if row != longest]
        order = torch.tensor([*reversed(others), others[0]], device=self.lm.device)
        session.select(order)
        after = self.outcome(session)
        for place, row in enumerate(order.tolist()):
            self.same_law(
                after.logits[place : place + 1],
                before.logits[row : row + 1],
                before.base[row : row + 1],
                0.0,
                f"after rows were reordered, row {row} has another law: state belongs in columns, which follow their request",
            )

    # --- generation -----------------------------------------------------------------------------------------------------------

    def generation(self, guard: Guard, walk: _Walk) -> None:
        greedy: dict[str, Any] = {"max_new_tokens": _TOKENS, "do_sample": False, "seed": 0}
        own = guard.generate(self.prompts, **greedy).token_ids
        self.same_tokens(own, own, walk, "guard.generate gives other tokens than its own steps")
        twice = self.guard(self.control, self.control).generate(self.prompts, **greedy).token_ids
        self.same_tokens(own, twice, walk, "listed twice it gives other tokens than once: it must act once, and bind alike each time")
        with guard.attach():
            attached = self.transformers_generate()
        self.same_tokens(own, attached, walk, "model.generate under attach gives other tokens than guard.generate")
        needs = self.control.needs
        if not (needs.hidden or needs.grad or needs.cache):
            processor = guard.logits_processor()
            processed = self.transformers_generate(logits_processor=[processor, processor])
            self.same_tokens(own, processed, walk, "as a logits processor (listed twice) it gives other tokens than guard.generate")

    def transformers_generate(self, **arguments: Any) -> list[list[int]]:
        width = max(len(prompt) for prompt in self.prompts)
        pad = self.lm.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in self.prompts], device=self.lm.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in self.prompts], device=self.lm.device)
        plain = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "pad_token_id": pad, "return_dict_in_generate": False}
        with quiet_transformers():
            output = self.lm.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=_TOKENS, **plain, **arguments)
        return output[:, width:].tolist()

    def same_tokens(self, own: list[list[int]], other: list[list[int]], walk: _Walk, what: str) -> None:
        """Compare up to where the own loop stopped; where two tokens were as good as tied, rounding may take either."""
        for row, (mine, theirs, steps, leads) in enumerate(zip(own, other, walk.tokens, walk.leads, strict=True)):
            for index, (a, b, c) in enumerate(zip(mine, theirs, steps, strict=False)):
                if a == b == c:
                    continue
                if leads[index] <= (_TOLERANCE if self.lm.dtype in (torch.float32, torch.float64) else 0.1):
                    break
                self.fail(f"{what} (row {row}: {mine} against {steps if a == b else theirs})")

    def model_unchanged(self, before: dict[str, dict[str, Any]]) -> None:
        after = _snapshot(self.lm.model)
        for kind, known in before.items():
            names = sorted(name for name in known.keys() | after[kind].keys() if known.get(name) != after[kind].get(name))
            if names:
                self.fail(f"the model was left changed: {kind} of {names[0] or 'the model'}; everything done to it must be undone")


def _snapshot(model: Any) -> dict[str, dict[str, Any]]:
    """What a control could leave behind: hooks, methods replaced on the model, weights, gradients, modes."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    return {
        "hooks": {name: sum(len(getattr(module, kind, ())) for kind in _HOOKS) for name, module in modules.items()},
        "training mode": {name: module.training for name, module in modules.items()},
        "methods": {name: id(value) for name, value in vars(model).items() if callable(value)},
        "weights": {name: (p.data_ptr(), float(p.detach().sum(dtype=torch.float64))) for name, p in parameters.items()},
        "gradients": {name: (p.requires_grad, p.grad is None) for name, p in parameters.items()},
    }


def _tensors_of(step: Step, passes: Sequence[Pass]) -> dict[str, torch.Tensor]:
    """Everything that a control can reach in a step."""
    found = {field.name: getattr(step, field.name) for field in fields(step)}
    found |= {f"columns[{name!r}]": value for name, value in step.columns.items()}
    found |= {f"pass {i}": step.of(item).logits for i, item in enumerate(passes)}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _flat(value: Any, name: str = "terms") -> dict[str, Any]:
    """Tensors and plain values of nested dataclasses, tuples and dicts by their place."""
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f"{name}.{field.name}": getattr(value, field.name) for field in fields(value)}
        return {f"{name}:": type(value).__name__} | {k: v for place, part in parts.items() for k, v in _flat(part, place).items()}
    if isinstance(value, (tuple, list)):
        return {k: v for i, part in enumerate(value) for k, v in _flat(part, f"{name}[{i}]").items()}
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in _flat(part, f"{name}[{key!r}]").items()}
    return {name: value}


def _equal(a: Any, b: Any) -> bool:
    """Bit for bit; NaN equals NaN."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and bool(a == b)
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """bool[R]: which rows are equal, with -inf, NaN and the sign of zero."""
    return (a.contiguous().view(torch.int32) == b.contiguous().view(torch.int32)).all(-1)


def _gap_of_laws(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference of log-probabilities [1, V] where both are finite; infinite where one law doesn't exist and the other does."""
    a, b = torch.log_softmax(one.double(), -1), torch.log_softmax(other.double(), -1)
    both = torch.isfinite(a) & torch.isfinite(b)
    if not bool(both.any()):
        return 0.0 if bool(torch.isneginf(one).all()) and bool(torch.isneginf(other).all()) else float("inf")
    return float((a - b)[both].abs().max())


def _problem_of(terms: Any, step: Step) -> str | None:
    """What is wrong with the form of terms, or None."""
    if not isinstance(terms, Terms):
        return f"it is a {type(terms).__name__}; expected Terms"
    rows, vocabulary = step.logits.shape
    if terms.rows is not None and (terms.rows.dtype != torch.bool or tuple(terms.rows.shape) != (rows,)):
        return f"rows is {terms.rows.dtype}{tuple(terms.rows.shape)}; expected bool{(rows,)}"
    for name, tensor in terms.carry.items():
        if tensor.ndim == 0 or tensor.shape[0] != rows:
            return f"carry[{name!r}] has shape {tuple(tensor.shape)}; expected one row a request ({rows})"
    for index, term in enumerate(terms.terms):
        for name, tensor, shape in _expected(term, rows, vocabulary):
            if tuple(tensor.shape) != shape:
                return f"terms[{index}], {type(term).__name__}.{name} has shape {tuple(tensor.shape)}; expected {shape}"
        problem = _problem_of_term(term, vocabulary)
        if problem:
            return f"terms[{index}], {type(term).__name__}: {problem}"
    return None


def _expected(term: Any, rows: int, vocabulary: int) -> list[tuple[str, torch.Tensor, tuple[int, ...]]]:
    """(field, tensor, shape it must have)."""
    whole, one_each = (rows, vocabulary), (rows,)
    parts: list[tuple[str, torch.Tensor, tuple[int, ...]]] = []
    if isinstance(term, (Mix, Attenuation)):
        parts += [("sources", source, whole) for source in term.sources]
    if isinstance(term, Mix):
        parts += [("weights", weight, one_each) for weight in term.weights]
        return parts if term.base_weight is None else [*parts, ("base_weight", term.base_weight, one_each)]
    if isinstance(term, Attenuation):
        return [*parts, ("decay_constant", term.decay_constant, one_each), ("epsilon", term.epsilon, one_each)]
    if isinstance(term, LowRank):
        rank = term.projection.shape[-1]
        return [("projection", term.projection, (vocabulary, rank)), ("coefficients", term.coefficients, (rows, rank))]
    if isinstance(term, Sparse):
        count = term.ids.shape[-1]
        return [("ids", term.ids, (rows, count)), ("bias", term.bias, (rows, count))]
    if isinstance(term, Only):
        return [("mask", term.mask, whole)]
    return [("delta", term.delta, whole)] if isinstance(term, Dense) else []


def _problem_of_term(term: Any, vocabulary: int) -> str | None:
    if not isinstance(term, (Mix, LowRank, Sparse, Attenuation, Dense, Keep, Only)):
        return "not a term that backends know; see moralguard.decoding.terms"
    if isinstance(term, Only) and term.mask.dtype != torch.bool:
        return f"mask is {term.mask.dtype}; expected bool"
    if isinstance(term, Mix) and len(term.sources) != len(term.weights):
        return f"{len(term.sources)} sources, but {len(term.weights)} weights"
    if isinstance(term, Attenuation) and not term.sources:
        return "no sources"
    if isinstance(term, Sparse) and term.ids.numel():
        if term.ids.dtype != torch.int64:
            return f"ids are {term.ids.dtype}; expected int64"
        if int(term.ids.min()) < 0 or int(term.ids.max()) >= vocabulary:
            return f"ids lie outside the vocabulary (0 to {vocabulary - 1})"
        ordered = term.ids.sort(-1).values
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            return "an id stands twice in a row; ids of one row are distinct, or it is undefined which bias counts"
    return None
