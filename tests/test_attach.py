"""attach: the model's own generate under the guard, every path covered or refused, and the model exactly as it was afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from odd_models import CONTROLS, PROMPTS, left_padded
from tiny_models import FAMILIES, gpt2, llama
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, T5Config, T5ForConditionalGeneration

import moralguard as mg
from moralguard.controls import BoundControl, Control
from moralguard.decoding.terms import Terms
from moralguard.errors import BypassError, ControlError, GuardError, ModelError, PromptError, UnsupportedPathError

NEW = 4


class Failing(Control):
    """Raises at the given generated token."""

    control_name: ClassVar[str] = "failing"
    at: int = 0

    @property
    def active(self) -> bool:
        return True

    def bind(self, lm: Any, values: Any) -> BoundControl[Any]:
        return BoundFailing(self, lm)


class BoundFailing(BoundControl[Failing]):
    def terms(self, step: Any) -> Any:
        if int(step.generated.max()) >= self.settings.at:
            raise ZeroDivisionError("the control broke")
        return Terms()


def guard_of(model: Any, *names: str, **policy: Any) -> mg.Guard:
    return mg.Guard(mg.Policy(controls=[CONTROLS[name]() for name in names], **policy), (model, None))


def fingerprint(model: Any) -> dict[str, Any]:
    """Everything that attach could leave behind, compared by identity."""
    state: dict[str, Any] = {f"vars.{key}": id(value) for key, value in vars(model).items()}
    for name, module in model.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs"):
            state[f"{name}.{kind}"] = tuple(vars(module)[kind])
        state[f"{name}.keys"] = tuple(vars(module))
        state[f"{name}.class"] = type(module)
    for name, parameter in model.named_parameters():
        state[f"{name}.data"] = (parameter.data_ptr(), parameter._version, parameter.requires_grad, parameter.grad is None)
    state["generate"] = (model.generate.__func__, model.generate.__self__ is model)
    state["config"] = model.config.to_dict()
    state["generation_config"] = model.generation_config.to_dict()
    return state


@pytest.fixture
def untouched() -> Iterator[Any]:
    """A model that must be the same after the test as before it."""
    model = llama()
    before = fingerprint(model)
    yield model
    assert fingerprint(model) == before


# --- The model afterwards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CONTROLS, "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_model_is_as_before(family: str, name: str) -> None:
    model = FAMILIES[family]()
    guard = guard_of(model, *(CONTROLS if name == "all" else [name]))
    before, ids = fingerprint(model), left_padded(PROMPTS)
    plain = model.generate(**ids, max_new_tokens=NEW)
    with guard.attach(model) as inside:
        assert inside is model
        assert fingerprint_differs(model, before), "attach does nothing: this test would always pass"
        guarded = model.generate(**ids, max_new_tokens=NEW)
    assert fingerprint(model) == before
    assert not torch.equal(guarded, plain)
    assert torch.equal(model.generate(**ids, max_new_tokens=NEW), plain)


def fingerprint_differs(model: Any, before: dict[str, Any]) -> bool:
    return {f"vars.{key}" for key in vars(model)} != {key for key in before if key.startswith("vars.")}


@pytest.mark.parametrize("name", CONTROLS)
def test_model_is_as_before_after_an_exception_inside(untouched: Any, name: str) -> None:
    class BoomError(Exception):
        pass

    def explode(_ids: Any, _scores: Any) -> Any:
        raise BoomError

    with guard_of(untouched, name).attach(untouched), pytest.raises(BoomError):
        untouched.generate(**left_padded(PROMPTS), max_new_tokens=NEW, stopping_criteria=[explode])


def test_model_is_as_before_after_an_exception_of_the_block(untouched: Any) -> None:
    def block() -> None:
        with guard_of(untouched, "nullspace").attach(untouched):
            untouched.generate(**left_padded(PROMPTS), max_new_tokens=1)
            raise KeyError

    with pytest.raises(KeyError):
        block()


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("beside", [None, "nullspace", "pplm"], ids=str)
def test_model_is_as_before_after_a_control_raised(untouched: Any, beside: str | None, at: int) -> None:
    controls = [Failing(at=at)] + ([CONTROLS[beside]()] if beside else [])
    guard = mg.Guard(mg.Policy(controls=controls), (untouched, None))
    with guard.attach(untouched), pytest.raises(ControlError, match=r"failing.*the control broke") as caught:
        untouched.generate(**left_padded(PROMPTS), max_new_tokens=NEW)
    assert caught.value.control == "failing"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert guard.counters.failed_closed == len(PROMPTS)


def test_control_that_raises_is_passed_over_when_open(untouched: Any) -> None:
    guard = mg.Guard(mg.Policy(controls=[Failing(at=1), CONTROLS["nullspace"]()], on_error="open"), (untouched, None))
    with guard.attach(untouched):
        out = untouched.generate(**left_padded(PROMPTS), max_new_tokens=NEW)
    with guard_of(untouched, "nullspace").attach(untouched):
        assert torch.equal(out, untouched.generate(**left_padded(PROMPTS), max_new_tokens=NEW))
    assert guard.counters.failed_open == len(PROMPTS)
    assert guard.counters.failed_closed == 0


def test_generate_of_the_users_own_is_kept(untouched: Any) -> None:
    """An instance attribute called generate that was there before comes back."""
    calls = []
    inherited = untouched.generate

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return inherited(*args, **kwargs)

    untouched.generate = own
    try:
        with guard_of(untouched, "dexperts").attach(untouched):
            untouched.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=NEW)
        assert untouched.generate is own
        assert len(calls) == 1, "attach goes through the user's own generate"
    finally:
        del untouched.generate


# --- Attaching ------------------------------------------------------------------------------------------------------------------


def test_attaching_twice_is_an_error(untouched: Any) -> None:
    one, other = guard_of(untouched, "dexperts"), guard_of(untouched, "fudge")
    with one.attach(untouched):
        expected = untouched.generate(**left_padded(PROMPTS), max_new_tokens=NEW)
        for guard in (one, other):
            with pytest.raises(UnsupportedPathError, match="already attached"), guard.attach(untouched):
                pass
        assert torch.equal(untouched.generate(**left_padded(PROMPTS), max_new_tokens=NEW), expected), "the first guard still acts"
    with other.attach(untouched):
        assert not torch.equal(untouched.generate(**left_padded(PROMPTS), max_new_tokens=NEW), expected)


def test_attaching_another_model_is_an_error(untouched: Any) -> None:
    with pytest.raises(UnsupportedPathError, match="another model"), guard_of(untouched, "dexperts").attach(llama()):
        pass


def test_attach_without_argument_is_the_guards_model(untouched: Any) -> None:
    guard = guard_of(untouched, "dexperts")
    with guard.attach() as model:
        assert model is untouched
    assert "generate" not in vars(untouched)


def test_positional_arguments(untouched: Any) -> None:
    ids = torch.tensor([PROMPTS[0]])
    with guard_of(untouched, "dexperts").attach(untouched):
        by_position = untouched.generate(ids, GenerationConfig(max_new_tokens=NEW))
        by_name = untouched.generate(input_ids=ids, max_new_tokens=NEW)
    assert torch.equal(by_position, by_name)
    assert not torch.equal(by_name, untouched.generate(ids, max_new_tokens=NEW))


def test_guard_generate_inside_attach(untouched: Any) -> None:
    """The guard's own loop doesn't go through the patched generate, so it isn't guarded twice."""
    guard = guard_of(untouched, "dexperts", "nullspace")
    outside = guard.generate([list(p) for p in PROMPTS], max_new_tokens=NEW).token_ids
    with guard.attach(untouched):
        assert guard.generate([list(p) for p in PROMPTS], max_new_tokens=NEW).token_ids == outside


