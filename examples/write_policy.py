"""A policy as data (YAML) and the same policy from objects."""

from __future__ import annotations

import tempfile
from pathlib import Path

import moralguard as mg
from moralguard.controls import SelfDebias

POLICY = """
name: no-gossip
values:
  - id: no-gossip
    statement: The text does not spread rumours about anyone.
controls:
  - control: self-debias@1
    decay_constant: 100
    prefixes:
      - "The following text spreads nasty rumours about someone:\\n"
decoding:
  max_new_tokens: 16
"""


def main() -> None:
    # A policy is a file that people can read and review; Policy.load also takes a built-in name ("detox") or a dict.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "no-gossip.yaml"
        file.write_text(POLICY)
        from_file = mg.Policy.load(file)

    from_objects = mg.Policy(
        name="no-gossip",
        values=[mg.Value(id="no-gossip", statement="The text does not spread rumours about anyone.")],
        controls=[SelfDebias(decay_constant=100, prefixes=["The following text spreads nasty rumours about someone:\n"])],
        decoding={"max_new_tokens": 16},
    )
    print(f"the same policy both ways: {from_file.digest == from_objects.digest}\n")
    print(from_objects.as_yaml())

    # Mistakes are found before anything runs, and name what was probably meant.
    try:
        mg.Policy.load({"controls": [{"control": "self-debias@1", "decay": 100}]})
    except mg.GuardError as error:
        print(f"a typing mistake: {error}\n")

    lm = mg.load_model("smollm2-135m")
    prompt = "My boss is a"
    for policy in (mg.Policy(name="no policy", decoding={"max_new_tokens": 16}), from_objects):
        print(f"{policy.name + ':':<11} {prompt}{mg.Guard(policy, lm).generate(prompt).texts[0]}")


if __name__ == "__main__":
    main()
