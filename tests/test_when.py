"""`when`: a single control acts where its own conditions hold, on every path, and elsewhere it isn't there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy_model import NumpyModel
from odd_models import byte_llama, byte_tokenizer
from test_slots import Count, Stack, alone, random
from tiny_models import HIDDEN, llama

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.backends.turns import last_turn, tells_roles
from moralguard.controls import Control, DExperts, FactoredHead, GeDi, Prompt, SelfDebias, When
from moralguard.decoding.conditions import gates_of
from moralguard.decoding.gate import BoundGate, Gate
from moralguard.decoding.grad import plain_no_grad
from moralguard.decoding.rectification import rectify
from moralguard.decoding.script import language_of
from moralguard.decoding.session import Session
from moralguard.errors import PolicyError
from moralguard.packs import write_pack
from moralguard.policy import policy_schema
from moralguard.serving.running_requests import RunningRequests
from moralguard.testing import check_control

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<start>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}"
)
NO_ROLES = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
ZH, LATIN, RU = "你好，天气", "How are you", "Как дела"
DEXPERTS = DExperts(expert=Prompt([5, 6]), anti_expert=Prompt([7]), alpha=2.0)
DEBIAS = SelfDebias(prefixes=[[11, 12, 13]], decay_constant=300.0)


def model(numpy: bool = False, template: str | None = CHATML) -> Any:
    tokenizer = byte_tokenizer(template)
    return NumpyModel(byte_llama(), tokenizer) if numpy else LanguageModel(byte_llama(), tokenizer)


def ids(text: str) -> list[int]:
    return list(byte_tokenizer()(text)["input_ids"])


@pytest.fixture(scope="module")
def risk(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prefix head whose risk differs from text to text."""
    folder = tmp_path_factory.mktemp("risk")
    FactoredHead(random(3, HIDDEN, seed=4), random(3, HIDDEN, seed=5), random(HIDDEN, seed=6), -0.5, random(HIDDEN, seed=7)).save(folder)
    write_pack(folder, kind="prefix-head", method="random", lm=model(), name="risk", data=(), settings={}, metrics={})
    return str(folder)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Comment ça va?", "latin"),
        ("Привіт", "cyrillic"),
        ("你好 OK", "zh"),
        ("今日はいい天気", "ja"),
        ("カメラ", "ja"),
        ("鮮の每日C水果茶很好喝我要两杯请问", "zh"),
        ("안녕하세요", "ko"),
        ("مرحبا", "arabic"),
        ("नमस्ते", "devanagari"),
        ("สวัสดี", "th"),
        ("ＡＢＣ", "latin"),
        ("Γειά", "el"),
        ("שלום", "he"),
        ("12 + 7 = 😀", None),
        ("", None),
    ],
)
def test_language_is_what_most_letters_are_written_in(text: str, language: str | None) -> None:
    assert language_of(text) == language


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize(
    ("template", "roles"),
    [(CHATML, ("system", "user", "assistant", "tool")), (INST, ("user", "assistant")), (GEMMA, ("user", "assistant", "tool"))],
    ids=["chatml", "inst", "gemma"],
)
def test_the_last_message_is_told_from_ids(template: str, roles: tuple[str, ...], asked: bool) -> None:
    lm = model(template=template)
    assert tells_roles(lm) == roles
    chats = {
        "user": [[("user", "A?")], [("user", "x"), ("assistant", "y"), ("user", "A?")]],
        "assistant": [[("user", "x"), ("assistant", "A?")]],
        "system": [[("system", "A?")]],
        "tool": [[("user", "x"), ("assistant", "y"), ("tool", "A?")]],
    }
    for role in roles:
        for chat in chats[role]:
            messages = [{"role": name, "content": content} for name, content in chat]
            text = lm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked)
            turn = last_turn(lm, ids(text))
            assert (turn.role, turn.text.strip()) == (role, "A?")
    assert last_turn(lm, ids("A?")) == last_turn(model(template=None), ids("A?"))
    assert last_turn(lm, ids("A?")).role is None