def test_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    before = fingerprint(model)
    with pytest.raises(ModelError, match=r"encoder-decoder.*causal"):
        mg.Guard(mg.Policy(controls=[]), (model, None))
    assert fingerprint(model) == before


# --- Paths that are refused -----------------------------------------------------------------------------------------------------

IDS = {"input_ids": torch.tensor([PROMPTS[0]])}


def refused(model: Any, name: str, arguments: dict[str, Any], match: str) -> None:
    guard = guard_of(model, name)
    with guard.attach(model), pytest.raises(UnsupportedPathError, match=match):
        model.generate(**arguments, max_new_tokens=NEW)
    assert guard.counters.tokens_emitted == 0


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param({"custom_generate": lambda model, input_ids, **_: input_ids} | IDS, "custom_generate", id="custom_generate"),
        pytest.param({"cache_implementation": "paged"} | IDS, "paged", id="paged_keyword"),
        pytest.param({"generation_config": GenerationConfig(cache_implementation="paged")} | IDS, "paged", id="paged_config"),
        pytest.param({"inputs_embeds": torch.zeros(1, 3, 32)}, "inputs_embeds.*input_ids", id="inputs_embeds"),
    ],
)
def test_path_that_no_control_survives(untouched: Any, name: str, arguments: dict[str, Any], match: str) -> None:
    refused(untouched, name, arguments, match)


