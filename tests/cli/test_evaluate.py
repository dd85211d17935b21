"""`modicum evaluate` as a user runs it."""

import json
import sys

import pytest

from modicum.cli import main


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["modicum", "evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main.run()
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.py"
    path.write_text("def add(a, b):\n    return a + b\n" * 12)
    return path


def test_models_side_by_side(text, tmp_path, monkeypatch, capsys):
    plot = tmp_path / "quality.png"
    models = ["modicum-code-target", "modicum-code-draft"]
    arguments = [*models, "--data", text, "--contexts", "16,40", "--dtype", "float32", "--plot", plot]
    code, out, err = run(monkeypatch, capsys, *arguments, "--json")
    target, draft = json.loads(out)
    assert (code, err) == (0, "")
    assert (target["divergence"], target["query_heads"]) == (0, 8)
    assert draft["divergence"] > 0
    assert draft["nats_per_token"] > target["nats_per_token"] > 0
    assert set(draft["ms_per_token"]) == {"16", "40"}
    assert target["kv_bytes_per_token"] == 2 * 8 * 8 * 32 * 4
    assert plot.read_bytes()[:4] == b"\x89PNG"
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert (code, "exists: choose another" in err) == (2, True)
    # The same numbers when the original is named apart.
    code, out, _ = run(monkeypatch, capsys, models[1], "--original", models[0], *arguments[2:-2], "--json")
    assert json.loads(out)[0]["divergence"] == pytest.approx(draft["divergence"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "none.txt"], "data source none.txt does not exist"),
        (["--data", "text.py", "--contexts", "a"], "--contexts a is not a list of lengths"),
        (["--data", "text.py", "--contexts", "512"], "more than the model's 512: give a shorter one"),
    ],
)
def test_refusals(arguments, sentence, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(monkeypatch, capsys, "modicum-code-draft", *arguments)
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1
