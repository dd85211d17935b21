"""`modicum uptrain` as a user runs it."""

import json
import signal
import sys

import pytest

import modicum
from modicum.cli import main
from modicum.train.loop import Training
from tests.gqa.small import TOKENS, trained


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a trained model, and that of its text."""
    return trained(tmp_path_factory.mktemp("small"))


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["modicum", "uptrain", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main.run()
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(small, tmp_path, monkeypatch, capsys):
    arguments = [small[0], tmp_path / "gqa", "--kv-heads", 2, "--data", small[1], "--teacher", small[0], "--dry-run"]
    code, out, err = run(monkeypatch, capsys, *arguments, "--fraction", 0.1)
    assert (code, out) == (0, "")
    assert f"{small[0]}, 4 key-value heads -> 2 by merged, calibrated on the training text\n" in err
    assert "steps       3 of 72 tokens: 216 tokens, 10.00% of the original's\n" in err
    assert "rate        1.00e-03 after 1 steps of warm-up, adamw\n" in err
    assert f"teacher     {small[0]}, 90% of the loss\n" in err
    assert f"writes to   {tmp_path / 'gqa'}; until then the run is in {tmp_path / 'gqa.run'}\n" in err
    code, out, _ = run(monkeypatch, capsys, *arguments, "--tokens", 720, "--json")
    facts = json.loads(out)
    assert (facts["steps"], facts["original_tokens"], facts["kv_heads"]) == (10, TOKENS, [4, 2])
    assert list(tmp_path.iterdir()) == []


def test_ends_with_a_table_and_a_folder_that_generates(small, tmp_path, monkeypatch, capsys):
    arguments = [small[0], tmp_path / "gqa", "--kv-heads", 1, "--method", "first", "--data", small[1], "--tokens", 720]
    code, out, err = run(monkeypatch, capsys, *arguments, "--held-out", 0.5)
    assert code == 0
    assert "whole files (0.5)" in err
    assert "step 10: held out" in err
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows[1:]] == ["original", "converted", "uptrained"]
    assert [(row[1], row[3]) for row in rows[1:]] == [("4", "384"), ("1", "96"), ("1", "96")]
    assert float(rows[3][2]) < float(rows[2][2])
    model = modicum.load(tmp_path / "gqa")
    assert modicum.generate(model, "def", max_new_tokens=3, temperature=0, ignore_eos=True).tokens[0]
    # What is there is not replaced unless that is asked for.
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "already holds files" in err
    code, out, _ = run(monkeypatch, capsys, *arguments, "--control", "--force", "--json")
    facts = json.loads(out)
    assert (code, facts["control"], facts["kv_heads"]) == (0, True, [4, 4])
    assert facts["nats_per_token"]["converted"] is None


def test_ctrl_c_is_an_exit_code_and_resume_ends_the_run(small, tmp_path, monkeypatch, capsys):
    step = Training._step

    def interrupted(self, number):
        if number == 4:
            signal.raise_signal(signal.SIGINT)
        return step(self, number)

    arguments = [small[0], tmp_path / "gqa", "--kv-heads", 2, "--method", "mean", "--data", small[1], "--tokens", 720]
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", interrupted)
        code, out, err = run(monkeypatch, capsys, *arguments)
    assert (code, out) == (130, "")
    assert "stopped after step 5, saved: continue with --resume\n" in err
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "holds a run already: add --resume" in err
    code, out, _ = run(monkeypatch, capsys, *arguments, "--resume")
    assert code == 0
    assert "uptrained" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--kv-heads", 2, "--fraction", 0.1, "--tokens", 9],
            "`fraction` and `tokens` both give the budget: leave one",
        ),
        (["--tokens", 99], "`kv_heads` is missing: give the number of key-value heads, or ask for the control"),
        (["--kv-heads", 2, "--method", "middle"], "`method` is 'middle': choose one of"),
        (["--kv-heads", 3], "3 key-value heads do not divide the checkpoint's 4: choose one of 1, 2, 4"),
        (["--kv-heads", 2, "--tokens", 9], "a budget of 9 tokens is less than a step of 72: raise it"),
        (["--kv-heads", 2, "--fraction", 0], "`fraction` is 0.0: it must be above 0"),
        (["--kv-heads", 2, "--window", 65], "`window` is 65: the model's context is 64 tokens"),
        (["--kv-heads", 2, "--held-out", 1.5], "`held_out` is 1.5: give the share of files, between 0 and 1"),
        (["--kv-heads", 2, "--held-out", "none.txt"], "data source none.txt does not exist"),
        (["--kv-heads", 2, "--calibration", "none.txt"], "calibration text none.txt does not exist"),
        (
            ["--kv-heads", 2, "--method", "mean", "--calibration", "x"],
            "calibration is for aligned and merged: leave it out",
        ),
        (["--kv-heads", 2, "--teacher-weight", 2], "`teacher_weight` is 2.0: give a share from 0 to 1"),
        (["--kv-heads", 2, "--resume"], "nothing to resume: run without --resume first"),
    ],
)
def test_refusals_write_nothing(arguments, sentence, small, tmp_path, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, small[0], tmp_path / "gqa", "--data", small[1], *arguments)
    assert (code == 0, out) == (False, "")
    assert sentence in err
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_does_not_say_its_tokens(small, tmp_path, monkeypatch, capsys):
    model = modicum.load(small[0])
    del model.files["training.json"]
    modicum.save(model, tmp_path / "bare")
    arguments = [
        tmp_path / "bare",
        tmp_path / "gqa",
        "--kv-heads",
        2,
        "--data",
        small[1],
        "--held-out",
        0.3,
        "--dry-run",
    ]
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "bare does not say how many tokens it was trained on: give --original-tokens N, or the budget as" in err
    code, _, err = run(monkeypatch, capsys, *arguments, "--original-tokens", 1_000_000)
    assert code == 0
    # Batches of 8, the whole context as the window.
    assert "steps       98 of 512 tokens: 50,176 tokens, 5.02% of the original's\n" in err
    assert "rate        1.00e-04 after 5 steps of warm-up, adamw\n" in err