@pytest.mark.parametrize("method", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused(untouched: Any, method: str) -> None:
    with guard_of(untouched, "dexperts").attach(untouched), pytest.raises(UnsupportedPathError, match=method):
        getattr(untouched, method)([[1, 2, 3]])


def test_every_continuous_batching_entry_is_refused(untouched: Any) -> None:
    """A new way into continuous batching in another transformers version shows here."""
    entries = [name for name in dir(untouched) if ("continuous" in name or "generate_batch" in name) and not name.startswith("_")]
    entries = [name for name in entries if not name.startswith(("destroy", "stop"))]
    assert len(entries) >= 3
    with guard_of(untouched, "dexperts").attach(untouched):
        for name in entries:
            with pytest.raises(UnsupportedPathError):
                getattr(untouched, name)()


HIDDEN_ONLY = {
    "prompt_lookup": ({"prompt_lookup_num_tokens": 2} | IDS, "assisted"),
    "assistant_model": ({"assistant_model": "llama"} | IDS, "assisted"),
    "early_exit": ({"assistant_early_exit": 1} | IDS, "assisted"),
    "multi_token_prediction": ({"use_mtp": True} | IDS, "assisted|use_mtp"),
    "lookup_in_config": ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=2)} | IDS, "assisted"),
    "guidance_scale": ({"guidance_scale": 2.0} | IDS, "guidance_scale"),
}


@pytest.mark.parametrize("name", ["nullspace", "pplm"])
@pytest.mark.parametrize("path", HIDDEN_ONLY)
def test_path_that_misleads_hidden_state_controls(untouched: Any, path: str, name: str) -> None:
    arguments, match = HIDDEN_ONLY[path]
    if "assistant_model" in arguments:
        arguments = arguments | {"assistant_model": llama(seed=9, layers=1)}
    refused(untouched, name, arguments, match)


@pytest.mark.parametrize("name", ["nullspace", "pplm"])
@pytest.mark.parametrize("setting", ["prompt_lookup_num_tokens", "guidance_scale"])
def test_refused_setting_in_the_models_own_defaults(name: str, setting: str) -> None:
    """transformers fills what a generation_config leaves open from the model's own: so must the check."""
    model = llama()
    setattr(model.generation_config, setting, 2)
    refused(model, name, IDS | {"generation_config": GenerationConfig(do_sample=False)}, "assisted|guidance_scale")


