"""The command line as a user meets it, on the demo model."""

import io
import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

import moralguard
from moralguard import cli

pytestmark = pytest.mark.smollm

SHORT = ("--max-new-tokens", "8")


@dataclass
class Done:
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the entry point in this process: the same code as the installed command, without its start-up time."""

    def call(*arguments, stdin="", expect=0):
        monkeypatch.setattr(sys, "argv", ["moralguard", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        assert code == expect, (code, out, err)
        return Done(out, err)

    return call


def test_the_command_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "moralguard", "--version"], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == moralguard.__version__, done.stderr


def test_compare_shows_both_texts_and_what_acted(run):
    out = run("generate", "Shut up, you stupid", "--policy", "detox", "--compare", "--max-new-tokens", "24").stdout
    assert "unguarded" in out
    assert "guarded by detox" in out
    assert "tokens changed" in out
    assert "fudge" in out
    assert "dexperts" in out


def test_same_seed_same_text_and_another_seed_another(run):
    first, again, other = (run("generate", "Once upon a time", "--seed", seed, *SHORT).stdout for seed in ("1", "1", "2"))
    assert first == again
    assert first != other


def test_json_holds_text_trace_and_counterfactual(run, tmp_path):
    file = tmp_path / "trace.json"
    strong = ("--policy", "detox-strong")  # detox alone leaves such a prompt as it is
    printed = json.loads(run("generate", "The woman worked as a", *strong, "--json", "--compare", "--trace", str(file), *SHORT).stdout)
    assert printed == json.loads(file.read_text())
    (completion,) = printed["completions"]
    assert completion["prompt"] == "The woman worked as a"
    assert completion["unguarded_text"]
    assert len(completion["trace"]) == len(completion["token_ids"]) == 8
    record = completion["trace"][0]
    assert record["kl"] > 0
    assert set(record["contributions"]) == {"fudge", "dexperts"}
    assert record["changed"] == (record["token_id"] != record["counterfactual_id"])


def test_prompts_from_standard_input_and_files(run, tmp_path):
    assert run("generate", "-", "--temperature", "0", *SHORT, stdin="The capital of France is").stdout.strip()
    lines = tmp_path / "prompts.txt"
    lines.write_text("The capital of France is\n\nTwo plus two is\n")
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "The capital of France is"}\n{"prompt": "Two plus two is"}\n')
    texts = [
        [c["text"] for c in json.loads(run("generate", str(file), "--temperature", "0", "--json", *SHORT).stdout)["completions"]]
        for file in (lines, rows)
    ]
    assert len(texts[0]) == 2
    assert texts[0] == texts[1]


def test_a_value_statement_alone_acts(run):
    statement = "The text does not demean anyone because of their sex."
    data = json.loads(run("generate", "My neighbour says that women are", "--value", statement, "--json", "--compare", *SHORT).stdout)
    assert data["policy"] == "values"
    trace = json.loads(run("generate", "My neighbour says that women are", "--value", statement, "--json", "--compare", *SHORT).stdout)[
        "completions"
    ][0]["trace"]
    assert max(record["kl"] for record in trace) > 0.01


def test_chat_uses_the_template(run):
    chat = json.loads(run("generate", "Say hello.", "--chat", "--temperature", "0", "--json", *SHORT).stdout)["completions"][0]
    plain = json.loads(run("generate", "Say hello.", "--temperature", "0", "--json", *SHORT).stdout)["completions"][0]
    assert chat["text"] != plain["text"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "x", "--policy", "detoxx"), "did you mean 'detox'?"),
        (("generate", ""), "no text"),
        (("generate", "x", "--model", "./nowhere.gguf"), "isn't there"),
        (("policy", "show", "nowhere.yaml"), "isn't there"),
    ],
    ids=["policy", "empty", "model", "file"],
)
def test_mistakes_are_one_message_and_exit_code_1(run, arguments, message):
    done = run(*arguments, expect=1)
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_policy_commands(run, tmp_path):
    assert "detox" in run("policy", "list").stdout
    text = run("policy", "show", "detox").stdout
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert run("policy", "show", str(file)).stdout == text
    assert "SelfDebias" in json.loads(run("policy", "schema").stdout)["$defs"]
    assert "yes" in run("policy", "check", str(file)).stdout


def test_policy_check_says_why_a_control_does_not_run(run, tmp_path):
    from safetensors.torch import save_file
    from torch import eye

    save_file({"basis": eye(10, 2)}, tmp_path / "basis.safetensors")
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps({"controls": [{"control": "nullspace@1", "basis": str(tmp_path / "basis.safetensors")}]}))
    out = " ".join(run("policy", "check", str(file), expect=1).stdout.split())
    assert "nullspace@1" in out
    assert "576" in out
