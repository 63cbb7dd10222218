"""A gate by risk: it opens where the prefix head expects a broken value, and rows under it pass through bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import gpt2, llama

import moralguard as mg
from moralguard.backends.factored_head import FactoredHead
from moralguard.backends.hf import LanguageModel
from moralguard.controls import DExperts, Prompt
from moralguard.decoding.gate import Gate
from moralguard.decoding.outcome import Outcome
from moralguard.decoding.session import Session
from moralguard.errors import ModelError, PolicyError, UnsupportedPathError
from moralguard.packs import write_pack

PROMPTS = [[1, 5, 9], [2, 7, 3, 8], [4], [11, 12, 13, 14]]
CONTROL = DExperts(expert=Prompt([5, 6]), anti_expert=Prompt([7]), alpha=2.0)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel(llama(), None)


@pytest.fixture(scope="module")
def pack(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("risk")
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(3, lm.width, generator=generator) for _ in range(2))
    FactoredHead(query, key, torch.randn(lm.width, generator=generator), 0.2, torch.randn(lm.width, generator=generator)).save(folder)
    write_pack(folder, kind="prefix-head", method="random", lm=lm, name="risk", data=(), settings={}, metrics={})
    return str(folder)


def risks(lm: LanguageModel, pack: str) -> torch.Tensor:
    """The risk at the end of every prompt, from the formula, in float64."""
    head = FactoredHead.load(pack)
    embedding = lm.model.get_output_embeddings().weight.detach().double()
    found = []
    for prompt in PROMPTS:
        with torch.no_grad():
            hidden = lm.model.base_model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1].double()
            logits = lm.model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
        top = torch.topk(logits, 50)
        e = embedding[top.indices]
        kept = (
            (e @ head.key.double().T) @ (head.query.double() @ hidden) + e @ head.linear.double() + hidden @ head.state.double() + head.bias
        )
        found.append((torch.softmax(top.values, -1) * -kept).sum())
    return torch.sigmoid(torch.stack(found))


def middle(values: torch.Tensor) -> float:
    """Between two of the values, so that no rounding decides."""
    return float(values.sort().values[1:3].mean())


def test_the_risk_is_the_formula_and_the_gate_opens_at_it(lm: LanguageModel, pack: str) -> None:
    expected = risks(lm, pack)
    least = middle(expected)
    gate = Gate(risk=pack, min_risk=least).bind(lm)
    guard = mg.Guard(mg.Policy(controls=(CONTROL,)), lm)
    session = Session(lm, guard.controls, PROMPTS, own_base=True, gate=gate)
    outcome = session.step()
    assert outcome.touched.tolist() == (expected >= least).tolist()
    assert 0 < int(outcome.touched.sum()) < len(PROMPTS)
    shut = ~outcome.touched
    assert torch.equal(outcome.logits[shut], outcome.base[shut])
    assert not torch.equal(outcome.logits[outcome.touched], outcome.base[outcome.touched])
    log_odds = gate.log_odds(session._pending.step)
    assert log_odds is not None
    torch.testing.assert_close(torch.sigmoid(log_odds).double(), expected, atol=1e-4, rtol=1e-4)


def test_a_risk_is_the_same_alone_and_in_a_batch(lm: LanguageModel, pack: str) -> None:
    guard = mg.Guard(mg.Policy(controls=(CONTROL,), gate=Gate(risk=pack, min_risk=0.4)), lm)
    together = guard.generate(PROMPTS, max_new_tokens=6, seed=1, batch_size=4).token_ids
    alone = [guard.generate([prompt], max_new_tokens=6, seed=1).token_ids[0] for prompt in PROMPTS]
    assert [list(ids) for ids in together] == [list(ids) for ids in alone]


def test_shut_gates_give_the_base_and_attach_agrees_with_the_own_loop(lm: LanguageModel, pack: str) -> None:
    def tokens(gate: Gate | None, controls: tuple[DExperts, ...] = (CONTROL,)) -> list[list[int]]:
        result = mg.Guard(mg.Policy(controls=controls, gate=gate), lm).generate(PROMPTS, max_new_tokens=8)
        return [list(ids) for ids in result.token_ids]

    assert tokens(Gate(risk=pack, min_risk=1 - 1e-12)) == tokens(None, ())
    assert tokens(Gate(risk=pack, min_risk=1e-12)) == tokens(None)
    half = Gate(risk=pack, min_risk=middle(risks(lm, pack)))
    guard = mg.Guard(mg.Policy(controls=(CONTROL,), gate=half), lm)
    for prompt, own in zip(PROMPTS, tokens(half), strict=True):
        with guard.attach() as model:
            found = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
        assert found == own


@pytest.mark.parametrize("generation", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}], ids=["greedy", "beams", "drafts"])
def test_a_logits_processor_reads_the_risk_from_a_row_of_its_own(lm: LanguageModel, pack: str, generation: dict[str, int]) -> None:
    """Where transformers hands over no hidden states; the law is that of the other paths."""
    risk = middle(risks(lm, pack))
    guard = mg.Guard(mg.Policy(controls=(CONTROL,), gate=Gate(risk=pack, min_risk=risk)), lm)
    arguments = {"max_new_tokens": 8, "do_sample": False} | generation
    for prompt in PROMPTS[:2] if generation else PROMPTS:
        ids = torch.tensor([prompt])
        found = lm.model.generate(ids, logits_processor=[guard.logits_processor()], **arguments)[0, len(prompt) :].tolist()
        if "num_beams" in generation:
            with guard.attach() as model:
                wanted = model.generate(ids, **arguments)[0, len(prompt) :].tolist()
        else:
            wanted = list(guard.generate([prompt], max_new_tokens=8).token_ids[0])
        assert found == wanted


def looked_at(lm: LanguageModel, pack: str, guard: mg.Guard, ids: list[int]) -> tuple[Outcome, torch.Tensor]:
    """The guarded step behind a text that was read from its start, and its log-odds of a broken value."""
    session = Session(lm, guard.controls, [ids], own_base=True, gate=Gate(risk=pack, min_risk=1e-9).bind(lm))
    outcome = session.step()
    assert session.gate is not None
    assert session._pending is not None
    newest = session.gate.log_odds(session._pending.step)
    assert newest is not None
    return outcome, newest[0]


@pytest.mark.parametrize("generation", [{}, {"prompt_lookup_num_tokens": 2}, {"num_beams": 3}], ids=["greedy", "drafts", "beams"])
@pytest.mark.parametrize("window", [1, 3])
def test_a_gate_that_stays_open_is_open_from_its_first_risk_on(
    lm: LanguageModel, pack: str, window: int, generation: dict[str, int]
) -> None:
    """Against a loop that reads the whole text anew at every token."""
    new, risk = 10, middle(risks(lm, pack))
    policy = mg.Policy(controls=(CONTROL,), gate=Gate(risk=pack, min_risk=risk, risk_window=window, stay_open=True))
    guard, always = mg.Guard(policy, lm), mg.Guard(mg.Policy(controls=(CONTROL,)), lm)
    opened = []
    for prompt in PROMPTS:
        ids, is_open, log_odds = list(prompt), False, []
        for _ in range(new):
            outcome, newest = looked_at(lm, pack, always, ids)
            log_odds.append(newest)
            is_open |= torch.sigmoid(torch.stack(log_odds[-window:]).mean()).item() >= risk
            law = outcome.logits if is_open else outcome.base
            ids.append(int(law.argmax()))
        opened.append(is_open)
        if "num_beams" in generation:
            with guard.attach() as model:
                wanted = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, **generation)[0].tolist()
        else:
            wanted = ids
            assert list(guard.generate([prompt], max_new_tokens=new).token_ids[0]) == ids[len(prompt) :]
        processors = [guard.logits_processor()]
        found = lm.model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, logits_processor=processors, **generation)
        assert found[0].tolist() == wanted
    assert any(opened)


def test_several_heads_take_the_largest_risk(lm: LanguageModel, pack: str, tmp_path: Path) -> None:
    head = FactoredHead.load(pack)
    FactoredHead(head.query, head.key, head.linear, head.bias - 3.0, head.state).save(tmp_path)
    write_pack(tmp_path, kind="prefix-head", method="random", lm=lm, name="riskier", data=(), settings={}, metrics={})
    session = Session(lm, (), PROMPTS, own_base=True, gate=Gate(risk=(pack, str(tmp_path))).bind(lm))
    session.step()
    step = session._pending.step
    one, other, both = (Gate(risk=risk).bind(lm).log_odds(step) for risk in (pack, str(tmp_path), (pack, str(tmp_path))))
    assert one is not None
    assert other is not None
    assert both is not None
    assert torch.equal(both, torch.maximum(one, other))
    assert bool((other > one).all())


def test_what_a_gate_by_risk_cannot_do(lm: LanguageModel, pack: str, tmp_path: Path) -> None:
    policy = mg.Policy(controls=(CONTROL,), gate=Gate(risk=pack, min_risk=0.4))
    with pytest.raises(ModelError, match="fingerprint"):
        mg.Guard(policy, (gpt2(), None))
    with pytest.raises(PolicyError, match="prefix-head packs that tell the risk"):
        Gate(min_risk=0.3)
    with pytest.raises(PolicyError, match="risk_window needs `risk`"):
        Gate(risk_window=2)
    with pytest.raises((PolicyError, ModelError), match="isn't a pack"):
        Gate(risk=str(tmp_path))
    with mg.Guard(policy, lm).attach() as model, pytest.raises(UnsupportedPathError, match="the gate can't follow"):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, prompt_lookup_num_tokens=2)


def test_a_gate_is_copied_and_written_whole(lm: LanguageModel, pack: str) -> None:
    gate = Gate(risk=pack, min_risk=0.4)
    assert gate.replaced(min_risk=0.6).min_risk == 0.6
    assert Gate(first_tokens=3).replaced(first_tokens=2) == Gate(first_tokens=2)
    policy = mg.Policy(controls=(CONTROL,), gate=gate)
    assert mg.Policy.load(policy.as_dict()).gate == gate
