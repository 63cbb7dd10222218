"""A nullspace projection in vLLM as a baked checkpoint and as a LoRA for the head, against the guard; prints one JSON object."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from agreement import OPENINGS, TIE, gap_at
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

import moralguard as mg
from moralguard.demo_model import demo_model_folder
from moralguard.export.bake import bake

TOKENS = 16


def tokens_of(llm: LLM, **more: Any) -> list[list[int]]:
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in llm.generate(OPENINGS, sampling, use_tqdm=False, **more)]


def main() -> None:
    source = str(demo_model_folder())
    lm = mg.load_model(source, dtype="float32")
    lm.eos_token_ids = frozenset()
    policy = mg.Policy.load({"controls": [{"control": "nullspace@1", "basis": "pack:smollm2-135m/gender"}]})
    guard = mg.Guard(policy, lm)
    prompts = [lm.tokenizer(text)["input_ids"] for text in OPENINGS]
    wanted = guard.generate(prompts, max_new_tokens=TOKENS, do_sample=False).token_ids
    free = mg.Guard({"controls": []}, lm).generate(prompts, max_new_tokens=TOKENS, do_sample=False).token_ids
    settings = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "max_num_seqs": 8}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = bake(lm, policy, Path(scratch) / "checkpoint")
        adapter = bake(lm, policy, Path(scratch) / "lora", "lora")
        found = {"checkpoint": tokens_of(LLM(str(checkpoint), **settings))}
        # one place more than adapters: on the CPU vLLM's rows without an adapter read the last place
        llm = LLM(source, enable_lora=True, max_lora_rank=8, max_loras=2, **settings)
        found["lora"] = tokens_of(llm, lora_request=LoRARequest("gender", 1, str(adapter)))
        plain = tokens_of(llm)
    result: dict[str, Any] = {"texts": len(OPENINGS), "differ_from_unguarded": sum(a != b for a, b in zip(wanted, free, strict=True))}
    result["without_adapter_same"] = sum(a == b for a, b in zip(plain, free, strict=True))
    for form, tokens in found.items():
        gaps = []
        for prompt, mine, theirs in zip(prompts, tokens, wanted, strict=True):
            first = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
            if first is not None:
                gaps.append(round(gap_at(guard, prompt, theirs[:first]), 6))
        result[form] = {"same": len(prompts) - len(gaps), "ties": [g for g in gaps if g < TIE], "different": [g for g in gaps if g >= TIE]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
