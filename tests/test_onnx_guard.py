"""The guard on ONNX models against the guard on the PyTorch models of the same weights; and that torch stays out of it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphs
import pytest
import torch
from odd_models import BAG, PROMPTS, future
from tiny_models import HIDDEN, llama

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.backends.onnx.model import OnnxLanguageModel
from moralguard.controls import PPLM, Control, DExperts, FactoredHead, Fudge, NullspaceProjection, Prompt, SelfDebias
from moralguard.decoding.gate import Gate
from moralguard.errors import ModelError, PolicyError
from moralguard.packs import write_pack

pytest.importorskip("onnxruntime")

NEW = 10
GREEDY = {"do_sample": False, "max_new_tokens": NEW}
SAMPLING = {"do_sample": True, "temperature": 1.1, "top_p": 0.98, "max_new_tokens": NEW}
ROWS = [*(list(prompt) for prompt in PROMPTS), [8] * 11]
CLOSE = 5e-3  # where the two best candidates lie as close as this, rounding may take either
SEED = 7


def drawn(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def numpy_future(token_ids: np.ndarray, candidates: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
    found: np.ndarray = future(*(torch.from_numpy(part) for part in (token_ids, candidates, attention_mask))).numpy()
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model and an expert as ONNX, with what `moralguard export` writes beside them, and packs of the model."""
    root = tmp_path_factory.mktemp("onnx")
    before = os.environ.get("MORALGUARD_CACHE")
    os.environ["MORALGUARD_CACHE"] = str(root / "cache")
    found = {}
    for name, model in (("base", llama()), ("expert", llama(seed=21, layers=1))):
        found[name] = root / name
        onnx_graphs.plain(model, found[name])
        lm = LanguageModel(model, None)
        about = {"fingerprint": lm.fingerprint, "tokenizer_hash": lm.tokenizer_hash}
        (found[name] / "moralguard.json").write_text(json.dumps(about))
    onnx_graphs.word_tokenizer(found["base"], llama().config.vocab_size)
    lm = LanguageModel(llama(), None)
    for name, seed in (("head", 4), ("risk", 14)):
        found[name] = root / name
        parts = [drawn(3, HIDDEN, seed=seed), drawn(3, HIDDEN, seed=seed + 1), drawn(HIDDEN, seed=seed + 2)]
        FactoredHead(*parts, -0.5, drawn(HIDDEN, seed=seed + 3)).save(found[name])
        write_pack(found[name], kind="prefix-head", method="random", lm=lm, name=name, data=(), settings={}, metrics={})
    yield found
    if before is None:
        del os.environ["MORALGUARD_CACHE"]
    else:
        os.environ["MORALGUARD_CACHE"] = before


@pytest.fixture(scope="module")
def lm(folders: dict[str, Path]) -> OnnxLanguageModel:
    model = mg.load_model(str(folders["base"]))
    assert isinstance(model, OnnxLanguageModel)
    return model


U = np.linalg.qr(drawn(HIDDEN, 3, seed=5))[0]
LINEAR = (drawn(2, HIDDEN, seed=8), drawn(2, seed=9))


def controls(name: str, folders: dict[str, Path], onnx: bool) -> list[Control]:
    expert: Any = str(folders["expert"]) if onnx else (llama(seed=21, layers=1), None)
    named: dict[str, Control] = {
        "expert": DExperts(expert=expert, anti_expert=Prompt([9, 8, 7]), alpha=1.5, filter_p=0.95),
        "prompts": DExperts(expert=Prompt([4, 5]), anti_expert=Prompt([9, 8, 7]), alpha=2.0),
        "callable": Fudge(discriminator=numpy_future if onnx else future, strength=2.0, top_k=30),
        "head": Fudge(discriminator=str(folders["head"]), strength=2.0, top_k=40),
        "self-debias": SelfDebias(prefixes=[[11, 12, 13], [14]], decay_constant=300.0),
        "nullspace": NullspaceProjection(basis=U, keep=0.25),
        "a-inlp": NullspaceProjection(basis=U[:, :1], adaptive=True, direction=4 * U[:, 0]),
        "pplm": PPLM(bag_of_words=[BAG], head=LINEAR, stepsize=2.0, gamma=1.0, scope="hidden"),
    }
    return [named[part] for part in (("expert", "head", "self-debias", "nullspace", "pplm") if name == "many" else (name,))]


NAMES = ("expert", "prompts", "callable", "head", "self-debias", "nullspace", "a-inlp", "pplm", "many")


def guards(name: str, lm: OnnxLanguageModel, folders: dict[str, Path], **policy: Any) -> tuple[mg.Guard, mg.Guard]:
    """(on ONNX Runtime, on PyTorch)."""
    ours, theirs = (controls(name, folders, onnx) for onnx in (True, False))
    return mg.Guard(mg.Policy(controls=ours, **policy), lm), mg.Guard(mg.Policy(controls=theirs, **policy), (llama(), None))


def lead(guard: mg.Guard, ids: list[int]) -> float:
    """How far the best candidate of the guarded law is ahead of the second behind these tokens."""
    from moralguard.decoding.session import Session

    with torch.inference_mode():
        best = torch.topk(Session(guard.lm, guard.controls, [ids], own_base=True, gate=guard.gate).step().logits[0], 2).values
    return float(best[0] - best[1])


