"""Subspaces fitted on states: INLP, LEACE, directions and word odds against naive computations, and what must hold of every edit."""

from __future__ import annotations

import json

import numpy as np
import oracles
import pytest
import scipy.linalg
import tiny_models
import torch
import typer
from typer.testing import CliRunner

from moralguard import Guard, Policy  # at the top: a guard imported while a test has load_model replaced would keep the replacement
from moralguard.backends.head import Head
from moralguard.backends.hf import LanguageModel
from moralguard.cli import fit_subspace
from moralguard.controls import NullspaceProjection
from moralguard.errors import DataError
from moralguard.fitting import subspace_fit
from moralguard.fitting.directions import fit_class_means, fit_directions, fit_word_odds, law_metric
from moralguard.fitting.hidden_states import encode_texts, pooled_states
from moralguard.fitting.inlp import fit_inlp
from moralguard.fitting.labelled import checked
from moralguard.fitting.leace import LeaceFitter, fit_leace
from moralguard.fitting.probe import probe
from moralguard.fitting.subspace import Subspace, checked_rows
from moralguard.packs import read_pack

WIDTH = 24


def rows(classes=2, count=900, width=WIDTH, seed=0, strength=1.5, rank=None):
    """States with correlated, unevenly wide axes and a mean; classes differ in their means alone. Labels are unevenly frequent."""
    g = torch.Generator().manual_seed(seed)
    labels = (torch.rand(count, generator=g) ** 1.3 * classes).long().clamp_max(classes - 1)
    noise = torch.randn(count, width, generator=g, dtype=torch.float64)
    mixing = torch.randn(width, width if rank is None else rank, generator=g, dtype=torch.float64) * 0.6
    means = strength * torch.randn(classes, mixing.shape[1], generator=g, dtype=torch.float64)
    x = (noise[:, : mixing.shape[1]] + means[labels]) @ mixing.T
    return x + 3 * torch.randn(width, generator=g, dtype=torch.float64), labels


def one_hot(labels):
    return torch.nn.functional.one_hot(labels).double()


def cross_covariance(x, labels):
    """Correlations, so that 0 means the same at every scale."""
    x, z = x - x.mean(0), one_hot(labels) - one_hot(labels).mean(0)
    return float((x.T @ z / len(x)).abs().max())


def naive_leace(x, labels):
    """r(x) = x - W^+ P W (x - mu), P the projector on the columns of W S_xz, with SciPy's roots and pseudo-inverses throughout."""
    x, z = x.numpy(), one_hot(labels).numpy()
    mu = x.mean(0)
    s_xx, s_xz = np.cov(x.T, bias=True), (x - mu).T @ (z - z.mean(0)) / len(x)
    w = np.linalg.pinv(np.real(scipy.linalg.sqrtm(s_xx)), rcond=1e-7, hermitian=True)
    a = w @ s_xz
    p = a @ np.linalg.pinv(a, rcond=1e-7)
    return torch.from_numpy(x - (x - mu) @ (np.linalg.pinv(w, rcond=1e-7, hermitian=True) @ p @ w).T)


