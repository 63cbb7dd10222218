"""Every control has a page, and the table of all of them is what the source says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from moralguard.controls.registry import control_names

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "benchmarks" / "control_lines.py"


@pytest.fixture(scope="module")
def lines() -> ModuleType:
    spec = importlib.util.spec_from_file_location("control_lines", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_control_has_a_page() -> None:
    built_in = [name for name, place in control_names().items() if place.startswith("moralguard.")]
    missing = sorted(name for name in built_in if not (ROOT / "docs" / "methods" / f"{name}.md").is_file())
    assert not missing, f"docs/methods lacks a page of: {', '.join(missing)}"


def test_the_table_is_current() -> None:
    done = subprocess.run([sys.executable, str(PROGRAM), "--check"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_every_page_says_what_was_measured() -> None:
    program = ROOT / "benchmarks" / "method_effects.py"
    done = subprocess.run([sys.executable, str(program), "--check"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_code_lines_leave_out_what_is_no_code(lines: ModuleType) -> None:
    source = '"""Module."""\n\n# why\nx = """two\nlines"""  # beside\n\n\nclass A:\n    """Doc\n    of two."""\n\n'
    source += '    y: int = 0\n    """Of y."""\n'
    assert lines.code_lines(source) == 4  # x's two, the class and y


def test_own_modules_are_those_that_nothing_else_uses(lines: ModuleType) -> None:
    uses = {"a": {"b", "shared"}, "b": {"c"}, "c": set(), "other": {"shared"}, "shared": {"d"}, "d": set()}
    assert lines.own_modules("a", uses) == ["a", "b", "c"]
    assert lines.imported("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import x\ndef f():\n    from p import q\n") == {
        "typing",
        "typing.TYPE_CHECKING",
        "p",
        "p.q",
    }


def test_what_a_control_needs_is_read_from_its_source(lines: ModuleType) -> None:
    source = "class A:\n    @property\n    def needs(self):\n        return Capabilities(auxiliary=True, hidden=self.x is None)\n"
    assert lines.needs(source) == "auxiliary, (hidden)"
    assert lines.needs("class A: pass") == "nothing"
    two = "def needs(self):\n    return Capabilities(hidden=True) if self.x else Capabilities(hidden=True, grad=True)\n"
    assert lines.needs(two) == "hidden, (grad)"
