"""Nullspace projection against its formula: logits = E (a h + (1 - a) P h), with INLP's, A-INLP's and LEACE's P and a."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import tiny_models
import torch
from oracles import TOLERANCE, Reference, check_greedy, distance, run_attached

import moralguard as mg
from moralguard.controls import DExperts, Fudge, NullspaceProjection, SelfDebias
from moralguard.controls.experts import Prompt
from moralguard.errors import PolicyError

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


def directions(rank, seed=0):
    """f64[d, rank], orthonormal."""
    noise = torch.randn(HIDDEN, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(noise).Q


def removing(basis):
    """P = I - U U^T as a map."""
    basis = torch.as_tensor(basis).double()
    return lambda h: h - basis @ (basis.T @ h)


class TestINLP:
    @pytest.mark.parametrize("keep", [0.0, 0.5])
    @pytest.mark.parametrize("rank", [1, 4, 12])
    def test_law(self, family, rank, keep):
        model, basis = family(0), directions(rank)
        oracle = oracles.nullspace(Reference(model), removing(basis), keep)
        check_greedy(guard_of(model, NullspaceProjection(basis=basis, keep=keep)), model, oracle, RAGGED)

    @pytest.mark.parametrize("name", tiny_models.FAMILIES)
    def test_every_architecture(self, name):
        model, basis = tiny_models.FAMILIES[name](3), directions(8, seed=1)
        oracle = oracles.nullspace(Reference(model), removing(basis), 0.0)
        check_greedy(guard_of(model, NullspaceProjection(basis=basis)), model, oracle, PROMPTS)

    def test_another_basis_of_the_same_space_gives_the_same_law(self, family):
        model, basis = family(0), directions(4)
        turned = basis @ directions(4, seed=5)[:4].T.contiguous().svd().U
        oracle = oracles.nullspace(Reference(model), removing(basis), 0.0)
        check_greedy(guard_of(model, NullspaceProjection(basis=turned)), model, oracle, PROMPTS)

    def test_removing_everything_leaves_no_preference(self, family):
        model = family(0)
        run = run_attached(guard_of(model, NullspaceProjection(basis=torch.eye(HIDDEN))), model, PROMPTS)
        assert torch.allclose(run.laws.exp(), torch.full_like(run.laws, 1 / VOCAB), atol=1e-5)


class TestAdaptive:
    """A-INLP. The direction is long enough that the bias leaves the band at some steps, and at some so far that a is at its floor."""

    COUNT = 10
    KINDS = {"inside the band": lambda a: a == 1, "between": lambda a: 0.6 < a < 1, "at the floor": lambda a: a == 0.6}

    @pytest.fixture
    def direction(self):
        return 2.0 * torch.randn(HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def keeps(self, base, direction, prompt, tokens):
        keep = oracles.adaptive_keep(base.unembedding, direction)
        return [keep(base.logits([*prompt, *tokens[:i]])) for i in range(len(tokens))]

    def test_law(self, family, direction):
        model, basis = family(0), directions(6)
        base = Reference(model)
        oracle = oracles.nullspace(base, removing(basis), oracles.adaptive_keep(base.unembedding, direction))
        control = NullspaceProjection(basis=basis, adaptive=True, direction=direction)
        run = check_greedy(guard_of(model, control), model, oracle, RAGGED, self.COUNT)
        seen = dict.fromkeys(self.KINDS, 0)
        for row, prompt in enumerate(RAGGED):
            for step, a in enumerate(self.keeps(base, direction, prompt, run.tokens[row])):
                for kind, holds in self.KINDS.items():
                    seen[kind] += holds(a)
                untouched = torch.equal(run.scores[row, step], run.base[row, step])
                assert untouched == (a == 1)  # a step that needs no help passes through bit for bit
        assert min(seen.values()) >= 2, seen

    def test_a_basis_of_rank_1_is_its_own_direction(self, family):
        model = family(0)
        base = Reference(model)
        # the direction of the likeliest tokens, or the bias of a unit vector would stay inside the band
        rows = base.unembedding / base.unembedding.norm(dim=-1, keepdim=True)
        axis = sum(base.log_law(prompt).exp() @ rows for prompt in RAGGED)
        axis = axis / axis.norm()
        oracle = oracles.nullspace(base, removing(axis[:, None]), oracles.adaptive_keep(base.unembedding, axis))
        run = check_greedy(guard_of(model, NullspaceProjection(basis=axis, adaptive=True)), model, oracle, RAGGED, self.COUNT)
        assert any(a < 1 for row, prompt in enumerate(RAGGED) for a in self.keeps(base, axis, prompt, run.tokens[row]))

    def test_keep_is_not_used(self, family, direction):
        model, basis = family(0), directions(6)
        runs = [
            run_attached(guard_of(model, NullspaceProjection(basis=basis, adaptive=True, direction=direction, keep=keep)), model, PROMPTS)
            for keep in (0.0, 1.0)
        ]
        assert torch.equal(runs[0].scores, runs[1].scores)

    def test_a_request_can_switch_it_off_but_not_scale_it(self, direction):
        control = NullspaceProjection(basis=directions(6), adaptive=True, direction=direction)
        assert not control.scaled(0).active
        assert control.scaled(1) is control
        with pytest.raises(PolicyError, match=r"strength 0\.5 means nothing"):
            control.scaled(0.5)

    def test_unit_length_of_the_tokens_matters(self, family, direction):
        """The negative control of ||e_v||: a rule without it disagrees."""
        model, basis = family(0), directions(6)
        base = Reference(model)

        def keep(logits):
            p, inside = torch.softmax(logits, -1), oracles.nucleus(logits, 0.7)
            b = float((p * inside) @ (base.unembedding @ direction))
            return 1.0 if -0.1 <= b <= 0.15 else max(1 - abs(b), 0.6)

        control = NullspaceProjection(basis=basis, adaptive=True, direction=direction)
        run = run_attached(guard_of(model, control), model, RAGGED, self.COUNT)
        assert distance(run, oracles.nullspace(base, removing(basis), keep), RAGGED) > 10 * TOLERANCE


class TestLEACE:
    @pytest.fixture
    def fitted(self, family):
        """States of random texts and two concepts that they hold linearly; the eraser of both."""
        model = family(0)
        base = Reference(model)
        generator = torch.Generator().manual_seed(7)
        texts = torch.randint(0, VOCAB, (40, 12), generator=generator).tolist()
        states = torch.cat([base.states(text) for text in texts]).numpy()
        noise = np.random.default_rng(7).normal(size=(len(states), 2))
        concepts = (states @ directions(2, seed=8).numpy() + 0.3 * noise > 0).astype(np.float64)
        return model, base, states, concepts, oracles.leace(states, concepts)

    def test_the_oracle_erases(self, fitted):
        _, _, states, concepts, (dense, u_in, u_out, mu) = fitted
        assert u_in.shape == u_out.shape == (HIDDEN, 2)
        assert np.allclose(dense, u_out @ u_in.T)
        erased = states - (states - mu) @ dense.T
        centred = concepts - concepts.mean(0)
        assert np.abs(erased.T @ centred / len(states)).max() < 1e-9
        assert np.abs(states.T @ centred / len(states)).max() > 0.05

    @pytest.mark.parametrize("keep", [0.0, 0.5])
    def test_law(self, fitted, keep):
        model, base, _, _, (dense, u_in, u_out, mu) = fitted
        dense, mu = torch.from_numpy(dense), torch.from_numpy(mu)
        oracle = oracles.nullspace(base, lambda h: h - dense @ (h - mu), keep)
        run = check_greedy(guard_of(model, NullspaceProjection(basis=(u_in, u_out, mu), keep=keep)), model, oracle, RAGGED)
        assert distance(run, base.log_law, RAGGED) > 10 * TOLERANCE

    @pytest.mark.parametrize("mistake", ["no mean", "factors swapped"])
    def test_a_wrong_oracle_disagrees(self, fitted, mistake):
        model, base, _, _, (dense, u_in, u_out, mu) = fitted
        run = run_attached(guard_of(model, NullspaceProjection(basis=(u_in, u_out, mu))), model, RAGGED)
        dense, mu = torch.from_numpy(dense), torch.from_numpy(mu)
        wrong = {"no mean": lambda h: h - dense @ h, "factors swapped": lambda h: h - dense.T @ (h - mu)}[mistake]
        assert distance(run, oracles.nullspace(base, wrong, 0.0), RAGGED) > 10 * TOLERANCE


class TestFromClassifiers:
    ROUNDS = {"one round": [2], "three rounds of three classes": [3, 3, 3], "logistic rounds": [1, 1, 1, 1]}

    def matrices(self, classes):
        """One weight matrix [classes, d] a round."""
        generator = np.random.default_rng(0)
        found = [generator.normal(size=(count, HIDDEN)) for count in classes]
        # softmax classifiers are often centred: rows that add up to zero, so of rank classes - 1
        return [w - w.mean(0) if len(w) == 3 else w for w in found]

    @pytest.mark.parametrize("classes", ROUNDS.values(), ids=ROUNDS)
    def test_projection_is_the_published_one(self, classes):
        weights = self.matrices(classes)
        expected = oracles.inlp_projector(weights)
        p = NullspaceProjection.from_classifiers(weights).projection().double().numpy()
        assert np.abs(p - expected).max() < 1e-5
        assert np.abs(p - p.T).max() < 1e-6
        assert np.abs(p @ p - p).max() < 1e-5
        removed = sum(len(w) - (len(w) == 3) for w in weights)
        assert abs(np.trace(p) - (HIDDEN - removed)) < 1e-4
        for w in weights:
            assert np.abs(w @ p).max() < 1e-5  # no classifier sees anything any more

    def test_rounds_that_overlap_count_once(self):
        first, second = self.matrices([2, 2])
        weights = [first, np.stack([first[0] + first[1], second[0]])]
        expected = oracles.inlp_projector(weights)
        p = NullspaceProjection.from_classifiers(weights).projection().double().numpy()
        assert abs(np.trace(expected) - (HIDDEN - 3)) < 1e-9
        assert np.abs(p - expected).max() < 1e-5

    def test_vectors_and_tensors_are_read_alike(self):
        weights = self.matrices([1, 1])
        vectors = [torch.tensor(w[0], dtype=torch.float32) for w in weights]
        p = NullspaceProjection.from_classifiers(vectors).projection().double().numpy()
        assert np.abs(p - oracles.inlp_projector(weights)).max() < 1e-5

    @pytest.mark.parametrize("keep", [0.0, 0.5])
    def test_law(self, family, keep):
        model, weights = family(0), self.matrices([3, 3, 3])
        p = torch.from_numpy(oracles.inlp_projector(weights))
        oracle = oracles.nullspace(Reference(model), lambda h: p @ h, keep)
        check_greedy(guard_of(model, NullspaceProjection.from_classifiers(weights, keep=keep)), model, oracle, RAGGED)

    def test_a_round_left_out_disagrees(self):
        weights = self.matrices([3, 3, 3])
        p = NullspaceProjection.from_classifiers(weights).projection().double().numpy()
        assert np.abs(p - oracles.inlp_projector(weights[:2])).max() > 0.01


class TestComposition:
    """Controls listed together: the sum of their deltas, each computed from the base, on the intersection of their supports."""

    PREFIX, ANTI_PREFIX = (3, 4), (60, 61, 62)

    def delta_of_nullspace(self, base, basis, keep=0.0):
        return lambda ids: -(1 - keep) * base.unembedding @ (basis @ (basis.T @ base.states(ids)[-1]))

    def delta_of_self_debias(self, base):
        oracle = oracles.self_debias(base, [self.PREFIX], decay_constant=50, epsilon=0.01)

        def delta(ids):
            shift = oracle(ids) - base.log_law(ids)
            return shift - shift.max()  # a delta of at most 0, up to what normalising takes back

        return delta

    def delta_of_contrast(self, base):
        return lambda ids: 1.5 * (base.logits([*self.PREFIX, *ids]) - base.logits([*self.ANTI_PREFIX, *ids]))

    def summed(self, base, *deltas):
        return lambda ids: torch.log_softmax(base.logits(ids) + sum(delta(ids) for delta in deltas), -1)

    def controls(self, kind, base):
        """The partner of a nullspace control: itself and its delta."""
        if kind == "another nullspace":
            second = directions(3, seed=9)
            return NullspaceProjection(basis=second, keep=0.25), self.delta_of_nullspace(base, second, 0.25)
        if kind == "self-debiasing":
            return SelfDebias(prefixes=[self.PREFIX]), self.delta_of_self_debias(base)
        contrast = DExperts(expert=Prompt(self.PREFIX), anti_expert=Prompt(self.ANTI_PREFIX), alpha=1.5, filter_p=1.0)
        return contrast, self.delta_of_contrast(base)

    @pytest.mark.parametrize("kind", ["another nullspace", "self-debiasing", "prompted experts"])
    @pytest.mark.parametrize("order", ["nullspace first", "nullspace last"])
    def test_sum_of_deltas_under_attach(self, family, kind, order):
        model, basis = family(0), directions(4)
        base = Reference(model)
        partner, delta = self.controls(kind, base)
        controls = [NullspaceProjection(basis=basis), partner]
        oracle = self.summed(base, self.delta_of_nullspace(base, basis), delta)
        run = run_attached(guard_of(model, *(controls if order == "nullspace first" else controls[::-1])), model, RAGGED)
        assert distance(run, oracle, RAGGED) <= TOLERANCE

    @pytest.mark.parametrize("kind", ["another nullspace", "self-debiasing", "prompted experts"])
    def test_sum_of_deltas_in_the_own_loop(self, family, kind):
        model, basis = family(0), directions(4)
        base = Reference(model)
        partner, delta = self.controls(kind, base)
        oracle = self.summed(base, self.delta_of_nullspace(base, basis), delta)
        own = guard_of(model, NullspaceProjection(basis=basis), partner).generate(RAGGED, max_new_tokens=8).token_ids
        assert own == [oracles.greedy(oracle, prompt, 8) for prompt in RAGGED]

    def test_supports_intersect(self, family):
        """DExperts' nucleus of the base and FUDGE's candidates, with a nullspace delta on top."""
        model, basis = family(0), directions(4)
        expert = family(1)
        base, other = Reference(model), Reference(expert)
        table = torch.randn(VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        fudge = Fudge(discriminator=lambda token_ids, candidates, attention_mask: table[candidates], strength=2.0, top_k=25)
        nullspace = self.delta_of_nullspace(base, basis)

        def law(ids):
            z = base.logits(ids)
            kept = oracles.nucleus(z, 0.6)
            kept &= z >= z.topk(25).values[-1]
            summed = z + 2.0 * (other.logits(ids) - z) + nullspace(ids) + 2.0 * torch.nn.functional.logsigmoid(table)
            return torch.log_softmax(torch.where(kept, summed, -torch.inf), -1)

        guard = guard_of(model, DExperts(expert=expert, filter_p=0.6), fudge, NullspaceProjection(basis=basis))
        run = check_greedy(guard, model, law, RAGGED)
        sizes = torch.isfinite(run.scores).sum(-1).flatten().tolist()
        assert max(sizes) <= 25
        assert min(sizes) < 25  # both filters acted somewhere

    def test_one_delta_alone_disagrees(self, family):
        model, basis = family(0), directions(4)
        base = Reference(model)
        partner, delta = self.controls("another nullspace", base)
        run = run_attached(guard_of(model, NullspaceProjection(basis=basis), partner), model, RAGGED)
        for alone in (delta, self.delta_of_nullspace(base, basis)):
            assert distance(run, self.summed(base, alone), RAGGED) > 10 * TOLERANCE


WRONG = {"keep off by 0.05": (4, 0.55), "a direction forgotten": (3, 0.5), "no projection": (0, 0.5)}


@pytest.mark.parametrize(("rank", "keep"), WRONG.values(), ids=WRONG)
def test_a_wrong_oracle_disagrees(family, rank, keep):
    model, basis = family(0), directions(4)
    run = run_attached(guard_of(model, NullspaceProjection(basis=basis, keep=0.5)), model, PROMPTS)
    assert distance(run, oracles.nullspace(Reference(model), removing(basis[:, :rank]), keep), PROMPTS) > 10 * TOLERANCE


def test_the_guarded_law_is_not_the_base_law(family):
    model = family(0)
    base = Reference(model)
    run = run_attached(guard_of(model, NullspaceProjection(basis=directions(6))), model, RAGGED)
    assert distance(run, base.log_law, RAGGED) > 0.05
    assert run.tokens != [oracles.greedy(base.log_law, prompt, 8) for prompt in RAGGED]