class TestLeace:
    @pytest.mark.parametrize("classes", [2, 3, 5])
    def test_is_the_papers_formula(self, classes):
        x, y = rows(classes)
        assert torch.allclose(fit_leace(x, y).apply(x), naive_leace(x, y), atol=1e-8)

    @pytest.mark.parametrize("classes", [2, 3, 5])
    def test_nothing_linear_is_left(self, classes):
        x, y = rows(classes)
        eraser = fit_leace(x, y)
        assert eraser.rank == classes - 1
        assert cross_covariance(x, y) > 0.1
        edited = eraser.apply(x)
        assert cross_covariance(edited, y) < 1e-10
        # least squares on the erased states can't beat the constant
        design = torch.cat([edited, torch.ones(len(x), 1, dtype=torch.float64)], 1)
        residual = one_hot(y) - design @ torch.linalg.lstsq(design, one_hot(y), driver="gelsd").solution
        assert torch.allclose(residual, one_hot(y) - one_hot(y).mean(0), atol=1e-6)

    def test_logistic_probe_learns_before_and_fails_after(self):
        x, y = rows(3, count=3000)
        held = torch.arange(len(y)) % 4 == 0
        result = probe(x, y, fit_leace(x, y).apply, held=held)
        assert result.before > result.majority + 0.15
        assert result.after == pytest.approx(result.majority, abs=0.02)
        nothing = probe(x, y, lambda s: s, held=held)
        assert nothing.after == nothing.before

    def test_idempotent(self):
        x, y = rows(3)
        eraser = fit_leace(x, y)
        once = eraser.apply(x)
        assert torch.allclose(eraser.apply(once), once, atol=1e-9)
        assert not torch.allclose(once, x, atol=1e-2)

    def test_changes_less_than_other_projections_that_erase(self):
        x, y = rows(3)
        erased = (fit_leace(x, y).apply(x) - x).square().sum(1).mean()
        means = fit_class_means(x, y)
        # about the data's mean, so that the orthogonal edit moves no more than it must
        orthogonal = Subspace(means.u_in, means.u_out, x.mean(0)).apply(x)
        assert cross_covariance(orthogonal, y) < 1e-10
        inlp = fit_inlp(x - x.mean(0), y, rounds=8).subspace.apply(x - x.mean(0)) - (x - x.mean(0))
        assert erased < 0.95 * (orthogonal - x).square().sum(1).mean()
        assert erased < 0.75 * inlp.square().sum(1).mean()

    @pytest.mark.parametrize("sizes", [[1], [7, 1, 200], [450]])
    def test_streaming_is_one_batch(self, sizes):
        # rows in order of their label: some batches hold one class alone
        x, y = rows(3)
        x, y = x[y.argsort()] + 100, y.sort().values
        fitter, start, turn = LeaceFitter(WIDTH, 3), 0, 0
        while start < len(x):
            end = start + sizes[turn % len(sizes)]
            fitter.update(x[start:end], y[start:end])
            start, turn = end, turn + 1
        many, one = fitter.eraser(), fit_leace(x, y)
        assert torch.allclose(many.mu, one.mu, atol=1e-10)
        assert torch.allclose(many.u_out @ many.u_in.T, one.u_out @ one.u_in.T, atol=1e-9)

    def test_rank_deficient_states(self):
        """Fewer axes than the width, in float32: rounding fills the others and must not be whitened."""
        x, y = rows(3, rank=9)
        eraser = fit_leace(x.float(), y)
        assert eraser.u_in.abs().max() < 1e3
        assert cross_covariance(eraser.apply(x), y) < 1e-5
        assert torch.allclose(eraser.apply(x), naive_leace(x, y), atol=1e-3)
        # fewer rows than the width
        few = fit_leace(x[:12], y[:12])
        assert cross_covariance(few.apply(x[:12]), y[:12]) < 1e-9

    @pytest.mark.parametrize("scale", [1e-4, 1e4])
    def test_tolerance_is_relative(self, scale):
        x, y = rows(3)
        assert torch.allclose(fit_leace(x * scale, y).apply(x * scale) / scale, fit_leace(x, y).apply(x), atol=1e-8)

    def test_a_weak_concept_goes_too(self):
        x, y = rows(2, strength=0.0)
        x[:, 0] += 1e-3 * y
        assert cross_covariance(fit_leace(x, y).apply(x), y) < 1e-12

    def test_a_weak_difference_goes_beside_a_strong_one(self):
        """Classes 1 and 2 differ by a thousandth of what class 0 differs from both: an absolute tolerance would keep that."""
        g = torch.Generator().manual_seed(0)
        y = torch.arange(900) % 3
        # noise without a trace of the labels, so that what differs is what is put in
        x = torch.randn(300, WIDTH, generator=g, dtype=torch.float64).repeat_interleave(3, 0)
        x[:, 0] += 5 * (y == 0)
        x[:, 1] += 5e-3 * (y == 1)
        found = fit_leace(x, y)
        assert found.rank == 2
        assert cross_covariance(found.apply(x), y) < 1e-10

    def test_rank_takes_the_strongest(self):
        x, y = rows(4)
        whole, part = fit_leace(x, y), fit_leace(x, y, rank=1)
        assert (whole.rank, part.rank) == (3, 1)
        assert 1e-6 < cross_covariance(part.apply(x), y) < cross_covariance(x, y)

    @pytest.mark.parametrize("shrinkage", [0.1, 1.0])
    def test_shrinkage_erases_as_much(self, shrinkage):
        """Few rows in many dimensions: the concept is gone, at a larger change of these rows, and read with smaller weights."""
        x, y = rows(3, count=40)
        plain, shrunk = fit_leace(x, y), fit_leace(x, y, shrinkage=shrinkage)
        assert shrunk.rank == 2
        assert cross_covariance(shrunk.apply(x), y) < 1e-10
        assert (shrunk.apply(x) - x).square().sum() > (plain.apply(x) - x).square().sum()
        assert shrunk.u_in.norm() < plain.u_in.norm()
        if shrinkage == 1:  # an orthogonal projection
            assert torch.allclose(shrunk.u_out @ shrunk.u_in.T, (lambda u: u @ u.T)(fit_class_means(x, y).u_in), atol=1e-8)

    def test_errors(self):
        x, y = rows(2)
        with pytest.raises(DataError, match="1 class"):
            LeaceFitter(WIDTH, 2).update(x, torch.zeros_like(y)).eraser()
        with pytest.raises(DataError, match="width 3"):
            LeaceFitter(WIDTH, 2).update(x[:, :3], y)
        with pytest.raises(DataError, match="0 to 1"):
            LeaceFitter(WIDTH, 2).update(x, y + 1)
        with pytest.raises(DataError, match="hold nothing"):
            fit_leace(torch.ones(6, 4), torch.tensor([0, 1, 0, 1, 0, 1]))
        with pytest.raises(DataError, match="at least two classes"):
            LeaceFitter(WIDTH, 1)


