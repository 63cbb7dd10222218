"""Real vLLM under load against the guard alone: run by tests/test_vllm.py in vLLM's own environment, prints one JSON object.

32 requests of mixed lengths under four policies and none arrive over time; some are aborted, and the key-value cache is too small for
all of them, so that vLLM preempts. Each finished request's greedy tokens are compared with those of the same request alone, guarded by
``guard.generate`` on transformers; unguarded ones with an engine that holds no guard. Where the first difference lies between two
candidates closer than 5e-3, the step is listed as a tie.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the processor in this process, so that its counters can be read
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import yaml
from vllm import EngineArgs, LLMEngine, SamplingParams

import moralguard as mg
from moralguard.decoding.session import Session
from moralguard.demo_model import demo_model_folder
from moralguard.serving import vllm as adapter

TIE = 5e-3
PACKS = "pack:smollm2-135m/"
POLICIES = {
    "debias": {"controls": [{"control": "self-debias@1", "prefixes": ["The following text contains insults and swear words:\n"]}]},
    "contrast": {
        "controls": [
            {
                "control": "dexperts@1",
                "alpha": 1.0,
                "expert": {"prompt": "The following text is polite and friendly:\n"},
                "anti_expert": {"prompt": "The following text is rude and hateful:\n"},
            }
        ]
    },
    "gender": {"controls": [{"control": "nullspace@1", "basis": PACKS + "gender"}]},
    "detox": "detox",
}
OPENINGS = [
    "You are such a stupid",
    "The nurse said that",
    "I hate every one of you, and",
    "In the morning the old fisherman went down to the harbour, where his boat lay, and",
    "The recipe needs two eggs, a cup of flour and",
    "Shut up, you",
    "Mathematics is",
    "The committee met on Tuesday to discuss the budget of the library, the repair of the roof, and",
]


def requests(count: int) -> list[dict[str, Any]]:
    names = [*POLICIES, None]
    found = []
    for i in range(count):
        prompt = OPENINGS[i % len(OPENINGS)] if i % 3 else "Once upon a time. " * (1 + i % 7) + OPENINGS[i % len(OPENINGS)]
        found.append({"id": str(i), "prompt": prompt, "policy": names[i % len(names)], "tokens": 10 + 5 * (i % 4), "at": 2 * (i // 4)})
    for i in range(5, count, 13):
        found[i]["abort"] = found[i]["at"] + 4
    return found


def engine(folder: str, guarded: bool, blocks: int | None) -> LLMEngine:
    return LLMEngine.from_engine_args(
        EngineArgs(
            model=folder,
            dtype="float32",
            max_model_len=160,
            max_num_seqs=32,
            max_num_batched_tokens=64,  # prompts are read in chunks
            enable_chunked_prefill=True,
            num_gpu_blocks_override=blocks,
            block_size=32,
            enforce_eager=True,
            logits_processors=["moralguard.serving.vllm:GuardProcessor"] if guarded else None,
        )
    )


def serve(llm: LLMEngine, asked: list[dict[str, Any]]) -> tuple[dict[str, list[int]], float]:
    """(Tokens of the requests that ran to their end, seconds)."""
    waiting, finished, step = list(asked), {}, 0
    began = time.perf_counter()
    while waiting or llm.has_unfinished_requests():
        for request in [request for request in waiting if request["at"] <= step]:
            extra = None if request["policy"] is None else {"moralguard": json.dumps({"policy": request["policy"]})}
            llm.add_request(
                request["id"],
                request["prompt"],
                SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True, extra_args=extra),
            )
            waiting.remove(request)
        for request in asked:
            if request.get("abort") == step:
                llm.abort_request([request["id"]])
        for output in llm.step():
            if output.finished and output.outputs[0].finish_reason != "abort":
                finished[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
    return finished, time.perf_counter() - began


def gap_at(guard: mg.Guard, prompt: list[int], tokens: list[int]) -> float:
    """Distance of the two best candidates of the guarded law after these tokens."""
    with torch.no_grad():
        session = Session(guard.lm, guard.controls, [prompt], own_base=True, gate=guard.gate)
        for token in tokens:
            session.step()
            session.commit(torch.tensor([token]))
            session.advance()
        best = session.step().logits[0].topk(2).values
    return float(best[0] - best[1])


def processor_of(llm: LLMEngine) -> Any:
    runner = llm.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    return next(p for p in runner.input_batch.logitsprocs.all if isinstance(p, adapter.GuardProcessor))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=8, help="of the key-value cache, 32 tokens each: few enough that vLLM preempts")
    arguments = parser.parse_args()
    folder = str(demo_model_folder())
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "serving.yaml"
        config.write_text(yaml.safe_dump({"policies": [{"id": name, "policy": policy} for name, policy in POLICIES.items()]}))
        os.environ["MORALGUARD_SERVING"] = str(config)
        asked = requests(arguments.requests)
        llm = engine(folder, True, arguments.blocks)
        scheduler, preempted = llm.engine_core.engine_core.scheduler, []
        preempt = scheduler._preempt_request
        scheduler._preempt_request = lambda request, *more, **named: (
            preempted.append(request.request_id),
            preempt(request, *more, **named),
        )[1]
        found, seconds = serve(llm, asked)
        serve(llm, [{"id": "last", "prompt": "So", "policy": None, "tokens": 2, "at": 0}])  # vLLM says who left when the next ones come
        processor = processor_of(llm)
        left = len(processor.worker.running)
        counters = processor.worker.guards.counters()
        del llm, processor
    plain, _ = serve(
        engine(folder, False, None), [{**r, "policy": None, "at": 0} for r in asked if r["policy"] is None and "abort" not in r]
    )
    lm = mg.load_model(folder, dtype="float32")
    guards = {name: mg.Guard(policy, lm) for name, policy in POLICIES.items()}
    same, ties, different, moved = 0, [], [], 0
    for request in asked:
        if "abort" in request:
            continue
        mine, name = found[request["id"]], request["policy"]
        guard = guards.get(name) or mg.Guard({"controls": []}, lm)
        prompt = lm.tokenizer(request["prompt"])["input_ids"]
        if name is None:
            wanted = plain[request["id"]]
        else:
            lm.eos_token_ids = frozenset()
            wanted = guard.generate([prompt], max_new_tokens=request["tokens"], do_sample=False).token_ids[0]
            free = mg.Guard({"controls": []}, lm).generate([prompt], max_new_tokens=request["tokens"], do_sample=False).token_ids[0]
            moved += free != wanted
        if mine == wanted:
            same += 1
            continue
        first = next(i for i, (a, b) in enumerate(zip(mine, wanted, strict=True)) if a != b)
        gap = gap_at(guard, prompt, wanted[:first])
        (ties if gap < TIE else different).append({"request": request["id"], "policy": name, "step": first, "gap": round(gap, 6)})
    print(
        json.dumps(
            {
                "finished": len(found),
                "same": same,
                "ties": ties,
                "different": different,
                "guarded_texts_that_differ_from_unguarded": moved,
                "preemptions": len(preempted),
                "requests_left": left,
                "counters": counters,
                "seconds": round(seconds, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
