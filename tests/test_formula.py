"""Formulas: what is read, how it is printed, what is refused and where."""

from __future__ import annotations

import pytest

from moralguard.controls.formula import parse_formula
from moralguard.errors import PolicyError

PRINTED = {
    "base": "base",
    "  base  -  0.96 * max( base,toxic ) ": "base - 0.96*max(base, toxic)",
    "0.7*base - 0.96*max(base, toxic)": "0.7*base - 0.96*max(base, toxic)",
    "-(a-2*b)/4": "-0.25*a + 0.5*b",
    "a + a": "2*a",
    "2*(a + b)*.5": "a + b",
    "a*3 - min(a, 2*b, c/2)": "3*a - min(a, 2*b, 0.5*c)",
    "(1 + 2)*a - 2e-3*b": "3*a - 0.002*b",
    "max(a, min(b, 2*c))*3 - a": "3*max(a, min(b, 2*c)) - a",
    "max(a, b) + 2*max(a, b)": "3*max(a, b)",
    "a\n  + b": "a + b",
    "10*a": "10*a",
}


@pytest.mark.parametrize("text", PRINTED)
def test_it_is_printed_in_one_form_and_read_back(text):
    found = parse_formula(text)
    assert str(found) == PRINTED[text]
    assert parse_formula(str(found)) == found


def test_names_weights_and_sums_of_weights():
    found = parse_formula("a*3 - min(b, 2*c) + d")
    assert found.names == ("a", "b", "c", "d")
    assert found.weights is None
    assert found.norms == {3.0, 2.0}
    assert parse_formula("a*3 - c").weights == {"a": 3.0, "c": -1.0}
    assert parse_formula("0.7*base - 0.96*max(base, toxic)").norms == {-0.26}


REFUSED = {
    "": "invalid syntax",
    "a +": "invalid syntax",
    "a $ b": "character 3: invalid syntax",
    "a b": "invalid syntax",
    "(a + b": r"character 1: '\(' was never closed",
    "3": "a number alone is no law",
    "a + 1": "a number can't be added to a law",
    "a*b": "two laws can't be multiplied",
    "b - 1/a": "character 5: a law can't be divided by",
    "a/0": "division by zero",
    "a/(2 - 2)": "division by zero",
    "max(a)": "max takes two laws or more",
    "b + min(a, 1)": "character 5: min takes two laws or more, and no number alone",
    "abs(a)": r"'abs\(a\)' means nothing here",
    "a**2": "means nothing here",
    "a if b else c": "means nothing here",
    "a.real": "means nothing here",
    "True*a": "'True' means nothing here",
    "1e9*a": "a number is too large",
    "a - a": "add up to 0, and the law divides by their sum",
    "0.5*a + 0.5*b - c": "add up to 0",
    "a - max(a, 2*b)*0.5 - 0.5*c": "add up to 0 for some choice of its max and min",
    "(" * 900 + "a" + ")" * 900: "nested",
    "a + " * 600 + "a": "a formula of 2401 characters; at most 2000",
    " + ".join(f"max({1 + 0.001 * 2**i}*a, b{i})" for i in range(14)): "more than 4096 sums of weights",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20])
def test_what_is_no_formula_is_refused(text):
    with pytest.raises(PolicyError, match=REFUSED[text]):
        parse_formula(text)


def test_long_sums_are_read():
    text = " + ".join(f"p{i}" for i in range(300))
    assert len(parse_formula(text).names) == 300
