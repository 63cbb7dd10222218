"""GeDi against its formula, worked out from whole texts: class log-odds with every candidate, the filter, and the sums along a text."""

from __future__ import annotations

import math

import control_runs
import numpy as np
import pytest
import tiny_models
import torch
from numpy_model import NumpyModel
from odd_models import byte_llama, byte_tokenizer, expert, gemma2, left_padded
from oracles import TOLERANCE, Reference, check_greedy, distance, run_attached
from scipy.special import log_softmax
from transformers import LlamaForCausalLM

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.controls import GeDi, Prompt
from moralguard.controls.registry import write_control
from moralguard.decoding.passes import Pass, PassTable
from moralguard.errors import ModelError, PolicyError
from moralguard.testing import check_control

DESIRED, UNDESIRED, OTHER = [3, 4], [60, 61, 62], [90]
PROMPTS = [[8], [5, 9, 20, 7, 33, 41, 2], [100, 3, 77]]


@pytest.fixture(params=["llama", "gpt2"])
def family(request):
    return tiny_models.FAMILIES[request.param]


def guard_of(model, **settings):
    return mg.Guard(mg.Policy(controls=[GeDi(**settings)]), (model, None))


def log_laws(reference, ids):
    """f64[T, V], log-probabilities of the token behind each of these."""
    return log_softmax(reference.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].numpy(), axis=-1)


def oracle(
    base, codes, disc_weight=30.0, filter_p=0.8, target_p=0.8, logit_scale=1.0, class_bias=0.0, prompt_counts=True, mass_of_base=False
):
    """A code is (model, prefix), the desired one first. The last two are mistakes, for negative controls."""

    def law(ids):
        own = log_softmax(base.logits(ids).numpy())
        scores = []
        for model, prefix in codes:
            laws = log_laws(model, [*prefix, *ids])
            start = max(len(prefix), 1)  # a class without a prompt doesn't say how probable the first token was
            text = [*prefix, *ids]
            counted = range(start, len(text)) if prompt_counts else range(0)
            running = sum(laws[i - 1, text[i]] for i in counted)
            scores.append(logit_scale * (laws[-1] + running) / (len(counted) + 1))
        scores[0] = scores[0] + class_bias
        desired = log_softmax(np.stack(scores), axis=0)[0]
        guided = own + disc_weight * desired
        mass, weights = 0.0, np.exp(own) if mass_of_base else np.exp(log_softmax(guided))
        removed = np.zeros(len(own), dtype=bool)
        for token in np.argsort(desired, kind="stable"):
            mass += weights[token]
            removed[token] = mass < filter_p and desired[token] < math.log(target_p)
        return torch.from_numpy(log_softmax(np.where(removed, -np.inf, guided)))

    return law


