"""README.md and README.zh-CN.md say the same: headings, code, links, figures; and every relative link leads somewhere."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MADE_TABLE = re.compile(r"^<!-- begin ([\w-]+) -->$.*?^<!-- end \1 -->$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
NUMBER = re.compile(r"(?<![\d.])\d*(?:[.,]\d+)+|\d{2,}")


@pytest.fixture(scope="module")
def texts():
    return [(ROOT / name).read_text(encoding="utf-8") for name in READMES]


def code(text):
    """The language and the lines of every fenced block, without comments."""
    return [(tag, [re.sub(r"\s*(?:^|(?<=\s))#.*$", "", line).rstrip() for line in body.splitlines()]) for tag, body in FENCE.findall(text)]


def relative_links(text):
    links = (link for link in LINK.findall(FENCE.sub("", text)) if not re.match(r"[a-z]+:|#", link))
    return {link.partition("#")[0] for link in links}


def numbers(text):
    """Every number of two digits or more, decimals among them, as often as it stands outside the tables that a program fills in."""
    return Counter(NUMBER.findall(MADE_TABLE.sub("", text)))


def test_the_chinese_one_links_to_the_english_one_at_its_top(texts):
    assert "README.md" in relative_links(texts[1].partition("\n# ")[0])


def test_headings_are_as_many_on_every_level(texts):
    english, chinese = ([len(marks) for marks in re.findall(r"^(#+) ", FENCE.sub("", text), re.MULTILINE)] for text in texts)
    assert english == chinese


def test_code_is_the_same_but_for_its_comments(texts):
    english, chinese = map(code, texts)
    assert len(english) > 8
    assert english == chinese


def test_tables_that_a_program_fills_in_are_the_same(texts):
    english, chinese = (MADE_TABLE.findall(text) for text in texts)
    assert english == chinese
    assert english


def test_links_are_the_same(texts):
    english, chinese = (relative_links(text) - set(READMES) for text in texts)
    assert english == chinese


@pytest.mark.parametrize("name", READMES)
def test_every_relative_link_leads_somewhere(name):
    links = relative_links((ROOT / name).read_text(encoding="utf-8"))
    assert sorted(link for link in links if not (ROOT / link).exists()) == []


def test_figures_are_the_same(texts):
    english, chinese = map(numbers, texts)
    assert {"only English": english - chinese, "only Chinese": chinese - english} == {"only English": Counter(), "only Chinese": Counter()}
