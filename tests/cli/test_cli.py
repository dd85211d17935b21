"""The command line: one-line refusals, exit codes, streams, and batches that survive an interruption."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import modicum
from modicum import api, resources
from modicum.checkpoint.hf import language_config
from modicum.cli import main
from modicum.lm.decoder import Decoder
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


@pytest.mark.parametrize("verb", ["generate", "compare", "certify", "inspect", "train", "demo"])
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
        (
            ["generate", target, *prompt, "--draft", "ngram", "-k", "fast"],
            2,
            "give a whole number of at least 1, or auto",
        ),
        (["generate", target, *prompt, "--weights", "int4"], 2, "weights `int4` are not known"),
        (["compare", target, "--draft", "ngram", "-k", "0"], 2, "-k 0 drafts nothing"),
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


@pytest.mark.parametrize("place", [0, 3])
def test_debug_adds_the_traceback(monkeypatch, capsys, tmp_path, place):
    arguments = ["inspect", tmp_path / "missing"]
    arguments.insert(place, "--debug")
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert code == 1
    assert err.startswith("Traceback")
    assert "does not exist" in err.splitlines()[-1]


def test_ctrl_c_is_one_line(monkeypatch, capsys, folders):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "generate", interrupted)
    code, out, err = call(monkeypatch, capsys, "generate", folders / "target", "--prompt", "x")
    assert (code, out, err) == (130, "", "modicum: interrupted\n")


def test_recipes_by_name(tmp_path):
    for name in ("code-target", "code-target.toml", "recipes/code-target.toml"):
        assert resources.recipe_path(name).read_text().startswith("#")
    # Elsewhere, the name of a shipped recipe is still a wrong path.
    assert resources.recipe_path(tmp_path / "code-target.toml") == tmp_path / "code-target.toml"


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
    assert code == 130
    assert (code, "interrupted with 4 of 6 prompts done" in err) == (130, True)
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


def test_an_interrupted_resume_loses_nothing(monkeypatch, capsys, batch):
    arguments, out = batch
    partial = out.with_name("out.jsonl.partial")
    assert call(monkeypatch, capsys, *arguments)[0] == 0
    whole = results(out)
    out.unlink()

    from modicum.cli import batch as batch_module

    monkeypatch.setattr(batch_module, "CHUNK", 2)
    generate = api.generate

    def stopped_at(n_calls):
        calls = []

        def run(*args, **kwargs):
            calls.append(args[1])
            if len(calls) > n_calls:
                raise KeyboardInterrupt
            return generate(*args, **kwargs)

        return run

    for n_calls, done in ((1, 2), (0, 2), (1, 4)):
        monkeypatch.setattr(api, "generate", stopped_at(n_calls))
        code, _, err = call(monkeypatch, capsys, *arguments)
        assert (code, f"with {done} of 6 prompts done" in err) == (130, True)
        # As if the machine had gone down in the middle of a line.
        partial.write_bytes(partial.read_bytes() + b'{"line": 5, "resu')
    monkeypatch.setattr(api, "generate", generate)
    assert call(monkeypatch, capsys, *arguments)[0] == 0
    assert results(out) == whole


def test_a_partial_file_cut_before_its_first_line_starts_over(monkeypatch, capsys, batch):
    arguments, out = batch
    out.with_name("out.jsonl.partial").write_bytes(b'{"finger')
    assert call(monkeypatch, capsys, *arguments)[0] == 0
    assert len(results(out)) == 6


def test_a_prompt_that_cannot_run_is_refused_before_any_runs(monkeypatch, capsys, batch, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"tokens": [7] * 97}) + "\n")
    monkeypatch.setattr(api, "generate", lambda *_, **__: pytest.fail("a prompt was run"))
    code, _, err = call(monkeypatch, capsys, *batch[0])
    assert (code, "prompt 1 has 97 tokens" in err) == (2, True)


def test_lines_may_hold_unicode_line_separators(monkeypatch, capsys, batch, tmp_path):
    line = json.dumps({"prompt": "a\u2028b\u0085c"}, ensure_ascii=False)
    (tmp_path / "in.jsonl").write_text(line + "\n", encoding="utf-8")
    assert call(monkeypatch, capsys, *batch[0])[0] == 0
    assert json.loads(batch[1].read_text(encoding="utf-8"))["prompt"] == "a\u2028b\u0085c"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"prompt": "caf\xe9"}\n', "is not UTF-8 text (byte 15)"),
        (b'{"prompt": "a"}\n{"prompt": ""}\n', "line 2 must have a text"),
        (b'{"tokens": [3, "5"]}\n', "line 1 must have a text"),
        (b'{"prompt": \n', "line 1 is not JSON"),
        (b'\n\n{"prompt": 5}\n', "line 3 must have a text"),
        (b"\n", "has no prompts"),
    ],
)
def test_bad_files_are_one_line(monkeypatch, capsys, batch, tmp_path, content, sentence):
    (tmp_path / "in.jsonl").write_bytes(content)
    code, out, err = call(monkeypatch, capsys, *batch[0])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert sentence in err


def test_a_bad_line_is_named(monkeypatch, capsys, batch, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    code, _, err = call(monkeypatch, capsys, *batch[0])
    assert (code, 'line 2 needs either "prompt"' in err) == (2, True)


def test_prompts_as_lines_of_text(tmp_path):
    from modicum.cli.batch import read_texts

    # U+2028 ends a line for Python, not for a file of lines.
    (tmp_path / "in.txt").write_text("one\u2028two\n\nthree\n", encoding="utf-8")
    (tmp_path / "in.jsonl").write_text('{"prompt": "one\u2028two"}\n{"tokens": [5, 7]}\n', encoding="utf-8")
    assert read_texts(tmp_path / "in.txt") == ["one\u2028two", "three"]
    assert read_texts(tmp_path / "in.jsonl") == ["one\u2028two", [5, 7]]


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


def test_generate_with_int8_weights(monkeypatch, capsys, folders):
    arguments = ["--prompt", "def f", "--temperature", "0", "--max-new-tokens", "9", "--ignore-eos", "--json"]
    code, out, _ = call(monkeypatch, capsys, "generate", folders / "target", *arguments, "--weights", "int8")
    model = modicum.load(folders / "target").for_inference(weights="int8")
    expected = modicum.generate(model, "def f", temperature=0, max_new_tokens=9, ignore_eos=True)
    assert (code, json.loads(out)["tokens"]) == (0, expected.tokens)


def test_k_chosen_by_cost(monkeypatch, capsys, folders, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pair = [folders / "target", "--draft", folders / "draft", "-k", "auto", "--max-new-tokens", "20"]
    greedy = ["--prompt", "def f", "--temperature", "0", "--ignore-eos"]
    code, out, _ = call(monkeypatch, capsys, "generate", *pair, *greedy, "--json")
    plain = call(monkeypatch, capsys, "generate", folders / "target", *greedy, "--max-new-tokens", "20", "--json")[1]
    assert code == 0
    assert json.loads(out)["tokens"] == json.loads(plain)["tokens"]
    stats = json.loads(out)["stats"]
    assert sum(stats["loops_by_k"].values()) == stats["target_calls"]
    assert stats["mean_k"] is not None
    assert list((tmp_path / "cache" / "modicum" / "costs").iterdir())

    figure = tmp_path / "figure.png"
    code, out, _ = call(monkeypatch, capsys, "compare", *pair, "-k", "2", "--repeats", "1", "--out", figure, "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["k"] for row in rows] == [0, "auto", 2]
    assert rows[1]["efficiency"] == pytest.approx(rows[1]["tokens_per_target_call"] / (rows[1]["mean_k"] + 1))
    assert figure.read_bytes().startswith(b"\x89PNG")
    code, out, _ = call(monkeypatch, capsys, "compare", *pair, "--repeats", "1", "--out", figure, "--force")
    assert (code, "auto" in out) == (0, True)


def test_compare_without_matplotlib_is_refused_before_measuring(monkeypatch, capsys, folders, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(api, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    arguments = ["--draft", folders / "draft", "--out", tmp_path / "figure.png"]
    code, _, err = call(monkeypatch, capsys, "compare", folders / "target", *arguments)
    assert (code, "pip install 'modicum[plot]'" in err) == (1, True)


def test_inspect_does_not_take_a_mask_for_a_weight(monkeypatch, capsys, folders, tmp_path):
    sizes = {"vocab_size": 37, "n_positions": 41, "n_embd": 21, "n_layer": 2, "n_head": 3}
    gpt2 = Decoder(language_config({"model_type": "gpt2", **sizes}))
    modicum.save(gpt2, tmp_path / "gpt2")
    weights = tmp_path / "gpt2" / "model.safetensors"
    state = load_file(weights)
    mask = torch.ones(1, 1, 41, 41).tril().to(torch.uint8)
    save_file({**state, "transformer.h.0.attn.bias": mask}, weights, metadata={"format": "pt"})
    facts = json.loads(call(monkeypatch, capsys, "inspect", tmp_path / "gpt2", "--json")[1])
    assert facts["parameters"] == sum(p.numel() for p in gpt2.parameters())
    assert facts["dtype"] == "float32"
    assert facts["file_bytes"] == weights.stat().st_size


def test_a_terminal_tells_drafted_tokens_apart(monkeypatch, capsys, folders):
    arguments = ["generate", folders / "target", "--draft", folders / "target", "--prompt", "def f", "--ignore-eos"]
    arguments += ["--temperature", "0", "--max-new-tokens", "11"]
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain = call(monkeypatch, capsys, *arguments)[1]
    monkeypatch.setenv("FORCE_COLOR", "1")
    painted, notes = call(monkeypatch, capsys, *arguments)[1:]
    assert re.sub("\x1b\\[[0-9;]*m", "", painted) == plain
    model, said = modicum.load(folders / "target"), []
    modicum.generate(
        model, "def f", draft=model, temperature=0, max_new_tokens=11, ignore_eos=True, on_token=said.append
    )
    # The draft is the target: four accepted, then one of the target's own; 11 tokens are 5 + 5 + 1.
    assert [event.source for event in said] == [*(["draft"] * 4 + ["target"]) * 2, "target"]
    green, yellow = (sum(e.source == source and e.text != "" for e in said) for source in ("draft", "target"))
    assert (painted.count("\x1b[32m"), painted.count("\x1b[33m")) == (green, yellow)
    assert min(green, yellow) > 0
    assert "drafted and accepted" in notes
    assert call(monkeypatch, capsys, *arguments, "--no-color")[1] == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert call(monkeypatch, capsys, *arguments)[1] == plain


def test_the_text_is_printed_as_it_is(monkeypatch, capsys):
    from modicum.cli.generate import stream

    def spoken(*_, on_token, **__):
        on_token(SimpleNamespace(text="\t:x: [red]", source="draft"))
        stats = SimpleNamespace(tokens=1, tokens_per_second=1.0, judged_by_position=[])
        return SimpleNamespace(texts=["\t:x: [red]"], stats=stats)

    monkeypatch.setattr(api, "generate", spoken)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream((None, "ngram"), "a", {}, as_json=False, color=True)
    assert capsys.readouterr().out == "\x1b[32m\t:x: [red]\x1b[0m\n"


def test_what_nobody_expected_is_one_line_too(monkeypatch, capsys, folders):
    def broken(*_, **__):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(api, "load", broken)
    code, _, err = call(monkeypatch, capsys, "generate", folders / "target", "--prompt", "x")
    assert (code, err) == (1, "modicum: RuntimeError: out of memory (--debug shows where)\n")


def test_a_seed_gives_the_same_text_from_a_file_and_alone(monkeypatch, capsys, batch, folders):
    arguments, out = batch
    assert call(monkeypatch, capsys, *arguments)[0] == 0
    alone = ["--prompt", "def f0", "--seed", "5", "--max-new-tokens", "7", "--ignore-eos", "--json"]
    _, text, _ = call(monkeypatch, capsys, "generate", folders / "target", *alone)
    assert results(out)[0]["tokens"] == json.loads(text)["tokens"][0]


def test_logprobs_in_json_and_in_every_line(monkeypatch, capsys, folders, batch):
    arguments, out = batch
    model = modicum.load(folders / "target")
    settings = {"max_new_tokens": 7, "ignore_eos": True, "logprobs": 2}
    assert call(monkeypatch, capsys, *arguments, "--logprobs", "2", "--draft", folders / "draft")[0] == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for line in lines:
        assert [item["token"] for item in line["logprobs"]] == line["tokens"]
        assert {len(item["top"]) for item in line["logprobs"]} == {2}
        assert line["stats"]["model_seconds"].keys() == {"target", "draft"}
        assert 0 < line["stats"]["non_model_share"] < 1
        assert line["stats"]["seconds_per_token"].keys() == {"mean", "p50", "p90", "p99"}
    single = ["--prompt", "def f1", "--temperature", "0", "--max-new-tokens", "7", "--ignore-eos"]
    code, printed, _ = call(monkeypatch, capsys, "generate", folders / "target", *single, "--json", "--logprobs", "2")
    expected = modicum.generate(model, "def f1", temperature=0, **settings)
    assert code == 0
    assert json.loads(printed)["logprobs"] == expected.to_dict()["logprobs"]
    code, _, err = call(monkeypatch, capsys, "generate", folders / "target", *single, "--logprobs", "2")
    assert (code, "--logprobs needs a place to go: add --json, or use --prompts" in err) == (2, True)
    code, _, err = call(monkeypatch, capsys, "generate", folders / "target", *single, "--json", "--logprobs", "-1")
    assert (code, "logprobs is -1: give 0 for none" in err) == (2, True)