def test_a_long_system_prompt_does_not_hide_the_language_of_the_message() -> None:
    lm = model()
    guard = mg.Guard(mg.Policy(controls=[DEXPERTS.replaced(when=When(language="zh"))]), lm)
    chat = [{"role": "system", "content": "You are a helpful assistant." * 2}, {"role": "user", "content": "你好"}]
    guard.generate([chat], max_new_tokens=2)
    assert guard.counters.rows_touched == 2
    guard.generate(["You say 你好"], max_new_tokens=2)
    assert guard.counters.rows_touched == 2


@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
def test_rows_whose_condition_is_false_have_no_term_of_the_control(numpy: bool) -> None:
    lm = model(numpy)
    controls = [DEXPERTS.replaced(when=When(language=("zh", "ja"))), DEBIAS.replaced(when=When(language=("zh", "cyrillic")))]
    guard = mg.Guard(mg.Policy(controls=controls), lm)
    with torch.no_grad():
        session = Session(lm, guard.controls, [ids(text) for text in (ZH, LATIN, RU)], own_base=True)
        for _ in range(3):
            outcome = session.step()
            assert outcome.touched.tolist() == [True, False, True]
            assert outcome.terms is not None
            names = [control.name for control in session.controls]
            assert names == ["dexperts", "self-debias"]
            logits, base = np.array(outcome.logits), np.array(outcome.base)
            assert logits[1].tobytes() == base[1].tobytes()
            # Cyrillic: what the policy without dexperts gives, from the same base
            without = [guard.controls[1].terms(_stepped(session, 1))]
            assert np.array(rectify(outcome.base, without).logits)[2].tobytes() == logits[2].tobytes()
            assert logits[2].tobytes() != base[2].tobytes()
            session.commit(outcome.logits.argmax(-1))
            session.advance()


def _stepped(session: Session, index: int) -> Any:
    from dataclasses import replace

    assert session._pending is not None
    return replace(session._pending.step, columns=session.columns[index] or {})


def test_passes_of_a_control_that_no_prompt_admits_are_not_run() -> None:
    lm = model()
    guard = mg.Guard(mg.Policy(controls=[DEXPERTS.replaced(when=When(language="zh")), DEBIAS]), lm)
    plain = mg.Guard(mg.Policy(controls=[DEBIAS]), lm)
    with torch.no_grad():
        session, wanted = (Session(lm, each.controls, [ids(LATIN)], own_base=True) for each in (guard, plain))
        assert [control.name for control in session.controls] == ["self-debias"]
        assert sum(len(group.lengths) for group in session.table.groups) == 2  # the base's own row and the prefix
        assert torch.equal(session.step().logits, wanted.step().logits)
        both = Session(lm, guard.controls, [ids(LATIN), ids(ZH)], own_base=True)
        assert sum(len(group.lengths) for group in both.table.groups) == 2 * 4


@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
@pytest.mark.parametrize(
    "settings",
    [{"first_tokens": 2}, {"min_entropy": 4.6}, {"min_risk": 0.62, "risk_window": 3, "stay_open": True}, {"min_risk": 0.62}],
    ids=["first", "entropy", "stays", "risk"],
)
def test_conditions_of_the_only_control_are_a_gate(risk: str, settings: dict[str, Any], numpy: bool) -> None:
    """Along every path, to the same tokens; and the control would do something else without them."""
    settings = settings | ({"risk": risk} if "min_risk" in settings else {})
    lm, prompts = model(numpy), [ids(text) for text in (ZH, LATIN, RU, "b")]
    gated = mg.Guard(mg.Policy(controls=[DEXPERTS], gate=Gate(**settings)), lm)
    under = mg.Guard(mg.Policy(controls=[DEXPERTS.replaced(when=When(**settings))]), lm)
    always = mg.Guard(mg.Policy(controls=[DEXPERTS]), lm)
    mine, wanted, others = (
        [list(row) for row in guard.generate(prompts, max_new_tokens=8, seed=1).token_ids] for guard in (under, gated, always)
    )
    assert mine == wanted
    assert under.counters.rows_touched == gated.counters.rows_touched < always.counters.rows_touched
    assert mine != others
    if numpy:
        return
    for prompt, row in zip(prompts, under.generate(prompts, max_new_tokens=6, do_sample=False).token_ids, strict=True):
        arguments = {"max_new_tokens": 6, "do_sample": False}
        found = lm.model.generate(torch.tensor([prompt]), logits_processor=[under.logits_processor()], **arguments)
        assert found[0, len(prompt) :].tolist() == list(row)
        with under.attach() as attached:
            assert attached.generate(torch.tensor([prompt]), **arguments)[0, len(prompt) :].tolist() == list(row)


