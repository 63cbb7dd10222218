"""FUDGE against its formula: z + lambda log sigmoid(c) on the base's top candidates."""

from __future__ import annotations

import math

import oracles
import pytest
import tiny_models
import torch
from oracles import TOLERANCE, Reference, check_greedy, distance, run_attached

import moralguard as mg
from moralguard.controls import FactoredHead, Fudge

VOCAB, HIDDEN = tiny_models.VOCAB, tiny_models.HIDDEN
PROMPTS = [[5, 9, 20, 7, 33]]
RAGGED = [[8], [5, 9, 20, 7, 33, 41, 2], [100, 3, 77]]


@pytest.fixture(autouse=True)
def _one_thread():
    with oracles.one_thread():
        yield


@pytest.fixture(params=["llama", "gpt2"])
def family(request):
    return tiny_models.FAMILIES[request.param]


def guard_of(model, *controls):
    return mg.Guard(mg.Policy(controls=list(controls)), (model, None))


def affinities(seed, scale=2.0):
    """f64[V, V]: how well token b suits a text that holds token a."""
    return scale * torch.randn(VOCAB, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batched_discriminator(table):
    """c of a batch: the recency-weighted mean over the tokens of the text, so that padding and position both matter."""

    def discriminator(token_ids, candidates, attention_mask):
        age = attention_mask.flip(-1).cumsum(-1).flip(-1) - 1
        weights = attention_mask * 0.7**age
        means = torch.einsum("bt,btv->bv", weights.double(), table[token_ids]) / weights.sum(-1, keepdim=True)
        return means.gather(-1, candidates)

    return discriminator


def single_discriminator(table):
    """The same for one text, token by token."""

    def discriminator(ids):
        total, norm = torch.zeros(VOCAB, dtype=torch.float64), 0.0
        for age, token in enumerate(reversed(ids)):
            total, norm = total + 0.7**age * table[token], norm + 0.7**age
        return total / norm

    return discriminator


def head(seed=0, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    query, key = (scale * torch.randn(6, HIDDEN, generator=generator) for _ in range(2))
    return FactoredHead(query, key, torch.randn(HIDDEN, generator=generator), 0.3)


def single_head(base, factored):
    return oracles.factored_discriminator(base, factored.query, factored.key, factored.linear, factored.bias)


CASES = {
    "whole vocabulary": {"top_k": 200},
    "top_k 20": {"top_k": 20},
    "top_k 5": {"top_k": 5},
    "strength 4": {"top_k": 50, "strength": 4.0},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
class TestLaw:
    def test_callable(self, family, settings):
        model, table = family(0), affinities(1)
        oracle = oracles.fudge(Reference(model), [(single_discriminator(table), settings.get("strength", 1.0), settings["top_k"])])
        check_greedy(guard_of(model, Fudge(discriminator=batched_discriminator(table), **settings)), model, oracle, RAGGED)

    def test_factored_head(self, family, settings):
        model, factored = family(0), head()
        base = Reference(model)
        oracle = oracles.fudge(base, [(single_head(base, factored), settings.get("strength", 1.0), settings["top_k"])])
        check_greedy(guard_of(model, Fudge(discriminator=factored, **settings)), model, oracle, RAGGED)


@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_factored_head_on_every_architecture(name):
    model, factored = tiny_models.FAMILIES[name](3), head(4)
    base = Reference(model)
    oracle = oracles.fudge(base, [(single_head(base, factored), 4.0, 100)])
    check_greedy(guard_of(model, Fudge(discriminator=factored, strength=4.0, top_k=100)), model, oracle, PROMPTS)


def test_a_factored_head_without_linear_part_scores_the_product_alone(family):
    model, full = family(0), head()
    base = Reference(model)
    product = oracles.factored_discriminator(base, full.query, full.key, torch.zeros(HIDDEN), 0.0)
    control = Fudge(discriminator=FactoredHead(full.query, full.key), top_k=30)
    check_greedy(guard_of(model, control), model, oracles.fudge(base, [(product, 1.0, 30)]), PROMPTS)


@pytest.mark.parametrize(("first_k", "second_k"), [(40, 40), (40, 15), (8, 200)])
def test_two_attributes_add(family, first_k, second_k):
    model, table, factored = family(0), affinities(1), head()
    base = Reference(model)
    oracle = oracles.fudge(base, [(single_discriminator(table), 2.0, first_k), (single_head(base, factored), 1.5, second_k)])
    first = Fudge(discriminator=batched_discriminator(table), strength=2.0, top_k=first_k)
    second = Fudge(discriminator=factored, strength=1.5, top_k=second_k)
    run = check_greedy(guard_of(model, first, second), model, oracle, RAGGED)
    assert int(torch.isfinite(run.scores[0, 0]).sum()) == min(first_k, second_k, VOCAB)


def test_the_support_is_exactly_top_k(family):
    model = family(0)
    run = run_attached(guard_of(model, Fudge(discriminator=batched_discriminator(affinities(1)), top_k=20)), model, RAGGED)
    for scores, base in zip(run.scores.flatten(0, 1), run.base.flatten(0, 1), strict=True):
        assert set(torch.isfinite(scores).nonzero().flatten().tolist()) == set(base.topk(20).indices.tolist())


@pytest.mark.parametrize("keyword", ["attention_mask", "mask", "kwargs"])
def test_what_a_callable_is_given(family, keyword):
    """Left-padded ids of the text so far and the candidates by position, the mask by keyword: the same on every path."""
    model, calls = family(0), []

    def record(token_ids, candidates, mask):
        calls.append((token_ids.clone(), candidates.clone(), mask.clone()))
        return torch.zeros(candidates.shape)

    functions = {
        "attention_mask": lambda token_ids, candidates, attention_mask: record(token_ids, candidates, attention_mask),
        "mask": lambda token_ids, candidates, mask: record(token_ids, candidates, mask),
        "kwargs": lambda token_ids, candidates, **keywords: record(token_ids, candidates, keywords["attention_mask"]),
    }
    guard = guard_of(model, Fudge(discriminator=functions[keyword], top_k=7))
    run = run_attached(guard, model, RAGGED, 6)
    attached, calls = calls, []
    own = guard.generate(RAGGED, max_new_tokens=6).token_ids
    assert own == run.tokens
    assert len(attached) == len(calls) == 6
    for seen in (attached, calls):
        for step, (ids, candidates, mask) in enumerate(seen):
            assert ids.dtype == candidates.dtype == torch.int64
            assert ids.shape == mask.shape == (3, 7 + step)
            for row, prompt in enumerate(RAGGED):
                text = [*prompt, *run.tokens[row][:step]]
                assert mask[row].tolist() == [0] * (7 + step - len(text)) + [1] * len(text)
                assert ids[row][mask[row].bool()].tolist() == text
                assert set(candidates[row].tolist()) == set(run.base[row, step].topk(7).indices.tolist())


def test_a_logits_processor_gives_the_same_scores_as_attach(family):
    model, table = family(0), affinities(1)
    guard = guard_of(model, Fudge(discriminator=batched_discriminator(table), top_k=30))
    ids = torch.tensor([[11] * (7 - len(prompt)) + prompt for prompt in RAGGED])
    mask = torch.tensor([[0] * (7 - len(prompt)) + [1] * len(prompt) for prompt in RAGGED])
    out = model.generate(
        ids,
        attention_mask=mask,
        logits_processor=[guard.logits_processor()],
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    oracle = oracles.fudge(Reference(model), [(single_discriminator(table), 1.0, 30)])
    laws = torch.stack(out.scores, 1).double()
    for row, prompt in enumerate(RAGGED):
        tokens = out.sequences[row, 7:].tolist()
        assert oracles.gap(laws[row], oracles.follow(oracle, prompt, tokens)) <= TOLERANCE  # normalised as they are


class TestExtremeLogits:
    """The released c - log(1 + e^c) is -inf from c = 88.7 on; log sigmoid isn't."""

    def discriminators(self, favoured):
        """c = 200 for some tokens, -200 for the others."""
        row = torch.full((VOCAB,), -200.0, dtype=torch.float64)
        row[favoured] = 200.0
        return (lambda token_ids, candidates, attention_mask: row[candidates]), (lambda ids: row)

    @pytest.mark.parametrize("strength", [1.0, 4.0])
    def test_favoured_tokens_share_the_mass_as_in_the_base(self, family, strength):
        model = family(0)
        batched, single = self.discriminators(torch.arange(0, VOCAB, 3))
        control = Fudge(discriminator=batched, strength=strength, top_k=60)
        run = check_greedy(guard_of(model, control), model, oracles.fudge(Reference(model), [(single, strength, 60)]), PROMPTS)
        finite = torch.isfinite(run.scores[0])
        assert (finite.sum(-1) == 60).all()  # no candidate was lost to an overflow
        favoured = finite & (torch.arange(VOCAB) % 3 == 0)
        base = torch.log_softmax(run.base[0].masked_fill(~favoured, -math.inf), -1)
        assert torch.allclose(run.scores[0][favoured], base[favoured], atol=1e-4)

    @pytest.mark.parametrize("favoured", [[], list(range(VOCAB))], ids=["all -200", "all 200"])
    def test_the_same_logit_everywhere_leaves_the_candidates_as_they_are(self, family, favoured):
        model = family(0)
        base = Reference(model)
        batched, _ = self.discriminators(favoured)
        zero = oracles.fudge(base, [(lambda ids: torch.zeros(VOCAB), 0.0, 60)])
        run = check_greedy(guard_of(model, Fudge(discriminator=batched, top_k=60)), model, zero, PROMPTS)
        assert (torch.isfinite(run.scores[0]).sum(-1) == 60).all()


WRONG = {
    "strength off by 10 %": {"strength": 2.2},
    "another top_k": {"top_k": 45},
    "mask ignored": {"padding": True},
    "another discriminator": {"seed": 2},
}


@pytest.mark.parametrize("mistake", WRONG.values(), ids=WRONG)
def test_a_wrong_oracle_disagrees(family, mistake):
    model = family(0)
    run = run_attached(guard_of(model, Fudge(discriminator=batched_discriminator(affinities(1)), strength=2.0, top_k=50)), model, RAGGED)
    c = single_discriminator(affinities(mistake.get("seed", 1)))
    if mistake.get("padding"):
        right, c = c, lambda ids: right([oracles.PAD, *ids])
    wrong = oracles.fudge(Reference(model), [(c, mistake.get("strength", 2.0), mistake.get("top_k", 50))])
    assert distance(run, wrong, RAGGED) > 10 * TOLERANCE


@pytest.mark.parametrize("part", ["query", "key", "linear", "bias"])
def test_every_part_of_a_factored_head_matters(family, part):
    model, factored = family(0), head()
    base = Reference(model)
    run = run_attached(guard_of(model, Fudge(discriminator=factored, top_k=50)), model, PROMPTS)
    parts = {name: getattr(factored, name) for name in ("query", "key", "linear", "bias")}
    wrong = FactoredHead(**(parts | {part: parts[part] * 1.1}))
    factor = 3 if part == "bias" else 10  # a bias shows only where log sigmoid bends
    assert distance(run, oracles.fudge(base, [(single_head(base, wrong), 1.0, 50)]), PROMPTS) > factor * TOLERANCE


def test_the_guarded_law_is_not_the_base_law(family):
    model = family(0)
    base = Reference(model)
    run = run_attached(guard_of(model, Fudge(discriminator=batched_discriminator(affinities(1)), strength=4.0, top_k=50)), model, PROMPTS)
    assert distance(run, base.log_law, PROMPTS) > 0.05
    assert run.tokens[0] != oracles.greedy(base.log_law, PROMPTS[0], 8)
