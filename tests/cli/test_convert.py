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


def test_report_before_any_conversion(tmp_path, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "modicum-code-draft", "--report")
    assert code == 0
    assert "lost, of keys / values, by number of key-value heads" in out
    assert "blocks.0.attention" in out
    assert "by the weights alone" in err
    text = tmp_path / "text.py"
    text.write_text("import os\n\n\ndef main(path):\n    return os.path.basename(path)\n" * 40)
    arguments = ["--calibration", text, "--plot", tmp_path / "losses.png", "--json"]
    code, out, err = run(monkeypatch, capsys, "modicum-code-draft", *arguments)
    rows = json.loads(out)
    assert [row["kv_heads"] for row in rows] == [1, 2, 4]
    assert all(0 < row[name] < 1 for row in rows for name in ("keys", "values", "outputs"))
    # Fewer heads lose more.
    assert rows[0]["outputs"] > rows[1]["outputs"] > rows[2]["outputs"]
    assert (tmp_path / "losses.png").stat().st_size > 5000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["losses.png", "text.py"]
    code, _, err = run(monkeypatch, capsys, "modicum-code-draft", *arguments)
    assert code == 2
    assert "exists" in err


def test_calibrated_by_a_folder_and_recorded(tmp_path, monkeypatch, capsys):
    (tmp_path / "texts").mkdir()
    for name in "abc":
        (tmp_path / "texts" / f"{name}.py").write_text(f"class {name.upper()}:\n    def go(self):\n        pass\n" * 20)
    goal = tmp_path / "gqa"
    arguments = ["--kv-heads", 4, "--method", "merged", "--calibration", tmp_path / "texts"]
    code, _, err = run(monkeypatch, capsys, "modicum-code-draft", goal, *arguments)
    assert (code, err) == (0, "")
    record = json.loads((goal / "training.json").read_text())
    assert record["conversion"] == {"method": "merged", "kv_heads": 4, "calibrated": True}
    # Tokens are still those that the original was trained on; its loss is not this model's.
    assert record["tokens"] > 0
    assert "val_loss" not in record


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--kv-heads", 3], "3 key-value heads do not divide the checkpoint's 8: choose one of 1, 2, 4, 8"),
        (
            ["--kv-heads", 2, "--method", "middle"],
            "`method` is 'middle': choose one of aligned, first, mean, merged",
        ),
    ],
)
def test_refusals_write_nothing(arguments, sentence, tmp_path, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "modicum-code-draft", tmp_path / "gqa", *arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert list(tmp_path.iterdir()) == []
