"""The command line: one-line refusals, exit codes, streams, and batches that survive an interruption."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

import modicum
from modicum import api
from modicum.cli import main
from modicum.train.tokenizer import tokenizer_files, train_tokenizer
from tests.helpers import perturbed, tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target and a draft on disk, with a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    target = tiny(vocab_size=300)
    files = tokenizer_files(train_tokenizer(["def f(x):\n    return x\n"] * 5, 300), 97)
    for name, model in (("target", target), ("draft", perturbed(target, 1, 0.05))):
        model.files = files
        modicum.save(model, root / name)
    return root


def call(monkeypatch, capsys, *arguments):
    """Exit code, stdout and stderr of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["modicum", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main.run()
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


def test_importing_costs_nothing():
    code = "import sys, modicum; print({'torch', 'transformers', 'rich', 'typer'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
    code = "import sys, modicum.cli.main; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize("verb", ["generate", "compare", "inspect", "train", "demo"])
def test_help(monkeypatch, capsys, verb):
    code, out, _ = call(monkeypatch, capsys, verb, "--help")
    assert code == 0
    assert "Usage" in out


def test_generate_streams_the_text(monkeypatch, capsys, folders):
    arguments = ["--prompt", "def f", "--temperature", "0", "--max-new-tokens", "9", "--ignore-eos"]
    code, out, err = call(monkeypatch, capsys, "generate", folders / "target", *arguments)
    expected = modicum.generate(
        modicum.load(folders / "target"), "def f", temperature=0, max_new_tokens=9, ignore_eos=True
    )
    assert (code, out) == (0, expected.texts[0] + "\n")
    assert "9 tokens" in err
    draft = ["--draft", folders / "draft", "-k", "3"]
    code, out, err = call(monkeypatch, capsys, "generate", folders / "target", *arguments, *draft)
    assert (code, out) == (0, expected.texts[0] + "\n")
    assert "tokens per target call, accepted by position" in err


def test_generate_json_and_stdin(monkeypatch, capsys, folders):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(read=lambda: "def f"))
    code, out, _ = call(
        monkeypatch,
        capsys,
        "generate",
        folders / "target",
        "--prompt",
        "-",
        "--json",
        "--seed",
        "3",
        "--draft",
        "ngram",
    )
    result = json.loads(out)
    assert code == 0
    assert set(result) == {"texts", "tokens", "finish_reasons", "stats"}