CASES = {
    "defaults": {},
    "disc_weight 5": {"disc_weight": 5.0},
    "filter_p 0.3": {"disc_weight": 8.0, "filter_p": 0.3},
    "no filter": {"filter_p": 0.0},
    "target_p 0.45": {"target_p": 0.45, "disc_weight": 8.0},
    "scale and bias": {"logit_scale": 3.0, "class_bias": 0.7, "disc_weight": 10.0},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_law_with_prompts(family, settings):
    model = family(0)
    base = Reference(model)
    expected = oracle(base, [(base, DESIRED), (base, UNDESIRED)], **settings)
    guard = guard_of(model, code_desired=Prompt(DESIRED), code_undesired=Prompt(UNDESIRED), **settings)
    check_greedy(guard, model, expected, PROMPTS)


def test_law_with_models(family):
    model, one, two = family(0), family(1), family(2)
    expected = oracle(Reference(model), [(Reference(one), []), (Reference(two), [])], disc_weight=4.0)
    check_greedy(guard_of(model, code_desired=one, code_undesired=two, disc_weight=4.0), model, expected, PROMPTS)


def test_law_with_several_classes(family):
    model, other = family(0), family(1)
    base = Reference(model)
    expected = oracle(base, [(base, DESIRED), (base, UNDESIRED), (base, OTHER), (Reference(other), [])], disc_weight=10.0)
    more = (Prompt(OTHER), other)
    guard = guard_of(model, code_desired=Prompt(DESIRED), code_undesired=Prompt(UNDESIRED), other_codes=more, disc_weight=10.0)
    check_greedy(guard, model, expected, PROMPTS)


def test_a_head_with_a_soft_cap():
    model = gemma2()
    base = Reference(model)
    expected = oracle(base, [(base, DESIRED), (base, UNDESIRED)], disc_weight=10.0)
    guard = guard_of(model, code_desired=Prompt(DESIRED), code_undesired=Prompt(UNDESIRED), disc_weight=10.0)
    check_greedy(guard, model, expected, PROMPTS)


WRONG = {
    "disc_weight off by 10 %": {"disc_weight": 11.0},
    "no filter": {"filter_p": 0.0},
    "the prompt isn't counted": {"prompt_counts": False},
    "the filter's mass is the base's own": {"mass_of_base": True},
    "target_p 0.5": {"target_p": 0.5},
}


@pytest.mark.parametrize("mistake", WRONG.values(), ids=WRONG)
def test_a_wrong_oracle_disagrees(mistake):
    model = tiny_models.llama(0)
    base, right = Reference(model), {"disc_weight": 10.0, "filter_p": 0.5}
    codes = [(base, DESIRED), (base, UNDESIRED)]
    run = run_attached(guard_of(model, code_desired=Prompt(DESIRED), code_undesired=Prompt(UNDESIRED), **right), model, PROMPTS)
    assert distance(run, oracle(base, codes, **(right | mistake)), PROMPTS) > 10 * TOLERANCE
    assert distance(run, oracle(base, codes, **right), PROMPTS) <= TOLERANCE


def test_the_filter_removes_tokens(family):
    model = family(0)
    guard = guard_of(model, code_desired=Prompt(DESIRED), code_undesired=Prompt(UNDESIRED), disc_weight=10.0)
    kept = torch.isfinite(run_attached(guard, model, PROMPTS).scores).sum(-1)
    assert 0 < kept.min() < tiny_models.VOCAB
    assert len(kept.unique()) > 3, "how many stay differs from row to row"


def settings_for(numpy):
    model = NumpyModel(expert()) if numpy else expert()
    return GeDi(code_desired=Prompt(DESIRED), code_undesired=model, other_codes=(Prompt(OTHER),), disc_weight=6.0, filter_p=0.5)


def test_the_numpy_runtime_agrees():
    control_runs.assert_numpy_agrees(settings_for)


@pytest.mark.parametrize("numpy", [False, True], ids=["torch", "numpy"])
def test_slots_do_not_matter(numpy):
    control_runs.assert_slots_do_not_matter(settings_for, numpy)


ZERO = [GeDi(code_desired=Prompt(DESIRED), code_undesired=Prompt(UNDESIRED), disc_weight=0.0), settings_for(False).scaled(0.0)]


@pytest.mark.parametrize("control", ZERO)
def test_disc_weight_0_is_the_base_filter_and_all(control):
    control_runs.assert_zero_is_the_base(control)


def test_every_rule_of_the_framework_holds():
    codes = {"code_desired": Prompt([5, 6, 7]), "code_undesired": Prompt([9, 9])}
    check_control(GeDi(**codes, disc_weight=6.0, filter_p=0.4))
    check_control(GeDi(**codes, filter_p=0.0))
    check_control(GeDi(**codes, disc_weight=0.0))
    control_runs.assert_rows_are_bit_equal_in_a_batch(settings_for(False))


def test_the_trace_adds_up():
    control_runs.assert_trace_adds_up(settings_for(False))


def test_assisted_decoding_takes_tokens_back_and_the_sums_with_them():
    """A draft model proposes tokens, the guarded law rejects some: the text is the one without a draft model."""
    model, draft = tiny_models.llama(0), tiny_models.llama(5, layers=1)
    draft.generation_config.num_assistant_tokens = 3
    control = GeDi(code_desired=Prompt(DESIRED), code_undesired=Prompt(UNDESIRED), disc_weight=6.0, filter_p=0.5)
    guard = mg.Guard(mg.Policy(controls=[control]), (model, None))
    ids = left_padded(PROMPTS[1:2])
    plain = model.generate(**ids, max_new_tokens=12, do_sample=False, logits_processor=[guard.logits_processor()])
    assisted = model.generate(**ids, max_new_tokens=12, do_sample=False, logits_processor=[guard.logits_processor()], assistant_model=draft)
    assert torch.equal(plain, assisted)


@pytest.mark.parametrize("factory", [tiny_models.llama, tiny_models.gpt2])
def test_beams_take_their_sums_along(factory):
    """Beam search under the guard against beam search over the oracle's law."""
    model = factory(0)
    base = Reference(model)
    settings = {"disc_weight": 6.0, "filter_p": 0.0}
    law = oracle(base, [(base, DESIRED), (base, UNDESIRED)], **settings)
    guard = guard_of(model, code_desired=Prompt(DESIRED), code_undesired=Prompt(UNDESIRED), **settings)
    arguments = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 3, "do_sample": False, "length_penalty": 0.0}
    with guard.attach(model):
        found = model.generate(**left_padded(PROMPTS[1:2]), **arguments)[:, len(PROMPTS[1]) :].tolist()
    beams = [([], 0.0)]
    for _ in range(5):
        laws = [law([*PROMPTS[1], *tokens]).numpy() for tokens, _ in beams]
        longer = [([*tokens, v], total + float(own[v])) for (tokens, total), own in zip(beams, laws, strict=True) for v in range(len(own))]
        beams = sorted(longer, key=lambda beam: -beam[1])[:3]
    assert found == [tokens for tokens, _ in beams]


