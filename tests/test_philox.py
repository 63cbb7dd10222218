"""The noise: published known answers, Triton's own generator, and laws of the draws by chi-squared."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import moralguard_kernels as ops

ALL = 0xFFFFFFFF
# Random123's kat_vectors, philox4x32-10: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL,) * 4, (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def chi_squared(counts: np.ndarray, expected: np.ndarray) -> float:
    """p-value of counts against expected counts of the same sum."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    halves = torch.tensor([(len(counts) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(halves[0], halves[1]))


def test_chi_squared_gives_tabled_values() -> None:
    """The .05 critical values of 1 and 10 degrees of freedom, 3.841 and 18.307."""
    assert chi_squared(np.array([10 + 4.3818, 10 - 4.3818]), np.array([10.0, 10.0])) == pytest.approx(0.05, abs=1e-4)
    assert chi_squared(np.array([100 + 1830.7**0.5] + [100.0] * 10), np.full(11, 100.0)) == pytest.approx(0.05, abs=1e-4)
    assert chi_squared(np.full(5, 3.0), np.full(5, 3.0)) == 1.0


def signed(key: tuple[int, int]) -> int:
    """The 64-bit seed whose low and high words are the key."""
    seed = key[0] | key[1] << 32
    return seed - 2**64 if seed >= 2**63 else seed


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], wanted: tuple[int, ...]) -> None:
    words = ops.philox4x32(torch.tensor(signed(key)), tuple(torch.tensor(c) for c in counter))
    assert tuple(int(w) for w in words) == wanted


def test_counters_and_seeds_broadcast() -> None:
    seeds = torch.tensor([[signed(key)] for _, key, _ in KNOWN])
    counters = tuple(torch.tensor([[counter[i] for counter, _, _ in KNOWN]]) for i in range(4))
    words = ops.philox4x32(seeds, counters)
    for n, (_, _, wanted) in enumerate(KNOWN):
        assert tuple(int(w[n, n]) for w in words) == wanted
    assert all(w.shape == (3, 3) for w in words)


def test_fewer_rounds_give_other_words() -> None:
    zero = (torch.tensor(0),) * 4
    assert [int(w) for w in ops.philox4x32(torch.tensor(0), zero, rounds=9)] != list(KNOWN[0][2])


TRITON_SCRIPT = """
import json, sys
import torch, triton
import triton.language as tl

@triton.jit
def words(seeds, c0, c1, out, n: tl.constexpr):
    i = tl.arange(0, n)
    zero = tl.zeros([n], dtype=tl.int32)
    a, b, c, d = tl.philox(tl.load(seeds + i), tl.load(c0 + i), tl.load(c1 + i), zero, zero)
    tl.store(out + i, a)
    tl.store(out + n + i, b)
    tl.store(out + 2 * n + i, c)
    tl.store(out + 3 * n + i, d)

@triton.jit
def randint(seed, offsets, out, n: tl.constexpr):
    i = tl.arange(0, n)
    a, b, c, d = tl.randint4x(seed, tl.load(offsets + i))
    tl.store(out + i, a)
    tl.store(out + n + i, b)
    tl.store(out + 2 * n + i, c)
    tl.store(out + 3 * n + i, d)

given = json.loads(sys.stdin.read())
seeds, c0, c1 = (torch.tensor(given[k], dtype=t) for k, t in (("seeds", torch.int64), ("c0", torch.int32), ("c1", torch.int32)))
n = len(seeds)
philox = torch.zeros(4, n, dtype=torch.int32)
words[(1,)](seeds, c0, c1, philox, n)
answers = []
for seed in given["seeds"]:
    out = torch.zeros(4, n, dtype=torch.int32)
    randint[(1,)](seed, c0, out, n)
    answers.append(out.tolist())
print(json.dumps({"philox": philox.tolist(), "randint4x": answers}))
"""


