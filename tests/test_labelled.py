"""Labelled texts: what every source gives, and what each mistake in one is told as."""

import csv
import gzip
import json
import sys
import types

import pytest

from moralguard.errors import DataError
from moralguard.fitting.labelled import LabelledText, checked, read_labelled, read_pairs

ROWS = [
    {"text": "a kind word", "label": 1, "split": "train"},
    {"text": "a cruel word", "label": 0, "split": "train"},
    {"text": "thank you", "label": 1, "split": "dev"},
    {"text": "go away", "label": 0, "split": "test"},
]
EXPECTED = [("a kind word", 1, "train"), ("a cruel word", 0, "train"), ("thank you", 1, "dev"), ("go away", 0, "test")]


def _plain(found):
    return [(row.text, row.label, row.split) for row in found.rows]


def _jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _gz(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def _csv(path, rows, encoding="utf-8"):
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("form", ["jsonl", "gz", "csv", "spreadsheet", "list", "generator", "by split", "files by split", "path text"])
def test_every_source_gives_the_same_rows(form, tmp_path):
    by_split = {name: [{k: v for k, v in row.items() if k != "split"} for row in ROWS if row["split"] == name] for name in ("train", "dev")}
    by_split["validation"] = by_split.pop("dev")
    by_split["test"] = [{"text": "go away", "label": 0, "split": None}]
    source = {
        "jsonl": lambda: _jsonl(tmp_path / "rows.jsonl", ROWS),
        "gz": lambda: _gz(tmp_path / "rows.jsonl.gz", ROWS),
        "csv": lambda: _csv(tmp_path / "rows.csv", ROWS),
        "spreadsheet": lambda: _csv(tmp_path / "rows.csv", ROWS, "utf-8-sig"),
        "list": lambda: ROWS,
        "generator": lambda: (row for row in ROWS),
        "by split": lambda: by_split,
        "files by split": lambda: {name: _jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in by_split.items()},
        "path text": lambda: str(_jsonl(tmp_path / "rows.jsonl", ROWS)),
    }[form]()
    found = read_labelled(source)
    assert _plain(found) == EXPECTED
    assert found.classes == ("0", "1")
    assert [row.text for row in found.of("train")] == ["a kind word", "a cruel word"]


def test_a_saved_data_set_is_read_with_the_package_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        read_labelled(tmp_path)
    package = types.ModuleType("datasets")
    package.load_from_disk = lambda path: ROWS if path == str(tmp_path) else None
    monkeypatch.setitem(sys.modules, "datasets", package)
    assert _plain(read_labelled(tmp_path)) == EXPECTED


@pytest.mark.parametrize(
    ("given", "numbers", "classes"),
    [
        ([True, False], [1, 0], ("0", "1")),
        (["true", "False"], [1, 0], ("0", "1")),
        ([1.0, "0.0", 2.0], [1, 0, 2], ("0", "1", "2")),
        (["joy", "anger", " joy "], [1, 0, 1], ("anger", "joy")),
    ],
)
def test_labels_are_numbers_truth_or_names(given, numbers, classes):
    found = read_labelled([{"text": f"text {i}", "label": label, "split": "train"} for i, label in enumerate(given)])
    assert [row.label for row in found.rows] == numbers
    assert found.classes == classes


@pytest.mark.parametrize("given", [["broken", "kept"], [0, 1], ["0", True], [0.0, "1.0"]])
def test_named_classes_set_the_order_and_numbers_count_in_it(given):
    rows = [{"text": f"text {i}", "label": label, "split": "train"} for i, label in enumerate(given)]
    found = read_labelled(rows, classes=("broken", "kept"))
    assert [row.label for row in found.rows] == [0, 1]
    assert found.classes == ("broken", "kept")
    assert [row.label for row in read_labelled(rows, classes=("kept", "broken")).rows] == ([1, 0] if given[0] == "broken" else [0, 1])


def test_a_class_may_be_named_true():
    rows = [{"text": "a", "label": "false", "split": "train"}, {"text": "b", "label": "true", "split": "train"}]
    assert [row.label for row in read_labelled(rows, classes=("true", "false")).rows] == [1, 0]


def test_fields_can_be_named_and_the_label_may_be_called_kept():
    rows = [{"comment": row["text"], "mean": row["label"], "split": "train"} for row in ROWS]
    assert [row.label for row in read_labelled(rows, text="comment", label="mean").rows] == [1, 0, 1, 0]
    for name in ("kept", "satisfies"):
        rows = [{"text": row["text"], "label": "", name: row["label"], "split": "train"} for row in ROWS]
        assert [row.label for row in read_labelled(rows).rows] == [1, 0, 1, 0]


def test_repeats_are_dropped_and_a_text_without_a_split_always_has_the_same():
    rows = [{"text": f"text {i % 100}", "label": i % 2} for i in range(200)]
    found = read_labelled(rows)
    assert len(found.rows) == 100
    assert set(found.rows) == set(read_labelled(reversed(rows)).rows)
    counts = {name: len(found.of(name)) for name in ("train", "dev", "test")}
    assert counts["train"] > 70
    assert sum(counts.values()) == 100


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"text": "a", "label": 1}, {"text": "  ", "label": 0}], "row 2: field 'text' must hold a text, not '  '"),
        ([{"text": None, "label": 1}], "row 1: field 'text' must hold a text, not None"),
        ([{"words": "a", "label": 1}], "name the field"),
        ([{"text": "a"}], "row 1: no label in label, kept, satisfies"),
        ([{"text": "a", "label": ""}], "row 1: no label"),
        ([{"text": "a", "label": float("nan")}], "row 1: no label"),
        ([{"text": "a", "label": 1, "split": "holdout"}], "row 1: split 'holdout' is none of train, dev, test"),
        ([{"text": "a", "label": 1, "split": "train"}, {"text": "b", "label": 1, "split": "train"}], "hold 1 alone"),
        ([{"text": "a", "label": 1, "split": "train"}, {"text": "b", "label": 0, "split": "test"}], "hold 1 alone"),
        ([], "hold nothing alone"),
        ([*ROWS, {"text": "thank you", "label": 1, "split": "train"}], "'thank you' stands in the splits dev and train"),
        ([*ROWS, {"text": "hm", "label": 2, "split": "dev"}], "no training row is of class 2"),
        ([{"text": "a", "label": 1, "split": "train"}, {"text": "b", "label": 2, "split": "train"}], "no training row is of class 0"),
        ([{"text": "a", "label": 7}, {"text": "b", "label": 10**12}], "leave most numbers up to 1000000000000 out"),
        (["a text"], "row 1 is a str; expected a mapping"),
        (3, "the rows are a int; expected a file"),
        ({"holdout": ROWS}, "split 'holdout' is none of"),
    ],
)
def test_what_is_wrong_with_rows(rows, told):
    with pytest.raises(DataError) as caught:
        read_labelled(rows)
    assert told in str(caught.value)


