"""``moralguard score`` as a user meets it, on the shipped discriminator."""

import csv
import io
import json
import sys
from dataclasses import dataclass

import pytest

import moralguard
from moralguard import cli
from moralguard.cli import console
from moralguard.cli.texts import read_texts
from moralguard.errors import DataError

THREAT = "I will kill you tonight, you worthless idiot."
CALM = "The library opens at nine on weekdays."
VALUE = ("--value", "no_threat")


@dataclass
class Done:
    stdout: str
    stderr: str

    @property
    def said(self):
        """What was said on standard error, without the frame and the line breaks that typer puts in."""
        return " ".join(self.stderr.replace("│", " ").split())


@pytest.fixture(scope="module")
def discriminator():
    return moralguard.Discriminator.load()


@pytest.fixture
def command(monkeypatch, capsys):
    """Call the entry point in this process."""

    def call(*arguments, stdin=b"", expect=0):
        monkeypatch.setattr(sys, "argv", ["moralguard", "score", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        assert code == expect, (code, out, err)
        assert "Traceback" not in err
        return Done(out, err)

    return call


@pytest.fixture
def run(command, discriminator, monkeypatch):
    """The command with the discriminator that is loaded already: every call would read its weights again."""
    monkeypatch.setattr(moralguard.Discriminator, "load", lambda *_, **__: discriminator)
    monkeypatch.setattr(console.out, "width", 100)
    return command


def test_a_statement_is_scored_and_the_exit_code_says_whether_it_is_kept(command):
    value = ("--value", "The text does not threaten anyone.")
    broken = command(THREAT, *value, "--threshold", "1", expect=3)
    assert "1 text: 1 breaks a value (the-text-does-not-threaten-anyone 1)" in broken.stdout
    kept = command(CALM, *value, "--threshold", "0")
    assert "1 text: every value is kept" in kept.stdout


def test_json_agrees_with_the_discriminator(run, discriminator):
    data = json.loads(run(THREAT, CALM, *VALUE, "--value", "no_hate", "--context", "Japan", "--json", "--no-fail").stdout)
    expected = discriminator.judge([THREAT, CALM], ["no_threat", "no_hate"], "Japan")
    assert [list(text["scores"].values()) for text in data["texts"]] == [
        pytest.approx(row, abs=1e-5) for row in expected.probability.tolist()
    ]
    assert [text["verdict"] for text in data["texts"]] == [resolution.verdict for resolution in expected.resolve()]
    assert [text["row"] for text in data["texts"]] == [1, 2]
    assert [value["id"] for value in data["values"]] == ["no_threat", "no_hate"]
    assert data["context"] == "Japan"
    assert data["broken"] == {name: sum(name in text["broken"] for text in data["texts"]) for name in ("no_threat", "no_hate")}


def test_a_threat_breaks_and_a_calm_text_keeps(run):
    data = json.loads(run(THREAT, CALM, *VALUE, "--json", expect=3).stdout)
    assert [text["broken"] for text in data["texts"]] == [["no_threat"], []]
    assert [text["verdict"] for text in data["texts"]] in (["breaks", "silent"], ["breaks", "keeps"])


def test_no_fail_gives_0_and_changes_nothing_else(run):
    arguments = (THREAT, *VALUE, "--threshold", "1", "--format", "jsonl")
    assert run(*arguments, "--no-fail").stdout == run(*arguments, expect=3).stdout


def test_a_policy_and_values_together_with_distinct_ids(run):
    same_start = "The text does not insult, demean or threaten animals."
    again = "The text does not insult, demean or threaten plants."
    arguments = ("--policy", "detox", "--value", same_start, "--value", again, "--value", again, "--json", "--no-fail")
    data = json.loads(run(CALM, *arguments).stdout)
    name = "the-text-does-not-insult-demean"
    assert list(data["texts"][0]["scores"]) == ["respectful", "clean-language", name, f"{name}-2"]


def test_every_file_form_gives_the_same_scores(run, tmp_path):
    files = {
        "lines.txt": f"{THREAT}\n\n  \n{CALM}\n",
        "table.csv": f'id,text\n1,"{THREAT}"\n2,"{CALM}"\n',
        "objects.jsonl": f"{json.dumps({'text': THREAT})}\n\n{json.dumps({'text': CALM})}\n",
    }
    found = {}
    for name, content in files.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())  # a byte order mark is no part of the first text or column
        found[name] = json.loads(run(tmp_path / name, *VALUE, "--json", "--no-fail").stdout)["texts"]
    found["-"] = json.loads(run("-", *VALUE, "--json", "--no-fail", stdin=files["lines.txt"].encode()).stdout)["texts"]
    assert {name: [text["row"] for text in texts] for name, texts in found.items()} == {
        "lines.txt": [1, 4],
        "table.csv": [1, 2],
        "objects.jsonl": [1, 3],
        "-": [1, 4],
    }
    for texts in found.values():
        assert [text["text"] for text in texts] == [THREAT, CALM]
        assert [text["scores"] for text in texts] == [text["scores"] for text in found["-"]]


def test_rows_of_several_sources_say_which(run, tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text(CALM)
    texts = json.loads(run(CALM, file, *VALUE, "--json", "--no-fail").stdout)["texts"]
    assert [(text["source"], text["row"]) for text in texts] == [("", 1), (str(file), 1)]
    assert "lines.txt:1" in run(CALM, file, *VALUE, "--no-fail").stdout


def test_csv_reads_back(run):
    text = 'He said "stop; now", and\nleft, =1+1'
    out = run(text, CALM, *VALUE, "--value", "no_hate", "--threshold", "1", "--format", "csv", "--no-fail").stdout
    rows = list(csv.DictReader(io.StringIO(out, newline="")))
    assert list(rows[0]) == ["row", "text", "no_threat", "no_hate", "verdict", "broken"]
    assert [row["text"] for row in rows] == [text, CALM]
    for row in rows:
        assert row["broken"].split(";") == [name for name in ("no_threat", "no_hate") if float(row[name]) < 1] or row["broken"] == ""


def test_output_file_and_its_ending(run, tmp_path):
    arguments = (CALM, *VALUE, "--no-fail")
    for name, option in (("a.csv", "csv"), ("a.json", "json"), ("a.jsonl", "jsonl"), ("a.txt", "table")):
        done = run(*arguments, "--output", tmp_path / name)
        assert done.stdout == ""
        assert CALM not in done.stderr
        if option != "table":
            assert (tmp_path / name).read_bytes().decode() == run(*arguments, "--format", option).stdout
    assert CALM in (tmp_path / "a.txt").read_text()
    source = tmp_path / "source.txt"
    source.write_text(CALM)
    assert "overwritten" in run(source, *VALUE, "--output", source, expect=1).said
    assert source.read_text() == CALM
    assert "create it first" in run(*arguments, "--output", tmp_path / "nowhere" / "a.csv", expect=1).said
    assert "is a folder" in run(*arguments, "--output", tmp_path, expect=1).said


def test_explain_adds_what_the_score_rests_on(run):
    for method in ("occlusion", "gradient"):
        arguments = (THREAT, *VALUE, "--explain", "--spans-method", method, "--no-fail")
        (explained,) = json.loads(run(*arguments, "--json").stdout)["texts"][0]["explanation"]
        assert explained["value"] == "no_threat"
        assert explained["probability"] == pytest.approx(1 - explained["relevance"] * (1 - explained["valence"]))
        assert explained["spans"]
        assert all(THREAT[span["start"] : span["end"]] == span["text"] for span in explained["spans"])
    shown = " ".join(run(*arguments).stdout.split())
    assert f"relevance {explained['relevance']:.3f}" in shown
    assert f'"{explained["spans"][0]["text"]}" {explained["spans"][0]["weight"]:+.3f}' in shown
    (row,) = csv.DictReader(io.StringIO(run(*arguments, "--format", "csv").stdout))
    assert json.loads(row["no_threat.spans"]) == explained["spans"]


def test_markup_and_control_characters_are_shown_and_not_obeyed(run):
    text = "[bold]Hi[/bold] [/red] :smile: \x1b[2J\x07 there"
    shown = run(text, *VALUE, "--no-fail").stdout
    assert "[bold]Hi[/bold] [/red] :smile: [2J there" in shown
    assert "\x1b" not in shown
    explained = run(text, *VALUE, "--explain", "--no-fail").stdout
    assert explained.count("[bold]Hi[/bold] [/red] :smile:") == 2
    assert json.loads(run(text, *VALUE, "--format", "jsonl", "--no-fail").stdout)["text"] == text


def test_the_table_keeps_to_the_width_and_marks_each_row(run):
    shown = run("long " * 200, CALM, *VALUE, "--policy", "balanced", "--no-fail").stdout.splitlines()
    assert max(map(len, shown)) <= 100
    assert "…" in "".join(shown)
    assert sum(CALM in line for line in shown) == 1


def test_more_texts_than_a_chunk(run, tmp_path, monkeypatch):
    monkeypatch.setattr("moralguard.cli.score._CHUNK", 2)
    file = tmp_path / "lines.txt"
    file.write_text(f"{THREAT}\n{CALM}\n" * 2 + THREAT)
    texts = json.loads(run(file, *VALUE, "--json", "--no-fail").stdout)["texts"]
    assert [text["row"] for text in texts] == [1, 2, 3, 4, 5]
    assert [text["scores"] for text in texts[:2]] == [text["scores"] for text in texts[2:4]]


def test_list_values(command):
    assert "no_threat" in command("--list-values").stdout
    assert json.loads(command("--list-values", "--json").stdout)["no_threat"]["en"]


@pytest.mark.parametrize(
    ("arguments", "code", "messages"),
    [
        (("x",), 2, ["--policy detox", "no_offense", "--list-values"]),
        ((*VALUE,), 2, ["give a text"]),
        (("x", *VALUE, "--json", "--format", "csv"), 2, ["contradict"]),
        (("x", *VALUE, "--format", "xml"), 2, ["jsonl"]),
        (("x", *VALUE, "--threshold", "1.5"), 2, ["--threshold"]),
        (("x", "--value", "no_threats"), 1, ["did you mean 'no_threat'?"]),
        (("x", "--value", " "), 1, ["empty"]),
        (("x", "--policy", "detoxx"), 1, ["did you mean 'detox'?"]),
        (("nowhere.csv", *VALUE), 1, ["'nowhere.csv' isn't there", "`-`"]),
        (("-", *VALUE), 1, ["standard input: no text"]),
        (("-", *VALUE, "--encoding", "utf-99"), 1, ["no text encoding 'utf-99'"]),
    ],
)
def test_mistakes_are_one_message(command, arguments, code, messages):
    done = command(*arguments, expect=code)
    for message in messages:
        assert message in done.said
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("name", "content", "messages"),
    [
        ("a.csv", b"comment,label\nhello,1\n", ["no column 'text'", "'comment', 'label'", "--field"]),
        ("a.csv", b"", ["no column 'text'", "none"]),
        ("a.csv", b"id,text\n1,one\n2\n", ["row 2", "line 3"]),
        ("a.csv", b'text\n"one" two\n', ["begins at line 2", "isn't CSV"]),
        ("a.csv", b"text\n", ["no text there"]),
        ("a.jsonl", b'{"text": "secret"}\n\n{"text": secret}\n', ["line 3", "JSON object"]),
        ("a.jsonl", b'{"body": "secret"}\n', ["line 1", "'body'", "--field"]),
        ("a.jsonl", b'["secret"]\n', ["line 1", "found list"]),
        ("a.ndjson", b'{"text": null}\n', ["line 1", "NoneType"]),
        ("a.txt", b"caf\xe9\n", ["offset 3 (0xe9, line 1)", "--encoding latin-1"]),
        ("a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n\xff", ["offset 13 (0xff, line 3)"]),
        ("a.txt", "text".encode("utf-16"), ["offset 0", "--encoding utf-16"]),
        ("a.txt", b" \n\n", ["no text there"]),
        ("a.pdf", b"secret", ["kind that isn't read", ".txt"]),
    ],
)
def test_errors_in_files_name_the_place_and_not_the_text(tmp_path, name, content, messages):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_texts([str(file)], "text", "utf-8")
    for message in (*messages, name):
        assert message in str(error.value)
    assert "secret" not in str(error.value)


def test_fields_and_encodings_and_odd_line_ends(tmp_path):
    def texts(name, content, field="text", encoding="utf-8"):
        (tmp_path / name).write_bytes(content)
        return [(row.row, row.text) for row in read_texts([str(tmp_path / name)], field, encoding)]

    assert texts("a.txt", b"caf\xe9\x85\r\nb", encoding="latin-1") == [(1, "caf\xe9\x85"), (2, "b")]
    assert texts("a.txt", "one\ntwo".encode("utf-16"), encoding="utf-16") == [(1, "one"), (2, "two")]
    assert texts("a.csv", b'n,body\n1,"two\nlines"\n2,\n3,c\n', field="body") == [(1, "two\nlines"), (2, ""), (3, "c")]
    assert texts("a.jsonl", '{"body": "a\u2028b"}\n{"body": "\\ud800"}'.encode(), field="body") == [(1, "a\u2028b"), (2, "\ufffd")]


def test_a_text_that_only_looks_odd_is_a_text():
    odd = ["a" * 5000, "two\nlines.txt", "nul\0", "~", "../..", ""]
    assert [row.text for row in read_texts(odd, "text", "utf-8")] == odd