class TestInlp:
    @pytest.mark.parametrize("classes", [2, 3])
    def test_projector(self, classes):
        x, y = rows(classes)
        fitted = fit_inlp(x, y, rounds=4)
        u = fitted.subspace.u_in
        p = torch.eye(WIDTH, dtype=torch.float64) - u @ u.T
        assert torch.allclose(u.T @ u, torch.eye(u.shape[1], dtype=torch.float64), atol=1e-10)
        assert torch.allclose(p @ p, p, atol=1e-10)
        assert torch.equal(p, p.T)
        assert len(fitted.accuracies) == 4
        assert fitted.accuracies[0] > fitted.accuracies[-1]

    def test_is_the_papers_algorithm(self):
        """Written once more with dense projectors, each round from the original states."""
        from sklearn.svm import LinearSVC

        from moralguard.fitting.probe import stratified

        x, y = rows(3)
        scaled, train = (x / x.square().mean().sqrt()).numpy(), (~stratified(y, 0.2, 0)).numpy()
        p, total, weights = np.eye(WIDTH), np.zeros((WIDTH, WIDTH)), []
        for _ in range(3):
            w = LinearSVC(C=0.1, dual=False, fit_intercept=False, tol=1e-3).fit((scaled @ p)[train], y.numpy()[train]).coef_
            weights.append(w)
            total += np.linalg.pinv(w) @ w
            p = np.eye(WIDTH) - scipy.linalg.orth(total, rcond=1e-6) @ scipy.linalg.orth(total, rcond=1e-6).T
        u = fit_inlp(x, y, rounds=3).subspace.u_in
        assert torch.allclose(torch.eye(WIDTH, dtype=torch.float64) - u @ u.T, torch.from_numpy(p), atol=1e-6)
        ours = NullspaceProjection(basis=u.float()).projection()
        assert torch.allclose(ours, NullspaceProjection.from_classifiers(weights).projection(), atol=1e-4)

    def test_probe_fails_after_enough_rounds(self):
        x, y = rows(2, count=2000)
        x = x - x.mean(0)
        few, many = (probe(x, y, fit_inlp(x, y, rounds=rounds, cost=10).subspace.apply) for rounds in (2, 16))
        assert many.before > many.majority + 0.15
        assert many.after < many.majority + 0.03
        assert many.after < few.after

    def test_weak_rounds_are_skipped(self):
        x, y = rows(2, count=2000, strength=0.3)
        x = x - x.mean(0)
        every = fit_inlp(x, y, rounds=10)
        least = (every.accuracies[0] + every.accuracies[-1]) / 2
        some = fit_inlp(x, y, rounds=10, min_accuracy=least)
        assert 0 < len(some.accuracies) < 10
        assert min(some.accuracies) >= least
        assert some.accuracies == every.accuracies[: len(some.accuracies)]
        with pytest.raises(DataError, match="min_accuracy"):
            fit_inlp(x, y, min_accuracy=1.0)

    def test_stops_when_everything_is_removed(self):
        x, y = rows(2, width=4)
        assert fit_inlp(x, y, rounds=50).subspace.rank == 4

    def test_direction_points_to_the_second_class(self):
        x, y = rows(2)
        x = x - x.mean(0)
        g = fit_inlp(x, y).subspace.direction
        assert float(g.norm()) == pytest.approx(1)
        assert (x[y == 1] @ g).mean() > (x[y == 0] @ g).mean()


