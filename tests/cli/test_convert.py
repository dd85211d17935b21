"""`modicum convert` as a user runs it."""

import json
import sys

import pytest

import modicum
from modicum.cli import main
from tests.parity.families import make


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["modicum", "convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main.run()
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


def test_writes_a_folder_that_generates(tmp_path, monkeypatch, capsys):
    goal = tmp_path / "gqa"
    code, out, err = run(monkeypatch, capsys, "modicum-code-draft", goal, "--kv-heads", 2)
    assert (code, err) == (0, "")
    assert out == f"{goal}: 8 -> 2 key-value heads by mean, keys and values 512 -> 128 numbers per token\n"
    model = modicum.load(goal)
    assert model.config.n_kv_heads == 2
    assert modicum.generate(model, "def f(x):", max_new_tokens=3, temperature=0).tokens[0]
    code, _, err = run(monkeypatch, capsys, "modicum-code-draft", goal, "--kv-heads", 4)
    assert code == 2
    assert "already holds files" in err
    code, out, _ = run(monkeypatch, capsys, "modicum-code-draft", goal, "--kv-heads", 4, "--force", "--json")
    assert json.loads(out)["kv_heads"] == [8, 4]
    assert modicum.load(goal).config.n_kv_heads == 4


def test_says_where_transformers_cannot_follow(tmp_path, monkeypatch, capsys):
    make("gpt_neox", tmp_path / "source")
    capsys.readouterr()
    code, _, err = run(monkeypatch, capsys, tmp_path / "source", tmp_path / "gqa", "--kv-heads", 2)
    assert code == 0
    assert err == "transformers has no grouped form of this family: the folder loads here alone\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--kv-heads", 3], "3 key-value heads do not divide the checkpoint's 8: choose one of 1, 2, 4, 8"),
        (["--kv-heads", 2, "--method", "middle"], "`method` is 'middle': choose one of first, mean, merged, random"),
    ],
)
def test_refusals_write_nothing(arguments, sentence, tmp_path, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "modicum-code-draft", tmp_path / "gqa", *arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert list(tmp_path.iterdir()) == []
