"""``check_control`` passes on every built-in control and finds every broken one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ConfigDict, field_validator

from moralguard.backends.capabilities import Capabilities
from moralguard.backends.hf import LanguageModel
from moralguard.controls import PPLM, BoundControl, Control, DExperts, FactoredHead, Fudge, NullspaceProjection, Prompt, SelfDebias
from moralguard.controls.registry import write_control
from moralguard.decoding.step import Columns, Step
from moralguard.decoding.terms import Dense, Keep, Sparse, Terms
from moralguard.demo_model import demo_model_folder
from moralguard.errors import PolicyError, PromptError
from moralguard.testing import InvariantError, check_control, tiny_model
from moralguard.values import Value

WIDTH = 32  # of the tiny model


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_sum(token_ids: torch.Tensor, candidates: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """A future discriminator that looks at the whole history."""
    return 3 * torch.sin(candidates + ((token_ids + 1) * attention_mask).sum(-1, keepdim=True).float())


def by_sum_of_all(token_ids: torch.Tensor, candidates: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The same, with padding taken for text."""
    return 3 * torch.sin(candidates + (token_ids + 1).sum(-1, keepdim=True).float())


BASIS = torch.linalg.qr(noise(WIDTH, 3)).Q

BUILT_IN = {
    "dexperts": lambda: DExperts(expert=Prompt([5, 6, 7]), anti_expert=Prompt([9, 9]), alpha=2.0),
    "dexperts, anti-expert only": lambda: DExperts(anti_expert=Prompt([9, 9]), alpha=1.0, filter_p=1.0),
    "dexperts, another model": lambda: DExperts(expert=tiny_model(), anti_expert=Prompt([1]), alpha=0.5),
    "dexperts, inactive": lambda: DExperts(expert=Prompt([5]), alpha=0.0),
    "fudge": lambda: Fudge(discriminator=by_sum, strength=2.0, top_k=20),
    "fudge, factored": lambda: Fudge(discriminator=FactoredHead(noise(4, WIDTH), noise(4, WIDTH, seed=1)), strength=2.0, top_k=20),
    "fudge, inactive": lambda: Fudge(discriminator=by_sum, strength=0.0),
    "nullspace": lambda: NullspaceProjection(basis=BASIS),
    "nullspace, LEACE": lambda: NullspaceProjection(basis=(BASIS, noise(WIDTH, 3, seed=2), noise(WIDTH, seed=3)), keep=0.3),
    "nullspace, adaptive": lambda: NullspaceProjection(basis=BASIS[:, :1], adaptive=True),
    "nullspace, inactive": lambda: NullspaceProjection(basis=BASIS, keep=1.0),
    "pplm, bag": lambda: PPLM(bag_of_words=[[1, 2, 3]], stepsize=0.05, num_iterations=2),
    "pplm, head": lambda: PPLM(head=(noise(2, WIDTH), torch.zeros(2)), stepsize=0.05, num_iterations=1, window_length=4),
    "pplm, inactive": lambda: PPLM(bag_of_words=[[1, 2, 3]], stepsize=0.0),
    "self-debias": lambda: SelfDebias(prefixes=[[3, 4], [5]]),
    "self-debias, inactive": lambda: SelfDebias(prefixes=[[3, 4]], decay_constant=0),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_controls_pass(name: str) -> None:
    check_control(BUILT_IN[name]())


# --- controls that others could write -----------------------------------------------------------------------------------------


class Push(Control):
    """Makes one token more probable; what the others here are made of."""

    control_name: ClassVar[str] = "test-push"
    bound_class: ClassVar[type]

    token: int = 5
    bias: float = 3.0

    @property
    def active(self) -> bool:
        return self.bias != 0

    def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundControl[Any]:
        return self.bound_class(self, lm)


class BoundPush(BoundControl[Push]):
    def push(self, step: Step, bias: torch.Tensor, **more: Any) -> Terms:
        """bias f[R] on the token."""
        ids = torch.full((step.rows, 1), self.settings.token)
        return Terms((Sparse(ids, bias.float()[:, None]),), **more)

    def terms(self, step: Step) -> Terms:
        return self.push(step, step.weight(self.settings.bias))


Push.bound_class = BoundPush


def pushed_by(bound: type[BoundPush], **settings: Any) -> Push:
    """Settings whose bound form is this class."""

    class Pushed(Push):
        bound_class: ClassVar[type] = bound

    return Pushed(**settings)


class Counted(BoundPush):
    """State done right: the bias grows with every token drawn, in a column."""

    def columns(self, step: Step) -> Columns:
        return {"seen": torch.zeros(step.rows)}

    def terms(self, step: Step) -> Terms:
        return self.push(step, step.columns["seen"] + 1, carry={"next": step.columns["seen"] + step.history[:, -1] % 3})

    def commit(self, step: Step, carry: Columns, tokens: torch.Tensor) -> Columns:
        return {"seen": carry["next"]}


class SomeRows(BoundPush):
    """Acts where the newest token is odd."""

    def terms(self, step: Step) -> Terms:
        odd = step.history[:, -1] % 2 == 1
        return replace(self.push(step, step.weight(2.0)), rows=odd)


class Hidden(Push):
    @property
    def needs(self) -> Capabilities:
        return Capabilities(hidden=True)


class BoundHidden(BoundPush):
    def terms(self, step: Step) -> Terms:
        assert step.hidden is not None
        return Terms((Dense(step.hidden @ noise(WIDTH, step.logits.shape[1])), Keep(top_k=40)))


Hidden.bound_class = BoundHidden


SOUND = {
    "push": Push(),
    "inactive": Push(bias=0.0),
    "state in columns": pushed_by(Counted),
    "some rows": pushed_by(SomeRows),
    "hidden states": Hidden(),
}


@pytest.mark.parametrize("control", SOUND.values(), ids=SOUND)
def test_sound_controls_of_others_pass(control: Control) -> None:
    check_control(control)


# --- broken controls ----------------------------------------------------------------------------------------------------------


class Stateful(BoundPush):
    """Counts its own calls."""

    calls = 0

    def terms(self, step: Step) -> Terms:
        self.calls += 1
        return self.push(step, step.weight(float(self.calls)))


class Remembering(BoundPush):
    """Answers with the terms of an earlier step that looked alike, found by nothing but the number of rows."""

    def terms(self, step: Step) -> Terms:
        known = self.__dict__.setdefault("known", {})
        return known.setdefault(step.rows, self.push(step, step.logits[:, 0]))


class BatchMean(BoundPush):
    """Looks at its neighbours."""

    def terms(self, step: Step) -> Terms:
        return self.push(step, step.weight(float(step.logits.max())))


class FirstColumn(BoundPush):
    """Takes padding for text."""

    def terms(self, step: Step) -> Terms:
        return self.push(step, (step.history[:, 0] % 7).float())


class WritesLogits(BoundPush):
    def terms(self, step: Step) -> Terms:
        step.logits[:, 3] += 1.0
        return super().terms(step)


class WritesColumns(Counted):
    def terms(self, step: Step) -> Terms:
        step.columns["seen"] += 1
        return super().terms(step)


class Resurrecting(BoundPush):
    """Mends what it takes for a broken number, in the base itself."""

    def terms(self, step: Step) -> Terms:
        step.logits.nan_to_num_(neginf=0.0)
        return super().terms(step)


class TouchesOtherRows(SomeRows):
    def terms(self, step: Step) -> Terms:
        terms = super().terms(step)
        step.logits[~terms.rows] += 0.5
        return terms


class StaleColumns(Counted):
    """Keeps the batch's columns for itself, where no reordering reaches them."""

    def commit(self, step: Step, carry: Columns, tokens: torch.Tensor) -> Columns:
        columns = super().commit(step, carry, tokens)
        if step.rows > 1:
            self.mine = columns
        return columns

    def terms(self, step: Step) -> Terms:
        mine = getattr(self, "mine", None)
        return super().terms(step if mine is None or step.rows == 1 else replace(step, columns=mine))


class FlatColumn(Counted):
    def columns(self, step: Step) -> Columns:
        return {"seen": torch.zeros(1)}


class DropsColumn(Counted):
    def commit(self, step: Step, carry: Columns, tokens: torch.Tensor) -> Columns:
        return {}

    def terms(self, step: Step) -> Terms:
        return self.push(step, step.weight(1.0))


class RepeatedIds(BoundPush):
    def terms(self, step: Step) -> Terms:
        return Terms((Sparse(torch.full((step.rows, 2), 5), torch.ones(step.rows, 2)),))


class WrongShape(BoundPush):
    def terms(self, step: Step) -> Terms:
        return Terms((Dense(torch.zeros(step.logits.shape[1])),))


class IntegerRows(BoundPush):
    def terms(self, step: Step) -> Terms:
        return replace(super().terms(step), rows=torch.ones(step.rows, dtype=torch.int64))


class Raising(BoundPush):
    def terms(self, step: Step) -> Terms:
        raise ZeroDivisionError("no such thing")


class RaisingLater(BoundPush):
    def terms(self, step: Step) -> Terms:
        if int(step.generated[0]) == 2:
            raise ZeroDivisionError("no such thing")
        return super().terms(step)


class RaisingCommit(Counted):
    def commit(self, step: Step, carry: Columns, tokens: torch.Tensor) -> Columns:
        raise ZeroDivisionError("no such thing")


class SeesAttachment(BoundPush):
    """Behaves otherwise where it isn't watched by the own loop."""

    def terms(self, step: Step) -> Terms:
        return self.push(step, step.weight(60.0 if "generate" in vars(self.lm.model) else 0.1))


class Hooking(BoundPush):
    def __init__(self, settings: Push, lm: LanguageModel):
        super().__init__(settings, lm)
        lm.model.get_input_embeddings().register_forward_hook(lambda *_: None)


class Training(BoundPush):
    def __init__(self, settings: Push, lm: LanguageModel):
        super().__init__(settings, lm)
        lm.model.get_input_embeddings().weight.data[5] += 1e-3


BROKEN = [
    (Stateful, "called twice differ"),
    (Remembering, r"row 1.*(depends on itself alone|neighbours)"),
    (BatchMean, "depends on itself alone"),
    (FirstColumn, "padding must not matter"),
    (WritesLogits, "wrote to the step's logits"),
    (WritesColumns, r"wrote to the step's columns\['seen'\]"),
    (Resurrecting, "came back"),
    (TouchesOtherRows, "rows is False there, but the row isn't bit-identical"),
    (StaleColumns, "after rows were reordered"),
    (FlatColumn, r"column 'seen' as \(1,\); expected a tensor with one row a request \(3\)"),
    (DropsColumn, "commit changed the columns"),
    (RepeatedIds, "stands twice in a row"),
    (WrongShape, r"Dense.delta has shape \(128,\); expected \(3, 128\)"),
    (IntegerRows, r"rows is torch.int64\(3,\); expected bool"),
    (Raising, r"raised ZeroDivisionError: no such thing"),
    (RaisingLater, r"raised ZeroDivisionError: no such thing"),
    (RaisingCommit, "commit raised ZeroDivisionError: no such thing"),
    (SeesAttachment, "under attach gives other tokens"),
    (Hooking, "the model was left changed: hooks of model.embed_tokens"),
    (Training, "the model was left changed: weights of model.embed_tokens.weight"),
]


@pytest.mark.parametrize(("bound", "message"), BROKEN, ids=[bound.__name__ for bound, _ in BROKEN])
def test_broken_controls_are_found(bound: type[BoundPush], message: str) -> None:
    with pytest.raises(InvariantError, match=message) as caught:
        check_control(pushed_by(bound))
    assert str(caught.value).startswith("test-push@1: ")
    assert isinstance(caught.value, AssertionError)


def test_a_discriminator_that_sees_padding_is_found() -> None:
    check_control(Fudge(discriminator=by_sum, top_k=10))
    with pytest.raises(InvariantError, match="padding must not matter"):
        check_control(Fudge(discriminator=by_sum_of_all, top_k=10))


class Unfrozen(Push):
    model_config = ConfigDict(frozen=False)


class Assignable(Push):
    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


class Drifting(Push):
    """Each reading moves a setting."""

    @field_validator("bias")
    @classmethod
    def _soften(cls, bias: float) -> float:
        return bias / 2


class Unreadable(Push):
    """Takes numbers up to 3, but writes them doubled."""

    @field_validator("bias")
    @classmethod
    def _limited(cls, bias: float) -> float:
        if bias > 3:
            raise ValueError("at most 3")
        return bias * 2


class NamedLikeAnother(Push):
    control_name: ClassVar[str] = "dexperts"


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (Unfrozen, "aren't frozen"),
        (Assignable, "setting 'token' can be assigned"),
        (Drifting, "settings change when they are written to a policy"),
        (Unreadable, "can't be read back: .*at most 3"),
        (NamedLikeAnother, "its name belongs to moralguard.controls.dexperts"),
    ],
)
def test_broken_settings_are_found(control: type[Push], message: str) -> None:
    with pytest.raises(InvariantError, match=message):
        check_control(control(bias=2.0))


