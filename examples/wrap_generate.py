"""Guard transformers' own generate(), without changing the code around it.

Two ways: a logits processor, for controls that re-weigh logits; and attach, which covers every control.
"""

from __future__ import annotations

import moralguard as mg


def main() -> None:
    lm = mg.load_model("smollm2-135m")
    model, tokenizer = lm.model, lm.tokenizer
    guard = mg.Guard("detox", lm)

    inputs = tokenizer(["Shut up, you stupid", "The weather is"], return_tensors="pt", padding=True, padding_side="left")
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}

    def show(title: str, sequences: object) -> None:
        print(f"\n{title}")
        for text in tokenizer.batch_decode(sequences, skip_special_tokens=True):
            print("   ", " ".join(text.split()))

    show("unguarded", model.generate(**inputs, **settings))
    show("logits_processor=[guard.logits_processor()]", model.generate(**inputs, **settings, logits_processor=[guard.logits_processor()]))

    # PPLM and nullspace projection need more than logits: attach gives it to them, and model.generate stays as you wrote it.
    with guard.attach(model):
        show("with guard.attach(model)", model.generate(**inputs, **settings))

    # Proof that the guard ran: tokens that it saw being emitted, and rows of logits that it guarded.
    counts = guard.counters
    print(f"\n{counts.tokens_emitted} tokens emitted, {counts.rows_guarded} guarded, {counts.rows_touched} of them by an active control")


if __name__ == "__main__":
    main()
