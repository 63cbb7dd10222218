"""PPLM against a naive float64 version of the released algorithm, one text at a time."""

from __future__ import annotations

import oracles
import pytest
import tiny_models
import torch
from oracles import TOLERANCE, PPLMOracle, Reference, check_greedy, distance, gap, run_attached
from transformers import GenerationConfig

import moralguard as mg
from moralguard.controls import PPLM, SelfDebias

HIDDEN = tiny_models.HIDDEN
PROMPTS = [[5, 9, 20, 7, 33]]
RAGGED = [[8], [5, 9, 20, 7, 33, 41, 2], [100, 3, 77]]

BAG, TWO_BAGS = [[10, 20, 30, 40]], [[10, 20, 30, 40], [55, 66, 77]]


def linear_head(classes, seed=0):
    """(W f32[classes, d], b f32[classes])."""
    generator = torch.Generator().manual_seed(seed)
    return 0.7 * torch.randn(classes, HIDDEN, generator=generator), 0.5 * torch.randn(classes, generator=generator)


HEAD = linear_head(2)

# Strong enough for every setting to show after a few tokens, weak enough for rounding not to grow into a difference: normalised
# steps amplify it, in float32 oracles as much as in the guard.
BAGS = {"bag_of_words": BAG, "stepsize": 0.3}
HEADED = {"head": HEAD, "stepsize": 0.1, "gamma": 1.0, "gm_scale": 0.95}
BOTH = {"bag_of_words": BAG, "head": HEAD, "stepsize": 0.15, "gamma": 1.0}
# With three classes the direction of the gradient depends on the bias, and not its length alone, which a gamma of 1 takes away.
THREE = {"head": linear_head(3), "target": 2, "stepsize": 0.1, "gamma": 1.0}


@pytest.fixture(autouse=True)
def _one_thread():
    with oracles.one_thread():
        yield


@pytest.fixture(params=["llama", "gpt2"])
def family(request):
    return tiny_models.FAMILIES[request.param]


def guard_of(model, settings):
    return mg.Guard(mg.Policy(controls=[PPLM(**settings)]), (model, None))


def oracle_of(model, settings, **changes):
    """The oracle of the same settings."""
    settings = dict(settings)
    return PPLMOracle(Reference(model), bags=settings.pop("bag_of_words", ()), **(settings | changes))


CASES = {
    "bag of words": BAGS,
    "two bags": BAGS | {"bag_of_words": TWO_BAGS},
    "head": HEADED,
    "head of three classes": THREE,
    "head and bag": BOTH,
    "bag, paper's stepsize": {"bag_of_words": BAG},
    "head, released detoxification run": {
        "head": HEAD,
        "stepsize": 0.04,
        "gamma": 1.0,
        "num_iterations": 10,
        "gm_scale": 0.95,
        "kl_scale": 0.01,
    },
    "bag, window 3": BAGS | {"window_length": 3},
    "bag, window 3 with decay": BAGS | {"window_length": 3, "decay": True},
    "bag, window that the text outgrows": BAGS | {"window_length": 8, "decay": True},
    "head, window 3 with decay": HEADED | {"window_length": 3, "decay": True},
    "head, horizon 2": HEADED | {"horizon_length": 2},
    "head and bag, horizon 2": BOTH | {"horizon_length": 2},
    "bag, no KL": BAGS | {"kl_scale": 0.0},
    "bag, strong KL": BAGS | {"kl_scale": 2.0},
    "head, no KL": HEADED | {"kl_scale": 0.0},
    "bag, gm_scale 1": BAGS | {"gm_scale": 1.0},
    "bag, gm_scale 0.5": BAGS | {"gm_scale": 0.5},
    "bag, 1 iteration": BAGS | {"num_iterations": 1},
    "bag, gamma 1": BAGS | {"gamma": 1.0},
    "bag, gamma 0": BAGS | {"gamma": 0.0},
    "head, gamma 1.5": HEADED | {"gamma": 1.5, "stepsize": 0.03},
    "bag, grad_length 3": BAGS | {"grad_length": 3},
    "head, grad_length 3": HEADED | {"grad_length": 3},
    "bag, grad_length 0": BAGS | {"grad_length": 0},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_law(family, settings):
    model = family(0)
    check_greedy(guard_of(model, settings), model, oracle_of(model, settings), PROMPTS)


@pytest.mark.parametrize("settings", [BAGS, HEADED, BOTH], ids=["bag", "head", "both"])
@pytest.mark.parametrize("name", ["gpt_neox", "qwen2"])
def test_more_architectures(name, settings):
    model = tiny_models.FAMILIES[name](3)
    check_greedy(guard_of(model, settings), model, oracle_of(model, settings), PROMPTS)


@pytest.mark.parametrize("settings", [BAGS, HEADED, BOTH], ids=["bag", "head", "both"])
def test_one_token_prompt(family, settings):
    """The first token has no past, so it comes from the base; perturbation starts with the second."""
    model = family(0)
    base = Reference(model)
    run = check_greedy(guard_of(model, settings), model, oracle_of(model, settings), [[8]])
    assert gap(run.laws[0, 0], base.log_law([8])) <= 1e-6
    assert gap(run.laws[0, 1], base.log_law([8, run.tokens[0][0]])) > 10 * TOLERANCE


def test_a_logistic_head_is_a_head_of_two_classes(family):
    model = family(0)
    weight, bias = linear_head(1)
    settings = HEADED | {"head": (weight[0], bias)}
    two_classes = (torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros(1), bias]))
    check_greedy(guard_of(model, settings), model, oracle_of(model, settings, head=two_classes), PROMPTS)