class TestDirections:
    def test_principal_directions_of_pairs(self):
        g = torch.Generator().manual_seed(0)
        axes = torch.linalg.qr(torch.randn(WIDTH, 2, generator=g, dtype=torch.float64)).Q
        along = torch.randn(60, 2, generator=g, dtype=torch.float64) * torch.tensor([3.0, 1.0]) + torch.tensor([4.0, 0.0])
        found = fit_directions(along @ axes.T + 1e-3 * torch.randn(60, WIDTH, generator=g, dtype=torch.float64), 2)
        assert found.is_orthogonal
        assert torch.allclose(found.u_in @ found.u_in.T, axes @ axes.T, atol=1e-2)
        assert float(found.direction @ axes[:, 0]) > 0.99
        assert fit_directions(along @ axes.T, 9).rank == 2  # no more than there are

    @pytest.mark.parametrize("classes", [2, 4])
    def test_class_means_coincide_after(self, classes):
        x, y = rows(classes)
        found = fit_class_means(x, y)
        assert found.rank == classes - 1
        edited = found.apply(x)
        means = torch.stack([edited[y == c].mean(0) for c in range(classes)])
        assert torch.allclose(means, means[:1].expand_as(means), atol=1e-9)

    def test_errors(self):
        with pytest.raises(DataError, match="aren't all 0"):
            fit_directions(torch.zeros(3, 4), 1)
        with pytest.raises(DataError, match="rank is 0"):
            fit_directions(torch.ones(3, 4), 0)
        with pytest.raises(DataError, match="row 2 isn't finite"):
            checked_rows(torch.tensor([[1.0], [float("nan")]]), torch.tensor([0, 1]))
        with pytest.raises(DataError, match="don't fit"):
            checked_rows(torch.ones(3, 2), torch.tensor([0, 1]))


