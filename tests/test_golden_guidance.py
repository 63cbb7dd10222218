"""Guidance against its formula: z- + gamma (z+ - z-), and the share of the way there."""

from __future__ import annotations

import control_runs
import numpy as np
import oracles
import pytest
import tiny_models
import torch
from numpy_model import NumpyModel
from odd_models import expert
from oracles import TOLERANCE, Reference, check_greedy, distance, run_attached
from scipy.special import log_softmax

import moralguard as mg
from moralguard.controls import GeDi, Guidance, Prompt, Unconditional
from moralguard.controls.registry import write_control
from moralguard.decoding.passes import Pass, PassTable
from moralguard.decoding.session import Session
from moralguard.errors import PolicyError
from moralguard.testing import check_control

POSITIVE, NEGATIVE = [3, 4], [60, 61, 62]
PROMPTS = [[8], [5, 9, 20, 7, 33, 41, 2], [100, 3, 77]]


@pytest.fixture(params=["llama", "gpt2"])
def family(request):
    return tiny_models.FAMILIES[request.param]


def guard_of(model, **settings):
    return mg.Guard(mg.Policy(controls=[Guidance(**settings)]), (model, None))


def oracle(base, positive, negative, gamma=1.5, strength=1.0):
    """log p(x | c-) + gamma (log p(x | c) - log p(x | c-)), mixed with the base's log-law; a prompt is (model, prefix) or None."""

    def law(ids):
        own = log_softmax(base.logits(ids).numpy())
        plus, minus = (own if side is None else log_softmax(side[0].logits([*side[1], *ids]).numpy()) for side in (positive, negative))
        guided = minus + gamma * (plus - minus)
        return torch.from_numpy(log_softmax((1 - strength) * own + strength * guided))

    return law


CASES = {
    "defaults": {},
    "gamma 0.5": {"gamma": 0.5},
    "gamma 3": {"gamma": 3.0},
    "half way": {"strength": 0.5},
    "beyond": {"strength": 1.5, "gamma": 1.25},
}


@pytest.mark.parametrize("sides", ["both", "positive", "negative"])
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_law(family, settings, sides):
    model = family(0)
    base = Reference(model)
    prompts = {"positive": POSITIVE, "negative": NEGATIVE}
    given = {name: Prompt(ids) for name, ids in prompts.items() if sides in (name, "both")}
    expected = oracle(base, *((base, ids) if name in given else None for name, ids in prompts.items()), **settings)
    check_greedy(guard_of(model, **given, **settings), model, expected, PROMPTS)


def test_another_model_as_a_side(family):
    model, other = family(0), family(1)
    base = Reference(model)
    expected = oracle(base, (base, POSITIVE), (Reference(other), []), gamma=2.0)
    check_greedy(guard_of(model, positive=Prompt(POSITIVE), negative=other, gamma=2.0), model, expected, PROMPTS)


def test_gamma_1_is_the_positive_prompt_and_gamma_0_the_negative_one(family):
    model = family(0)
    base = Reference(model)
    for gamma, prefix in ((1.0, POSITIVE), (0.0, NEGATIVE)):
        guard = guard_of(model, positive=Prompt(POSITIVE), negative=Prompt(NEGATIVE), gamma=gamma)
        check_greedy(guard, model, lambda ids, prefix=prefix: base.log_law([*prefix, *ids]), PROMPTS)


def test_temperature_comes_after_the_guidance(family):
    model = family(0)
    base = Reference(model)
    expected = oracle(base, (base, POSITIVE), (base, NEGATIVE))
    torch.manual_seed(0)
    guard = guard_of(model, positive=Prompt(POSITIVE), negative=Prompt(NEGATIVE))
    run = run_attached(guard, model, PROMPTS, do_sample=True, temperature=0.6, top_k=0)
    assert distance(run, lambda ids: torch.log_softmax(expected(ids) / 0.6, -1), PROMPTS) <= TOLERANCE
    assert distance(run, expected, PROMPTS) > 10 * TOLERANCE


WRONG = {
    "gamma off by 10 %": lambda base: oracle(base, (base, POSITIVE), (base, NEGATIVE), gamma=1.65),
    "sides swapped": lambda base: oracle(base, (base, NEGATIVE), (base, POSITIVE)),
    "base for the negative": lambda base: oracle(base, (base, POSITIVE), None),
    "DExperts without its filter": lambda base: oracles.dexperts(base, (base, POSITIVE), (base, NEGATIVE), alpha=1.5, filter_p=1.0),
}


@pytest.mark.parametrize("mistake", WRONG.values(), ids=WRONG)
def test_a_wrong_oracle_disagrees(family, mistake):
    model = family(0)
    run = run_attached(guard_of(model, positive=Prompt(POSITIVE), negative=Prompt(NEGATIVE)), model, PROMPTS)
    assert distance(run, mistake(Reference(model)), PROMPTS) > 10 * TOLERANCE


