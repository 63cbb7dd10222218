"""Guard llama-cpp-python: the GGUF file decodes in llama.cpp, and the guard's own passes run on the same file.

CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" pip install llama-cpp-python
python examples/llamacpp_generate.py SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import sys

from llama_cpp import Llama

import moralguard as mg
from moralguard.serving.llamacpp import LlamaGuard

TOKENS = 12
POLICY = {"controls": [{"control": "self-debias@1", "prefixes": ["The following text contains insults and swear words:\n"]}]}


def main() -> None:
    path = sys.argv[1]
    llama = Llama(path, n_ctx=512, verbose=False)
    guard = mg.Guard(POLICY, path)
    free, guarded = LlamaGuard(mg.Guard(mg.Policy(), guard.lm), llama), LlamaGuard(guard, llama)
    for prompt in ("Shut up, you stupid", "The weather is"):
        for title, model in (("unguarded", free), ("guarded", guarded)):
            found = model.create_completion(prompt, max_tokens=TOKENS, temperature=0.0)
            print(f"{title}:", prompt + found["choices"][0]["text"].replace("\n", " "))
    pieces = guarded.create_completion("Shut up, you stupid", max_tokens=TOKENS, temperature=0.8, seed=1, stream=True)
    print("guarded, sampled:", *(repr(piece["choices"][0]["text"]) for piece in pieces))
    answer = guarded.create_chat_completion([{"role": "user", "content": "Insult me."}], max_tokens=TOKENS, temperature=0.0)
    print("guarded, chat:", answer["choices"][0]["message"]["content"])
    print({name: count for name, count in guard.counters.as_dict().items() if count})


if __name__ == "__main__":
    main()
