"""What can't be used is refused before anything runs: the type of error, what the message says, and nothing left patched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from odd_models import CONTROLS, basis, byte_llama, byte_tokenizer
from safetensors.torch import save_file
from tiny_models import HIDDEN, POSITIONS, VOCAB, llama

import moralguard as mg
from moralguard.controls import PPLM, DExperts, FactoredHead, Fudge, NullspaceProjection, Prompt, SelfDebias
from moralguard.errors import ControlError, GuardError, ModelError, PolicyError, PromptError

DISCRIMINATOR = CONTROLS["fudge"]().discriminator


def refused(kind: type[GuardError], said: list[str], act: Callable[[], Any], *models: Any) -> None:
    """``act`` raises ``kind``; the message holds all of ``said``; the models have no hooks and are unpatched."""
    with pytest.raises(GuardError) as caught:
        act()
    assert isinstance(caught.value, kind), f"{type(caught.value).__name__}: {caught.value}"
    message = str(caught.value)
    for part in said:
        assert part in message, f"{part!r} isn't in {message!r}"
    for model in models:
        assert "generate" not in vars(model)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def guard_with(*controls: Any, model: Any = None, tokenizer: Any = None, **policy: Any) -> mg.Guard:
    return mg.Guard(mg.Policy(controls=list(controls), **policy), (model or llama(), tokenizer))


# --- Policies -------------------------------------------------------------------------------------------------------------------

UNKNOWN = {
    "policy key": ({"contols": []}, ["'contols'", "did you mean 'controls'?"]),
    "policy key far from all": ({"zzz": 1}, ["'zzz'", "controls", "values", "on_error"]),
    "control setting": ({"controls": [{"control": "dexperts", "alfa": 2}]}, ["DExperts", "'alfa'", "did you mean 'alpha'?"]),
    "value key": ({"values": [{"id": "a", "statment": "x y z"}]}, ["'statment'", "did you mean 'statement'?"]),
    "decoding key": ({"decoding": {"max_tokens": 3}}, ["'max_tokens'", "did you mean 'max_new_tokens'?"]),
    "gate key": ({"gate": {"entropy": 3}}, ["'entropy'", "did you mean 'min_entropy'?"]),
    "control name": ({"controls": [{"control": "dexpert"}]}, ["'dexpert'", "did you mean 'dexperts'?"]),
    "control name far from all": (
        {"controls": [{"control": "xyzzy"}]},
        ["'xyzzy'", "dexperts", "fudge", "nullspace", "pplm", "self-debias"],
    ),
    "control version": ({"controls": [{"control": "dexperts@9"}]}, ["'dexperts'", "version 1", "dexperts@9"]),
    "control without a name": ({"controls": [{"alpha": 2}]}, ["`control`"]),
    "control of a wrong type": ({"controls": ["dexperts"]}, ["`control`", "'dexperts'"]),
    "on_error": ({"on_error": "maybe"}, ["on_error", "closed", "open", "'maybe'"]),
    "value ids repeated": ({"values": [{"id": "a", "statement": "x y z"}] * 2}, ["id a", "distinct"]),
    "values of a wrong type": ({"values": "be kind"}, ["values", "list"]),
    "controls of a wrong type": ({"controls": {"control": "dexperts"}}, ["controls"]),
}


@pytest.mark.parametrize(("data", "said"), UNKNOWN.values(), ids=UNKNOWN)
def test_policy_that_cannot_be_read(data: dict[str, Any], said: list[str]) -> None:
    refused(PolicyError, said, lambda: mg.Policy.load(data))
    mg.Policy.load({"controls": [{"control": "dexperts", "alpha": 2}], "values": ["Be kind."], "gate": {"min_entropy": 1}})


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("policy.yaml", None, ["isn't there", "detox"]),
        ("policy.yaml", "- a\n- b\n", ["list", "mapping"]),
        ("policy.yaml", "a: [", ["isn't YAML"]),
        ("policy.json", '{"contols": []}', ["policy.json", "did you mean 'controls'?"]),
    ],
    ids=["missing", "list", "broken", "unknown_key"],
)
def test_policy_file_that_cannot_be_read(tmp_path: Path, name: str, text: str | None, said: list[str]) -> None:
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    refused(PolicyError, said, lambda: mg.Policy.load(str(file)))


def test_built_in_policy_that_is_none() -> None:
    refused(PolicyError, ["'detoks'", "did you mean 'detox'?", ".yaml"], lambda: mg.Policy.load("detoks"))


@pytest.mark.parametrize("source", [None, 3, ["detox"]], ids=str)
def test_policy_of_a_wrong_type(source: Any) -> None:
    refused(PolicyError, [type(source).__name__, "dict"], lambda: mg.Policy.load(source))


# --- Numbers --------------------------------------------------------------------------------------------------------------------

NUMBERS = {
    "alpha": lambda x: DExperts(alpha=x),
    "decay_constant": lambda x: SelfDebias(decay_constant=x),
    "strength": lambda x: Fudge(discriminator=DISCRIMINATOR, strength=x),
    "keep": lambda x: NullspaceProjection(basis=basis(), keep=x),
    "stepsize": lambda x: PPLM(bag_of_words=[[1]], stepsize=x),
    "kl_scale": lambda x: PPLM(bag_of_words=[[1]], kl_scale=x),
}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0, "two", None], ids=str)
@pytest.mark.parametrize("setting", NUMBERS)
def test_number_out_of_range(setting: str, number: Any) -> None:
    expected = {"nan": "finite", "inf": "finite", "-1.0": "greater than or equal to 0"}.get(str(number), "valid number")
    refused(PolicyError, [setting, expected], lambda: NUMBERS[setting](number))
    NUMBERS[setting](0.5)


OUT_OF_RANGE = {
    "filter_p 0": (lambda: DExperts(filter_p=0), ["filter_p", "greater than 0"]),
    "filter_p 1.1": (lambda: DExperts(filter_p=1.1), ["filter_p", "less than or equal to 1"]),
    "keep 1.5": (lambda: NullspaceProjection(basis=basis(), keep=1.5), ["keep", "less than or equal to 1"]),
    "top_k 0": (lambda: Fudge(discriminator=DISCRIMINATOR, top_k=0), ["top_k", "greater than or equal to 1"]),
    "epsilon 0": (lambda: SelfDebias(epsilon=0), ["epsilon", "greater than 0"]),
    "gm_scale 2": (lambda: PPLM(bag_of_words=[[1]], gm_scale=2), ["gm_scale", "less than or equal to 1"]),
    "num_iterations -1": (lambda: PPLM(bag_of_words=[[1]], num_iterations=-1), ["num_iterations", "greater than or equal to 0"]),
}


@pytest.mark.parametrize(("act", "said"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_setting_out_of_range(act: Callable[[], Any], said: list[str]) -> None:
    refused(PolicyError, said, act)


DECODING = {
    "max_new_tokens 0": ({"max_new_tokens": 0}, ["max_new_tokens", "greater than or equal to 1"]),
    "temperature -1": ({"temperature": -1}, ["temperature", "greater than or equal to 0"]),
    "temperature nan": ({"temperature": float("nan")}, ["temperature", "finite"]),
    "top_p 0": ({"top_p": 0}, ["top_p", "greater than 0"]),
    "batch_size 0": ({"batch_size": 0}, ["batch_size", "greater than or equal to 1"]),
    "num_return_sequences 0": ({"num_return_sequences": 0}, ["num_return_sequences", "greater than or equal to 1"]),
    "unknown": ({"max_tokens": 5}, ["'max_tokens'", "did you mean 'max_new_tokens'?"]),
    "num_beams": ({"num_beams": 2}, ["'num_beams'"]),
}


@pytest.mark.parametrize(("settings", "said"), DECODING.values(), ids=DECODING)
def test_decoding_setting(settings: dict[str, Any], said: list[str]) -> None:
    guard = guard_with(CONTROLS["dexperts"]())
    refused(PolicyError, said, lambda: guard.generate([1, 2], **settings), guard.lm.model)
    assert guard.counters.requests == 0


@pytest.mark.parametrize("seed", ["one", 1.5, [1]], ids=str)
def test_seed_of_a_wrong_type(seed: Any) -> None:
    guard = guard_with()
    refused(GuardError, ["seed"], lambda: guard.generate([1, 2], seed=seed, max_new_tokens=1))


# --- Prompts --------------------------------------------------------------------------------------------------------------------

PROMPTS = {
    "empty ids": ([[]], ["empty", "at least one token"]),
    "empty among others": ([[1], []], ["prompt 1", "empty"]),
    "empty tensor": (torch.zeros(0, dtype=torch.int64), ["empty"]),
    "too long": ([5] * POSITIONS, [f"{POSITIONS} tokens", "context", f"at most {POSITIONS - 1}"]),
    "too long among others": ([[1], [5] * (POSITIONS + 3)], ["prompt 1", f"{POSITIONS + 3} tokens"]),
    "id too large": ([[1, VOCAB]], [f"token id {VOCAB}", f"0 to {VOCAB - 1}"]),
    "id negative": ([1, -1], ["token id -1", "vocabulary"]),
    "float ids": ([[1.0, 2.0]], ["list", "list of token ids"]),
    "bool ids": ([[True, False]], ["list of token ids"]),
    "mixed": ([[1, "a"]], ["list of token ids"]),
    "none": (None, ["NoneType", "token ids"]),
    "number": (5, ["int", "token ids"]),
    "dict": ({"role": "user", "content": "x"}, ["dict", "chat"]),
    "no prompt at all": ([], ["no prompt", "at least one"]),
    "padded tensor": (torch.tensor([[1, 2], [0, 3]]), ["(2, 2)", "padding", "unpadded"]),
    "array": (np.asarray([1, 2]), ["ndarray", "token ids"]),
    "list of none": ([None], ["NoneType", "token ids"]),
    "bytes": ([b"abc"], ["bytes", "string"]),
    "float tensor": (torch.tensor([1.0, 2.0]), ["token ids"]),
    "text without a tokenizer": ("hello", ["text", "without a tokenizer", "(model, tokenizer)"]),
    "chat without a tokenizer": ([{"role": "user", "content": "x"}], ["without a tokenizer"]),
}


@pytest.mark.parametrize(("prompt", "said"), PROMPTS.values(), ids=PROMPTS)
def test_prompt(prompt: Any, said: list[str]) -> None:
    guard = guard_with(CONTROLS["dexperts"](), CONTROLS["nullspace"]())
    refused(PromptError, said, lambda: guard.generate(prompt, max_new_tokens=2), guard.lm.model)
    assert guard.counters.requests == guard.counters.tokens_emitted == 0


TEXT_PROMPTS = {
    "empty text": ("", ["empty", "at least one"]),
    "empty text among others": (["a", ""], ["prompt 1", "empty"]),
    "chat without a template": ([{"role": "user", "content": "x"}], ["chat template", "plain text"]),
    "too long": ("é" * POSITIONS, [f"{2 * POSITIONS} tokens", "context"]),
}


@pytest.mark.parametrize(("prompt", "said"), TEXT_PROMPTS.values(), ids=TEXT_PROMPTS)
def test_text_prompt(prompt: Any, said: list[str]) -> None:
    guard = guard_with(CONTROLS["nullspace"](), model=byte_llama(), tokenizer=byte_tokenizer())
    refused(PromptError, said, lambda: guard.generate(prompt, max_new_tokens=2), guard.lm.model)
    assert guard.generate("a", max_new_tokens=1).texts


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
CHATS = {
    "without a role": [{"content": "x"}],
    "without content": [{"role": "user"}],
    "message of a wrong type": [{"role": "user", "content": "x"}, "y"],
}


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_chat_that_is_none(chat: Any) -> None:
    guard = guard_with(model=byte_llama(), tokenizer=byte_tokenizer(TEMPLATE))
    refused(PromptError, ["role", "content"], lambda: guard.generate(chat, max_new_tokens=1), guard.lm.model)
    assert guard.generate([{"role": "user", "content": "x"}], max_new_tokens=1).prompt_ids[0]


@pytest.mark.parametrize("kind", [torch.tensor, tuple, list])
def test_ids_in_every_container(kind: Any) -> None:
    """Tensors, tuples and lists of ids are the same prompt."""
    guard = guard_with(CONTROLS["dexperts"]())
    expected = guard.generate([[1, 7, 9]], max_new_tokens=3).token_ids
    assert guard.generate(kind([1, 7, 9]), max_new_tokens=3).token_ids == expected
    assert guard.generate([kind([1, 7, 9])] * 2, max_new_tokens=3).token_ids == expected * 2
    assert guard.generate(kind([[1, 7, 9]]), max_new_tokens=3).token_ids == expected


def test_stream_takes_one_text_prompt() -> None:
    refused(PolicyError, ["tokenizer", "generate"], lambda: guard_with().stream([1, 2]))
    guard = guard_with(model=byte_llama(), tokenizer=byte_tokenizer())
    refused(PolicyError, ["one prompt", "generate"], lambda: guard.stream(["a", "b"]))


def test_rows_of_padding_alone_under_attach() -> None:
    guard = guard_with(CONTROLS["dexperts"]())
    model = guard.lm.model

    def act() -> None:
        with guard.attach():
            model.generate(torch.tensor([[1, 2], [0, 0]]), attention_mask=torch.tensor([[1, 1], [0, 0]]), max_new_tokens=2)

    refused(PromptError, ["row 1", "padding"], act, model)


# --- Experts --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["expert", "anti_expert"])
def test_expert_with_another_vocabulary(side: str) -> None:
    model, other = llama(), llama(vocab=VOCAB + 1)
    refused(
        ModelError,
        [side, str(VOCAB), str(VOCAB + 1), "tokenizer"],
        lambda: guard_with(DExperts(**{side: other}), model=model),
        model,
        other,
    )
    guard_with(DExperts(**{side: llama(seed=3)}), model=model)


def test_expert_with_other_tokens() -> None:
    """As many entries, but token i means something else."""
    other = byte_tokenizer()
    other.add_tokens(["new"])

    def build(tokenizer: Any) -> mg.Guard:
        return guard_with(DExperts(expert=(byte_llama(2), tokenizer)), model=byte_llama(), tokenizer=byte_tokenizer())

    refused(ModelError, ["other tokens", "tokenizer"], lambda: build(other))
    build(byte_tokenizer())


EXPERTS = {
    "number": (3, PolicyError, ["expert", "int", "Prompt"]),
    "list": ([1, 2], PolicyError, ["expert", "list", "Prompt"]),
    "missing folder": ("/nowhere/at/all", ModelError, ["/nowhere/at/all"]),
    "text prompt without a tokenizer": (Prompt("be kind"), PolicyError, ["expert", "tokenizer", "token ids"]),
    "prompt id outside": (Prompt([VOCAB]), PolicyError, [f"token id {VOCAB}", f"0 to {VOCAB - 1}"]),
}


@pytest.mark.parametrize(("expert", "kind", "said"), EXPERTS.values(), ids=EXPERTS)
def test_expert(expert: Any, kind: type[GuardError], said: list[str]) -> None:
    model = llama()
    refused(kind, said, lambda: guard_with(DExperts(expert=expert), model=model), model)


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    refused(ModelError, ["config.json"], lambda: guard_with(DExperts(expert=str(tmp_path))))
    refused(ModelError, ["config.json"], lambda: mg.load_model(tmp_path))


@pytest.mark.parametrize("model", [None, 3, torch.nn.Linear(2, 2)], ids=["none", "number", "module"])
def test_model_of_a_wrong_type(model: Any) -> None:
    refused(ModelError, [type(model).__name__, "causal LM"], lambda: mg.Guard(mg.Policy(controls=[]), model))


def test_prompts_that_say_nothing() -> None:
    refused(PolicyError, ["empty Prompt"], lambda: Prompt(""))
    refused(PolicyError, ["empty Prompt"], lambda: Prompt([]))
    refused(PolicyError, ["expert", "value"], lambda: guard_with(DExperts()))
    refused(PolicyError, ["prefixes", "value"], lambda: guard_with(SelfDebias()))
    for prefix in ("", []):
        refused(PolicyError, ["empty"], lambda prefix=prefix: guard_with(SelfDebias(prefixes=[prefix]), tokenizer=byte_tokenizer()))


def test_self_debias_prefixes() -> None:
    refused(PolicyError, ["prefixes"], lambda: SelfDebias(prefixes="The following text is rude:"))
    refused(PolicyError, [f"token id {VOCAB}"], lambda: guard_with(SelfDebias(prefixes=[[VOCAB]])))
    refused(PolicyError, ["tokenizer"], lambda: guard_with(SelfDebias(prefixes=["rude:"])))


# --- Bases ----------------------------------------------------------------------------------------------------------------------

U = basis(2)
BASES = {
    "not orthonormal": (lambda: NullspaceProjection(basis=2 * U), ["orthonormal", "qr"]),
    "not orthogonal": (lambda: NullspaceProjection(basis=torch.stack([U[:, 0], U[:, 0]], 1)), ["orthonormal"]),
    "more directions than dimensions": (lambda: NullspaceProjection(basis=U.T), ["orthonormal", "(2, 32)"]),
    "three dimensions": (lambda: NullspaceProjection(basis=torch.zeros(2, 3, 4)), ["3 dimensions", "[d, r]"]),
    "nan": (lambda: NullspaceProjection(basis=U * float("nan")), ["finite"]),
    "text": (lambda: NullspaceProjection(basis="/nowhere.safetensors"), ["/nowhere.safetensors", "isn't there"]),
    "none": (lambda: NullspaceProjection(basis=None), ["basis", "[d, r]"]),
    "object": (lambda: NullspaceProjection(basis=object()), ["basis", "[d, r]"]),
    "missing": (lambda: NullspaceProjection(), ["basis"]),
    "leace shapes": (lambda: NullspaceProjection(basis=(U, U[:, :1], U[:, 0])), ["(U_in [d, r], U_out [d, r], mu [d])"]),
}


@pytest.mark.parametrize(("act", "said"), BASES.values(), ids=BASES)
def test_basis(act: Callable[[], Any], said: list[str]) -> None:
    refused(PolicyError, said, act)
    NullspaceProjection(basis=U)


def test_basis_of_a_wrong_width() -> None:
    model = llama()
    wide = NullspaceProjection(basis=basis(2, width=HIDDEN + 4))
    refused(PolicyError, [f"({HIDDEN + 4}, 2)", f"[{HIDDEN}, r]"], lambda: guard_with(wide, model=model), model)


def test_adaptive_basis_without_a_direction() -> None:
    model = llama()
    refused(PolicyError, ["direction", f"f[{HIDDEN}]"], lambda: guard_with(NullspaceProjection(basis=U, adaptive=True), model=model), model)
    refused(
        PolicyError,
        ["direction", "(5,)"],
        lambda: guard_with(NullspaceProjection(basis=U, adaptive=True, direction=torch.ones(5)), model=model),
    )
    guard_with(NullspaceProjection(basis=U[:, :1], adaptive=True), model=model)


def test_basis_file(tmp_path: Path) -> None:
    save_file({"other": torch.zeros(2)}, tmp_path / "odd.safetensors")
    refused(PolicyError, ["other", "basis", "U_in"], lambda: NullspaceProjection(basis=tmp_path / "odd.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    refused(PolicyError, ["broken.safetensors"], lambda: NullspaceProjection(basis=tmp_path / "broken.safetensors"))


# --- FUDGE ----------------------------------------------------------------------------------------------------------------------


def test_discriminator() -> None:
    refused(PolicyError, ["discriminator", "int", "callable"], lambda: Fudge(discriminator=3))
    refused(PolicyError, ["/nowhere", "safetensors"], lambda: Fudge(discriminator="/nowhere"))
    refused(PolicyError, ["discriminator"], lambda: Fudge())
    for query, key in ((torch.zeros(2, 5), torch.zeros(2, HIDDEN)), (torch.zeros(2, HIDDEN), torch.zeros(2, 5))):
        head = Fudge(discriminator=FactoredHead(query, key))
        refused(PolicyError, ["(2, 5)", f"[k, {HIDDEN}]"], lambda head=head: guard_with(head))
    different_ranks = Fudge(discriminator=FactoredHead(torch.zeros(2, HIDDEN), torch.zeros(3, HIDDEN)))
    refused(PolicyError, ["(2, 32)", "(3, 32)"], lambda: guard_with(different_ranks))


def test_discriminator_that_answers_in_a_wrong_shape() -> None:
    guard = guard_with(Fudge(discriminator=lambda ids, candidates: torch.zeros(1, 1), top_k=5))
    with pytest.raises(ControlError, match=r"fudge.*\(1, 1\).*\(1, 5\)"):
        guard.generate([1, 2], max_new_tokens=2)


# --- PPLM -----------------------------------------------------------------------------------------------------------------------

W, B = torch.zeros(2, HIDDEN), torch.zeros(2)
PPLMS = {
    "neither bag nor head": (lambda: PPLM(), ["bag_of_words", "head"]),
    "empty bags": (lambda: PPLM(bag_of_words=[]), ["bag_of_words", "head"]),
    "bag of strings": (lambda: PPLM(bag_of_words=["nurse"]), ["bag_of_words"]),
    "target out of range": (lambda: PPLM(head=(W, B), target=2), ["target", "2", "0 to 1"]),
    "target negative": (lambda: PPLM(head=(W, B), target=-1), ["target", "greater than or equal to 0"]),
    "head of a wrong type": (lambda: PPLM(head=W), ["head", "(W [classes, d], b [classes])"]),
    "head whose parts disagree": (lambda: PPLM(head=(W, torch.zeros(3))), ["(2, 32)", "(3,)"]),
    "head with text": (lambda: PPLM(head=("a", "b")), ["head", "(W [classes, d], b [classes])"]),
    "head with nan": (lambda: PPLM(head=(W * float("nan"), B)), ["head", "finite"]),
}


@pytest.mark.parametrize(("act", "said"), PPLMS.values(), ids=PPLMS)
def test_pplm(act: Callable[[], Any], said: list[str]) -> None:
    refused(PolicyError, said, act)
    PPLM(head=(W, B), target=1)


BAGS = {
    "only multi-token words": ([["nurse", "doctor"]], ["bag 0", "single token"], True),
    "second bag of multi-token words": ([["a"], ["nurse"]], ["bag 1", "single token"], True),
    "empty bag": ([[]], ["bag 0", "single token"], True),
    "words without a tokenizer": ([["a"]], ["'a'", "without a tokenizer", "token ids"], False),
    "id outside": ([[1, 10_000]], ["bag 0", "10000", "0 to"], True),
    "id negative": ([[-1]], ["bag 0", "-1"], True),
}


@pytest.mark.parametrize(("bags", "said", "tokenizer"), BAGS.values(), ids=BAGS)
def test_bag_that_the_model_cannot_use(bags: Any, said: list[str], tokenizer: bool) -> None:
    model = byte_llama()
    words = byte_tokenizer() if tokenizer else None
    refused(PolicyError, said, lambda: guard_with(PPLM(bag_of_words=bags), model=model, tokenizer=words), model)
    guard_with(PPLM(bag_of_words=[["a", "nurse"]]), model=model, tokenizer=byte_tokenizer())


def test_pplm_head_of_a_wrong_width() -> None:
    model = llama()
    refused(PolicyError, ["(2, 5)", str(HIDDEN)], lambda: guard_with(PPLM(head=(torch.zeros(2, 5), B)), model=model), model)


def test_model_loaded_in_inference_mode() -> None:
    with torch.inference_mode():
        model = llama()
    refused(PolicyError, ["gradients", "inference_mode", "outside"], lambda: guard_with(CONTROLS["pplm"](), model=model), model)
    guard_with(CONTROLS["dexperts"](), model=model).generate([1, 2], max_new_tokens=2)