def settings_for(numpy):
    return Guidance(positive=Prompt(POSITIVE), negative=NumpyModel(expert()) if numpy else expert(), gamma=1.8)


def unconditional_oracle(base, gamma=1.5, prompts=PROMPTS):
    """The same with z- behind the prompt's last token alone."""

    def law(ids):
        asked = next(len(prompt) for prompt in prompts if list(ids[: len(prompt)]) == prompt)
        minus, plus = (log_softmax(base.logits(text).numpy()) for text in (ids[asked - 1 :], ids))
        return torch.from_numpy(log_softmax(minus + gamma * (plus - minus)))

    return law


@pytest.mark.parametrize("gamma", [1.5, 0.0, 3.0])
def test_the_unconditional_law_reads_the_prompts_last_token(family, gamma):
    model = family(0)
    guard = guard_of(model, negative=Unconditional(), gamma=gamma)
    run = check_greedy(guard, model, unconditional_oracle(Reference(model), gamma), PROMPTS)
    if gamma:
        whole = oracle(Reference(model), None, (Reference(model), []), gamma=gamma)  # z- reads the prompt, too
        assert distance(run, whole, PROMPTS) > 10 * TOLERANCE


def test_the_unconditional_law_is_that_of_transformers(family):
    model = family(0)
    settings = {"max_new_tokens": 8, "do_sample": False, "output_scores": True, "return_dict_in_generate": True, "pad_token_id": 0}
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), guidance_scale=1.7, **settings)
        with guard_of(model, negative=Unconditional(), gamma=1.7).attach(model):
            mine = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert mine.sequences.tolist() == theirs.sequences.tolist()
        for own, other in zip(mine.scores, theirs.scores, strict=True):
            assert torch.allclose(own.softmax(-1), other.softmax(-1), atol=1e-6)


def test_the_unconditional_law_follows_beams(family):
    model, width = family(0), 3
    law, guard = unconditional_oracle(Reference(model)), guard_of(model, negative=Unconditional())
    beams = [([], 0.0)]
    for _ in range(5):
        laws = [law([*PROMPTS[1], *tokens]).numpy() for tokens, _ in beams]
        longer = [([*tokens, v], total + float(own[v])) for (tokens, total), own in zip(beams, laws, strict=True) for v in range(len(own))]
        beams = sorted(longer, key=lambda beam: -beam[1])[:width]
    arguments = {"max_new_tokens": 5, "num_beams": width, "num_return_sequences": width, "do_sample": False, "length_penalty": 0.0}
    with guard.attach(model):
        found = model.generate(torch.tensor([PROMPTS[1]]), **arguments)[:, len(PROMPTS[1]) :].tolist()
    assert found == [tokens for tokens, _ in beams]


def test_the_unconditional_law_follows_drafts_that_are_taken_back(family):
    model = family(0)
    guard = guard_of(model, negative=Unconditional())
    prompt = [5, 9, 20, 5, 9, 20, 5, 9]
    wanted = list(guard.generate([prompt], max_new_tokens=12).token_ids[0])
    arguments = {"max_new_tokens": 12, "do_sample": False, "prompt_lookup_num_tokens": 3}
    found = model.generate(torch.tensor([prompt]), logits_processor=[guard.logits_processor()], **arguments)
    assert found[0, len(prompt) :].tolist() == wanted


def test_the_unconditional_law_of_a_request_that_comes_back():
    model, prompt, said = tiny_models.llama(0), [5, 9, 20, 7], [11, 2, 64]
    bound = mg.Guard(mg.Policy(controls=[Guidance(negative=Unconditional())]), (model, None)).controls
    lm = mg.LanguageModel(model)
    back = Session(lm, bound, [[*prompt, *said]], own_base=True, asked=[prompt])
    law = torch.log_softmax(back.step().logits[0].double(), -1)
    assert torch.allclose(law.exp(), unconditional_oracle(Reference(model), prompts=[prompt])([*prompt, *said]).exp(), atol=1e-6)


def test_the_unconditional_law_in_tables_that_split_and_join(family):
    model = family(0)
    lm, base = mg.LanguageModel(model), Reference(model)
    item, plain = Pass(lm, unconditional=True), Pass(lm)
    table = PassTable([plain, item], PROMPTS[:2], asked=[1, 4])
    texts = [PROMPTS[0], PROMPTS[1][3:]]
    twin = table.fork(torch.tensor([1, 0]))
    table.join(PassTable([plain, item], [PROMPTS[2]]))
    table.select(torch.tensor([2, 0, 1]))
    table.reread([[*PROMPTS[2], 9], [*PROMPTS[0], 9], [*PROMPTS[1], 9]])
    for view, wanted in ((twin, [texts[1], texts[0]]), (table, [[PROMPTS[2][-1], 9], [*texts[0], 9], [*texts[1], 9]])):
        found = view.view(item).logits
        assert torch.allclose(found.double(), torch.stack([base.logits(ids) for ids in wanted]), atol=1e-4)