class Unpadded(NumpyModel):
    """A model that takes no attention mask, so that rows of different lengths never share a pass."""

    takes_padding = False


@pytest.mark.parametrize("kind", ["torch", "numpy", "unpadded"])
def test_the_sums_follow_their_rows(kind):
    """Advancing, forking, dropping, joining and rewinding, against the log-probability of each row's text read whole."""
    model = tiny_models.llama(0)
    reference = Reference(model)
    lm = {"torch": lambda model: LanguageModel(model, None), "numpy": NumpyModel, "unpadded": Unpadded}[kind](model)
    array = torch.tensor if kind == "torch" else np.array
    item = Pass(lm, tuple(UNDESIRED), literal=True, likelihood=True)
    plain = Pass(lm)
    texts = [list(prompt) for prompt in PROMPTS]

    def check(table):
        view = table.view(item)
        for row, text in enumerate(texts):
            laws = log_laws(reference, [*UNDESIRED, *text])
            expected = sum(laws[len(UNDESIRED) - 1 + i, token] for i, token in enumerate(text))
            assert math.isclose(float(view.log_likelihood[row]), expected, rel_tol=1e-4), f"row {row}"
            assert int(view.counted[row]) == len(text)

    def advance(table, tokens):
        table.advance(array(tokens))
        for text, new in zip(texts, tokens, strict=True):
            text += new

    with torch.no_grad():
        table = PassTable([item, plain], texts)
        check(table)
        advance(table, [[5], [6], [7]])
        advance(table, [[15], [16], [17]])
        check(table)
        texts = [list(texts[i]) for i in (2, 0, 2)]
        table.select(array([2, 0, 2]))
        check(table)
        advance(table, [[25], [26], [27]])
        other = PassTable([item, plain], [[9, 9, 1, 2, 30, 40, 50, 60]])
        table.join(other)
        texts.append([9, 9, 1, 2, 30, 40, 50, 60])
        check(table)
        advance(table, [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]])
        check(table)
        table.rewind(2)
        texts = [text[:-2] for text in texts]
        advance(table, [[91], [92], [93], [94]])
        check(table)


