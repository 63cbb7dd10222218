"""Everything that runs a model, on the CPU and then on a device; prints one JSON line a case: here, there, error.

python tests/on_device.py pretend | cuda [CASE ...]
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any

import torch
from control_examples import examples
from odd_models import byte_llama, byte_tokenizer, left_padded
from pretend_device import DEVICE, WAITED, capturing, moved, pretended
from word_model import rows, word_model

import moralguard as mg
from moralguard.backends.hf import LanguageModel
from moralguard.controls import Control, DExperts, Prompt
from moralguard.decoding.gate import Gate
from moralguard.decoding.slots import Slots
from moralguard.errors import UnsupportedPathError
from moralguard.fitting.attribute_head import fit_attribute_head
from moralguard.fitting.expert_packs import fit_expert_packs
from moralguard.fitting.experts import ExpertSettings
from moralguard.fitting.hidden_states import LAST
from moralguard.fitting.prefix import PrefixSettings
from moralguard.fitting.prefix_head import PrefixHeadSettings, train_prefix_head
from moralguard.fitting.prefix_packs import fit_prefix_packs
from moralguard.fitting.subspace_fit import fit_subspace
from moralguard.fitting.trigger import TriggerSettings
from moralguard.fitting.trigger_pack import fit_trigger_pack
from moralguard.fitting.vectors import fit_vectors

PROMPTS = ["hello there", "my"]
SAMPLING = {"max_new_tokens": 4, "do_sample": True, "temperature": 0.9, "top_p": 0.9, "top_k": 50, "seed": 5}


def guard_of(lm: LanguageModel, *controls: Control, **policy: Any) -> mg.Guard:
    return mg.Guard(mg.Policy(controls=controls, **policy), lm)


def generated(control: Control) -> Callable[[LanguageModel], Any]:
    """Tokens, and what a trace says of them."""

    def case(lm: LanguageModel) -> Any:
        result = guard_of(lm, control).generate(PROMPTS, trace=True, **SAMPLING)
        told = [[(t.token_id, t.kl, list(t.contributions.values())) for t in trace] for trace in result.traces]
        return result.token_ids, told

    return case


def given(control: Control) -> Callable[[LanguageModel], Any]:
    """Log-probabilities of given text."""

    def case(lm: LanguageModel) -> Any:
        found = guard_of(lm, control).log_probabilities(PROMPTS, ["abc", "z y"])
        return [[float(value) for value in values] for _, values in found]

    return case


def in_transformers(control: Control, attached: bool, **settings: Any) -> Callable[[LanguageModel], Any]:
    """``model.generate`` under the guard."""

    def case(lm: LanguageModel) -> Any:
        guard = guard_of(lm, control)
        inputs = {name: value.to(lm.device) for name, value in left_padded([[3, 17, 5], [7]]).items()}
        arguments = {"max_new_tokens": 4, "do_sample": False, **settings}
        if attached:
            with guard.attach(lm.model):
                return lm.model.generate(**inputs, **arguments).tolist()
        try:
            processor = guard.logits_processor()
        except UnsupportedPathError:
            return "not as a processor"
        return lm.model.generate(**inputs, logits_processor=[processor], **arguments).tolist()

    return case


def in_slots(controls: dict[str, Control]) -> Callable[[LanguageModel], Any]:
    """Requests of different policies beside each other, as the server runs them."""

    def case(lm: LanguageModel) -> Any:
        slots = Slots(lm, own_base=True)
        told: dict[int, list[int]] = {}
        for i, name in enumerate(controls):
            guard = guard_of(lm, controls[name], gate=Gate(min_entropy=0.1))
            slots.add(i, guard.controls, guard.gate, [3, 17, 5 + i])
            told[i] = []
        with torch.no_grad():
            for _ in range(3):
                steps, failures = slots.step(told)
                assert not failures, failures
                for step in steps:
                    for slot, token in zip(step.slots, step.outcome.logits.argmax(-1).tolist(), strict=True):
                        told[slot].append(token)
        return list(told.values())

    return case


def with_a_folders_expert(folder: Path) -> Callable[[LanguageModel], Any]:
    """A model that the guard loads itself comes to where the base is."""
    byte_llama(seed=3).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)

    def case(lm: LanguageModel) -> Any:
        guard = guard_of(lm, DExperts(expert=str(folder), anti_expert=Prompt([9, 8, 7])))
        devices = {item.lm.device for control in guard.controls for item in control.passes}
        return guard.generate(PROMPTS, **SAMPLING).token_ids, devices == {lm.device}

    return case


def streamed(control: Control) -> Callable[[LanguageModel], Any]:
    return lambda lm: "".join(guard_of(lm, control).stream("hello", **SAMPLING))


def reviewed(lm: LanguageModel) -> Any:
    review = [{"method": "rollback@1", "max_rollback": 2, "max_retries": 2, "min_probability": 0.5, "on_exhausted": "open"}]
    return guard_of(lm, review=review, values=["people are treated with respect"]).generate(PROMPTS, **SAMPLING).token_ids


def discriminated(lm: LanguageModel) -> Any:
    """The shipped discriminator where the model is, in both languages and readings."""
    found = []
    for mode in ("cached", "cross"):
        judge = mg.Discriminator.load(device=str(lm.device), mode=mode)
        found.append(judge.score(["You are an idiot.", "\u4f60\u771f\u597d"], ["people are treated with respect"]).tolist())
    return found


def fitted(kind: str) -> Callable[[LanguageModel], Any]:
    """What fitting on the model's states or through the model says of itself."""

    def case(lm: LanguageModel) -> Any:
        few = {"steps": 3, "batch_size": 4, "bfloat16": False}
        losses: list[float] = []

        def note(*told: Any) -> None:
            losses.extend(value for value in told if isinstance(value, float))

        with tempfile.TemporaryDirectory() as folder:
            if kind == "expert":
                fit_expert_packs(lm, rows(20), folder, ExpertSettings(rank=2, alpha=4, **few), report=note)
            elif kind == "trigger":
                fit_trigger_pack(lm, rows(20), folder, TriggerSettings(length=2, first="w3", num_candidates=3, rounds=1), report=note)
            else:
                fit_prefix_packs(lm, rows(20), folder, PrefixSettings(method=kind, length=2, **few), report=note)
        return losses

    return case