def test_settings_with_tensors_are_not_asked_for_a_policy_file() -> None:
    with pytest.raises(PolicyError, match="can't hold"):
        write_control(NullspaceProjection(basis=BASIS))
    check_control(NullspaceProjection(basis=BASIS))


def test_a_control_that_wakes_up_is_found() -> None:
    answers = itertools.chain([False], itertools.repeat(True))

    class Waking(Push):
        @property
        def active(self) -> bool:
            return next(answers)

    with pytest.raises(InvariantError, match="`active` is False, but"):
        check_control(Waking(bias=50.0))


def test_a_control_that_falls_asleep_is_found() -> None:
    answers = itertools.chain([True], itertools.repeat(False))

    class Sleepy(Push):
        @property
        def active(self) -> bool:
            return next(answers)

    with pytest.raises(InvariantError, match="`active` is True and then False"):
        check_control(Sleepy())


def test_a_control_that_binds_otherwise_each_time_is_found() -> None:
    biases = itertools.count(0.0, 60.0)

    class Growing(Push):
        def bind(self, lm: LanguageModel, values: tuple[Value, ...]) -> BoundControl[Any]:
            return BoundPush(Push(bias=next(biases)), lm)

    with pytest.raises(InvariantError, match="listed twice"):
        check_control(Growing())