def test_gate_and_condition_must_both_hold() -> None:
    lm, prompt = model(), ids(LATIN)
    for gate, when in ((2, 5), (5, 2)):
        control = DEXPERTS.replaced(when=When(first_tokens=when))
        guard = mg.Guard(mg.Policy(controls=[control], gate=Gate(first_tokens=gate)), lm)
        guard.generate([prompt], max_new_tokens=6)
        assert guard.counters.rows_touched == 2


def test_equal_conditions_are_looked_at_once_a_step(risk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, own = [], BoundGate.log_odds
    monkeypatch.setattr(BoundGate, "log_odds", lambda self, step: [looked.append(self.settings), own(self, step)][1])
    when = {"risk": risk, "min_risk": 0.4}
    controls = [
        DEXPERTS.replaced(when=When(**when)),
        DEBIAS.replaced(when=When(**when)),
        GeDi(code_desired=Prompt([1]), code_undesired=Prompt([2]), when=When(first_tokens=3)),
    ]
    guard = mg.Guard(mg.Policy(controls=controls), model())
    assert len(gates_of(None, guard.controls)) == 2
    guard.generate([ids(LATIN), ids(ZH)], max_new_tokens=3)
    assert len(looked) == 3 * 2
    assert sum(bool(settings.risk) for settings in looked) == 3


def guards_of(risk: str, numpy: bool) -> list[mg.Guard]:
    lm = model(numpy)
    stays = When(risk=risk, min_risk=0.62, risk_window=3, stay_open=True)
    policies: list[list[Control]] = [
        [DEXPERTS.replaced(when=When(language="zh")), DEBIAS.replaced(when=stays)],
        [CountBytes(when=stays.replaced(language=("latin", "cyrillic"))), DEXPERTS.replaced(when=stays), DEBIAS],
    ]
    gate = Gate(risk=risk, min_risk=0.3, risk_window=2)
    return [mg.Guard(mg.Policy(controls=controls, gate=gate if i else None), lm) for i, controls in enumerate(policies)]


class CountBytes(Count):
    """``Count`` on the byte vocabulary."""

    def bind(self, lm: Any, values: Any) -> Any:
        from moralguard.controls import Dense, Terms

        bound = super().bind(lm, values)

        class Bound(type(bound)):  # type: ignore[misc]
            def terms(self, step: Any) -> Terms:
                delta = step.arrays.full((step.rows, lm.vocab_size), 0.0, step.arrays.float32, step.logits)
                delta[:, 5] = step.columns["even"]
                return Terms((Dense(delta),), carry={"even": step.columns["even"] + 0.5})

        return Bound(self, lm)


@pytest.mark.parametrize("own_base", [True, False], ids=["own", "given"])
@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
def test_requests_come_wait_and_leave_with_what_their_conditions_remember(risk: str, numpy: bool, own_base: bool) -> None:
    guards = guards_of(risk, numpy)
    texts = [ids(text) for text in (ZH, LATIN, RU, "b", "你", "a b a")]
    stack = Stack(guards, own_base=own_base)
    parked: dict[int, Any] = {}
    for slot in range(4):
        stack.add(slot, slot % 2, texts[slot])
    stack.step([0, 1])
    stack.step([0, 1, 2, 3])
    stack.step([3, 1])
    parked[1] = stack.slots.park(1, stack.tokens[1])
    parked[0] = stack.slots.park(0, stack.tokens[0])
    stack.add(4, 0, texts[4])
    stack.add(5, 1, texts[5])
    stack.step([2, 3, 4, 5])
    stack.add(1, 1, texts[1], parked[1])
    stack.add(0, 0, texts[0], parked[0])
    for _ in range(3):
        stack.step([0, 1, 2, 3, 4, 5])
    changed = 0
    for slot, tokens in stack.tokens.items():
        expected, laws = alone(guards[slot % 2], texts[slot], len(tokens))
        assert tokens == expected, f"slot {slot}"
        for mine, theirs in zip(stack.laws[slot], laws, strict=True):
            assert np.allclose(np.exp(mine - mine.max()), np.exp(theirs - theirs.max()), atol=2e-5)
        changed += tokens != alone(mg.Guard(mg.Policy(), guards[0].lm), texts[slot], len(tokens))[0]
    assert changed > 0


def test_preempted_requests_keep_the_language_of_their_prompt(risk: str) -> None:
    """What was generated since is of another script than the prompt, and is not asked."""
    lm = model()
    guard = mg.Guard(mg.Policy(controls=[DEXPERTS.replaced(when=When(language="zh"))]), lm)
    generated = ids("plain English letters")
    with torch.no_grad():
        session = Session(lm, guard.controls, [ids("你") + generated], own_base=True, asked=[ids("你")])
        assert bool(session.step().touched.all())
        assert Session(lm, guard.controls, [ids("你") + generated], own_base=True).controls == ()
        stack = Stack([guard], own_base=True)
        stack.add(0, 0, ids("你"))
        stack.tokens[0] = list(generated)
        [step], failures = stack.slots.step({0: generated})
        assert not failures
        assert bool(step.outcome.touched.all())


def test_the_paths_agree_on_language_and_role() -> None:
    """generate, stream, attach, a processor over a padded batch, and what a serving stack's adapter runs."""
    lm = model()
    controls = [DEXPERTS.replaced(when=When(language="zh")), DEBIAS.replaced(when=When(role="user"))]
    guard = mg.Guard(mg.Policy(controls=controls), lm)
    chat = [{"role": "user", "content": "Hi"}]
    texts = [ZH, LATIN, lm.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)]
    decoding = {"max_new_tokens": 5, "do_sample": False}
    result = guard.generate([ZH, LATIN, chat], **decoding)
    assert guard.counters.rows_touched == 10
    wanted = [list(row) for row in result.token_ids]
    assert ["".join(guard.stream(prompt, **decoding)) for prompt in (ZH, LATIN, chat)] == result.texts
    rows = [ids(text) for text in texts]
    width = max(map(len, rows))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    found = lm.model.generate(padded, attention_mask=mask, logits_processor=[guard.logits_processor()], **decoding)
    assert found[:, width:].tolist() == wanted
    with guard.attach() as attached:
        assert attached.generate(padded, attention_mask=mask, **decoding)[:, width:].tolist() == wanted
    running = RunningRequests(lm)
    tokens: dict[int, list[int]] = {slot: [] for slot in range(3)}
    for slot in tokens:
        running.add(slot, guard, rows[slot], 0)
    for _ in range(5):
        with plain_no_grad():
            logits = torch.stack([lm.model(torch.tensor([rows[slot] + tokens[slot]])).logits[0, -1] for slot in tokens])
        assert running.step(tokens, logits) == {}
        for slot, row in enumerate(logits):
            tokens[slot].append(int(row.argmax()))
    assert list(tokens.values()) == wanted


