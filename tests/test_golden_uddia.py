"""UDDIA against a plain float64 version: the biases of a copy of the model are changed by torch's own Adam, one text at a time."""

from __future__ import annotations

import copy

import control_runs
import numpy as np
import oracles
import pytest
import tiny_models
import torch
from oracles import TOLERANCE, distance, follow, gap, greedy, run_attached
from safetensors.torch import save_file
from transformers import DynamicCache, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

import moralguard as mg
from moralguard.controls import UDDIA
from moralguard.controls.bias_offsets import BiasOffsets
from moralguard.controls.registry import write_control
from moralguard.decoding.loop import grad_mode
from moralguard.decoding.session import Session
from moralguard.errors import PolicyError, UnsupportedPathError
from moralguard.testing import check_control

RAGGED = [[8], [5, 9, 20, 7, 33, 41, 2], [100, 3, 77]]
G = torch.Generator().manual_seed(0)
HEAD = (0.7 * torch.randn(2, tiny_models.HIDDEN, generator=G), 0.5 * torch.randn(2, generator=G))
PAIRS = ((3, 40), (5, 60), (7, 70))
FREQUENCIES = torch.rand(tiny_models.VOCAB, generator=G)


@pytest.fixture(autouse=True)
def _one_thread():
    with oracles.one_thread():
        yield


def guard_of(model, **settings):
    return mg.Guard(mg.Policy(controls=[UDDIA(**settings)]), (model, None))


def with_biases(model):
    """A float64 copy whose linear layers all have a bias, of 0 where the model has none."""
    if not isinstance(model, LlamaForCausalLM):
        return copy.deepcopy(model).double()
    config = copy.deepcopy(model.config)
    config.attention_bias = config.mlp_bias = True
    twin = LlamaForCausalLM(config).double().eval()
    twin.load_state_dict({name: torch.zeros_like(value) for name, value in twin.state_dict().items()})
    twin.load_state_dict(model.state_dict(), strict=False)
    return twin


class Groups:
    """The paper's classifier of groups, by a supervised PCA of the pairs and explicit means."""

    def __init__(self, embeddings, frequencies=None, components=1, pairs=PAIRS):
        self.e = embeddings.numpy()
        if components:
            self.e = self.e - self.e.mean(0)
            top = np.linalg.svd(self.e, full_matrices=False)[2][:components]
            self.e = self.e - self.e @ top.T @ top
        centred = np.concatenate([[self.e[a] - (self.e[a] + self.e[b]) / 2, self.e[b] - (self.e[a] + self.e[b]) / 2] for a, b in pairs])
        same = np.equal.outer(np.tile([0, 1], len(pairs)), np.tile([0, 1], len(pairs))).astype(float)
        h = np.eye(len(centred)) - 1 / len(centred)
        self.v = np.linalg.eigh(centred.T @ h @ same @ h @ centred)[1][:, -1]
        self.v *= np.sign(sum((self.e[b] - self.e[a]) @ self.v for a, b in pairs))
        self.p = self.classify(self.e)
        x = np.ones(len(self.e)) if frequencies is None else frequencies.double().numpy()
        self.laws = x[:, None] * self.p * (self.p > 0.75)
        self.laws /= self.laws.sum(0)

    def classify(self, vectors):
        cosine = vectors @ self.v / np.linalg.norm(vectors, axis=-1) / np.linalg.norm(self.v)
        scores = np.exp(np.stack([1 - (1 + cosine) / 2, (1 + cosine) / 2], -1) / 0.1)
        return scores / scores.sum(-1, keepdims=True)

    def gap(self, law):
        h = [np.sqrt(1 - np.sqrt(law.detach().numpy() * self.laws[:, a]).sum()) for a in (0, 1)]
        return abs(h[0] - h[1])

    def loss(self, law, ids, context=True):
        inside = self.classify((self.e[ids].sum(0) + self.e) / (len(ids) + 1))
        weights = (self.p * np.log(2 * self.p)).sum(-1) / 2
        if context:
            weights = weights + (inside * np.log(inside / self.p)).sum(-1)
        return (law * torch.from_numpy(weights)).sum()


