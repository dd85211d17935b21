"""`modicum evaluate` as a user runs it."""

import json
import sys

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

import modicum
from modicum import resources
from modicum.checkpoint.io import Checkpoint, read_checkpoint, write_checkpoint
from modicum.cli import main
from modicum.cli.evaluate import history
from tests.parity import t5


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
    names = ["modicum-code-target", "modicum-code-draft"]
    arguments = [*names, "--data", text, "--contexts", "16,40", "--dtype", "float32", "--plot", plot]
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
    code, out, _ = run(monkeypatch, capsys, names[1], "--original", names[0], *arguments[2:-2], "--json")
    assert json.loads(out)[0]["divergence"] == pytest.approx(draft["divergence"])


def converted(goal, kv_heads, **record):
    """The draft with so many key-value heads, and what its training.json would say of it."""
    before = modicum.convert_to_gqa(read_checkpoint(resources.model_presets()["modicum-code-draft"]), kv_heads)
    files = {**before.files, "training.json": json.dumps(record).encode()}
    write_checkpoint(Checkpoint(before.config, before.state_dict, files), goal)
    return goal


def test_how_models_were_made_goes_into_table_and_plot(text, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr("modicum.report.quality.write_png", lambda figure, path: drawn.extend(figure.axes))
    plain = converted(tmp_path / "plain", 2, conversion={"method": "mean"})
    entry = {"method": "mean", "control": False, "tokens": 30, "original_tokens": 600}
    trained = converted(tmp_path / "trained", 2, conversion={"method": "mean"}, uptrained=[entry])
    arguments = ["modicum-code-draft", plain, trained, "--data", text, "--max-tokens", 60, "--contexts", 16]
    code, out, _ = run(monkeypatch, capsys, *arguments, "--plot", tmp_path / "quality.png", "--json")
    assert code == 0
    keys = ("method", "fraction", "control", "kv_heads")
    rows = [tuple(row[key] for key in keys) for row in json.loads(out)]
    assert rows == [(None, 0.0, True, 8), ("mean", 0.0, False, 2), ("mean", 0.05, False, 2)]
    labels = [axis.get_xlabel() for axis in drawn]
    assert labels[1:] == ["training after conversion, % of the original's", "key-value heads"]
    code, out, _ = run(monkeypatch, capsys, *arguments)
    assert "made by" in out
    assert "5 %" in out
    code, out, _ = run(monkeypatch, capsys, "modicum-code-draft", *arguments[3:])
    assert "made by" not in out


ENTRY = {"method": "merged", "control": False, "tokens": 5, "original_tokens": 100}
CONTROL = {**ENTRY, "method": None, "control": True}


@pytest.mark.parametrize(
    ("record", "original", "expected"),
    [
        ({}, False, (None, None, False)),
        ({}, True, (None, 0.0, True)),
        ({"tokens": 100, "val_loss": 2.0}, True, (None, 0.0, True)),
        ({"conversion": {"method": "first"}}, False, ("first", 0.0, False)),
        ({"uptrained": [ENTRY]}, False, ("merged", 0.05, False)),
        ({"uptrained": [CONTROL]}, False, (None, 0.05, True)),
        # Two uptrainings, one after the other, and one of an original of unknown length.
        ({"uptrained": [ENTRY, {**ENTRY, "tokens": 10}]}, False, ("merged", 0.15, False)),
        ({"uptrained": [{**ENTRY, "original_tokens": None}]}, False, ("merged", None, False)),
        # What was converted before is no control, though it was left as it is.
        ({"conversion": {"method": "first"}, "uptrained": [CONTROL]}, False, ("first", 0.05, False)),
    ],
)
def test_history(record, original, expected):
    found = history({"training.json": json.dumps(record).encode()}, original=original)
    assert tuple(found[key] for key in ("method", "fraction", "control")) == pytest.approx(expected)


@pytest.fixture
def t5_folder(tmp_path):
    t5.make("v1.1", tmp_path / "t5", eos_token_id=1)
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(48)), *(f"<extra_id_{9 - i}>" for i in range(10))]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "t5" / "tokenizer.json"))
    return tmp_path / "t5"


def test_t5_is_judged_by_the_spans_it_fills_in(t5_folder, tmp_path, monkeypatch, capsys):
    write_checkpoint(modicum.convert_to_gqa(read_checkpoint(t5_folder), 1), tmp_path / "mqa")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * i % 48}" for i in range(150)))
    capsys.readouterr()
    arguments = [t5_folder, tmp_path / "mqa", "--data", text, "--window", 100, "--contexts", "16,40"]
    code, out, err = run(monkeypatch, capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    whole, mqa = json.loads(out)
    # Windows of 100 and 50 tokens ask for 15 and 8 of them, behind 5 and 3 sentinels, and for the end of each.
    assert whole["tokens"] == mqa["tokens"] == (15 + 5 + 1) + (8 + 3 + 1)
    assert (whole["bits_per_byte"], whole["divergence"]) == (None, 0)
    assert mqa["divergence"] > 0
    assert mqa["kv_bytes_per_token"] * 4 == whole["kv_bytes_per_token"]
    assert set(mqa["ms_per_token"]) == {"16", "40"}
    # The same places are asked for every time.
    again = json.loads(run(monkeypatch, capsys, *arguments, "--json")[1])
    assert again[1]["nats_per_token"] == mqa["nats_per_token"]
    monkeypatch.setenv("COLUMNS", "240")  # or a long path is broken into lines
    code, out, _ = run(monkeypatch, capsys, *arguments)
    assert (code, "mqa" in out) == (0, True)
    code, _, err = run(monkeypatch, capsys, t5_folder, "--data", text, "--window", 300)
    assert code == 2
    assert "a window of 300 tokens loses 15 spans and the tokenizer has 10 sentinels" in err


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