def test_a_condition_is_policy_data(tmp_path: Path) -> None:
    text = """
controls:
  - {control: self-debias@1, prefixes: [[1, 2]], when: {language: [zh, ja], role: user, first_tokens: 8, min_entropy: 1}}
"""
    (tmp_path / "policy.yaml").write_text(text)
    policy = mg.Policy.load(tmp_path / "policy.yaml")
    (control,) = policy.effective_controls()
    assert control.when == When(language=("zh", "ja"), role=("user",), first_tokens=8, min_entropy=1.0)
    written = policy.as_dict()["controls"][0]["when"]
    assert written == {"language": ["zh", "ja"], "role": ["user"], "first_tokens": 8, "min_entropy": 1.0}
    assert mg.Policy.load(policy.as_dict()) == policy
    assert policy.scaled(0.5).effective_controls()[0].when == control.when
    schema = policy_schema()["$defs"]
    assert "when" in schema["SelfDebias"]["properties"]
    assert "role" in schema["When"]["properties"]


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ({}, "holds no condition"),
        ({"stay_open": True}, "holds no condition"),
        ({"language": "en"}, "say 'latin'"),
        ({"language": ["zh", "ru"]}, "say 'cyrillic'"),
        ({"language": "klingon"}, "known: latin"),
        ({"role": "boss"}, "'system', 'user', 'assistant' or 'tool'"),
        ({"langauge": "zh"}, "did you mean 'language'"),
        ({"min_risk": 0.3}, "min_risk needs `risk`"),
        ({"first_tokens": 0}, "greater than or equal to 1"),
    ],
)
def test_what_a_condition_cannot_say(when: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        DExperts(when=when)


def test_what_a_model_cannot_tell_is_refused_when_the_guard_is_built() -> None:
    def build(lm: Any, **when: Any) -> None:
        mg.Guard(mg.Policy(controls=[DEBIAS.replaced(when=When(**when))]), lm)

    with pytest.raises(PolicyError, match="without a tokenizer"):
        build((llama(), None), language="zh")
    with pytest.raises(PolicyError, match="no chat template that tells roles"):
        build(model(template=None), role="user")
    with pytest.raises(PolicyError, match="no chat template that tells roles"):
        build(model(template=NO_ROLES), role="user")
    with pytest.raises(PolicyError, match=r"by role system would never hold .* it tells user, assistant"):
        build(model(template=INST), role=["user", "system"])


def test_a_gate_is_no_place_for_what_only_a_control_asks() -> None:
    with pytest.raises(PolicyError, match="give them as its `when`"):
        mg.Guard(mg.Policy(controls=[DEBIAS], gate=When(language="zh")), model())
    with pytest.raises(PolicyError, match="no setting 'language'"):
        mg.Policy.load({"gate": {"language": "zh"}})


@pytest.mark.parametrize("when", [When(first_tokens=2), When(min_entropy=3.0)], ids=["first", "entropy"])
def test_a_control_with_conditions_keeps_every_invariant(when: When) -> None:
    check_control(DEXPERTS.replaced(when=when))
    check_control(GeDi(code_desired=Prompt([1]), code_undesired=Prompt([2]), when=when))


@pytest.mark.smollm
def test_conditions_on_the_demo_model() -> None:
    lm = mg.load_model("smollm2-135m")
    control = DExperts(expert=Prompt("Very polite:\n"), anti_expert=Prompt("Very rude:\n"), when=When(language="latin", role="user"))
    guard, plain = (mg.Guard(mg.Policy(controls=controls), lm) for controls in ([control], ()))
    decoding = {"max_new_tokens": 10, "do_sample": False}
    english, chinese = ([{"role": "user", "content": text}] for text in ("Tell me about my neighbour.", "你好，介绍一下你自己。"))
    mine, base = (guard.generate([english, chinese, "My neighbour is"], **decoding).texts for guard in (guard, plain))
    assert mine[1:] == base[1:]
    assert guard.counters.rows_touched == 10
    assert mine[0] != base[0]
