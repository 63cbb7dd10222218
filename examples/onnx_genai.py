"""Guard onnxruntime-genai's Generator loop: read the logits, let the guard re-weigh them, hand them back. Torch is never imported.

pip install onnxruntime-genai
python -m onnxruntime_genai.models.builder -i MODEL_FOLDER -o smol-genai -p fp32 -e cpu -c cache --extra_options include_hidden_states=true
python examples/onnx_genai.py smol-genai
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime_genai as og

import moralguard as mg

TOKENS = 12
POLICY = {"controls": [{"control": "self-debias@1", "prefixes": ["The following text contains insults and swear words:\n"]}]}


def generate(model: og.Model, ids: list[int], guard: mg.Guard | None) -> list[int]:
    """Greedy token ids after the prompt."""
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + TOKENS, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(ids, np.int32))
    processor = guard.logits_processor() if guard else None
    history, emitted = list(ids), []
    while not generator.is_done() and len(emitted) < TOKENS:
        if processor:
            logits = generator.get_logits()  # f32[1, 1, V]
            generator.set_logits(processor(np.array([history]), logits[:, -1])[:, None])
        generator.generate_next_token()
        token = int(generator.get_next_tokens()[0])
        history.append(token)
        emitted.append(token)
    return emitted


def main() -> None:
    folder = sys.argv[1]
    guard = mg.Guard(POLICY, folder)
    model, tokenizer = og.Model(folder), guard.lm.tokenizer
    for prompt in ("Shut up, you stupid", "The weather is"):
        ids = tokenizer(prompt)["input_ids"]
        for title, guarding in (("unguarded", None), ("guarded", guard)):
            print(f"{title}:", prompt + tokenizer.decode(generate(model, ids, guarding), skip_special_tokens=True).replace("\n", " "))
    print("torch was imported:", "torch" in sys.modules)


if __name__ == "__main__":
    main()