def fitted_on_states(lm: LanguageModel) -> Any:
    data = rows(40)
    found = [fit_subspace(lm, data, method, pooling="mean").metrics for method in ("leace", "inlp")]
    found.append(train_prefix_head(lm, data, PrefixHeadSettings(rank=2, epochs=1)).metrics)
    found.append(fit_attribute_head(lm, data, layers=(1, LAST), poolings=("mean", "last"), hidden=4, epochs=2).metrics)
    found.append(fit_vectors(lm, data, layers=(1,)).metrics)
    return found


def refused(lm: LanguageModel) -> Any:
    """What the device doesn't put up with; nothing of it on the CPU."""
    there, here = torch.ones(2, device=lm.device), torch.ones(2)
    mistakes: dict[str, Callable[[], Any]] = {
        "sum": lambda: there + here,
        "product": lambda: torch.stack([there, there]) @ here,
        "concatenation": lambda: torch.cat([there, here]),
        "choice": lambda: torch.where(there > 0, there, here),
        "array": lambda: there.numpy(),
    }
    found = []
    for name, mistake in mistakes.items():
        try:
            mistake()
        except (RuntimeError, TypeError):
            found.append(name)
    right = [there + torch.tensor(1.0), there[torch.tensor([0])], there.cpu() + here, there + here.to(lm.device)]
    return found, [value.tolist() for value in right]


def captured(lm: LanguageModel) -> Any:
    """What ``benchmarks/kernels.py`` captures in graphs."""
    benchmark = run_path(str(Path(__file__).parents[1] / "benchmarks" / "kernels.py"))
    point = benchmark["Point"]("random", 2, 1000, 0.7, 0.95)
    inputs = benchmark["inputs_of"](point, str(lm.device), 1, None)
    found = {}
    for name, make in benchmark["contenders"](point, compiled=False).items():
        result = in_a_graph(make(inputs), lm.device)
        if name.endswith("fused"):
            found[name] = (result if name.startswith("mix") else result[0]).tolist()
    return found


