"""Learned prefixes against whole forwards of the model itself, in float64: the law, rows beside rows, every movement, the packs."""

from __future__ import annotations

import math
from pathlib import Path

import control_runs
import prefix_packs
import pytest
import tiny_models
import torch
from numpy_model import NumpyModel
from odd_models import gemma2, mistral
from oracles import TOLERANCE, Reference, check_greedy, distance, run_attached
from safetensors.torch import load_file, save_file

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.backends.learned_prefix import prefix_of
from moralguard.controls import DExperts, GeDi, Guidance, ModelArithmetic, Prefix, Prompt
from moralguard.controls.registry import write_control
from moralguard.decoding.passes import Pass, PassTable
from moralguard.errors import ModelError, PolicyError, PromptError
from moralguard.packs import write_pack
from moralguard.testing import check_control

PROMPTS = [[8], [5, 9, 20, 7, 33, 41, 2], [100, 3, 77]]
KINDS = {
    "tokens": lambda model, seed=0: {"tokens": torch.tensor([60 + seed, 61, 9])},
    "embeddings": lambda model, seed=0: prefix_packs.random_vectors(model, seed=seed),
    "cache": lambda model, seed=0: prefix_packs.random_cache(model, seed=seed),
}


@pytest.fixture(params=["llama", "gpt2"])
def family(request):
    return tiny_models.FAMILIES[request.param]


def guard_of(model, *controls):
    return mg.Guard(mg.Policy(controls=list(controls)), (model, None))


def oracle(base, tensors, strength=1.0, **wrong):
    behind = prefix_packs.logits_behind(base, tensors, **wrong)

    def law(ids):
        own = base.logits(ids)
        return torch.log_softmax(own + strength * (behind(ids)[-1] - own), -1)

    return law


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [1.0, 0.6, 1.7])
def test_the_law_is_that_of_the_model_behind_its_prefix(family, kind, strength, tmp_path):
    model = family(0)
    tensors = KINDS[kind](model)
    pack = prefix_packs.write(tmp_path / "pack", LanguageModel(model, None), tensors)
    check_greedy(guard_of(model, Prefix(prefix=pack, strength=strength)), model, oracle(Reference(model), tensors, strength), PROMPTS)


@pytest.mark.parametrize("factory", [gemma2, mistral])
@pytest.mark.parametrize("kind", KINDS)
def test_a_window_counts_positions_and_not_padding(factory, kind, tmp_path):
    """A window of 8 behind a prefix of 5, for rows of different lengths: padding between the two would end it too early."""
    model = factory()
    tensors = KINDS[kind](model)
    pack = prefix_packs.write(tmp_path / "pack", LanguageModel(model, None), tensors)
    check_greedy(guard_of(model, Prefix(prefix=pack)), model, oracle(Reference(model), tensors), PROMPTS)