class Oracle:
    """ids -> log-law; the ids behind ``prompt`` count as generated."""

    def __init__(
        self,
        model,
        prompt,
        *,
        head=None,
        target=1,
        pairs=None,
        frequencies=None,
        components=1,
        lr=0.06,
        steps=1,
        epsilon=1e-8,
        top_layers=18,
        redo_step=3,
        max_perplexity=30.0,
        gm_scale=0.9,
        hellinger=0.1,
        bias_weight=0.05,
        wrong="",
    ):
        self.model, self.prompt, self.wrong = with_biases(model).requires_grad_(False), list(prompt), wrong
        self.layers = self.model.config.num_hidden_layers
        self.head = None if head is None else [part.double() for part in head]
        embeddings = self.model.get_input_embeddings().weight
        self.groups = None if pairs is None else Groups(embeddings, frequencies, components, pairs)
        self.target, self.lr, self.steps, self.epsilon, self.top, self.redo, self.limit = (
            target,
            lr,
            steps,
            epsilon,
            top_layers,
            redo_step,
            max_perplexity,
        )
        self.gm, self.hellinger, self.bias_weight = gm_scale, hellinger, bias_weight
        self.attempts: list[list[int]] = []

    def __call__(self, ids):
        states, logits, read, past = self.clean(ids)
        base = torch.log_softmax(logits, -1)
        count = len(ids) - len(self.prompt)
        nats = float(
            -base[torch.arange(len(self.prompt) - 1, len(ids) - 1), torch.tensor(ids[len(self.prompt) :], dtype=torch.int64)].sum()
        )
        if self.wrong == "perplexity of this token alone":
            nats, count = 0.0, 0
        tried, layers = [], min(self.top, self.layers)
        while layers > 0:
            law = torch.log_softmax(self.gm * self.tuned(ids, states, read, past, layers) + (1 - self.gm) * logits[-1], -1)
            tried.append((float(-(law.exp() * base[-1]).sum()), layers, law))
            if self.limit is None or np.exp((nats + tried[-1][0]) / (count + 1)) <= self.limit:
                break
            layers -= self.redo
        self.attempts.append([layers for _, layers, _ in tried])
        return (tried[-1] if self.wrong == "last attempt" else min(tried, key=lambda one: one[0]))[2]

    @torch.no_grad()
    def clean(self, ids):
        read, past = DynamicCache(), DynamicCache()
        output = self.model(input_ids=torch.tensor([ids]), past_key_values=read, output_hidden_states=True)
        if len(ids) > 1:
            self.model(input_ids=torch.tensor([ids[:-1]]), past_key_values=past)
        return output.hidden_states[-1][0], output.logits[0], read, past

    def tuned(self, ids, states, read, past, layers):
        model = copy.deepcopy(self.model)
        blocks = model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h
        biases = [p.requires_grad_() for block in blocks[self.layers - layers :] for name, p in block.named_parameters() if "bias" in name]
        adam = torch.optim.Adam(biases, self.lr, eps=self.epsilon)
        for _ in range(self.steps):
            adam.zero_grad()
            loss = self.loss(model, ids, states, read, past)
            if loss.requires_grad:
                loss.backward()
                adam.step()
        return model(input_ids=torch.tensor([ids[-1:]]), past_key_values=copy.deepcopy(past)).logits[0, -1].detach()

    def loss(self, model, ids, states, read, past):
        output = model(input_ids=torch.tensor([ids[-1:]]), past_key_values=copy.deepcopy(past), output_hidden_states=True)
        law = torch.softmax(output.logits[0, -1], -1)
        loss = torch.zeros((), dtype=torch.float64)
        if self.head is not None:
            expected = (law @ model.get_input_embeddings().weight)[None, None]
            reader = self.model if self.wrong == "expected token read without the tuned biases" else model
            future = reader(inputs_embeds=expected, past_key_values=copy.deepcopy(read), output_hidden_states=True).hidden_states[-1][0, -1]
            mean = (states[:-1].sum(0) + output.hidden_states[-1][0, -1].detach() + future) / (len(ids) + 1)
            loss = loss - torch.log_softmax(self.head[0] @ mean + self.head[1], -1)[self.target]
        if self.groups is not None and self.groups.gap(law) > self.hellinger:
            loss = loss + self.bias_weight * self.groups.loss(law, ids, context=self.wrong != "no context")
        return loss


def check(model, settings, prompts=RAGGED, count=5):
    """The laws of a left-padded batch are the oracle's of each text alone; the oracles that were asked."""
    guard = guard_of(model, **settings)
    run = run_attached(guard, model, prompts, count)
    asked = [Oracle(model, prompt, **settings) for prompt in prompts]
    for row, (prompt, oracle) in enumerate(zip(prompts, asked, strict=True)):
        expected = follow(oracle, prompt, run.tokens[row])
        assert gap(run.laws[row], expected) <= TOLERANCE, f"row {row}: {[gap(a, b) for a, b in zip(run.laws[row], expected, strict=True)]}"
    assert guard.generate([list(prompt) for prompt in prompts], max_new_tokens=count, do_sample=False).token_ids == run.tokens
    return asked, run