def in_a_graph(call: Callable[[], Any], device: torch.device) -> Any:
    """What a call gives; on CUDA from a replayed graph, on the pretended device under its rules for one."""
    if device.type == "cuda":
        call()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()
        graph.replay()
        return found
    with capturing():
        return call()


def capture_mistakes(lm: LanguageModel) -> Any:
    """What the pretended device refuses while a graph is captured; nothing of it on the CPU."""
    there = torch.ones(2, device=lm.device)
    found = []
    for mistake in (lambda: float(there[0]), there.cpu, lambda: torch.tensor([1.0], device=lm.device)):
        try:
            with capturing():
                mistake()
        except RuntimeError as error:
            found.append(str(error))
    return found


def waits_a_token(controls: dict[str, Control]) -> Callable[[LanguageModel], Any]:
    """How often a step waits for the device beside the kernels, which are taken not to; nothing is told of the CPU, nor of CUDA."""

    def case(lm: LanguageModel) -> Any:
        found = {}
        for name in ("nullspace", "fudge", "gedi", "guidance", "prefix", "rad", "self-debias", "steering"):
            guard, waits = guard_of(lm, controls[name]), []
            for count in (4, 14):
                before = len(WAITED)
                guard.generate(PROMPTS, max_new_tokens=count, do_sample=True, top_p=0.9, seed=1)
                waits.append(len(WAITED) - before)
            found[name] = (waits[1] - waits[0]) / 10
        return found

    return case


def cases(folder: Path) -> dict[str, Callable[[LanguageModel], Any]]:
    controls = examples(folder)
    found: dict[str, Callable[[LanguageModel], Any]] = {"refused": refused}
    for name, control in controls.items():
        found[f"generate {name}"] = generated(control)
        found[f"score {name}"] = given(control)
        found[f"attach {name}"] = in_transformers(control, True)
        found[f"attach {name}, beams"] = in_transformers(control, True, num_beams=2)
        found[f"processor {name}"] = in_transformers(control, False)
        found[f"processor {name}, beams"] = in_transformers(control, False, num_beams=2)
    found["generate with a folder's expert"] = with_a_folders_expert(folder / "expert")
    found["slots"] = in_slots(controls)
    found["stream"] = streamed(controls["dexperts"])
    found["review"] = reviewed
    found["discriminator"] = discriminated
    found["captured"] = captured
    found["capture mistakes"] = capture_mistakes
    found["waits"] = waits_a_token(controls)
    found["fit on states"] = fitted_on_states
    adapters = ("expert",) if find_spec("peft") else ()  # an extra's
    for kind in (*adapters, "trigger", "prompt-tuning", "prefix-tuning", "contrastive"):
        found[f"fit {kind}"] = fitted(kind)
    return found


def model_for(case: str) -> LanguageModel:
    lm = word_model() if case.startswith("fit ") else LanguageModel(byte_llama(), byte_tokenizer())
    lm.model.set_attn_implementation("eager")  # the others ask the device which kernels it has
    return lm


@contextmanager
def on(device: torch.device, name: str) -> Iterator[LanguageModel]:
    """The case's model there."""
    if device.type == "pretend":
        with pretended():
            lm = model_for(name)
            moved(lm.model)
            yield lm
    else:
        lm = model_for(name)
        lm.model.to(device)
        yield lm


def main() -> None:
    device = DEVICE if sys.argv[1] == "pretend" else torch.device(sys.argv[1], 0)
    with tempfile.TemporaryDirectory() as folder:
        for name, case in cases(Path(folder)).items():
            if sys.argv[2:] and name not in sys.argv[2:]:
                continue
            line: dict[str, Any] = {"case": name, "here": case(model_for(name))}
            try:
                with on(device, name) as lm:
                    assert lm.device == device
                    line["there"] = case(lm)
            except Exception:
                line["error"] = traceback.format_exc()
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
