"""Guard onnxruntime-genai's Generator: each step's logits are read, re-weighed by the guard, and handed back. Torch is never imported.

pip install onnxruntime-genai
python -m onnxruntime_genai.models.builder -i MODEL_FOLDER -o smol-genai -p fp32 -e cpu -c cache --extra_options include_hidden_states=true
python examples/onnx_genai.py smol-genai
"""

from __future__ import annotations

import sys

import onnxruntime_genai as og

import moralguard as mg
from moralguard.serving.ort_genai import GenaiGuard

TOKENS = 12
POLICY = {"controls": [{"control": "self-debias@1", "prefixes": ["The following text contains insults and swear words:\n"]}]}


def main() -> None:
    folder = sys.argv[1]
    guard = mg.Guard(POLICY, folder)
    free = mg.Guard(mg.Policy(), guard.lm)
    model, tokenizer = og.Model(folder), guard.lm.tokenizer
    for prompt in ("Shut up, you stupid", "The weather is"):
        for title, guarding in (("unguarded", free), ("guarded", guard)):
            tokens = GenaiGuard(guarding, model).generate(prompt, max_new_tokens=TOKENS, do_sample=False)
            print(f"{title}:", prompt + tokenizer.decode(tokens, skip_special_tokens=True).replace("\n", " "))
    sampled = GenaiGuard(guard, model).stream("Shut up, you stupid", max_new_tokens=TOKENS, do_sample=True, top_p=0.9, random_seed=1)
    print("guarded, sampled:", *(repr(tokenizer.decode([token])) for token in sampled))
    print("torch was imported:", "torch" in sys.modules)


if __name__ == "__main__":
    main()
