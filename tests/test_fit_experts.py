"""Fitting experts: an adapter learns its texts, resumes to the same bits, leaves the model alone, and steers as a pack."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner
from word_model import rows, texts, word_model

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.backends.likelihood import negative_log_likelihoods
from moralguard.cli import app
from moralguard.controls import DExperts
from moralguard.errors import DataError, ModelError
from moralguard.fitting.expert_packs import fit_expert_packs
from moralguard.fitting.experts import ExpertSettings, fit_expert
from moralguard.packs import PackData, read_pack

SETTINGS = ExpertSettings(rank=4, alpha=8, steps=40, batch_size=8, learning_rate=2e-2, bfloat16=False, checkpoint_every=15)


@pytest.fixture
def lm() -> LanguageModel:
    return word_model()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_an_adapter_learns_its_texts_and_the_model_stays_as_it_was(lm: LanguageModel, tmp_path: Path) -> None:
    before = copy.deepcopy(lm.model.state_dict())
    names = [name for name, _ in lm.model.named_modules()]
    trainable = [p.requires_grad for p in lm.model.parameters()]
    losses: list[float] = []
    fit_expert(lm, texts(1, 60), tmp_path / "expert", SETTINGS, report=lambda step, steps, loss: losses.append(loss))
    assert losses[-1] < losses[0] - 0.2
    assert [name for name, _ in lm.model.named_modules()] == names
    assert [p.requires_grad for p in lm.model.parameters()] == trainable
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "expert").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_interrupted_run_ends_where_an_unbroken_one_does(lm: LanguageModel, tmp_path: Path) -> None:
    whole = fit_expert(lm, texts(1, 60), tmp_path / "whole", SETTINGS)

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_expert(lm, texts(1, 60), tmp_path / "broken", SETTINGS, report=stop)
    assert (tmp_path / "broken" / "checkpoint.safetensors").is_file()
    steps: list[int] = []
    resumed = fit_expert(lm, texts(1, 60), tmp_path / "broken", SETTINGS, report=lambda step, total, loss: steps.append(step))
    assert steps[0] == 16
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())
    with pytest.raises(KeyboardInterrupt):
        fit_expert(lm, texts(1, 60), tmp_path / "other", SETTINGS, report=stop)
    with pytest.raises(DataError, match="other settings"):
        fit_expert(lm, texts(0, 60), tmp_path / "other", SETTINGS)


def test_a_seed_decides_the_adapter(lm: LanguageModel, tmp_path: Path) -> None:
    one, same = (fit_expert(lm, texts(1, 40), tmp_path / name, SETTINGS.replaced(steps=5)) for name in ("a", "b"))
    other = fit_expert(lm, texts(1, 40), tmp_path / "c", SETTINGS.replaced(steps=5, seed=1))
    assert all(torch.equal(tensor, weights(same)[name]) for name, tensor in weights(one).items())
    assert any(not torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


def test_the_packs_steer_towards_their_class(lm: LanguageModel, tmp_path: Path) -> None:
    source = PackData(name="words", licence="CC0-1.0", rows=1000)
    expert, anti = fit_expert_packs(
        lm, rows(), tmp_path, SETTINGS.replaced(steps=120), value="The text uses early words.", sources=(source,)
    )
    card = read_pack(expert, "lora-expert").card
    metrics = card.metrics
    assert metrics["perplexity of kept texts under the adapter"] < 0.7 * metrics["perplexity of kept texts under the base"]
    assert metrics["perplexity of broken texts under the adapter"] > metrics["perplexity of kept texts under the adapter"]
    assert card.values == ("The text uses early words.",)
    assert card.data == (source,)

    def early(control: DExperts | None) -> float:
        policy = mg.Policy(controls=() if control is None else (control,))
        result = mg.Guard(policy, lm).generate([[1, 2], [1, 70]], max_new_tokens=12, do_sample=True, seed=3, num_return_sequences=6)
        ids = [i for tokens in result.token_ids for i in tokens if 2 <= i < 122]
        return float(np.mean([i < 62 for i in ids]))

    towards = early(DExperts(expert=str(expert), anti_expert=str(anti), alpha=2.0, filter_p=1.0))
    away = early(DExperts(expert=str(anti), anti_expert=str(expert), alpha=2.0, filter_p=1.0))
    assert away + 0.3 < towards
    assert away < early(None) < towards


def test_likelihoods_do_not_depend_on_the_batch(lm: LanguageModel) -> None:
    prompts, continuations = [[1], [1, 5, 9], [3]], [[4, 4], [7], [2, 8, 9, 11]]
    together = negative_log_likelihoods(lm, prompts, continuations)
    alone = np.concatenate([negative_log_likelihoods(lm, [p], [c]) for p, c in zip(prompts, continuations, strict=True)])
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    assert together[:, 1].tolist() == [2, 1, 4]
    law = torch.log_softmax(lm.model(input_ids=torch.tensor([[1, 4, 4]])).logits[0].double(), -1)
    assert alone[0, 0] == pytest.approx(-float((law[0, 4] + law[1, 4]).detach()), rel=1e-5)


def test_bad_input(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two tokens"):
        fit_expert(lm, ["w1", "w2"], tmp_path / "short", SETTINGS)
    with pytest.raises((ModelError, ValueError), match="nothing_proj"):
        fit_expert(lm, texts(1, 9), tmp_path / "modules", SETTINGS.replaced(modules=("nothing_proj",)))


def test_the_command_names_what_is_wrong_with_its_pairs(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 1}\n')
    arguments = ["fit", "experts", "--rows", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out"), "--licence", "MIT"]
    result = CliRunner().invoke(app, [*arguments, "--pairs", "neutral"])
    assert isinstance(result.exception, DataError)
    assert "KEPT,BROKEN" in str(result.exception)
