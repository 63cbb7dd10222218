"""What each control is made of: the table of docs/methods/README.md, from the source itself; tests run it with --check.

python benchmarks/control_lines.py [--check]
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

from moralguard.controls.registry import control_class, control_names
from moralguard.evaluation.report.tables import update_between_markers

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moralguard"
INDEX = ROOT / "docs" / "methods" / "README.md"
MARKER = "controls"
_NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
_FROM_OUTSIDE = "moralguard.controls"  # its __init__ names every control, and uses none


def code_lines(source: str) -> int:
    """Lines that hold code: no blank ones, comments or docstrings."""
    prose: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            found |= set(range(token.start[0], token.end[0] + 1))
    return len(found - prose)


def imported(source: str) -> set[str]:
    """Modules that a source imports when it runs, wherever the import stands; what only types need isn't run."""

    def run(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
                continue
            yield child
            yield from run(child)

    found: set[str] = set()
    for node in run(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def sources() -> dict[str, str]:
    """Module -> source of the whole package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def own_modules(module: str, uses: dict[str, set[str]]) -> list[str]:
    """The module and, step by step, those that nothing but these uses."""
    users: dict[str, set[str]] = {name: set() for name in uses}
    for user, used in uses.items():
        for name in used & users.keys() if user != _FROM_OUTSIDE else ():
            users[name].add(user)
    own, grown = {module}, True
    while grown:
        more = {name for name, by in users.items() if by and by <= own} - own
        own, grown = own | more, bool(more)
    return sorted(own)


def needs(source: str) -> str:
    """What a control's ``needs`` names; in brackets what only some settings ask for."""
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name == "needs")
    calls = [
        {str(keyword.arg): isinstance(keyword.value, ast.Constant) for keyword in part.keywords}
        for function in functions
        for part in ast.walk(function)
        if isinstance(part, ast.Call) and getattr(part.func, "id", "") == "Capabilities"
    ]
    names = list(dict.fromkeys(name for call in calls for name in call))
    always = [name for name in names if all(call.get(name, False) for call in calls)]
    return ", ".join([*always, *(f"({name})" for name in names if name not in always)]) or "nothing"


def table() -> str:
    """The Markdown table of every control that comes with moralguard."""
    texts = sources()
    uses = {name: imported(source) & texts.keys() - {name} for name, source in texts.items()}
    lines = ["| control | method | code lines | lines in all | runs on | needs |", "|---|---|---|---|---|---|"]
    for name, place in sorted(control_names().items()):
        module = place.partition(":")[0]
        if module not in texts:  # installed by another package
            continue
        own = own_modules(module, uses)
        method = (ast.get_docstring(ast.parse(texts[module])) or "").partition("\n")[0].removesuffix(".").partition(": ")[2]
        code, whole = (sum(count(texts[each]) for each in own) for count in (code_lines, lambda text: len(text.splitlines())))
        beside = f" in {len(own)} files" if len(own) > 1 else ""
        arrays = "torch, ONNX" if control_class(name).any_arrays else "torch"
        lines.append(f"| [`{name}`]({name}.md) | {method} | {code}{beside} | {whole} | {arrays} | {needs(texts[module])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where the table differs")
    check = parser.parse_args().check
    old = INDEX.read_text(encoding="utf-8")
    new = update_between_markers(old, MARKER, table())
    if new == old:
        return
    if check:
        sys.exit(f"{INDEX.relative_to(ROOT)} isn't what the source says; run python benchmarks/control_lines.py")
    INDEX.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
