"""Drafts by name on the command line: early exit, and folders that `modicum train` makes."""

import json
import subprocess
import sys

import pytest
import torch

import modicum
from modicum.cli import common, main
from modicum.speculative.drafters.early_exit import EarlyExitDrafter
from modicum.speculative.drafters.folder import KINDS, new_network
from modicum.speculative.drafters.make import make_drafter
from tests.helpers import tiny


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["modicum", "generate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main.run()
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


OPTIONS = ("--prompt", "def f(x):", "--max-new-tokens", 9, "--temperature", 0, "--dtype", "float32", "--json")


@pytest.fixture
def folder(tmp_path):
    """Untrained heads for the shipped target."""
    target = modicum.load("modicum-code-target", dtype="float32")
    modicum.save(KINDS["heads"][1](new_network(target, "heads", 3)), tmp_path / "heads")
    return tmp_path / "heads"


def test_every_way_of_naming_a_draft(folder, monkeypatch, capsys):
    code, plain, _ = run(monkeypatch, capsys, "modicum-code-target", *OPTIONS)
    assert code == 0
    for draft in ("self:2", "ngram", "modicum-code-draft", folder):
        code, out, err = run(monkeypatch, capsys, "modicum-code-target", "--draft", draft, *OPTIONS)
        assert (code, err) == (0, "")
        assert json.loads(out)["tokens"] == json.loads(plain)["tokens"]


def test_names_that_are_refused(folder, monkeypatch, capsys):
    for target, draft, sentence in (
        ("modicum-code-target", "self:9", "draft `self:9`: the target has 8 layers, choose from 1 to 8"),
        ("modicum-code-target", "self:", "write self:LAYERS, such as self:2"),
        ("modicum-code-draft", folder, "a llama of 8 layers, width 256 and 2048 tokens and the target is a llama of 1"),
        (folder, "ngram", "the target is a drafter, which only proposes"),
    ):
        code, out, err = run(monkeypatch, capsys, target, "--draft", draft, *OPTIONS)
        assert (code, out) == (2, "")
        assert sentence in err
        assert err.count("\n") == 1


def test_a_warning_is_one_line(tmp_path):
    for seed, name in ((0, "target"), (1, "other")):
        modicum.save(tiny(seed), tmp_path / name)
    network = new_network(modicum.load(tmp_path / "target"), "heads", 3)
    modicum.save(KINDS["heads"][1](network), tmp_path / "heads")
    (tmp_path / "in.jsonl").write_text('{"tokens": [1, 2, 3]}\n')
    command = ["generate", "other", "--draft", "heads", "--prompts", "in.jsonl", "--out", "out.jsonl"]
    script = "from modicum.cli.main import run; run()"
    done = subprocess.run(
        [sys.executable, "-c", script, *command, "--max-new-tokens", "3"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0
    lines = [line for line in done.stderr.splitlines() if "other weights" in line]
    assert lines == [
        "modicum: the draft was trained for a target with other weights: the text is right all the same, but fewer tokens "
        "may be accepted"
    ]


def test_pairs_as_generate_takes_them(folder):
    target, draft = common.load_pair("modicum-code-target", "self:3", "cpu", "float32")
    assert draft == "self:3"
    drafter = make_drafter(draft, 4)
    assert isinstance(drafter, EarlyExitDrafter)
    assert drafter.n_layers == 3
    loaded = common.load_pair("modicum-code-target", str(folder), "cpu", "bfloat16")[1]
    assert next(loaded.network.parameters()).dtype == torch.bfloat16
    assert make_drafter(loaded, 4) is loaded
    assert target.config.n_layers == 8