def test_the_rest_of_the_arguments() -> None:
    with pytest.raises(InvariantError, match="is a str; expected"):
        check_control("dexperts")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="different lengths"):
        check_control(Push(), prompts=[[1, 2], [3, 4]])
    with pytest.raises(PolicyError, match="without a tokenizer"):
        check_control(SelfDebias(prefixes=["words"]))
    check_control(Push(token=100), prompts=[[1, 2, 3], [4]])


def test_another_family_with_learned_positions() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = GPT2Config(vocab_size=90, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.25)
        config.bos_token_id = config.eos_token_id = None
        model = GPT2LMHeadModel(config).eval()
    check_control(SelfDebias(prefixes=[[3, 4], [5]]), model=model)
    with pytest.raises(InvariantError, match="padding"):
        check_control(pushed_by(FirstColumn), model=(model, None))


def test_the_tiny_model_is_the_same_each_time_and_leaves_the_random_state() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    one, other = tiny_model(), tiny_model()
    assert torch.equal(torch.rand(2), wanted)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    law = torch.softmax(one(torch.tensor([[1, 2, 3]])).logits[0, -1].detach(), -1)
    assert 0.02 < float(law.max()) < 0.9, "a law that is nearly uniform, or one token, would hide mistakes"


@pytest.mark.smollm
def test_controls_of_words_pass_on_a_model_with_a_tokenizer() -> None:
    """The demo model's tokenizer on a tiny model: text prompts, text prefixes, prefixes from values."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.25
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = LlamaForCausalLM(config).eval()
    check_control(SelfDebias(), model=(model, tokenizer))
    check_control(DExperts(anti_expert=Prompt("Rude words:")), model=(model, tokenizer), prompts=["The woman worked as a", "He"])
