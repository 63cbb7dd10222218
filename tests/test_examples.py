"""The examples run as a newcomer would run them, in processes of their own."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moralguard.controls.registry import control_names
from moralguard.errors import PolicyError
from moralguard.policy import Policy

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
THIRD_PARTY = EXAMPLES / "third_party_control"


def run(command: list[str], **environment: str) -> str:
    # one thread: several processes that each take all cores are far slower than they need be
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *command], env=settings, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_every_example_is_tested() -> None:
    # those on ONNX and in serving stacks are run in test_numpy_processor.py, test_ort_genai.py and test_llamacpp.py
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == [
        *("judge_texts.py", "llamacpp_generate.py", "onnx_genai.py", "onnx_generate.py", "stream.py", "wrap_generate.py", "write_policy.py")
    ]
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 65


def test_judge_texts() -> None:
    out = run([str(EXAMPLES / "judge_texts.py")])
    lines = out.splitlines()
    japan, states = (float(next(line for line in lines if line.startswith(place)).rsplit(" ", 1)[1]) for place in ("Japan", "the United"))
    assert japan < states
    assert "decided_by=('kind',)" in out
    assert any(line.startswith("refused:") and "no-insult" in line for line in lines)


@pytest.mark.smollm
def test_wrap_generate() -> None:
    out = run([str(EXAMPLES / "wrap_generate.py")])
    blocks = [block.splitlines() for block in out.strip().split("\n\n")]
    titles = [block[0] for block in blocks[:3]]
    assert titles == ["unguarded", "logits_processor=[guard.logits_processor()]", "with guard.attach(model)"]
    unguarded, processor, attached = (block[1:] for block in blocks[:3])
    assert len(unguarded) == 2
    assert processor == attached, "both ways guard alike"
    assert unguarded != processor
    counted = re.fullmatch(r"48 tokens emitted, 48 guarded, (\d+) of them by an active control", blocks[3][0])
    assert 0 < int(counted[1]) < 48, "the gate leaves the weather alone"
    assert processor[1] == unguarded[1]


@pytest.mark.smollm
def test_stream() -> None:
    text, _, table = run([str(EXAMPLES / "stream.py")]).partition("\n\ndrawn")
    assert text.startswith("Shut up, you stupid")
    rows = table.splitlines()[1:]
    assert len(rows) == 16
    tokens = [ast.literal_eval(f"'{row.split(chr(39))[1]}'") for row in rows if row.startswith("'")]
    assert len(tokens) > 10
    assert all(token in text for token in tokens), "the same seed gives the same text, streamed or not"
    assert any(row.endswith("<- changed") for row in rows)


@pytest.mark.smollm
def test_write_policy() -> None:
    out = run([str(EXAMPLES / "write_policy.py")])
    assert "the same policy both ways: True" in out
    assert "- control: self-debias@1" in out
    assert "did you mean 'decay_constant'?" in out
    free, guarded = out.strip().splitlines()[-2:]
    assert free.startswith("no policy:")
    assert guarded.startswith("no-gossip:")
    assert free.partition("My boss is a")[2] != guarded.partition("My boss is a")[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed the third-party package; not built in place, which would litter the examples."""
    for name in ("pip", "setuptools"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"installing the third-party example needs {name} in this environment")
    root = tmp_path_factory.mktemp("third_party")
    source = root / "source"
    shutil.copytree(THIRD_PARTY, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__", ".pytest_cache"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    run(["-m", "pip", "install", *options, "--target", str(root / "site"), str(source)], PIP_ROOT_USER_ACTION="ignore")
    return root / "site"


LOAD = """
import json, sys
import moralguard as mg
from moralguard.testing import tiny_model

def tokens(policy):
    return mg.Guard(policy, tiny_model()).generate([[1, 2, 3]], max_new_tokens=6, do_sample=False).token_ids[0]

empty = mg.Policy()
free = tokens(empty)
policy = mg.Policy.load({"controls": [{"control": "discouraged-words@1", "discouraged": free, "bias": -1000}]})
print(json.dumps({"module": type(policy.controls[0]).__module__, "free": free, "kept": tokens(policy), "yaml": policy.as_yaml()}))
"""


def test_a_policy_names_the_control_of_an_installed_package(installed: Path) -> None:
    found = json.loads(run(["-c", LOAD], PYTHONPATH=str(installed)))
    assert found["module"] == "moralguard_discouraged_words"
    assert "control: discouraged-words@1" in found["yaml"]
    assert not set(found["free"]) & set(found["kept"])


def test_without_the_package_the_control_is_unknown() -> None:
    if "discouraged-words" in control_names():
        pytest.skip("the example package is installed in this environment")
    with pytest.raises(PolicyError, match="there is no control 'discouraged-words'"):
        Policy.load({"controls": [{"control": "discouraged-words@1", "discouraged": [1]}]})


def test_the_packages_own_tests_pass(installed: Path, tmp_path: Path) -> None:
    """Among them check_control."""
    tests = shutil.copytree(THIRD_PARTY / "tests", tmp_path / "tests")
    out = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tests)], PYTHONPATH=str(installed))
    assert " passed" in out
    assert "skipped" not in out
