"""Counting instructions on a way through a disassembly, on one written by hand."""

from __future__ import annotations

import pytest
from sass_paths import instructions_to_arrival


def listing(*lines: str) -> str:
    """Labels as they are, instructions with an address as nvdisasm writes them."""
    return "\n".join(line if line.startswith(".") else f"        /*{16 * i:04x}*/               {line} ;" for i, line in enumerate(lines))


BRANCHES = listing(
    "LDG.E.128 R4, desc[UR4][R2.64]",  # 1
    "@P0 BRA `(.L_x_1)",  # 2
    "MUFU.EX2 R6, R4",  # 3: the way through
    "FADD R7, R6, R4",  # 4
    "@!P1 BRA `(.L_x_0)",  # 5
    "CALL.REL.NOINC `($__internal_0_slowpath)",  # rare
    ".L_x_0:",
    "BRA `(.L_x_2)",  # 6
    ".L_x_1:",
    "FMNMX R7, R4, R5, !PT",
    ".L_x_2:",
    "STG.E desc[UR4][R8.64], R7",  # 7
    "@P0 ATOMG.E.ADD.STRONG.GPU PT, R3, desc[UR4][R6.64], R3",  # 8
    "MUFU.EX2 R9, R9",
    "EXIT",
)


def test_the_way_goes_through_what_is_named_and_round_what_is_rare() -> None:
    assert instructions_to_arrival(BRANCHES, r"MUFU\.EX2") == 8
    assert instructions_to_arrival(BRANCHES, r"FMNMX") == 5
    assert instructions_to_arrival(BRANCHES, r"CALL") == 9


def test_what_isnt_on_any_way_is_none() -> None:
    assert instructions_to_arrival(BRANCHES, r"MUFU\.LG2") is None


@pytest.mark.parametrize("loop", ["@P2 BRA `(.L_x_0)", "BRA P2, `(.L_x_0)"])
def test_a_loop_counts_once_and_the_first_end_that_is_always_taken_ends(loop: str) -> None:
    code = listing(
        "MOV R1, R2", ".L_x_0:", "FFMA R1, R1, R2, R3", loop, "@P3 EXIT", "STG.E.128 desc[UR4][R2.64], R4", "EXIT", "FFMA R9, R9, R9, R9"
    )
    assert instructions_to_arrival(code, r"STG\S*\.128") == 6
    assert instructions_to_arrival(code, r"R9") is None