TOXICITY = {"head": HEAD, "max_perplexity": None}
BIAS = {"pairs": PAIRS, "hellinger": 0.0, "max_perplexity": None}
REDO = {"head": HEAD, "redo_step": 1, "max_perplexity": 20.0}
HOPELESS = REDO | {"max_perplexity": 2.0, "head": (4 * HEAD[0], HEAD[1]), "lr": 0.02}
CASES = {
    "toxicity": TOXICITY,
    "toxicity, one layer": TOXICITY | {"top_layers": 1},
    "toxicity, two steps": TOXICITY | {"steps": 2, "lr": 0.03},
    "toxicity, a large epsilon": TOXICITY | {"epsilon": 0.01},
    "toxicity, the other class": TOXICITY | {"target": 0, "gm_scale": 0.5},
    "bias": BIAS,
    "bias, embeddings as they are": BIAS | {"components": 0},
    "bias, frequencies": BIAS | {"frequencies": FREQUENCIES, "hellinger": 0.02},
    "both": BIAS | {"head": HEAD, "bias_weight": 3.0},
    "redo": REDO,
    "redo, always too high": HOPELESS,
    "redo, two steps": REDO | {"steps": 2, "lr": 0.03, "pairs": PAIRS, "hellinger": 0.02},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_law(family, settings):
    model = tiny_models.FAMILIES[family](0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    check(model, settings)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_token_is_done_again_with_fewer_layers():
    asked, run = check(tiny_models.gpt2(0), REDO)
    counts = [len(tried) for oracle in asked for tried in oracle.attempts]
    assert {1, 3} <= set(counts), "some tokens were accepted at once, some never"
    assert [3, 2, 1] in asked[0].attempts
    once = [Oracle(tiny_models.gpt2(0), prompt, **(REDO | {"max_perplexity": None})) for prompt in RAGGED]
    assert max(gap(run.laws[row], follow(oracle, RAGGED[row], run.tokens[row])) for row, oracle in enumerate(once)) > 10 * TOLERANCE


WRONG = {
    "lr": (TOXICITY, {"lr": 0.066}),
    "class": (TOXICITY, {"target": 0}),
    "a layer fewer": (TOXICITY, {"top_layers": 2}),
    "fusion": (TOXICITY, {"gm_scale": 1.0}),
    "a step more": (TOXICITY, {"steps": 2}),
    "expected token": (TOXICITY, {"wrong": "expected token read without the tuned biases"}),
    "context": (BIAS, {"wrong": "no context"}),
    "components": (BIAS, {"components": 0}),
    "never biased": (BIAS, {"hellinger": 1.0}),
    "redo step": (REDO, {"redo_step": 2}),
    "last attempt": (HOPELESS, {"wrong": "last attempt"}),
    "perplexity": (REDO, {"wrong": "perplexity of this token alone"}),
}


@pytest.mark.parametrize(("settings", "mistake"), WRONG.values(), ids=WRONG)
def test_a_wrong_oracle_disagrees(settings, mistake):
    model = tiny_models.gpt2(0)
    prompts = RAGGED[1:2] if settings["max_perplexity"] is None else RAGGED
    run = run_attached(guard_of(model, **settings), model, prompts, 5)
    wrong = [Oracle(model, prompt, **(settings | mistake)) for prompt in prompts]
    assert max(gap(run.laws[row], follow(oracle, prompts[row], run.tokens[row])) for row, oracle in enumerate(wrong)) > 10 * TOLERANCE


def test_adams_first_step_is_lr_times_the_sign_nearly():
    """lr g / (|g| + 1e-8), each row its own, in its own number of layers."""
    model = tiny_models.gpt2(0)
    bound = guard_of(model, **TOXICITY).controls[0]
    with grad_mode((bound,)):
        session = Session(bound.lm, (bound,), RAGGED, own_base=True)
        seen = []
        applied = BiasOffsets.applied

        def spy(self, offsets):
            seen.append(offsets.detach().clone())
            return applied(self, offsets)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BiasOffsets, "applied", spy)
            session.step()
    assert len(seen) == 2
    assert not bool(seen[0].any())
    d = tiny_models.HIDDEN
    assert seen[1].shape == (3, 3 * (d + 3 * d + d + d + 4 * d + d))  # ln_1, c_attn, c_proj, ln_2, c_fc, c_proj of three layers
    assert bool((seen[1].abs() <= 0.06 + 1e-6).all())
    assert float(seen[1].abs().median()) > 0.0599
    assert not torch.equal(seen[1][0].sign(), seen[1][1].sign())


def test_law_without_bias_passes_through_bit_for_bit():
    model = tiny_models.llama(0)
    run = run_attached(guard_of(model, pairs=PAIRS, hellinger=1.0), model, RAGGED, 4)
    assert torch.equal(run.scores, run.base)
    assert not torch.equal(*(lambda other: (other.scores, other.base))(run_attached(guard_of(model, **BIAS), model, RAGGED, 4)))


def test_temperature_acts_on_the_tuned_law_alone():
    model = tiny_models.gpt2(0)
    settings = TOXICITY | {"gm_scale": 0.6}
    torch.manual_seed(1)
    run = run_attached(guard_of(model, **settings), model, RAGGED[1:2], 4, do_sample=True, temperature=1.7, top_k=0, top_p=1.0)

    def law(ids):
        oracle = Oracle(model, RAGGED[1], **settings)
        states, logits, read, past = oracle.clean(ids)
        return torch.log_softmax(0.6 * oracle.tuned(ids, states, read, past, 3) / 1.7 + 0.4 * logits[-1], -1)

    assert distance(run, law, RAGGED[1:2]) <= TOLERANCE


@pytest.mark.parametrize("settings", [REDO, BIAS | {"head": HEAD, "max_perplexity": 20.0}], ids=["redo", "both"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_invariants(family, settings):
    # with the default epsilon a bias whose gradient is within rounding of 0 moves either way, which these checks would see
    check_control(UDDIA(epsilon=1e-6, **settings), model=(tiny_models.FAMILIES[family](0), None))


def test_slots():
    control_runs.assert_slots_do_not_matter(lambda numpy: UDDIA(**REDO))


def test_zero():
    for nothing in ({"lr": 0.0}, {"steps": 0}, {"top_layers": 0}, {"gm_scale": 0.0}):
        control_runs.assert_zero_is_the_base(UDDIA(head=HEAD, **nothing))
    control_runs.assert_zero_is_the_base(UDDIA(pairs=PAIRS, bias_weight=0.0))


def test_strength_scales_the_learning_rate():
    assert UDDIA(head=HEAD).scaled(0.5).lr == 0.03
    assert not UDDIA(head=HEAD).scaled(0.0).active


def test_the_head_rises():
    """The probability of the class that is sought, after a greedy text, apart from any oracle."""
    model = tiny_models.gpt2(0)
    base = oracles.Reference(model)

    def sought(tokens):
        return [
            float(torch.softmax(HEAD[0].double() @ base.states([*p, *t]).mean(0) + HEAD[1].double(), -1)[1])
            for p, t in zip(RAGGED, tokens, strict=True)
        ]

    guarded = guard_of(model, **TOXICITY).generate(RAGGED, max_new_tokens=12, do_sample=False).token_ids
    assert sum(sought(guarded)) > sum(sought([greedy(base.log_law, prompt, 12) for prompt in RAGGED]))


def test_policy_data(tmp_path):
    save_file({"frequencies": FREQUENCIES}, tmp_path / "counts.safetensors")
    data = {"control": "uddia@1", "pairs": [[3, 40], [5, 60], [7, 70]], "frequencies": str(tmp_path / "counts.safetensors"), "lr": 0.02}
    control = mg.Policy.load({"controls": [data]}).effective_controls()[0]
    assert control == UDDIA(pairs=PAIRS, frequencies=tmp_path / "counts.safetensors", lr=0.02)
    assert mg.Policy.load({"controls": [write_control(control)]}).effective_controls()[0] == control
    guard = mg.Guard(mg.Policy(controls=[control]), (tiny_models.llama(0), None))
    given = guard_of(tiny_models.llama(0), pairs=PAIRS, frequencies=FREQUENCIES)
    assert torch.equal(guard.controls[0].groups.laws, given.controls[0].groups.laws)


BAD = {
    "neither a head": {},
    "belongs to the debiasing loss": {"head": HEAD, "hellinger": 0.2},
    "target is 2": {"head": HEAD, "target": 2},
    "lr": {"head": HEAD, "lr": -0.1},
    "max_perplexity": {"head": HEAD, "max_perplexity": 1.0},
    "redo_step": {"head": HEAD, "redo_step": 0},
    "not all 0": {"pairs": PAIRS, "frequencies": [0.0, 0.0]},
    "arrays of numbers": {"head": ("a", "b")},
}
UNFIT = {
    "frequencies are 3": {"pairs": PAIRS, "frequencies": [1.0, 2.0, 3.0]},
    "token id 999": {"pairs": [(3, 999)]},
    "without a tokenizer": {"pairs": [("she", "he")]},
    "no direction": {"pairs": [(3, 3)]},
    "no more than 32": {"pairs": PAIRS, "components": 32},
    "hidden states of 32": {"head": (torch.ones(2, 5), torch.zeros(2))},
}


@pytest.mark.parametrize(("message", "settings"), BAD.items(), ids=BAD)
def test_bad_settings(message, settings):
    with pytest.raises(PolicyError, match=message):
        UDDIA(**settings)


@pytest.mark.parametrize(("message", "settings"), UNFIT.items(), ids=UNFIT)
def test_settings_that_do_not_fit_the_model(message, settings):
    with pytest.raises(PolicyError, match=message):
        guard_of(tiny_models.llama(0), **settings)


def test_where_it_cannot_run(tmp_path):
    with pytest.raises(UnsupportedPathError, match="attach"):
        guard_of(tiny_models.llama(0), head=HEAD).logits_processor()
    with torch.inference_mode():
        model = tiny_models.llama(0)
    with pytest.raises(PolicyError, match="inference_mode"):
        guard_of(model, head=HEAD)
    save_file({"counts": FREQUENCIES}, tmp_path / "counts.safetensors")
    with pytest.raises(PolicyError, match="expected `frequencies`"):
        guard_of(tiny_models.llama(0), pairs=PAIRS, frequencies=tmp_path / "counts.safetensors")


def test_experts_that_rows_are_routed_to_are_refused():
    config = Qwen2MoeConfig(
        vocab_size=199,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    with pytest.raises(PolicyError, match="gives each row biases of its own"):
        guard_of(Qwen2MoeForCausalLM(config).eval(), head=HEAD)


SMOLLM_PAIRS = (("woman", "man"), ("girl", "boy"), ("she", "he"), ("mother", "father"), ("daughter", "son"), ("her", "his"),
                ("female", "male"), ("herself", "himself"))  # fmt: skip


@pytest.fixture(scope="module")
def smollm():
    return mg.load_model("smollm2-135m")


@pytest.mark.smollm
def test_groups_on_smollm(smollm):
    groups = mg.Guard(mg.Policy(controls=[UDDIA(pairs=SMOLLM_PAIRS)]), smollm).controls[0].groups
    leaning = [{smollm.spell(int(i)) for i in law.topk(30).indices} for law in groups.laws]
    assert {" she", " her", " women", " mother"} <= leaning[0]
    assert {" he", " his", " man", " him"} <= leaning[1]
    published = mg.Guard(mg.Policy(controls=[UDDIA(pairs=SMOLLM_PAIRS, components=0)]), smollm).controls[0].groups
    assert int((published.laws[0] > 0).sum()) > 0.9 * smollm.vocab_size  # hence the default of components


@pytest.mark.smollm
def test_loss_on_smollm(smollm):
    """The gradient through a real model goes the right way: a small step lowers the loss of every row, roughly by what it says.

    Roughly, as the newest state changes the loss too, where the published gradient doesn't go.
    """
    settings = UDDIA(head="pack:smollm2-135m/toxicity-attribute", pairs=SMOLLM_PAIRS, hellinger=0.0)
    bound = mg.Guard(mg.Policy(controls=[settings]), smollm).controls[0]
    prompts = [smollm.tokenizer(text)["input_ids"] for text in ("My new neighbour is such a", "You people are")]
    with grad_mode((bound,)):
        session = Session(smollm, (bound,), prompts, own_base=True)
        session.step()
        text = bound._text(session._pending.step)
        start = torch.zeros(2, bound.biases.count)
        gradient = bound._gradient(text, start)
        step = -0.00005 * gradient.sign()
        losses = []
        for offsets in (start, step):
            with bound.biases.applied(offsets):
                losses.append(bound._loss(text, bound._newest(text)))
    fall, told = losses[0] - losses[1], -(gradient * step).sum(-1)
    assert bool((fall > 0).all())
    assert bool((fall > 0.5 * told).all() & (fall < 2 * told).all()), (fall, told)