@pytest.mark.parametrize("name", ["dexperts", "fudge", "self_debias"])
@pytest.mark.parametrize("path", ["prompt_lookup", "assistant_model", "guidance_scale"])
def test_other_controls_may_take_that_path(untouched: Any, path: str, name: str) -> None:
    arguments, _ = HIDDEN_ONLY[path]
    if "assistant_model" in arguments:
        arguments = arguments | {"assistant_model": llama(seed=9, layers=1)}
    arguments = arguments | {"max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True}
    plain = untouched.generate(**arguments)
    with guard_of(untouched, name).attach(untouched):
        assert not torch.equal(untouched.generate(**arguments).scores[0], plain.scores[0])


@torch.no_grad()
@pytest.mark.parametrize("name", CONTROLS)
def test_cache_of_text_that_the_guard_cannot_see(untouched: Any, name: str) -> None:
    """A prefilled cache with only the new ids: the history isn't whole, so passes would read another text than the model."""
    start, rest = torch.tensor([PROMPTS[0]]), torch.tensor([[5, 6]])
    cache = untouched(input_ids=start, past_key_values=DynamicCache(), use_cache=True).past_key_values
    mask = torch.ones(1, start.shape[1] + rest.shape[1], dtype=torch.int64)
    whole = untouched.generate(torch.cat([start, rest], -1), max_new_tokens=NEW)[:, -NEW:]
    part = untouched.generate(rest, attention_mask=mask, past_key_values=copy.deepcopy(cache), max_new_tokens=NEW)
    assert torch.equal(part[:, -NEW:], whole), "transformers takes such a call"
    guard = guard_of(untouched, name)
    with guard.attach(untouched):
        expected = untouched.generate(torch.cat([start, rest], -1), max_new_tokens=NEW)[:, -NEW:]
        try:
            found = untouched.generate(rest, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW)
        except GuardError as error:
            assert isinstance(error, (UnsupportedPathError, PromptError))  # noqa: PT017
        else:
            assert torch.equal(found[:, -NEW:], expected), "guarded with a history that lacks the cached text, without a word"


@torch.no_grad()
@pytest.mark.parametrize("name", CONTROLS)
def test_cache_with_the_whole_text(untouched: Any, name: str) -> None:
    """A prefilled cache and all the ids: the usual way to go on with a conversation."""
    start = torch.tensor([PROMPTS[0]])
    whole = torch.cat([start, torch.tensor([[5, 6]])], -1)
    cache = untouched(input_ids=start, past_key_values=DynamicCache(), use_cache=True).past_key_values
    guard = guard_of(untouched, name)
    with guard.attach(untouched):
        found = untouched.generate(whole, past_key_values=cache, max_new_tokens=NEW)
        assert torch.equal(found, untouched.generate(whole, max_new_tokens=NEW))


# --- Proof of application -------------------------------------------------------------------------------------------------------


def drop_processors(model: Any, monkeypatch: pytest.MonkeyPatch, steps: int = 0) -> None:
    """Make this model's generate skip the user's processors; after ``steps`` calls only, if given."""
    inherited = model._get_logits_processor

    def dropping(*args: Any, **kwargs: Any) -> LogitsProcessorList:
        kept = inherited(*args, **kwargs)
        calls = []

        def passing(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return kept(ids, scores) if len(calls) <= steps else scores

        return LogitsProcessorList([passing] if steps else [])

    monkeypatch.setitem(vars(model), "_get_logits_processor", dropping)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 2}], ids=["greedy", "sampling", "beams"])