def refusals(root, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (broken / name).write_bytes((root / "target" / name).read_bytes())
    weights = (root / "target" / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "perceiver9"}')
    (unknown / "model.safetensors").write_bytes(weights)
    target, prompt = root / "target", ["--prompt", "x"]
    return [
        (["generate", tmp_path / "missing", *prompt], 1, "does not exist"),
        (["generate", empty, *prompt], 1, "has no config.json"),
        (["generate", broken, *prompt], 1, "not a complete safetensors file"),
        (["generate", unknown, *prompt], 1, "perceiver9"),
        (["generate", target, *prompt, "--draft", "ngram", "-k", "0"], 2, "-k 0 drafts nothing"),
        (["generate", target, "--prompt", ""], 2, "the prompt is empty"),
        (["generate", target, "--prompt", "x" * 500], 2, "the model's context is 97"),
        (["generate", target, *prompt, "--top-p", "0"], 2, "top_p is 0.0"),
        (["generate", target, *prompt, "--temperature", "-1"], 2, "temperature is -1.0"),
        (["generate", target], 2, "give either --prompt"),
        (["generate", target, "--prompts", "in.jsonl"], 2, "--prompts needs --out"),
        (["generate", target, "--prompts", "in.jsonl", "--out", "/nowhere/out.jsonl"], 2, "/nowhere is not a folder"),
        (["generate", target, "--promt", "x"], 2, "--prompt"),
        (["generat"], 2, "generate"),
        (["inspect", tmp_path / "missing"], 1, "does not exist"),
        (["train", tmp_path / "missing.toml"], 2, "give the path of a recipe"),
    ]


def test_refusals_are_one_line(monkeypatch, capsys, folders, tmp_path):
    for arguments, expected, sentence in refusals(folders, tmp_path):
        code, out, err = call(monkeypatch, capsys, *arguments)
        assert code == expected, (arguments, err)
        assert sentence in err
        assert err.startswith("modicum: ")
        assert err.count("\n") == 1, err
        assert out == ""


def test_another_tokenizer_is_refused(monkeypatch, capsys, folders, tmp_path):
    other = tiny(vocab_size=300)
    other.files = tokenizer_files(train_tokenizer(["something quite different"] * 5, 280), 97)
    modicum.save(other, tmp_path / "other")
    arguments = ["--draft", tmp_path / "other", "--prompt", "def"]
    code, _, err = call(monkeypatch, capsys, "generate", folders / "target", *arguments)
    assert code == 2
    assert "the draft's tokenizer is not the target's (token" in err


@pytest.fixture
def batch(folders, tmp_path):
    lines = [{"prompt": f"def f{i}", "id": i} for i in range(5)] + [{"tokens": [5, 7, 9]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ["generate", folders / "target", "--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl"]
    return [*common, "--seed", "5", "--max-new-tokens", "7", "--ignore-eos"], tmp_path / "out.jsonl"


def results(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "stats"} for line in lines]


def test_batch_resumes_where_it_stopped(monkeypatch, capsys, batch):
    arguments, out = batch
    assert call(monkeypatch, capsys, *arguments)[0] == 0
    whole = results(out)
    assert [line.get("id") for line in whole] == [0, 1, 2, 3, 4, None]
    assert whole[5]["prompt_tokens"] == [5, 7, 9]
    assert len(whole[5]["tokens"]) == 7
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert (code, "replace it with --force" in err) == (2, True)
    out.unlink()

    from modicum.cli import batch as batch_module

    monkeypatch.setattr(batch_module, "CHUNK", 2)
    generate, calls = api.generate, []

    def interrupted(*args, **kwargs):
        calls.append(args[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(api, "generate", interrupted)
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert "interrupted with 4 of 6 prompts done" in err
    assert "run the same command again to go on" in err
    assert not out.exists()
    code, _, err = call(monkeypatch, capsys, *arguments, "--temperature", "0.5")
    assert (code, "begun with other prompts or settings" in err) == (2, True)
    calls.clear()
    monkeypatch.setattr(api, "generate", lambda *a, **k: (calls.append(a[1]), generate(*a, **k))[1])
    assert call(monkeypatch, capsys, *arguments)[0] == 0
    assert sum(map(len, calls)) == 2
    assert results(out) == whole
    assert sorted(os.listdir(out.parent)) == ["in.jsonl", "out.jsonl"]


def test_a_bad_line_is_named(monkeypatch, capsys, batch, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    code, _, err = call(monkeypatch, capsys, *batch[0])
    assert (code, 'line 2 needs either "prompt"' in err) == (2, True)


def test_inspect(monkeypatch, capsys, folders):
    code, out, _ = call(monkeypatch, capsys, "inspect", folders / "target", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["parameters"] == sum(p.numel() for p in modicum.load(folders / "target").parameters())
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 10 * 4
    assert [(row["kv_heads"], row["saved"]) for row in facts["groups"]] == [(2, 0.0), (1, 0.5)]
    assert facts["groups"][1]["parameters"] == facts["parameters"] - 2 * 2 * 10 * 24
    assert call(monkeypatch, capsys, "inspect", folders / "target")[1].startswith("family           llama\n")


def test_compare(monkeypatch, capsys, folders, tmp_path):
    figure = tmp_path / "figure.png"
    small = ["--max-k", "2", "--repeats", "1", "--max-new-tokens", "8", "--out", figure, "--json"]
    code, out, _ = call(monkeypatch, capsys, "compare", folders / "target", "--draft", folders / "draft", *small)
    rows = json.loads(out)
    assert code == 0
    assert [row["k"] for row in rows] == [0, 1, 2]
    assert rows[0]["tokens_per_target_call"] == 1
    assert rows[2]["efficiency"] == pytest.approx(rows[2]["tokens_per_target_call"] / 3)
    assert figure.read_bytes().startswith(b"\x89PNG")