class TestWordOdds:
    @pytest.fixture
    def law(self):
        g = torch.Generator().manual_seed(1)
        head = Head(torch.randn(60, WIDTH, generator=g) * 0.5, scale=0.7)
        states = torch.randn(50, WIDTH, generator=g) + 2 * torch.randn(WIDTH, generator=g)
        return head, states

    def test_metric_is_the_mean_covariance(self, law):
        head, states = law
        metric, mean = law_metric(head, states)
        e = head.weight.double()
        p = torch.softmax(0.7 * states.double() @ e.T, -1)
        naive = sum(e.T @ (torch.diag(row) - torch.outer(row, row)) @ e for row in p) * 0.49 / len(p)
        assert torch.allclose(metric, naive, atol=1e-5)
        assert torch.allclose(mean, p.mean(0), atol=1e-6)

    def test_metric_is_the_laws_curvature(self, law):
        head, states = law
        metric, _ = law_metric(head, states)
        move = 1e-3 * torch.randn(WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

        def log_law(s):
            return torch.log_softmax(0.7 * s.double() @ head.weight.double().T, -1)

        divergence = (log_law(states).exp() * (log_law(states) - log_law(states + move))).sum(1).mean()
        assert float(divergence) == pytest.approx(float(move @ metric @ move) / 2, rel=0.02)

    def test_pairs_are_even_and_the_move_is_the_least(self, law):
        head, states = law
        metric, _ = law_metric(head, states)
        e = head.weight.double()
        d = torch.stack([e[1] - e[0], e[3] - e[2], e[1] - e[2]])
        found = fit_word_odds(d, metric, ridge=0)
        edited = found.apply(states)
        logits = edited @ e.T
        assert torch.allclose(logits[:, [1, 3, 1]], logits[:, [0, 2, 2]], atol=1e-9)
        assert torch.allclose(found.apply(edited), edited, atol=1e-9)

        def cost(other):
            return ((other - states) @ metric * (other - states)).sum(1)

        # the constrained minimum, row by row, from its Karush-Kuhn-Tucker equations
        kkt = torch.cat([torch.cat([metric, d.T], 1), torch.cat([d, torch.zeros(3, 3, dtype=torch.float64)], 1)])
        right = torch.cat([torch.zeros(WIDTH, len(states), dtype=torch.float64), -d @ states.double().T])
        assert torch.allclose(edited - states, torch.linalg.solve(kkt, right)[:WIDTH].T, atol=1e-7)
        plain = fit_word_odds(d, torch.eye(WIDTH, dtype=torch.float64), ridge=0).apply(states)
        assert torch.allclose(d @ plain.T, torch.zeros(3, len(states), dtype=torch.float64), atol=1e-9)
        assert cost(edited).mean() < 0.9 * cost(plain).mean()

    def test_repeated_pairs_change_nothing(self, law):
        head, states = law
        metric, _ = law_metric(head, states)
        e = head.weight.double()
        d = torch.stack([e[1] - e[0], e[3] - e[2]])
        twice = fit_word_odds(torch.cat([d, -2 * d, d.sum(0, keepdim=True)]), metric)
        assert twice.rank == 2
        assert torch.allclose(twice.apply(states), fit_word_odds(d, metric).apply(states), atol=1e-8)


@pytest.mark.parametrize("kind", ["orthogonal", "leace", "words"])
def test_the_control_applies_what_was_fitted(kind):
    """Tensors of a pack through NullspaceProjection: its law is the head on the edited states."""
    model = tiny_models.llama(0)
    lm = LanguageModel(model)
    x, y = rows(2, width=tiny_models.HIDDEN)
    e = lm.head.weight.double()
    found = {
        "orthogonal": lambda: fit_inlp(x, y, rounds=2).subspace,
        "leace": lambda: fit_leace(x, y),
        "words": lambda: fit_word_odds(torch.stack([e[1] - e[0]]), law_metric(lm.head, x)[0]),
    }[kind]()
    tensors = found.tensors()
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors.values())
    basis = tensors["basis"] if "basis" in tensors else (tensors["U_in"], tensors["U_out"], tensors["mu"])
    base = oracles.Reference(model)
    control = NullspaceProjection(basis=basis, direction=tensors.get("direction"))
    with oracles.one_thread():
        run = oracles.run_attached(Guard(Policy(controls=[control]), lm), model, [[5, 9, 20, 7, 33]])
        state = found.apply(base.states([5, 9, 20, 7, 33])[-1:])[0]
    assert torch.allclose(torch.log_softmax(e @ state, -1), run.laws[0, 0].double(), atol=1e-4)


