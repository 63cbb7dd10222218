"""A concept taken out of a text encoder's features: an image generator's encoder in small, random and never trained."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from moralguard.backends.edit_rules import Filter, Projection
from moralguard.backends.edits import edited
from moralguard.controls import LayerProjection
from moralguard.fitting.leace import fit_leace
from moralguard.fitting.probe import probe
from moralguard.testing import _snapshot

WIDTH, WORDS, START, END = 32, 60, 0, 59
HE, SHE = 5, 6
SPLITS = torch.arange(360) % 4 == 0  # held back


@pytest.fixture(scope="module")
def encoder():
    config = CLIPTextConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=48,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
        initializer_factor=2.0,  # with the usual 1 a random encoder's features hardly tell words apart
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPTextModel(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def texts():
    """Token ids i64[n, 6] of "START word PRONOUN word word END", the pronoun's label and the label of the word that follows it."""
    g = torch.Generator().manual_seed(1)
    count = len(SPLITS)
    pronoun, other = torch.randint(0, 2, (count,), generator=g), torch.randint(0, 2, (count,), generator=g)
    words = torch.randint(10, 40, (count, 2), generator=g)
    topic = torch.tensor([50, 51])[other]
    ids = torch.stack(
        [torch.full((count,), START), words[:, 0], torch.tensor([HE, SHE])[pronoun], topic, words[:, 1], torch.full((count,), END)], 1
    )
    return ids, pronoun, other


def features(encoder, ids):
    return encoder(input_ids=ids).pooler_output.double()


def accuracy(states, labels):
    return probe(states, labels, held=SPLITS).before


NORM = "final_layer_norm"


@pytest.fixture(scope="module")
def eraser(encoder, texts):
    ids, pronoun, _ = texts
    return fit_leace(features(encoder, ids)[~SPLITS], pronoun[~SPLITS], shrinkage=0.05)


def test_a_probe_learns_the_concept_before_and_not_after(encoder, texts, eraser):
    ids, pronoun, other = texts
    before = _snapshot(encoder)
    plain = features(encoder, ids)
    with edited(encoder, {NORM: Projection(eraser.u_in, eraser.u_out, eraser.mu)}):
        edited_features = features(encoder, ids)
    assert accuracy(plain, pronoun) > 0.9
    assert accuracy(edited_features, pronoun) < 0.62
    assert torch.allclose(edited_features, eraser.apply(plain), atol=1e-5)  # the features behind the norm, and no others, were edited
    # another concept is read as well as before
    assert accuracy(plain, other) > 0.9
    assert accuracy(edited_features, other) > 0.9
    assert _snapshot(encoder) == before
    assert torch.equal(features(encoder, ids), plain)


def test_what_is_orthogonal_to_the_concept_stays(encoder, texts):
    ids, pronoun, _ = texts
    plain = features(encoder, ids)
    direction = plain[~SPLITS & (pronoun == 1)].mean(0) - plain[~SPLITS & (pronoun == 0)].mean(0)
    u = (direction / direction.norm())[:, None]
    others = torch.linalg.qr(torch.cat([u, torch.randn(WIDTH, WIDTH - 1, generator=torch.Generator().manual_seed(2)).double()], 1)).Q[:, 1:]
    control = LayerProjection(modules=(NORM,), basis=u)
    with edited(encoder, {NORM: control.edit()}):
        changed = features(encoder, ids)
    assert torch.allclose(changed @ others, plain @ others, atol=1e-5)
    assert float((changed @ u).abs().max()) < 1e-5 < float((plain @ u).abs().max())


def test_strength_a_prompt(encoder, texts, eraser):
    """One batch: the first prompts as they are, the others without the concept."""
    ids, plain = texts[0][:4], features(encoder, texts[0][:4])
    strengths = torch.tensor([0.0, 0.0, 1.0, 0.5])
    with edited(encoder, {NORM: Projection(eraser.u_in, eraser.u_out, eraser.mu, strength=strengths)}):
        changed = features(encoder, ids)
    assert torch.equal(changed[:2], plain[:2])
    assert torch.allclose(changed[2], eraser.apply(plain)[2], atol=1e-5)
    assert torch.allclose(changed[3], (plain[3] + eraser.apply(plain)[3]) / 2, atol=1e-5)


def test_inside_the_encoder_too(encoder, texts):
    """Erased at a block's output, all positions; what the blocks behind it make of the rest is theirs."""
    ids, pronoun, _ = texts
    block = "encoder.layers.0"
    caught = []
    hook = encoder.get_submodule(block).register_forward_hook(lambda _m, _a, out: caught.append(out))
    encoder(input_ids=ids)
    hook.remove()
    states = caught[0].flatten(0, 1).double()
    labels = pronoun.repeat_interleave(ids.shape[1])
    held = SPLITS.repeat_interleave(ids.shape[1])
    inner = fit_leace(states[~held], labels[~held], shrinkage=0.05)
    with edited(encoder, {block: Projection(inner.u_in, inner.u_out, inner.mu)}):
        hook = encoder.get_submodule(block).register_forward_hook(lambda _m, _a, out: caught.append(out))
        encoder(input_ids=ids)
        hook.remove()
    assert torch.allclose(caught[1].flatten(0, 1).double(), inner.apply(states), atol=1e-4)


def test_a_filter(encoder, texts):
    """A FairFil-type network that was fitted by least squares to keep all but the concept."""
    ids, pronoun, _ = texts
    plain = features(encoder, ids)
    erased = fit_leace(plain[~SPLITS], pronoun[~SPLITS], shrinkage=0.05)
    linear = torch.eye(WIDTH).double() - erased.u_out @ erased.u_in.T
    shift = erased.u_out @ (erased.u_in.T @ erased.mu)
    # relu(x) - relu(-x) = x: the two halves of a hidden layer carry any linear map through the network
    layers = (
        (torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)]).double(), torch.zeros(2 * WIDTH).double()),
        (torch.cat([linear, -linear], 1), shift),
    )
    with edited(encoder, {NORM: Filter(layers)}):
        changed = features(encoder, ids)
    assert torch.allclose(changed, erased.apply(plain), atol=1e-4)
    assert accuracy(changed, pronoun) < 0.62