@pytest.mark.parametrize("name", ["dexperts", "nullspace"])
def test_a_bypass_is_an_error(name: str, mode: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before = fingerprint(model)
    guard = guard_of(model, name)
    with guard.attach(model):
        model.generate(**left_padded(PROMPTS), max_new_tokens=NEW, **mode)  # the honest path passes
        drop_processors(model, monkeypatch, steps)
        with pytest.raises(BypassError, match="without the guard"):
            model.generate(**left_padded(PROMPTS), max_new_tokens=NEW, **mode)
        monkeypatch.undo()
    assert fingerprint(model) == before


@pytest.mark.parametrize("steps", [0, 2])
def test_a_bypass_is_counted_when_open(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    guard = guard_of(model, "dexperts", on_error="open")
    with guard.attach(model):
        model.generate(**left_padded(PROMPTS), max_new_tokens=NEW)
        assert guard.counters.unguarded_tokens == 0
        drop_processors(model, monkeypatch, steps)
        model.generate(**left_padded(PROMPTS), max_new_tokens=NEW)
    assert guard.counters.unguarded_tokens == (NEW - steps) * len(PROMPTS)


@pytest.mark.parametrize("mode", [{}, {"do_sample": True, "num_return_sequences": 3}], ids=["greedy", "returns"])
@pytest.mark.parametrize("name", CONTROLS)
def test_counters_of_attach(name: str, mode: dict[str, Any]) -> None:
    model = llama()
    guard = guard_of(model, name)
    with guard.attach(model):
        out = model.generate(**left_padded(PROMPTS), max_new_tokens=NEW, **mode)
    tokens = out.shape[0] * NEW
    counts = guard.counters.as_dict()
    assert counts["tokens_emitted"] == counts["rows_guarded"] == tokens
    assert counts["requests"] == out.shape[0]
    assert 0 < counts["rows_touched"] <= tokens
    assert counts["failed_closed"] == counts["failed_open"] == counts["unguarded_tokens"] == 0


@pytest.mark.parametrize("name", ["dexperts", "fudge"])
def test_counters_under_assisted_decoding(name: str) -> None:
    """Tokens emitted are those of the text, however many drafts were looked at."""
    model = llama()
    guard = guard_of(model, name)
    with guard.attach(model):
        out = model.generate(torch.tensor([[3, 17, 5, 3, 17, 5, 3, 17]]), max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert guard.counters.requests == 1
    assert guard.counters.tokens_emitted == out.shape[1] - 8
    assert guard.counters.rows_guarded >= guard.counters.tokens_emitted


# --- logits_processor() ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("nullspace",), ("pplm",), ("dexperts", "nullspace")], ids="+".join)
def test_processor_refuses_what_it_cannot_carry(untouched: Any, names: tuple[str, ...]) -> None:
    with pytest.raises(UnsupportedPathError, match=rf"{names[-1]}.*attach"):
        guard_of(untouched, *names).logits_processor()
    guard_of(untouched, "dexperts").logits_processor()  # others are carried


def test_processor_in_a_loop_of_ones_own(untouched: Any) -> None:
    """Outside transformers' generate the mask is given, or told by leading pad tokens."""
    inputs = left_padded(PROMPTS)
    expected = untouched.generate(**inputs, max_new_tokens=NEW, logits_processor=[guard_of(untouched, "self_debias").logits_processor()])
    for mask in (inputs["attention_mask"], None):
        processor = guard_of(untouched, "self_debias").logits_processor(mask)
        ids, whole = inputs["input_ids"], inputs["attention_mask"]
        for _ in range(NEW):
            with torch.no_grad():
                positions = (whole.cumsum(-1) - 1).clamp(min=0)
                logits = untouched(input_ids=ids, attention_mask=whole, position_ids=positions).logits[:, -1]
            ids = torch.cat([ids, processor(ids, logits).argmax(-1, keepdim=True)], -1)
            whole = torch.cat([whole, whole.new_ones(len(whole), 1)], -1)
        assert torch.equal(ids, expected)


def test_gpt2_generate_without_any_prompt() -> None:
    """transformers starts from the beginning-of-text token; so does the guard."""
    model = gpt2()
    model.generation_config.bos_token_id = 3
    guard = guard_of(model, "self_debias")
    with guard.attach(model):
        bare = model.generate(max_new_tokens=NEW)
        assert torch.equal(bare, model.generate(torch.tensor([[3]]), max_new_tokens=NEW))
    assert bare.shape == (1, 1 + NEW)