@pytest.mark.parametrize("label", [2, -1, "spam", 0.5])
def test_a_label_outside_the_named_classes(label):
    with pytest.raises(DataError, match=r"row 5: label .* is none of broken, kept \(0 to 1\)"):
        read_labelled([*ROWS, {"text": "hm", "label": label}], classes=("broken", "kept"))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("missing.jsonl", None, "missing.jsonl doesn't exist"),
        ("missing.csv", None, "missing.csv doesn't exist"),
        ("broken.jsonl", b'{"text": "a", "label": 1}\n{"text"', "broken.jsonl, line 2: expected a JSON object"),
        ("list.jsonl", b'["a"]\n', "expected a JSON object, found list"),
        ("broken.jsonl.gz", b"no gzip", "broken.jsonl.gz can't be read"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a", "label": 1}\n' * 50, mtime=0)[:-12], "cut.jsonl.gz can't be read"),
        ("latin.jsonl", '{"text": "\u00e9", "label": 1}'.encode("latin-1"), "latin.jsonl can't be read"),
        ("latin.csv", "text,label\n\u00e9,1\n".encode("latin-1"), "latin.csv can't be read"),
        ("short.csv", b"text,label\na\n", "short.csv, row 1: no label"),
        ("label.csv", b"text,label\na,1\nb,0\n,1\n", "label.csv, row 3: field 'text'"),
    ],
)
def test_what_is_wrong_with_a_file(name, content, told, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_labelled(path)
    assert told in str(caught.value)


def test_pairs_give_a_text_of_either_class_and_stay_in_one_split():
    rows = [{"toxic": f"rude {i}", "neutral": f"kind {i}"} for i in range(200)]
    found = read_pairs(rows, "neutral", "toxic")
    assert found.classes == ("toxic", "neutral")
    split = {row.text: row.split for row in found.rows}
    assert {row.label for row in found.rows if row.text.startswith("kind")} == {1}
    assert all(split[f"rude {i}"] == split[f"kind {i}"] for i in range(200))
    assert set(split.values()) == {"train", "dev", "test"}


def test_pairs_that_share_a_text_stay_together():
    # a chain: rude 0 - kind 0 - rude 1 - kind 1 - ...; a hash of each pair would spread it over the splits
    rows = [{"toxic": f"rude {(i + 1) // 2}", "neutral": f"kind {i // 2}"} for i in range(200)]
    rows[77]["split"] = "train"
    found = read_pairs(rows, "neutral", "toxic")
    assert {row.split for row in found.rows} == {"train"}
    assert len(found.rows) == 201
    many = [{"toxic": f"rude {i}", "neutral": f"kind {i % 40}"} for i in range(200)]
    split = {row.text: row.split for row in read_pairs(many, "neutral", "toxic").rows}
    assert len(set(split.values())) > 1
    assert all(split[f"rude {i}"] == split[f"kind {i % 40}"] for i in range(200))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"toxic": "a"}], "row 1: field 'neutral' must hold a text"),
        ([{"toxic": "", "neutral": "b"}], "a pair has one in 'neutral' and one in 'toxic'"),
        ([{"toxic": "a", "neutral": "b", "split": "test"}], "hold nothing alone"),
        (
            [{"toxic": "a", "neutral": "b", "split": "train"}, {"toxic": "a", "neutral": "c", "split": "test"}],
            "'a' stands in the splits train and test",
        ),
    ],
)
def test_what_is_wrong_with_pairs(rows, told, tmp_path):
    with pytest.raises(DataError) as caught:
        read_pairs(rows, "neutral", "toxic")
    assert told in str(caught.value)
    path = _jsonl(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(DataError) as caught:
        read_pairs(path, "neutral", "toxic")
    assert told in str(caught.value)


def test_checked_rows_keep_their_order():
    found = checked([("b", 1, "train"), ("a", 0, "train"), ("b", 1, "train")], ("no", "yes"))
    assert found.rows == (LabelledText("b", 1, "train"), LabelledText("a", 0, "train"))