def test_a_class_of_gedi_is_never_unconditional():
    with pytest.raises(PolicyError, match="gedi code_undesired is unconditional"):
        mg.Guard(mg.Policy(controls=[GeDi(code_desired=Prompt([4]), code_undesired=Unconditional())]), (tiny_models.llama(0), None))


def unconditional_settings(numpy):
    return Guidance(positive=Prompt(POSITIVE), negative=Unconditional(), gamma=1.8)


@pytest.mark.parametrize("settings", [settings_for, unconditional_settings])
def test_the_numpy_runtime_agrees(settings):
    control_runs.assert_numpy_agrees(settings)


@pytest.mark.parametrize("settings", [settings_for, unconditional_settings])
@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
def test_slots_do_not_matter(numpy, settings):
    control_runs.assert_slots_do_not_matter(settings, numpy)


ZERO = {
    "strength 0": Guidance(positive=Prompt(POSITIVE), negative=Prompt(NEGATIVE), strength=0.0),
    "a request's strength 0": Guidance(positive=Prompt(POSITIVE), negative=Prompt(NEGATIVE)).scaled(0.0),
    "gamma 1 without a positive prompt": Guidance(negative=Prompt(NEGATIVE), gamma=1.0),
    "gamma 0 without a negative prompt": Guidance(positive=Prompt(POSITIVE), gamma=0.0),
}


@pytest.mark.parametrize("control", ZERO.values(), ids=ZERO)
def test_zero_is_the_base(control):
    control_runs.assert_zero_is_the_base(control)


def test_every_rule_of_the_framework_holds():
    check_control(Guidance(positive=Prompt([5, 6, 7]), negative=Prompt([9, 9])))
    check_control(Guidance(negative=Prompt([9, 9]), gamma=2.0))
    check_control(Guidance(negative=Unconditional()))
    check_control(Guidance(positive=Prompt([5]), strength=0.0))
    control_runs.assert_rows_are_bit_equal_in_a_batch(settings_for(False))


def test_the_trace_adds_up():
    control_runs.assert_trace_adds_up(settings_for(False))


def test_scaling_multiplies_the_distance_from_the_base():
    control = Guidance(positive=Prompt(POSITIVE), gamma=2.0)
    model = tiny_models.llama(0)
    base = Reference(model)
    expected = oracle(base, (base, POSITIVE), None, gamma=2.0 * 0.4)
    check_greedy(mg.Guard(mg.Policy(controls=[control.scaled(0.4)]), (model, None)), model, expected, PROMPTS)


def test_policy_data():
    data = {"control": "guidance@1", "negative": {"prompt": [60, 61, 62]}, "gamma": 1.25}
    control = mg.Policy.load({"controls": [data]}).effective_controls()[0]
    assert control == Guidance(negative=Prompt(NEGATIVE), gamma=1.25)
    written = write_control(control)
    assert mg.Policy.load({"controls": [written]}).effective_controls()[0] == control
    assert written["gamma"] == 1.25
    assert "strength" not in written
    unconditional = mg.Policy.load({"controls": [{"control": "guidance@1", "negative": {"unconditional": True}}]}).effective_controls()[0]
    assert unconditional == Guidance(negative=Unconditional())
    assert write_control(unconditional)["negative"] == {"unconditional": True}
    with pytest.raises(PolicyError, match="unconditional"):
        mg.Policy.load({"controls": [{"control": "guidance@1", "negative": {"unconditional": False}}]}).effective_controls()


def test_bad_settings_are_told_when_the_guard_is_built():
    with pytest.raises(PolicyError, match="gamma"):
        Guidance(positive=Prompt(POSITIVE), gamma=-1.0)
    with pytest.raises(PolicyError, match="did you mean 'positive'"):
        Guidance(positiv=Prompt(POSITIVE))
    with pytest.raises(PolicyError, match="names no value to derive them from"):
        mg.Guard(mg.Policy(controls=[Guidance()]), (tiny_models.llama(0), None))
    with pytest.raises(PolicyError, match=r"guidance negative holds token id 4000, outside the vocabulary"):
        guard_of(tiny_models.llama(0), negative=Prompt([4000]))


def test_what_the_base_removed_stays_removed():
    guard = guard_of(tiny_models.llama(0), positive=Prompt(POSITIVE), negative=Prompt(NEGATIVE))
    processor = guard.logits_processor()
    ids = torch.tensor([[5, 9, 20]])
    scores = guard.lm.model(ids).logits[:, -1].detach().clone()
    scores[:, ::3] = -torch.inf
    guarded = processor(ids, scores)
    assert torch.isneginf(guarded[:, ::3]).all()
    assert torch.isfinite(guarded[:, 1::3]).all()
    assert not np.allclose(guarded[:, 1::3], torch.log_softmax(scores, -1)[:, 1::3], atol=1e-2)
