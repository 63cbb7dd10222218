"""What a trace reads off the laws: log-odds, KL, and the share of every control."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moralguard_kernels as ops
from moralguard.decoding.outcome import Outcome
from moralguard.decoding.rectification import Rectified, rectify
from moralguard.decoding.terms import Attenuation, Keep, LowRank, Mix, Sparse, Terms
from moralguard.trace.attribution import score, trace_step

ROWS, VOCABULARY = 4, 300


def base_and_terms() -> tuple[torch.Tensor, tuple[Terms, ...]]:
    """Four controls; the second acts on every other row, the last leaves a row a single token."""
    g = torch.Generator().manual_seed(0)

    def source() -> torch.Tensor:
        return torch.randn(ROWS, VOCABULARY, generator=g) * 3

    each = torch.full((ROWS,), 2.0)
    some = torch.tensor([True, False, True, False])
    return source(), (
        Terms((Mix((source(), source()), (each, -each)), Keep(top_p=0.95))),
        Terms((Attenuation((source(),), each * 20, each / 200),), some),
        Terms((LowRank(torch.randn(VOCABULARY, 3, generator=g), torch.randn(ROWS, 3, generator=g)),)),
        Terms((Sparse(torch.tensor([[7]] * ROWS), torch.zeros(ROWS, 1), keep_rest=False),), torch.tensor([False, False, False, True])),
    )


def naive_log_odds(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    z = logits.double()
    others = z.scatter(-1, tokens[:, None], float("-inf"))
    return z.gather(-1, tokens[:, None])[:, 0] - torch.logsumexp(others, -1)


def test_shares_are_the_change_in_log_odds_without_the_control() -> None:
    base, terms = base_and_terms()
    law = rectify(base, terms)
    tokens = law.logits.argmax(-1)
    records = trace_step(Outcome(base, law, terms), tokens, tokens, torch.arange(ROWS), "abcd", {}, str)
    guarded = naive_log_odds(law.logits, tokens)
    for index, name in enumerate("abcd"):
        without = naive_log_odds(rectify(base, terms[:index] + terms[index + 1 :]).logits, tokens)
        for row, record in enumerate(records):
            wanted = float(guarded[row] - without[row])
            found = record.contributions[name]
            # where a single token is left, its odds are infinite, and no share can be told
            assert found is None if not abs(wanted) < float("inf") else found == pytest.approx(wanted, abs=1e-9)
    assert records[1].contributions["b"] == 0, "it doesn't act there"
    assert records[2].contributions["b"] != 0
    assert all(share is None for share in records[3].contributions.values())
    assert [record.kl for record in records] == pytest.approx(ops.kl_divergence(law.logits, base).tolist(), abs=1e-6)


def test_the_op_on_the_terms_says_what_the_rectified_logits_say() -> None:
    """On a GPU a trace asks the op, elsewhere it reads the rectified logits."""
    base, terms = base_and_terms()
    for used in (terms, terms[1:], terms[:1], ()):
        law = rectify(base, used)
        tokens = law.logits.argmax(-1)
        odds, kl = score(law, tokens)
        assert odds.dtype == torch.float64
        _, found_odds, found_kl = ops.score_tokens(base, tokens, **law.arguments)
        assert torch.allclose(found_odds.double(), odds, atol=1e-5)
        assert torch.allclose(found_kl, kl, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_a_model_without_torch_gets_the_same_records() -> None:
    base, terms = base_and_terms()
    in_numpy = tuple(
        Terms(
            tuple(type(term)(**{name: as_arrays(value) for name, value in vars(term).items()}) for term in item.terms), as_arrays(item.rows)
        )
        for item in terms
    )
    law, numpy_law = rectify(base, terms), rectify(base.numpy(), in_numpy)
    tokens = law.logits.argmax(-1)
    wanted = trace_step(Outcome(base, law, terms), tokens, tokens, torch.arange(ROWS), "abcd", {}, str)
    drawn, positions = tokens.numpy(), np.arange(ROWS)
    found = trace_step(Outcome(base.numpy(), numpy_law, in_numpy), drawn, drawn, positions, "abcd", {}, str)
    for one, other in zip(found, wanted, strict=True):
        assert one.kl == pytest.approx(other.kl, abs=1e-5)
        for name, share in one.contributions.items():
            assert share == (None if other.contributions[name] is None else pytest.approx(other.contributions[name], abs=1e-4))


def as_arrays(value: object) -> object:
    if isinstance(value, tuple):
        return tuple(as_arrays(item) for item in value)
    return value.numpy() if isinstance(value, torch.Tensor) else value


def test_rows_rectified_one_by_one_are_read_from_their_logits() -> None:
    base, terms = base_and_terms()
    law = rectify(base, terms)
    tokens = law.logits.argmax(-1)
    computed = Rectified(base, law.touched, computed=law.logits)
    assert all(torch.equal(a, b) for a, b in zip(score(computed, tokens), score(law, tokens), strict=True))
    records = trace_step(Outcome(base, computed, None), tokens, tokens, torch.arange(ROWS), ["a"], {}, str)
    assert all(record.contributions["a"] is None for record in records)