class TestProbe:
    def test_a_network_finds_what_no_line_does(self):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(1200, 4, generator=g, dtype=torch.float64)
        y = (x[:, 0] * x[:, 1] > 0).long()
        result = probe(x, y, lambda s: s, mlp=True)
        assert result.before < 0.6
        assert result.mlp_before > 0.85
        assert result.mlp_after == result.mlp_before

    def test_held_rows_are_never_fitted(self):
        """Labels that only the held rows' states tell: a probe that saw them would be right."""
        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(400, 30, generator=g), torch.arange(400) % 2
        held = torch.arange(400) >= 300
        x[held, 0] = 50.0 * (2 * y[held] - 1)
        x[~held, 0] = 0
        assert probe(x, y, held=held).before < 0.7

    def test_errors(self):
        x, y = rows(2)
        with pytest.raises(DataError, match="held back"):
            probe(x, y, held=torch.ones(len(y), dtype=torch.bool))
        with pytest.raises(DataError, match="held back"):
            probe(x, y, held=torch.zeros(len(y), dtype=torch.bool))


class TestFitSubspace:
    """From texts to a subspace, on a tiny model whose tokenizer knows words by their first letters' codes."""

    @pytest.fixture
    def lm(self):
        return LanguageModel(tiny_models.llama(0), WordTokenizer(), "tiny")

    @pytest.fixture
    def texts(self):
        found = []
        for i in range(60):
            for label, word in enumerate(("cat", "dog", "eel")):
                found.append((f"{i % 6} {i // 6} a {word}", label, "test" if i % 5 == 0 else "train"))
        return checked(found, ["cat", "dog", "eel"])

    def test_leace(self, lm, texts):
        found = subspace_fit.fit_subspace(lm, texts, "leace")
        result = found.metrics["probe"]
        assert found.subspace.rank == 2
        assert result["before"] > 0.9
        assert result["after"] < 0.55
        assert found.metrics["held_back_rows"] == 36

    def test_inlp_and_class_means(self, lm, texts):
        inlp = subspace_fit.fit_subspace(lm, texts, "inlp", rounds=3)
        assert len(inlp.metrics["accuracies"]) == 3
        assert inlp.subspace.is_orthogonal
        assert subspace_fit.fit_subspace(lm, texts, "directions").subspace.rank == 2

    def test_word_odds(self, lm, texts):
        found = subspace_fit.fit_subspace(lm, texts, "directions", counterparts=[(10, 11, 12), (20, 21, 22)], rank=2)
        odds = found.metrics["mean_log_odds"]
        assert odds["before"] > 0.1 > 1e-4 > odds["after"]
        assert len(found.settings["words"]) == 2

    def test_the_mean_over_a_text_has_what_its_last_word_does_not_tell(self, lm, texts):
        told_first = [
            (f"{row.text.split()[-1]} {row.text.split()[-1]} {i} the same", row.label, row.split) for i, row in enumerate(texts.rows)
        ]
        rows = checked(told_first, texts.classes)
        found = subspace_fit.fit_subspace(lm, rows, "leace", layer=1, pooling="mean")
        assert found.settings["pooling"] == "mean"
        assert found.metrics["probe"]["before"] > 0.9 > 0.55 > found.metrics["probe"]["after"]
        states = pooled_states(lm, encode_texts(lm, [row.text for row in rows.rows], 64), layers=(1,), poolings=("rest",))[1, "rest"]
        y = torch.tensor([row.label for row in rows.rows])
        train = torch.tensor([row.split == "train" for row in rows.rows])
        expected = fit_leace(states[train], y[train], shrinkage=subspace_fit.SHRINKAGE)
        assert torch.equal(found.subspace.u_in, expected.u_in)

    def test_saves_what_the_control_reads(self, lm, texts, tmp_path):
        found = subspace_fit.fit_subspace(lm, texts, "leace")
        found.save(tmp_path / "new")
        control = NullspaceProjection(basis=str(tmp_path / "new" / "basis.safetensors"))
        u_in, u_out = found.subspace.u_in, found.subspace.u_out
        expected = torch.eye(tiny_models.HIDDEN, dtype=torch.float64) - u_out @ u_in.T
        assert torch.allclose(control.projection().double(), expected, atol=1e-4)

    def test_errors(self, lm, texts):
        with pytest.raises(DataError, match="no rank"):
            subspace_fit.fit_subspace(lm, texts, "inlp", rank=2)
        with pytest.raises(DataError, match="no rounds"):
            subspace_fit.fit_subspace(lm, texts, "leace", rounds=2)
        with pytest.raises(DataError, match="no method 'lace'"):
            subspace_fit.fit_subspace(lm, texts, "lace")
        with pytest.raises(DataError, match="pooling is 'max'"):
            subspace_fit.fit_subspace(lm, texts, "leace", pooling="max")
        train = checked([(row.text, row.label, "train") for row in texts.rows], texts.classes)
        with pytest.raises(DataError, match="probed"):
            subspace_fit.fit_subspace(lm, train, "leace")