def compare(ours: mg.Guard, theirs: mg.Guard, **settings: Any) -> None:
    """Tokens and traces, up to a step at which two candidates are as good as tied (greedily; noise keeps draws apart)."""
    mine, wanted = (guard.generate(ROWS, seed=SEED, trace=True, **settings) for guard in (ours, theirs))
    for prompt, own, other in zip(ROWS, mine.traces, wanted.traces, strict=True):
        for place, (a, b) in enumerate(zip(own, other, strict=True)):
            if a.token_id != b.token_id:
                text = prompt + [record.token_id for record in own[:place]]
                assert not settings["do_sample"]
                assert lead(theirs, text) < CLOSE, f"step {place} of {prompt}"
                break
            assert abs(a.kl - b.kl) < 1e-2
            for control, share in a.contributions.items():
                expected = b.contributions[control]
                assert (share is None) == (expected is None)
                assert share is None or expected is None or abs(share - expected) < 2e-2 * (1 + abs(expected))


@pytest.mark.parametrize("settings", [GREEDY, SAMPLING], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_traces_are_those_of_pytorch(
    name: str, settings: dict[str, Any], lm: OnnxLanguageModel, folders: dict[str, Path]
) -> None:
    ours, theirs = guards(name, lm, folders)
    compare(ours, theirs, **settings)
    assert 0 < ours.counters.rows_touched <= ours.counters.rows_guarded == NEW * len(ROWS)


def test_a_gate_by_risk(lm: OnnxLanguageModel, folders: dict[str, Path]) -> None:
    gate = Gate(risk=str(folders["risk"]), min_risk=0.5, min_entropy=2.0)
    ours, theirs = guards("prompts", lm, folders, gate=gate)
    compare(ours, theirs, **GREEDY)
    assert 0 < ours.counters.rows_touched < ours.counters.rows_guarded


def test_every_way_of_generating_gives_one_text(lm: OnnxLanguageModel, folders: dict[str, Path]) -> None:
    guard, _ = guards("prompts", lm, folders)
    prompt = "w5 w27 w9"  # w1 is a special token, which would be cut out of w17
    result = guard.generate(prompt, seed=3, **SAMPLING)
    assert result.prompt_ids == [[5, 27, 9]]
    assert result.texts[0].split()[0] == f"w{result.token_ids[0][0]}"
    assert "".join(guard.stream(prompt, seed=3, **SAMPLING)) == result.texts[0]
    assert asyncio.run(guard.agenerate(prompt, seed=3, **SAMPLING)).texts == result.texts
    several = guard.generate([prompt, [7, 7]], seed=3, num_return_sequences=3, batch_size=4, **SAMPLING)
    assert several.token_ids[0] == result.token_ids[0]
    assert len({tuple(ids) for ids in several.token_ids}) == 6
    assert guard.generate(prompt, seed=4, **SAMPLING).texts != result.texts


def test_packs_of_another_model_and_dtypes_are_refused(lm: OnnxLanguageModel, folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="fingerprint"):
        mg.Guard(mg.Policy(controls=[Fudge(discriminator=str(folders["head"]))]), str(folders["expert"]))
    with pytest.raises(ModelError, match="is an ONNX model, whose numbers were chosen at its export"):
        mg.load_model(str(folders["base"]), dtype="bfloat16")
    with pytest.raises(PolicyError, match='scope="hidden" steers the last hidden state'):
        mg.Guard(mg.Policy(controls=[PPLM(bag_of_words=[BAG])]), lm)


SCRIPT = """
import json, sys, time
begin = time.perf_counter()
import moralguard as mg
from moralguard.controls import PPLM, DExperts, Fudge, Prompt, SelfDebias
from moralguard.decoding.gate import Gate
base, head, risk = sys.argv[1:]
controls = [DExperts(expert=Prompt([4, 5]), anti_expert=Prompt([9, 8, 7])), Fudge(discriminator=head, strength=2.0, top_k=40)]
policy = mg.Policy(controls=controls, gate=Gate(risk=risk, min_risk=0.01))
guard = mg.Guard(policy, base)
ready = time.perf_counter() - begin
result = guard.generate([[3, 17, 5], "w7 w8"], max_new_tokens=6, do_sample=True, seed=1, trace=True)
for part in guard.stream("w7 w8", max_new_tokens=4, seed=1):
    assert isinstance(part, str)
built_in = mg.Guard(mg.Policy(values=["The text does not insult anyone."]), base)
assert built_in.generate("w7", max_new_tokens=2).scores.shape == (1, 1)
other = mg.Guard(mg.Policy(controls=[PPLM(bag_of_words=[[3, 4]], scope="hidden"), SelfDebias(prefixes=[[3]])]), base)
other.generate("w7", max_new_tokens=2)
loaded = sorted(name for name in ("torch", "transformers", "triton") if name in sys.modules)
print(json.dumps({"loaded": loaded, "ids": result.token_ids, "touched": guard.counters.rows_touched, "seconds": ready}))
"""


def test_a_process_that_guards_an_onnx_model_imports_no_torch(folders: dict[str, Path], lm: OnnxLanguageModel) -> None:
    arguments = [str(folders[name]) for name in ("base", "head", "risk")]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loaded"] == []
    assert found["touched"] > 0
    assert [len(ids) for ids in found["ids"]] == [6, 6]
    assert found["seconds"] < 60  # a bound for the busiest machine