@pytest.fixture(scope="module")
def triton_words(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What triton's interpreter makes of some seeds and counters; in a process of its own, as the mode is fixed at import."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton isn't installed")
    import triton

    if triton.__version__.startswith("3.6.") and tuple(int(x) for x in np.__version__.split(".")[:2]) >= (2, 4):
        pytest.skip("triton 3.6's interpreter needs numpy < 2.4")
    given = {
        "seeds": [0, 1, -1, 2**31, 2**32 + 5, -(2**63), 2**63 - 1, 123456789012345],
        "c0": [0, 1, 2, 3, 12288, 2**31 - 1, -1, 77],
        "c1": [0, 0, 9, 1, 2**20, 5, -1, 1000],
    }
    script: Path = tmp_path_factory.mktemp("triton") / "words.py"  # triton reads a kernel's source from its file
    script.write_text(TRITON_SCRIPT)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(given), env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return given | json.loads(done.stdout)


def unsigned(words: list) -> torch.Tensor:
    return torch.tensor(words) & ALL


def test_triton_philox_gives_the_same_words(triton_words: dict) -> None:
    zero = torch.tensor(0)
    seeds, c0, c1 = (torch.tensor(triton_words[name]) for name in ("seeds", "c0", "c1"))
    ours = torch.stack(ops.philox4x32(seeds, (c0, c1, zero, zero)))
    assert torch.equal(ours, unsigned(triton_words["philox"]))


def test_triton_randint4x_gives_the_same_words(triton_words: dict) -> None:
    zero, c0 = torch.tensor(0), torch.tensor(triton_words["c0"])
    for seed, words in zip(triton_words["seeds"], triton_words["randint4x"], strict=True):
        assert torch.equal(torch.stack(ops.philox4x32(torch.tensor(seed), (c0, zero, zero, zero))), unsigned(words))


# --- Gumbel noise -------------------------------------------------------------------------------------------------------------


def test_noise_follows_the_documented_layout() -> None:
    """Counter (token // 4, position, 0, 0), word token % 4, G = -log(-log(1 - u)) with u = (word + 1/2) / 2**32."""
    seed, position, tokens = 987654321987, 42, [0, 1, 2, 3, 4, 49151]
    found = ops.gumbel_noise(torch.tensor([seed]), torch.tensor([position]), torch.tensor([tokens]))
    zero = torch.tensor(0)
    for token, noise in zip(tokens, found[0].tolist(), strict=True):
        words = ops.philox4x32(torch.tensor(seed), (torch.tensor(token // 4), torch.tensor(position), zero, zero))
        u = (int(words[token % 4]) + 0.5) / 2**32
        assert noise == pytest.approx(-np.log(-np.log1p(-u)), rel=1e-6)


def test_noise_is_finite_at_the_ends_of_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from moralguard_kernels import noise, philox

    ends = [np.array([[end, end]], dtype=np.uint32) for end in (0, ALL, 0, ALL)]
    monkeypatch.setattr(noise, "philox_words", lambda *_: ends)
    low, high = philox.gumbel_noise(torch.tensor([0]), torch.tensor([0]), torch.tensor([[0, 1]]))[0].tolist()
    assert low == pytest.approx(np.log(2.0**33), rel=1e-6)  # the winning tail: u near 0
    assert high == pytest.approx(-np.log(np.log(2.0**33)), rel=1e-6)


def test_noise_of_a_token_depends_on_nothing_else() -> None:
    seeds, positions = torch.tensor([5, -5]), torch.tensor([0, 9])
    whole = ops.gumbel_noise(seeds, positions, torch.arange(300).expand(2, 300))
    some = torch.tensor([[299, 3, 0], [17, 18, 2]])
    assert torch.equal(ops.gumbel_noise(seeds, positions, some), whole.gather(1, some))
    assert torch.equal(ops.gumbel_noise(seeds[1:], positions[1:], some[1:]), whole.gather(1, some)[1:])


def test_noise_changes_with_seed_position_and_token() -> None:
    ids = torch.arange(8)[None]
    base = ops.gumbel_noise(torch.tensor([1]), torch.tensor([1]), ids)
    assert not torch.isclose(base, ops.gumbel_noise(torch.tensor([2]), torch.tensor([1]), ids)).any()
    assert not torch.isclose(base, ops.gumbel_noise(torch.tensor([1 + 2**32]), torch.tensor([1]), ids)).any(), "the high word counts"
    assert not torch.isclose(base, ops.gumbel_noise(torch.tensor([1]), torch.tensor([2]), ids)).any()
    assert base.unique().numel() == 8


def uniformity(probabilities: np.ndarray) -> float:
    """p-value that numbers in [0, 1] are uniform, by 100 bins."""
    counts = np.histogram(probabilities, bins=100, range=(0, 1))[0].astype(float)
    return chi_squared(counts, np.full(100, probabilities.size / 100))


def test_noise_is_gumbel_distributed() -> None:
    noise = ops.gumbel_noise(torch.arange(1000), torch.full((1000,), 3), torch.arange(40).expand(1000, 40)).double().numpy()
    assert uniformity(np.exp(-np.exp(-noise))) > 1e-4
    assert uniformity(np.exp(-np.exp(noise))) < 1e-12  # the mirrored law is told apart
    # lanes of one Philox call and neighbouring positions are as good as independent
    assert np.abs(np.corrcoef(noise.T) - np.eye(40)).max() < 0.2
    later = ops.gumbel_noise(torch.arange(1000), torch.full((1000,), 4), torch.arange(40).expand(1000, 40)).double().numpy()
    assert abs(np.corrcoef(noise.ravel(), later.ravel())[0, 1]) < 0.03


# --- draws --------------------------------------------------------------------------------------------------------------------

VOCABULARY = 50
DRAWS = 40_000


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    """f32[V], far from uniform, every token expected often enough for chi-squared."""
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)


def draw(logits: torch.Tensor, first_seed: int = 0, position: int = 7) -> torch.Tensor:
    """DRAWS tokens, one for each seed, in one call."""
    seeds = torch.arange(first_seed, first_seed + DRAWS)
    return ops.gumbel_argmax(logits.expand(DRAWS, -1), seeds, torch.full((DRAWS,), position))


def p_value(tokens: torch.Tensor, law: torch.Tensor) -> float:
    """Of the chi-squared test of drawn tokens against a law; tokens of probability 0 must not occur."""
    counts = torch.bincount(tokens, minlength=len(law)).double().numpy()
    expected = law.double().numpy() * counts.sum()
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    assert expected[possible].min() > 5
    expected = expected[possible] * counts.sum() / expected[possible].sum()
    return chi_squared(counts[possible], expected)


def removed_but(logits: torch.Tensor, survivors: list[int]) -> torch.Tensor:
    out = torch.full_like(logits, float("-inf"))
    out[survivors] = logits[survivors]
    return out


@pytest.mark.parametrize("first_seed", [0, -(2**62), 2**33])
def test_draws_follow_the_softmax(logits: torch.Tensor, first_seed: int) -> None:
    assert p_value(draw(logits, first_seed), torch.softmax(logits, -1)) > 1e-4


@pytest.mark.parametrize("count", [2, 10, 30])
def test_draws_among_survivors_follow_the_renormalised_law(logits: torch.Tensor, count: int) -> None:
    """Up to half of the vocabulary the survivors are gathered first; both ways are exact."""
    survivors = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(count))[:count].tolist()
    left = removed_but(logits, survivors)
    assert p_value(draw(left), torch.softmax(left, -1)) > 1e-4


def test_draws_over_positions_follow_the_softmax(logits: torch.Tensor) -> None:
    tokens = ops.gumbel_argmax(logits.expand(DRAWS, -1), torch.full((DRAWS,), 11), torch.arange(DRAWS))
    assert p_value(tokens, torch.softmax(logits, -1)) > 1e-4


def test_a_wrong_law_is_rejected(logits: torch.Tensor) -> None:
    tokens = draw(logits)
    law = torch.softmax(logits, -1)
    assert p_value(tokens, torch.softmax(logits / 1.1, -1)) < 1e-6
    swapped = law.clone()
    high, low = int(law.argmax()), int(law.argsort()[VOCABULARY // 2])
    swapped[high], swapped[low] = law[low], law[high]
    assert p_value(tokens, swapped) < 1e-6


def test_wrong_noise_is_rejected(logits: torch.Tensor) -> None:
    """The harness tells Gumbel noise from normal noise of the same variance."""
    noise = torch.randn(DRAWS, VOCABULARY, generator=torch.Generator().manual_seed(1)) * (np.pi / 6**0.5)
    assert p_value((logits + noise).argmax(-1), torch.softmax(logits, -1)) < 1e-6


def test_a_draw_does_not_depend_on_which_others_survive(logits: torch.Tensor) -> None:
    """Same noise: where the token drawn from all is among the survivors, it is drawn from them too."""
    of_all = draw(logits)
    for survivors in (list(range(0, VOCABULARY, 3)), list(range(40)), [1, 2]):
        of_some = draw(removed_but(logits, survivors))
        among = torch.isin(of_all, torch.tensor(survivors))
        assert 0 < int(among.sum()) < DRAWS
        assert torch.equal(of_some[among], of_all[among])
        assert torch.isin(of_some, torch.tensor(survivors)).all()


def test_a_draw_does_not_depend_on_the_batch(logits: torch.Tensor) -> None:
    """A row with few survivors beside one with all: alone it takes another way to the same token."""
    few = removed_but(logits, [3, 8, 20, 41])
    rows = torch.stack([few, logits] * 100)
    seeds, positions = torch.arange(200), torch.arange(200) % 7
    batch = ops.gumbel_argmax(rows, seeds, positions)
    alone = torch.cat([ops.gumbel_argmax(rows[i : i + 1], seeds[i : i + 1], positions[i : i + 1]) for i in range(200)])
    assert torch.equal(batch, alone)
    assert batch[::2].unique().numel() > 1
