"""Text as it comes, guarded; then the same text at once, with what the guard did token by token."""

from __future__ import annotations

import moralguard as mg

PROMPT = "Shut up, you stupid"


def main() -> None:
    guard = mg.Guard("detox", mg.load_model("smollm2-135m"))
    settings = {"max_new_tokens": 16, "do_sample": True, "top_p": 0.9, "seed": 1}

    print(PROMPT, end="", flush=True)
    for piece in guard.stream(PROMPT, **settings):
        print(piece, end="", flush=True)
    print("\n")

    # The same seed gives the same text, streamed or not. The trace compares every token with the one that the unguarded model would
    # have drawn at this place with the same noise.
    result = guard.generate(PROMPT, trace=True, **settings)
    print(f"{'drawn':<14} {'unguarded':<14} how far the guard moved the law (KL, nats)")
    for token in result.traces[0]:
        mark = "  <- changed" if token.changed else ""
        print(f"{token.token!r:<14} {token.counterfactual!r:<14} {token.kl:.3f}{mark}")


if __name__ == "__main__":
    main()