@pytest.mark.parametrize(
    "settings",
    [BAGS, HEADED, BOTH, BAGS | {"window_length": 4, "decay": True}, HEADED | {"horizon_length": 2}],
    ids=["bag", "head", "both", "window with decay", "horizon 2"],
)
def test_a_left_padded_batch_is_its_rows_alone(family, settings):
    model = family(0)
    guard = guard_of(model, settings)
    run = check_greedy(guard, model, oracle_of(model, settings), RAGGED, 6)
    for row, prompt in enumerate(RAGGED):
        alone = run_attached(guard, model, [prompt], 6)
        assert alone.tokens[0] == run.tokens[row]
        assert gap(alone.laws[0], run.laws[row]) <= 1e-5


@pytest.mark.parametrize("settings", [BAGS, HEADED], ids=["bag", "head"])
def test_a_row_that_ends_early_leaves_the_others_as_they_were(family, settings):
    model = family(0)
    oracle = oracle_of(model, settings)
    whole = [oracles.greedy(oracle, prompt, 10) for prompt in RAGGED]
    model.generation_config.eos_token_id = end = whole[1][2]  # the longest prompt ends first, and its padding goes with it
    expected = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in whole]
    assert len(expected[1]) <= 3 < max(map(len, expected))
    assert guard_of(model, settings).generate(RAGGED, max_new_tokens=10).token_ids == expected


@pytest.mark.parametrize("settings", [BAGS, HEADED], ids=["bag", "head"])
def test_with_self_debiasing_the_deltas_add(family, settings):
    """Both from the base, whose rows ride one batch with those of the prefix."""
    model, prefix = family(0), (60, 61, 62)
    base = Reference(model)
    steered, debiased = oracle_of(model, settings), oracles.self_debias(base, [prefix], decay_constant=50, epsilon=0.01)

    def law(ids):
        return torch.log_softmax(steered(ids) + debiased(ids) - base.log_law(ids), -1)

    guard = mg.Guard(mg.Policy(controls=[PPLM(**settings), SelfDebias(prefixes=[prefix])]), (model, None))
    run = check_greedy(guard, model, law, RAGGED, 6)
    for alone in (steered, debiased):
        assert distance(run, alone, RAGGED) > 10 * TOLERANCE