@pytest.mark.parametrize("form", ["plain", "bias", "softcap"])
def test_an_onnx_graph_gives_the_laws_of_pytorch(form, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    import onnx_graphs

    monkeypatch.setenv("MORALGUARD_CACHE", str(tmp_path / "cache"))
    model = onnx_graphs.llama()
    codes = {"code_desired": Prompt(DESIRED), "code_undesired": Prompt(UNDESIRED), "disc_weight": 5.0, "filter_p": 0.4}
    path = onnx_graphs.plain(model, tmp_path / "plain")
    if form != "plain":
        path = onnx_graphs.with_head(path, tmp_path / form, form)
    guard = mg.Guard(mg.Policy(controls=[GeDi(**codes)]), mg.load_model(str(path.parent)))
    read = guard.lm.forward(cache=guard.lm.new_cache(), input_ids=np.array([PROMPTS[1]]), hidden=True, states=True)
    assert np.allclose(guard.lm.logits_of(read.states)[0, -1], read.logits[0], atol=1e-4)
    drawn = guard.generate(PROMPTS, max_new_tokens=6, do_sample=False).token_ids
    assert [len(tokens) for tokens in drawn] == [6, 6, 6]
    if form == "plain":
        theirs = mg.Guard(mg.Policy(controls=[GeDi(**codes)]), (model, None))
        assert drawn == theirs.generate(PROMPTS, max_new_tokens=6, do_sample=False).token_ids


def test_text_codes_stand_behind_the_first_token_and_do_not_count():
    model, tokenizer = byte_llama(), byte_tokenizer()
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(0)
    lm = LanguageModel(model, tokenizer)
    prefix = tuple(tokenizer("Kind:", add_special_tokens=False)["input_ids"])
    prompt = [0, *tokenizer("Hi you", add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        view = PassTable([Pass(lm, prefix, likelihood=True)], [prompt]).view(Pass(lm, prefix))
    laws = log_laws(Reference(model), [0, *prefix, *prompt[1:]])
    expected = sum(laws[len(prefix) + i, token] for i, token in enumerate(prompt[1:]))
    assert math.isclose(float(view.log_likelihood[0]), expected, rel_tol=1e-4)
    assert int(view.counted[0]) == len(prompt) - 1


def test_policy_data():
    data = {"control": "gedi@1", "code_desired": {"prompt": [3, 4]}, "code_undesired": {"prompt": [60]}, "other_codes": [{"prompt": [9]}]}
    control = mg.Policy.load({"controls": [data]}).effective_controls()[0]
    assert control == GeDi(code_desired=Prompt([3, 4]), code_undesired=Prompt([60]), other_codes=(Prompt([9]),))
    assert mg.Policy.load({"controls": [write_control(control)]}).effective_controls()[0] == control
    assert control.scaled(0.5).disc_weight == 15.0


class Cubed(LlamaForCausalLM):
    """A head of a form that nobody knows."""

    def forward(self, *arguments, **named):
        output = super().forward(*arguments, **named)
        output.logits = output.logits**3
        return output


def test_bad_settings_are_told_when_the_guard_is_built():
    for wrong in ({"disc_weight": -1.0}, {"filter_p": 1.0}, {"target_p": 1.5}, {"logit_scale": 0.0}):
        with pytest.raises(PolicyError, match=next(iter(wrong))):
            GeDi(code_desired=Prompt([1]), code_undesired=Prompt([2]), **wrong)
    model = tiny_models.llama(0)
    with pytest.raises(PolicyError, match="gedi has no code_undesired"):
        guard_of(model, code_desired=Prompt([1]))
    with pytest.raises(PolicyError, match=r"gedi has no other_codes\[0\]"):
        guard_of(model, code_desired=Prompt([1]), code_undesired=Prompt([2]), other_codes=(None,))
    headless = tiny_models.llama(3)
    headless.__class__ = Cubed
    with pytest.raises(ModelError, match=r"gedi code_undesired: the head .* has no known form"):
        guard_of(model, code_desired=Prompt([1]), code_undesired=headless)


@pytest.mark.smollm
def test_given_text_on_smollm_has_the_probability_of_the_formula():
    lm = mg.load_model("smollm2-135m")
    encode = lm.tokenizer
    prompt, text = (encode(part, add_special_tokens=False)["input_ids"] for part in ("My new neighbour is", " a very nice man"))
    kind, rude = "The following text is very polite:\n", "The following text is very rude:\n"

    def laws(prefix):
        """Log-probabilities of every token behind the prefix, and the laws before each of the text's."""
        ids = [*prefix, *prompt, *text]
        with torch.no_grad():
            whole = log_softmax(lm.model(torch.tensor([ids])).logits[0].double().numpy(), axis=-1)
        own = range(max(len(prefix), 1), len(ids))
        return np.array([whole[i - 1, ids[i]] for i in own]), whole[-len(text) - 1 : -1]

    _, base = laws([])
    (good, good_laws), (bad, bad_laws) = (laws(encode(code, add_special_tokens=False)["input_ids"]) for code in (kind, rude))
    expected = []
    for i, token in enumerate(text):
        seen = len(prompt) + i
        scores = np.stack([(law[i] + own[:seen].sum()) / (seen + 1) for own, law in ((good, good_laws), (bad, bad_laws))])
        expected.append(log_softmax(base[i] + 30 * log_softmax(scores, axis=0)[0])[token])
    guard = mg.Guard(mg.Policy(controls=[GeDi(code_desired=Prompt(kind), code_undesired=Prompt(rude), filter_p=0.0)]), lm)
    [(ids, found)] = guard.log_probabilities(["My new neighbour is"], [" a very nice man"])
    assert ids == text
    assert np.abs(found - np.array(expected)).max() < 5e-3
    assert np.abs(found - base[range(len(text)), text]).max() > 0.05
