"""How many instructions a thread issues on its way through a compiled kernel, read from the disassembly without running anything."""

from __future__ import annotations

import re

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_NEVER = 10**9


def instructions_to_arrival(sass: str, through: str) -> int | None:
    """Instructions on the shortest way from the entry through one that matches ``through`` to the first atomic, or to the end.

    The shortest way leaves out what is taken rarely: slow paths of a division, masked tails. Loops count once. None where no
    instruction matches.
    """
    instructions, successors = _graph(sass)
    end = next(i for i, text in enumerate(instructions) if "ATOM" in text or text.startswith("EXIT"))
    here = [_NEVER] * (end + 1)
    here[0] = 1
    for i in range(end):
        for following in successors[i]:
            if i < following <= end:
                here[following] = min(here[following], here[i] + 1)
    onward = [_NEVER] * (end + 1)
    onward[end] = 0
    for i in range(end - 1, -1, -1):
        onward[i] = min((1 + onward[following] for following in successors[i] if i < following <= end), default=_NEVER)
    found = [here[i] + onward[i] for i, text in enumerate(instructions[: end + 1]) if re.search(through, text)]
    return min(found) if found and min(found) < _NEVER else None


def _graph(sass: str) -> tuple[list[str], list[list[int]]]:
    """The kernel's instructions, without subroutines behind it, and where each may lead."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(instruction[1])
        elif instructions and "__internal" in line and "CALL" not in line:
            break
    return instructions, [_successors(text, i, labels) for i, text in enumerate(instructions)]


def _successors(text: str, place: int, labels: dict[str, int]) -> list[int]:
    guarded, _, rest = text.partition(" ") if text.startswith("@") else ("", "", text)
    operation, target = rest.split(None, 1)[0], re.search(r"`\((\.L_x_\d+)\)", text)
    if operation.startswith("BRA") and target and target[1] in labels:
        always = not guarded and "," not in rest and not re.search(r"\bU?P\d", rest)
        return [labels[target[1]]] if always else [labels[target[1]], place + 1]
    if operation.startswith(("EXIT", "RET")) and not guarded:
        return []
    return [place + 1]