@pytest.mark.parametrize("factory", [gemma2, mistral])
def test_a_window_beside_passes_of_other_lengths(factory):
    """Rows that no learned prefix stands before, of lengths that none of the prefixed rows have."""
    model = factory()
    lm, tensors = LanguageModel(model, None), prefix_packs.random_cache(model)
    plain, told = Pass(lm), Pass(lm, (4, 5, 6, 7), literal=True)
    learned = Pass(lm, learned=prefix_of(lm, tensors, "prefix"))
    with torch.no_grad():
        mixed = PassTable([plain, told, learned], PROMPTS)
        apart = [PassTable([item], [prompt]) for prompt in PROMPTS for item in (plain, told, learned)]
        for step in range(4):
            for row in range(len(PROMPTS)):
                for place, item in enumerate((plain, told, learned)):
                    alone = apart[3 * row + place].view(item).logits[0]
                    assert (mixed.view(item).logits[row] - alone).abs().max() < 1e-5
            mixed.advance(torch.tensor([[step], [4], [90]]))
            for index, table in enumerate(apart):
                table.advance(torch.tensor([[(step, 4, 90)[index // 3]]]))


def test_a_wrong_oracle_disagrees(family, tmp_path):
    model = family(0)
    base, tensors = Reference(model), prefix_packs.random_cache(model)
    pack = prefix_packs.write(tmp_path / "pack", LanguageModel(model, None), tensors)
    run = run_attached(guard_of(model, Prefix(prefix=pack)), model, PROMPTS)
    assert distance(run, oracle(base, tensors), PROMPTS) <= TOLERANCE
    assert distance(run, oracle(base, tensors, start=0), PROMPTS) > 10 * TOLERANCE, "positions go on behind the prefix"
    assert distance(run, oracle(base, prefix_packs.random_cache(model, seed=1)), PROMPTS) > 10 * TOLERANCE
    assert distance(run, oracle(base, tensors, strength=0.9), PROMPTS) > 10 * TOLERANCE


def test_the_cache_or_the_vectors_of_tokens_are_those_tokens(family):
    model, ids = family(0), [60, 61, 9, 4]
    lm = LanguageModel(model, None)
    vectors = {"embeddings": model.get_input_embeddings()(torch.tensor(ids)).detach()}
    wanted, *same = (
        Pass(lm, tuple(ids), literal=True),
        Pass(lm, learned=prefix_of(lm, prefix_packs.cache_of(model, ids), "cache")),
        Pass(lm, learned=prefix_of(lm, vectors, "vectors")),
    )
    with torch.no_grad():
        table = PassTable([wanted, *same], PROMPTS)
        for step in range(4):
            for item in same:
                assert (table.view(item).logits - table.view(wanted).logits).abs().max() < 1e-5
            table.advance(torch.tensor([[step], [step + 1], [step + 2]]))


def test_rows_follow_every_movement_beside_rows_without_a_prefix(family):
    """Advancing, selecting, forking, joining and rewinding three passes in one forward; log-probabilities and sums of states, too."""
    model = family(0)
    lm, reference = LanguageModel(model, None), Reference(model)
    tensors = [prefix_packs.random_cache(model, length=6), prefix_packs.random_vectors(model, length=2)]
    plain = Pass(lm, states=True, likelihood=True)
    learned = [Pass(lm, learned=prefix_of(lm, found, "prefix"), likelihood=True) for found in tensors]
    readers = [prefix_packs.logits_behind(reference, found) for found in tensors]
    texts = [list(prompt) for prompt in PROMPTS]

    def check(table, texts, sums=True):
        assert len(table.groups) == 1, "one forward for all of them"
        for row, text in enumerate(texts):
            own = reference.model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
            for item, logits in zip((plain, *learned), (own, *(read(text) for read in readers)), strict=True):
                view = table.view(item)
                assert (view.logits[row] - logits[-1]).abs().max() < 2e-5
                laws = torch.log_softmax(logits, -1)
                expected = sum(float(laws[i, token]) for i, token in enumerate(text[1:]))
                assert math.isclose(float(view.log_likelihood[row]), expected, rel_tol=1e-4, abs_tol=1e-5)
                assert int(view.counted[row]) == len(text) - 1
            states = reference.states(text)[:-1].sum(0)
            assert not sums or (table.view(plain).hidden_sum[row] - states).abs().max() < 1e-3

    def advance(table, tokens):
        table.advance(torch.tensor(tokens))
        for text, new in zip(texts, tokens, strict=True):
            text += new

    with torch.no_grad():
        table = PassTable([plain, *learned], texts)
        check(table, texts)
        advance(table, [[5], [6], [7]])
        check(table, texts)
        twin = table.fork(torch.tensor([1]))
        check(twin, texts[1:2])
        texts = [list(texts[i]) for i in (2, 0, 2)]
        table.select(torch.tensor([2, 0, 2]))
        check(table, texts)
        assert table.groups[0].mask.shape[1] == max(table.groups[0].lengths), "columns of nothing but padding are gone"
        advance(table, [[25], [26], [27]])
        longer = [9, 9, 1, 2, 30, 40, 50, 60, 70]
        table.join(PassTable([plain, *learned], [longer]))
        texts.append(list(longer))
        check(table, texts)
        advance(table, [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]])
        check(table, texts)
        table.rewind(2)
        texts = [text[:-2] for text in texts]
        advance(table, [[91], [92], [93], [94]])
        check(table, texts, sums=False)  # a rewound pass keeps no sums, with or without a prefix
        table.reread(texts)
        check(table, texts)


def test_rows_without_a_prefix_do_not_change_beside_rows_with_one(family):
    model = family(0)
    lm = LanguageModel(model, None)
    plain, learned = Pass(lm), Pass(lm, learned=prefix_of(lm, prefix_packs.random_cache(model, length=3), "prefix"))
    with torch.no_grad():
        mixed, alone = PassTable([plain, learned], PROMPTS), PassTable([plain], PROMPTS)
        for step in range(4):
            assert (mixed.view(plain).logits - alone.view(plain).logits).abs().max() < 1e-5
            assert (mixed.view(learned).logits - alone.view(plain).logits).abs().max() > 0.1
            for table in (mixed, alone):
                table.advance(torch.tensor([[step], [4], [90]]))


@pytest.mark.parametrize("kinds", [("cache", "cache"), ("embeddings", "tokens")])
def test_a_pack_stands_wherever_an_expert_may(kinds, tmp_path):
    model = tiny_models.llama(0)
    base, lm = Reference(model), LanguageModel(model, None)
    tensors = [KINDS[kind](model, seed) for seed, kind in enumerate(kinds)]
    one, two = (prefix_packs.write(tmp_path / str(i), lm, found) for i, found in enumerate(tensors))
    first, second = (prefix_packs.logits_behind(base, found) for found in tensors)

    def contrast(weight, own):
        return lambda ids: torch.log_softmax(own * base.logits(ids) + weight * (first(ids)[-1] - second(ids)[-1]), -1)

    dexperts = DExperts(expert=one, anti_expert=two, alpha=1.3, filter_p=1.0)
    check_greedy(guard_of(model, dexperts), model, contrast(1.3, 1.0), PROMPTS)
    law = lambda ids: torch.log_softmax(second(ids)[-1] + 2.0 * (first(ids)[-1] - second(ids)[-1]), -1)  # noqa: E731
    check_greedy(guard_of(model, Guidance(positive=one, negative=two, gamma=2.0)), model, law, PROMPTS)
    formula = ModelArithmetic(formula="base + 0.7*kind - 0.7*rude", passes={"kind": one, "rude": two})
    check_greedy(guard_of(model, formula), model, contrast(0.7, 1.0), PROMPTS)

    def posterior(ids):
        """GeDi behind two learned prefixes: neither has a law for the first token."""
        scores = []
        for read in (first, second):
            laws = torch.log_softmax(read(ids), -1)
            running = sum(float(laws[i, token]) for i, token in enumerate(ids[1:]))
            scores.append((laws[-1] + running) / len(ids))
        return torch.log_softmax(base.log_law(ids) + 5.0 * torch.log_softmax(torch.stack(scores), 0)[0], -1)

    if kinds == ("cache", "cache"):
        check_greedy(guard_of(model, GeDi(code_desired=one, code_undesired=two, disc_weight=5.0, filter_p=0.0)), model, posterior, PROMPTS)


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """A pack of each kind for the model that ``control_runs`` guards."""
    model, folder = tiny_models.llama(), tmp_path_factory.mktemp("packs")
    return {kind: prefix_packs.write(folder / kind, LanguageModel(model, None), make(model)) for kind, make in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_of_the_framework_holds(packs, kind):
    model = (tiny_models.llama(), None)
    check_control(Prefix(prefix=packs[kind], strength=0.8), model=model, prompts=PROMPTS)
    check_control(Prefix(prefix=packs[kind], strength=0.0), model=model, prompts=PROMPTS)
    check_control(DExperts(expert=packs[kind], anti_expert=Prompt([4, 5])), model=model, prompts=PROMPTS)
    control_runs.assert_zero_is_the_base(Prefix(prefix=packs[kind], strength=0.0))
    control_runs.assert_rows_are_bit_equal_in_a_batch(Prefix(prefix=packs[kind]))
    control_runs.assert_trace_adds_up(Prefix(prefix=packs[kind], strength=0.8))


@pytest.mark.parametrize("kind", KINDS)
def test_slots_do_not_matter(packs, kind):
    control_runs.assert_slots_do_not_matter(lambda numpy: Prefix(prefix=packs[kind], strength=0.8))


def test_the_numpy_runtime_agrees_on_tokens_and_refuses_the_rest(packs):
    control_runs.assert_numpy_agrees(lambda numpy: Prefix(prefix=packs["tokens"], strength=0.8))
    control_runs.assert_slots_do_not_matter(lambda numpy: Prefix(prefix=packs["tokens"]), True)
    for kind, what in (("embeddings", "vectors"), ("cache", "keys and values")):
        for control in (Prefix(prefix=packs[kind]), DExperts(expert=packs[kind])):
            with pytest.raises(ModelError, match=rf"prefix pack .* of {what}, which needs a PyTorch model.*fit trigger"):
                mg.Guard(mg.Policy(controls=[control]), NumpyModel(tiny_models.llama()))


def test_beams_and_assisted_decoding_take_the_prefix_along(packs):
    model, draft = tiny_models.llama(), tiny_models.llama(5, layers=1)
    draft.generation_config.num_assistant_tokens = 3
    ids = torch.tensor([PROMPTS[1]])
    mask = torch.ones_like(ids)
    texts = {}
    for kind in ("tokens", "cache"):
        guard = guard_of(model, Prefix(prefix=packs[kind]))
        plain = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False, logits_processor=[guard.logits_processor()])
        assisted = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=10,
            do_sample=False,
            logits_processor=[guard.logits_processor()],
            assistant_model=draft,
        )
        assert torch.equal(plain, assisted)
        texts[kind] = plain.tolist()
    assert texts["tokens"] != texts["cache"]
    tensors = load_file(Path(packs["cache"]) / "prefix.safetensors")
    law = oracle(Reference(model), tensors)
    with guard.attach(model):
        arguments = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 3, "do_sample": False, "length_penalty": 0.0}
        found = model.generate(ids, attention_mask=mask, **arguments)[:, len(PROMPTS[1]) :].tolist()
    beams = [([], 0.0)]
    for _ in range(4):
        laws = [law([*PROMPTS[1], *tokens]).tolist() for tokens, _ in beams]
        longer = [([*tokens, v], total + own[v]) for (tokens, total), own in zip(beams, laws, strict=True) for v in range(len(own))]
        beams = sorted(longer, key=lambda beam: -beam[1])[:3]
    assert found == [tokens for tokens, _ in beams]


def test_policy_data(packs):
    control = mg.Policy.load({"controls": [{"control": "prefix@1", "prefix": packs["cache"], "strength": 0.5}]}).effective_controls()[0]
    assert control == Prefix(prefix=packs["cache"], strength=0.5)
    assert mg.Policy.load({"controls": [write_control(control)]}).effective_controls()[0] == control
    assert control.scaled(3.0).strength == 1.5
    with pytest.raises(PolicyError, match="strength"):
        Prefix(prefix=packs["cache"], strength=-1.0)


BAD = {
    "two kinds": (lambda t: t | {"tokens": torch.tensor([1])}, "holds tokens; expected"),
    "nothing known": (lambda t: {"prompt": torch.ones(3, 4)}, "holds prompt; expected"),
    "a layer is missing": (lambda t: {k: v for k, v in t.items() if k != "values.1"}, "values.1 is missing or too much"),
    "a layer too much": (lambda t: t | {"keys.2": t["keys.1"].clone()}, "keys.2 is missing or too much"),
    "other heads": (lambda t: t | {"keys.1": t["keys.1"].repeat(2, 1, 1)}, r"holds keys.1 of float32 \[4, 5, 8\]"),
    "other lengths": (lambda t: t | {"keys.1": t["keys.1"][:, :2]}, r"holds keys.1 of float32 \[2, 2, 8\]"),
    "integers": (lambda t: t | {"keys.0": t["keys.0"].long()}, r"holds keys.0 of int64"),
    "empty cache": (lambda t: {k: v[:, :0] for k, v in t.items()}, "n of 1 or more"),
    "vectors of another width": (
        lambda t: {"embeddings": torch.ones(3, 7)},
        r"holds embeddings of float32 \[3, 7\]; .* reads floats \[n, 32\]",
    ),
    "no vector": (lambda t: {"embeddings": torch.ones(0, 32)}, "n of 1 or more"),
    "a token outside": (lambda t: {"tokens": torch.tensor([3, 199])}, r"token id 199, outside the vocabulary .* \(0 to 198\)"),
    "tokens as floats": (lambda t: {"tokens": torch.ones(3)}, r"tokens of float32 \[3\]"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_file_that_does_not_fit_is_told_when_the_guard_is_built(change, message, tmp_path):
    model = tiny_models.llama()
    pack = prefix_packs.write(tmp_path / "pack", LanguageModel(model, None), change(prefix_packs.random_cache(model)))
    for control in (Prefix(prefix=pack), DExperts(anti_expert=pack)):
        with pytest.raises(ModelError, match=message):
            guard_of(model, control)


def test_broken_and_foreign_packs(packs, tmp_path):
    with pytest.raises(ModelError, match=r"fitted on .*fingerprint"):
        guard_of(tiny_models.llama(1), Prefix(prefix=packs["cache"]))
    whole = Path(packs["cache"])
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "card.json").write_bytes((whole / "card.json").read_bytes())
    (cut / "prefix.safetensors").write_bytes((whole / "prefix.safetensors").read_bytes()[:-100])
    for settings in ({"prefix": str(cut)}, {"prefix": str(tmp_path)}):
        with pytest.raises((ModelError, PolicyError), match=r"sha256|isn't a pack"):
            Prefix(**settings)
    other = tmp_path / "other"
    other.mkdir()
    save_file({"basis": torch.eye(32)[:, :2].contiguous()}, other / "basis.safetensors")
    lm = LanguageModel(tiny_models.llama(), None)
    write_pack(other, kind="subspace", method="test", lm=lm, name="other", data=(), settings={}, metrics={})
    with pytest.raises((ModelError, PolicyError), match="kind 'subspace'; expected one of kind 'prefix'"):
        Prefix(prefix=str(other))
    with pytest.raises((ModelError, PolicyError), match="kind 'subspace'; expected one of kind 'lora-expert' or 'prefix'"):
        DExperts(expert=str(other))


def test_a_prompt_that_leaves_no_room_is_told_before_anything_is_generated(packs):
    model = tiny_models.llama()
    guard = guard_of(model, Prefix(prefix=packs["cache"]))
    with pytest.raises(PromptError, match="prefix of 5 tokens"):
        guard.generate([[3] * (tiny_models.POSITIONS - 4)], max_new_tokens=1)
    with pytest.raises(PromptError, match="prefix of 5 tokens"), guard.attach(model):
        model.generate(torch.tensor([[3] * 100]), max_new_tokens=26)


@pytest.mark.smollm
def test_the_cache_of_a_text_is_that_text_on_smollm(tmp_path):
    lm = mg.load_model("smollm2-135m")
    text = "The following text is very polite:\n"
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    pack = prefix_packs.write(tmp_path / "polite", lm, prefix_packs.cache_of(lm.model, ids))
    prompts = ["Shut up, you", "My new neighbour is a very"]
    drawn = []
    for expert in (pack, Prompt(text)):
        guard = mg.Guard(mg.Policy(controls=[DExperts(expert=expert, filter_p=0.9)]), lm)
        drawn.append(guard.generate(prompts, max_new_tokens=12, do_sample=False).texts)
    assert drawn[0] == drawn[1]
    plain = mg.Guard(mg.Policy(controls=[]), lm).generate(prompts, max_new_tokens=12, do_sample=False).texts
    assert drawn[0] != plain
