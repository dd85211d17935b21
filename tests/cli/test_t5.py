"""Every verb that takes a language model, on a T5: it works, or says why not."""

import json
import sys

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

import modicum
from modicum.cli.main import run
from tests.parity.t5 import make


@pytest.fixture
def folder(tmp_path):
    make("v1.1", tmp_path / "t5", eos_token_id=1)
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(58))]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.add_special_tokens(words[:3])
    backend.save(str(tmp_path / "t5" / "tokenizer.json"))
    return tmp_path / "t5"


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["modicum", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run()
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_generate_one_and_many(monkeypatch, capsys, folder, tmp_path):
    model = modicum.load(folder)
    assert model.tokenizer.encode("w1 w9") == [4, 12, 1]
    settings = ["--seed", 5, "--max-new-tokens", 9]
    expected = modicum.generate(model, ["w1 w9", "w3"], seed=[(5, 0), (5, 1)], max_new_tokens=9)
    code, out, _ = call(monkeypatch, capsys, "generate", folder, "--prompt", "w1 w9", *settings)
    assert (code, out) == (0, expected.texts[0] + "\n")
    prompts, done = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "w1 w9"}\n{"tokens": [6, 1]}\n')
    assert call(monkeypatch, capsys, "generate", folder, "--prompts", prompts, "--out", done, *settings)[0] == 0
    lines = [json.loads(line) for line in done.read_text().splitlines()]
    assert [line["tokens"] for line in lines] == expected.tokens
    drafted = ["--draft", folder, "-k", 3, "--json"]
    code, out, _ = call(monkeypatch, capsys, "generate", folder, "--prompt", "w1 w9", *drafted, *settings)
    assert json.loads(out)["stats"]["acceptance_rate"] == 1
    code, _, err = call(monkeypatch, capsys, "generate", folder, "--prompt", "w1", "--draft", "modicum-code-draft")
    assert (code, err.count("\n")) == (2, 1)
    assert "choose a draft of the target's kind" in err


def test_compare_and_inspect(monkeypatch, capsys, folder, tmp_path):
    pytest.importorskip("matplotlib")
    settings = ["--max-k", 1, "--repeats", 1, "--max-new-tokens", 5, "--out", tmp_path / "figure.png", "--json"]
    code, out, _ = call(monkeypatch, capsys, "compare", folder, "--draft", "ngram", *settings)
    assert (code, [row["k"] for row in json.loads(out)]) == (0, [0, 1])
    facts = json.loads(call(monkeypatch, capsys, "inspect", folder, "--json")[1])
    assert facts["parameters"] == sum(p.numel() for p in modicum.load(folder).parameters())
    assert (facts["encoder_layers"], facts["layers"], facts["context"]) == (3, 2, None)
    # Two layers of four heads of 14 numbers, keys and values, four bytes each.
    assert facts["kv_bytes_per_token"] == 2 * 2 * 4 * 14 * 4
    code, out, _ = call(monkeypatch, capsys, "inspect", folder)
    assert code == 0
    assert "encoder layers   3" in out
    assert "full context" not in out


def test_convert(monkeypatch, capsys, folder, tmp_path):
    code, out, err = call(monkeypatch, capsys, "convert", folder, tmp_path / "gqa", "--kv-heads", 1)
    assert code == 0
    assert "4 -> 1 key-value heads by mean, keys and values 224 -> 56 numbers per token" in out
    assert "loads here alone" in err
    code, _, err = call(monkeypatch, capsys, "evaluate", folder, "--data", "stdlib")
    assert code == 2
    assert "span corruption marks what it drops with <extra_id_0>" in err
