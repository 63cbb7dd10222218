"""Formulas over the laws of named passes, such as ``0.7*base - 0.2*max(base, toxic)``: parsed, checked, printed back, evaluated.

A formula holds numbers, names, ``+ - * / ( )``, ``max(..., ...)`` and ``min(..., ...)``. A number weighs a law; a number added to a law,
two laws multiplied and a law divided by mean nothing and are errors.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moralguard.errors import PolicyError

if TYPE_CHECKING:  # or NumPy arrays, on a model without torch
    import torch

_SMALLEST_NORM = 1e-9
_MOST_NORMS = 4096
_LONGEST = 2000
_LARGEST = 1e6


@dataclass(frozen=True)
class Law:
    """log p of a named pass."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Extreme:
    """The largest or smallest of sums, token by token; ``kind`` is "max" or "min"."""

    kind: str
    parts: tuple[Sum, ...]

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(map(str, self.parts))})"


@dataclass(frozen=True)
class Sum:
    """Weighted laws and extremes, each once: ((weight, part), ...)."""

    parts: tuple[tuple[float, Law | Extreme], ...]

    def __str__(self) -> str:
        found = ""
        for weight, part in self.parts:
            sign = " - " if weight < 0 else " + "
            found += sign if found else sign.strip(" +")
            found += str(part) if abs(weight) == 1 else f"{repr(abs(weight)).removesuffix('.0')}*{part}"
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """Every name in it, in order of appearance."""
        found: dict[str, None] = {}
        for _, part in self.parts:
            inner = (part.name,) if isinstance(part, Law) else tuple(name for own in part.parts for name in own.names)
            found |= dict.fromkeys(inner)
        return tuple(found)

    @property
    def weights(self) -> dict[str, float] | None:
        """Name -> weight where there is neither max nor min, else None."""
        found = {part.name: weight for weight, part in self.parts if isinstance(part, Law)}
        return found if len(found) == len(self.parts) else None

    @property
    def norms(self) -> set[float]:
        """Every sum of weights that a token may have: one for each choice that the extremes can make.

        Raises:
            PolicyError: there are more than anyone can mean.
        """
        found = {0.0}
        for weight, part in self.parts:
            own = {1.0} if isinstance(part, Law) else {norm for inner in part.parts for norm in inner.norms}
            found = {round(total + weight * norm, 12) for total in found for norm in own}
            if len(found) > _MOST_NORMS:
                raise PolicyError(f"formula {str(self)!r} has more than {_MOST_NORMS} sums of weights; use fewer max and min")
        return found

    def evaluate(self, laws: Mapping[str, torch.Tensor], arrays: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of w log p, sum of w), both f64[R, V]; laws: log-probabilities f64[R, V] of every name."""
        like = next(iter(laws.values()))
        value = norm = arrays.full(tuple(like.shape), 0.0, like.dtype, like)
        for weight, part in self.parts:
            if isinstance(part, Law):
                value, norm = value + weight * laws[part.name], norm + weight
                continue
            best, its_norm = part.parts[0].evaluate(laws, arrays)
            for other in part.parts[1:]:
                theirs, their_norm = other.evaluate(laws, arrays)
                # of equal ones max counts the first and min the last, as the authors' code does
                stays = best >= theirs if part.kind == "max" else best < theirs
                best, its_norm = arrays.where(stays, best, theirs), arrays.where(stays, its_norm, their_norm)
            value, norm = value + weight * best, norm + weight * its_norm
        return value, norm


def parse_formula(text: str) -> Sum:
    """The formula of a text; ``str`` of it is the text again, in one form.

    Raises:
        PolicyError: it isn't a formula (where and what), divides by zero, or its weights can add up to 0, so that it has no law.
    """
    text = " ".join(text.split())
    if len(text) > _LONGEST:
        raise PolicyError(f"a formula of {len(text)} characters; at most {_LONGEST} can be read")
    try:
        found = _Reader(text).read(ast.parse(text, mode="eval").body)
    except SyntaxError as error:
        raise _error(text, error.offset or 1, error.msg) from None
    except (RecursionError, MemoryError):
        raise _error(text, 1, "it is nested too deeply") from None
    if isinstance(found, float):
        raise _error(text, 1, "a number alone is no law")
    if any(abs(norm) < _SMALLEST_NORM for norm in found.norms):
        choice = "" if found.weights is not None else " for some choice of its max and min"
        raise PolicyError(f"the weights of formula {text!r} add up to 0{choice}, and the law divides by their sum; change a weight")
    return found


def _error(text: str, character: int, what: str) -> PolicyError:
    return PolicyError(
        f"formula {text!r}, character {character}: {what}; expected numbers, names, + - * / ( ), max(..., ...) and min(..., ...)"
    )


class _Reader:
    """From Python's syntax tree of a formula to its parts; nothing is executed. A number alone is a float, all else a ``Sum``."""

    def __init__(self, text: str):
        self.text = text

    def error(self, node: ast.expr, what: str) -> PolicyError:
        return _error(self.text, node.col_offset + 1, what)

    def read(self, node: ast.expr) -> Sum | float:
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
            if not abs(node.value) <= _LARGEST:
                raise self.error(node, "a number is too large")
            return float(node.value)
        if isinstance(node, ast.Name):
            return Sum(((1.0, Law(node.id)),))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            return _scaled(self.read(node.operand), -1.0 if isinstance(node.op, ast.USub) else 1.0)
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
            return self.added(node, _scaled(self.read(node.right), 1.0 if isinstance(node.op, ast.Add) else -1.0))
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
            return self.weighed(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("max", "min") and not node.keywords:
            parts = [self.read(part) for part in node.args]
            if len(parts) < 2 or any(isinstance(part, float) for part in parts):
                raise self.error(node, f"{node.func.id} takes two laws or more, and no number alone")
            return Sum(((1.0, Extreme(node.func.id, tuple(part for part in parts if isinstance(part, Sum)))),))
        raise self.error(node, f"{ast.get_source_segment(self.text, node)!r} means nothing here")

    def added(self, node: ast.BinOp, second: Sum | float) -> Sum | float:
        first = self.read(node.left)
        if isinstance(first, float) and isinstance(second, float):
            return first + second
        if isinstance(first, float) or isinstance(second, float):
            raise self.error(node, "a number can't be added to a law")
        weights: dict[Law | Extreme, float] = {}
        for weight, part in (*first.parts, *second.parts):
            weights[part] = weights.get(part, 0.0) + weight
        return Sum(tuple((weight, part) for part, weight in weights.items()))

    def weighed(self, node: ast.BinOp) -> Sum | float:
        first, second = self.read(node.left), self.read(node.right)
        if isinstance(node.op, ast.Div):
            if isinstance(second, Sum):
                raise self.error(node, "a law can't be divided by")
            if second == 0:
                raise self.error(node, "division by zero")
            second = 1 / second
        if isinstance(first, Sum) and isinstance(second, Sum):
            raise self.error(node, "two laws can't be multiplied")
        return _scaled(second, first) if isinstance(first, float) else _scaled(first, second)  # type: ignore[arg-type]


def _scaled(found: Sum | float, factor: float) -> Sum | float:
    if isinstance(found, float):
        return found * factor
    return Sum(tuple((weight * factor, part) for weight, part in found.parts))