@pytest.mark.parametrize("temperature", [0.6, 1.7])
@pytest.mark.parametrize("settings", [BAGS | {"gm_scale": 0.6}, HEADED | {"gm_scale": 0.6}], ids=["bag", "head"])
def test_temperature_acts_on_the_perturbed_law_alone(family, settings, temperature):
    """softmax(logits / T) ** gm q ** (1 - gm), with q at temperature 1: the T that transformers applies afterwards is allowed for."""
    model = family(0)
    torch.manual_seed(1)
    run = run_attached(guard_of(model, settings), model, PROMPTS, do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    assert distance(run, oracle_of(model, settings, temperature=temperature), PROMPTS) <= TOLERANCE
    wrong = oracle_of(model, settings, temperature=temperature, wrong="fusion without temperature")
    assert distance(run, wrong, PROMPTS) > 10 * TOLERANCE


SAMPLED = {"do_sample": True, "temperature": 0.6}
WHERE = {  # name: (arguments of generate, the model's own config, the temperature that transformers applies)
    "argument": (SAMPLED, {}, 0.6),
    "argument over the model's config": (SAMPLED, {"temperature": 1.7}, 0.6),
    "config given to generate": ({"generation_config": GenerationConfig(**SAMPLED)}, {}, 0.6),
    "the model's config": ({}, SAMPLED, 0.6),
    "the model's config under one that leaves it open": ({"generation_config": GenerationConfig()}, SAMPLED, 0.6),
    "none, over the model's config": ({"temperature": None}, SAMPLED, 1.0),
}


@pytest.mark.parametrize(("given", "of_model", "temperature"), WHERE.values(), ids=WHERE)
def test_temperature_is_found_wherever_it_was_set(given, of_model, temperature):
    """What transformers divides by is what the fusion must have allowed for."""
    model, settings = tiny_models.llama(0), BAGS | {"gm_scale": 0.6}
    for name, value in of_model.items():
        setattr(model.generation_config, name, value)
    torch.manual_seed(1)
    options = {"max_new_tokens": 8, "top_k": 0, "return_dict_in_generate": True, "output_scores": True, "pad_token_id": 0}
    with guard_of(model, settings).attach(model):
        out = model.generate(torch.tensor(PROMPTS), **options, **given)
    laws = torch.log_softmax(torch.stack(out.scores, 1)[0].double(), -1)
    expected = oracles.follow(oracle_of(model, settings, temperature=temperature), PROMPTS[0], out.sequences[0, 5:].tolist())
    assert gap(laws, expected) <= TOLERANCE


def test_beams_carry_their_own_perturbed_cache(family):
    """The score of the best beam is the mean log-probability that the oracle gives to its tokens."""
    model = family(0)
    oracle = oracle_of(model, BAGS)
    with guard_of(model, BAGS).attach(model):
        out = model.generate(
            torch.tensor(PROMPTS),
            num_beams=4,
            num_return_sequences=2,
            max_new_tokens=7,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            pad_token_id=0,
        )
    for sequence, score in zip(out.sequences[:, 5:].tolist(), out.sequences_scores.tolist(), strict=True):
        laws = oracles.follow(oracle, PROMPTS[0], sequence)
        assert abs(float(laws.gather(-1, torch.tensor(sequence)[:, None]).mean()) - score) <= TOLERANCE
    assert out.sequences[0, 5:].tolist() != oracles.greedy(oracle, PROMPTS[0], 7)  # beams were reordered


def test_temperature_of_the_own_loop(family):
    """``guard.generate`` hands its temperature to the fusion; with top_k 1 its draw is the likeliest token of the fused law."""
    model, settings = family(0), BAGS | {"gm_scale": 0.6}
    tokens = guard_of(model, settings).generate(PROMPTS, max_new_tokens=8, do_sample=True, temperature=1.7, top_k=1, seed=0).token_ids[0]
    assert tokens == oracles.greedy(oracle_of(model, settings, temperature=1.7), PROMPTS[0], 8)
    assert tokens != oracles.greedy(oracle_of(model, settings, temperature=0.4), PROMPTS[0], 8)


def test_after_grad_length_only_the_kept_perturbation_is_left(family):
    """From that token on nothing is moved, but the cache moved before still is what the model reads."""
    model, settings = family(0), BAGS | {"grad_length": 2}
    base = Reference(model)
    run = check_greedy(guard_of(model, settings), model, oracle_of(model, settings), PROMPTS)
    untouched = base.log_law([*PROMPTS[0], *run.tokens[0][:3]])
    assert gap(run.laws[0, 3], untouched) > 10 * TOLERANCE
    none_at_all = run_attached(guard_of(model, BAGS | {"grad_length": 0}), model, PROMPTS)
    assert distance(none_at_all, base.log_law, PROMPTS) <= TOLERANCE


@pytest.mark.parametrize("settings", [BAGS, HEADED], ids=["bag", "head"])
def test_steering_reaches_its_attribute(family, settings):
    """The attribute's probability rises: the sign of the step, apart from any oracle."""
    model = family(0)
    base = Reference(model)
    run = run_attached(guard_of(model, settings), model, PROMPTS)
    gains = []
    for i in range(8):
        before, after = base.log_law([*PROMPTS[0], *run.tokens[0][:i]]).exp(), run.laws[0, i].exp()
        if "head" in settings:
            embeddings = base.model.get_input_embeddings().weight
            states = base.states([*PROMPTS[0], *run.tokens[0][:i]]).sum(0)

            def likelihood(law, embeddings=embeddings, states=states, ids=(*PROMPTS[0], *run.tokens[0][:i])):
                expected = (law @ embeddings)[None, None]
                whole = torch.cat([embeddings[list(ids)][None], expected], 1)
                future = base.model.base_model(inputs_embeds=whole, use_cache=False).last_hidden_state[0, -1]
                mean = (states + future) / (len(ids) + 1)
                return float(torch.log_softmax(HEAD[0].double() @ mean + HEAD[1].double(), -1)[1])

            gains.append(likelihood(after) - likelihood(before))
        else:
            gains.append(float(after[BAG[0]].sum() - before[BAG[0]].sum()))
    assert sum(gain > 0 for gain in gains) >= 6, gains


WRONG = {
    "bag: stepsize off by 10 %": (BAGS, {"stepsize": 0.33}),
    "bag: gamma off by 10 %": (BAGS, {"gamma": 1.35}),
    "bag: an iteration more": (BAGS, {"num_iterations": 4}),
    "bag: gm_scale off by 10 %": (BAGS, {"gm_scale": 0.81}),
    "bag: KL off by 10 %": (BAGS | {"kl_scale": 2.0}, {"kl_scale": 2.2}),
    "bag: KL forgotten": (BAGS | {"kl_scale": 2.0}, {"kl_scale": 0.0}),
    "bag: a word forgotten": (BAGS, {"bags": [[10, 20, 30]]}),
    "two bags: a bag forgotten": (BAGS | {"bag_of_words": TWO_BAGS}, {"bags": BAG}),
    "two bags: joined to one": (BAGS | {"bag_of_words": TWO_BAGS}, {"bags": [TWO_BAGS[0] + TWO_BAGS[1]]}),
    "bag: norm of this iteration alone": (BAGS, {"wrong": "fresh norm"}),
    "bag: perturbation forgotten after each token": (BAGS, {"wrong": "forget perturbation"}),
    "bag: one norm for keys and one for values": (BAGS, {"wrong": "norm per key and value"}),
    "bag: keys alone are moved": (BAGS, {"wrong": "keys only"}),
    "bag: grad_length counts from 1": (BAGS | {"grad_length": 3}, {"grad_length": 4}),
    "window: oldest positions": (BAGS | {"window_length": 3}, {"wrong": "oldest window"}),
    "window: one position more": (BAGS | {"window_length": 3}, {"window_length": 4}),
    "window: everywhere": (BAGS | {"window_length": 3}, {"window_length": 0}),
    "decay: forgotten": (BAGS | {"window_length": 3, "decay": True}, {"decay": False}),
    "head: horizon 1 for 2": (HEADED | {"horizon_length": 2}, {"horizon_length": 1}),
    "head: another target": (HEADED, {"target": 0}),
    "head: bias forgotten": (THREE, {"head": (THREE["head"][0], torch.zeros(3))}),
    "head: weights off by 20 %": (THREE, {"head": (1.2 * THREE["head"][0], THREE["head"][1])}),
    "head: running norm": (HEADED | {"gamma": 1.5, "stepsize": 0.03}, {"wrong": "running norm"}),
    "head: perturbation forgotten after each token": (HEADED, {"wrong": "forget perturbation"}),
    "both: head forgotten": (BOTH, {"head": None}),
    "both: bag forgotten": (BOTH, {"bags": []}),
    "both: running norm": (BOTH, {"wrong": "running norm"}),
}


@pytest.fixture(scope="module")
def runs():
    """(family, settings) -> what the guard gave: many mistakes are held against one run."""
    return {}


@pytest.mark.parametrize(("settings", "mistake"), WRONG.values(), ids=WRONG)
def test_a_wrong_oracle_disagrees(family, runs, settings, mistake):
    model = family(0)
    key = (family.__name__, repr(settings))
    run = runs[key] = runs.get(key) or run_attached(guard_of(model, settings), model, PROMPTS, 6)
    settings = dict(settings)
    right = {"bags": settings.pop("bag_of_words", ())} | settings
    assert distance(run, PPLMOracle(Reference(model), **(right | mistake)), PROMPTS) > 10 * TOLERANCE


@pytest.mark.parametrize("settings", [BAGS, HEADED, BOTH], ids=["bag", "head", "both"])
def test_the_guarded_law_is_not_the_base_law(family, settings):
    model = family(0)
    base = Reference(model)
    run = run_attached(guard_of(model, settings), model, RAGGED)
    assert distance(run, base.log_law, RAGGED) > 0.01
    assert run.tokens != [oracles.greedy(base.log_law, prompt, 8) for prompt in RAGGED]