class WordTokenizer:
    """A token a word, its id a checksum of the letters; enough for fitting, which only encodes."""

    def __call__(self, text, **_):
        return {"input_ids": [sum(map(ord, word)) % tiny_models.VOCAB for word in text.split()]}

    def decode(self, ids):
        return f"<{ids[0]}>"

    def get_vocab(self):
        return {f"<{i}>": i for i in range(tiny_models.VOCAB)}


class TestCommand:
    """``moralguard fit subspace`` on a tiny model, without the network."""

    @pytest.fixture
    def run(self, monkeypatch):
        lm = LanguageModel(tiny_models.llama(0), WordTokenizer(), "tiny")
        monkeypatch.setattr("moralguard.models.load_model", lambda *_, **__: lm)
        app = typer.Typer(pretty_exceptions_enable=False)
        app.command()(fit_subspace.subspace)

        def run(*arguments):
            return lm, CliRunner().invoke(app, [str(a) for a in arguments])

        return run

    @pytest.fixture
    def rows_file(self, tmp_path):
        file = tmp_path / "animals.jsonl"
        found = [
            {"text": f"{i % 6} {i // 6} a {w}", "label": w, "split": "test" if i % 5 == 0 else "train"}
            for i in range(30)
            for w in ("cat", "dog")
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in found))
        return file

    @pytest.mark.parametrize("method", ["leace", "inlp", "directions"])
    def test_writes_a_pack_that_guards(self, run, rows_file, tmp_path, method):
        lm, result = run("--rows", rows_file, "--method", method, "--out", tmp_path / "pack", "--licence", "CC0-1.0", "--value", "Fair.")
        assert result.exit_code == 0, result.output
        assert "a linear probe is right in" in result.output
        pack = read_pack(tmp_path / "pack", "subspace")
        pack.check(lm)
        assert pack.card.data[0].licence == "CC0-1.0"
        assert pack.card.data[0].rows == 60
        assert pack.card.values == ("Fair.",)
        assert pack.card.metrics["probe"]["before"] > 0.9
        if method == "leace":
            assert pack.card.metrics["probe"]["after"] < 0.7
        guard = Guard(Policy(controls=[NullspaceProjection(basis=str(tmp_path / "pack"))]), lm)
        base = Guard(Policy(controls=[]), lm)
        with oracles.one_thread():
            guarded, plain = (oracles.run_attached(g, lm.model, [[5, 9, 20]], 3) for g in (guard, base))
        assert oracles.gap(guarded.laws[:, 0], plain.laws[:, 0]) > 1e-3

    def test_a_concept(self, run, tmp_path):
        _, result = run("--concept", "race", "--out", tmp_path / "race", "--rank", 2)
        assert result.exit_code == 0, result.output
        card = read_pack(tmp_path / "race", "subspace").card
        assert card.settings["rank"] == 2
        assert card.settings["classes"] == ["white", "black", "asian", "hispanic", "native"]

    def test_errors(self, run, rows_file, tmp_path):
        for arguments, message in (
            ([], "--concept"),
            (["--concept", "gender", "--rows", rows_file], "one of them"),
            (["--concept", "gendre"], "did you mean 'gender'"),
            (["--rows", rows_file, "--method", "inlp", "--rank", 3], "no rank"),
            (["--rows", tmp_path / "none.jsonl"], "none.jsonl"),
        ):
            _, result = run("--out", tmp_path / "new", *arguments)
            assert isinstance(result.exception, DataError)
            assert message in str(result.exception)
            assert not (tmp_path / "new").exists()
        _, result = run("--out", tmp_path, "--concept", "race")
        assert "not an empty folder" in str(result.exception)
