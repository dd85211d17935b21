"""Fine-tuning on pairs: batches by hand, the loss on targets alone, exact resume, refusals."""

import json
import re
import signal

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers, processors

import modicum
from modicum import resources
from modicum.checkpoint.tokenizer import Tokenizer
from modicum.errors import UsageError
from modicum.train.finetune import FinetuneRecipe
from modicum.train.loop import Training
from modicum.train.pairs import IGNORED, Example, PairsTask, continued, encode_pairs, separate
from modicum.train.recipe import read_values
from modicum.train.run import train
from tests.helpers import tiny, tiny_t5

RECIPE = """
[model]
source = "{folder}/{kind}"

[data]
pairs = "{folder}/train.jsonl"
held_out = "{folder}/dev.jsonl"
max_input = 7
max_target = 4

[optim]
steps = 6
batch = 3
accumulate = 2
optimizer = "adafactor"
lr = 0.05
floor = 1.0
warmup = 0
bf16 = false

[run]
folder = "{folder}/run"
log_every = 1
save_every = 2
validate_every = 3
"""
WORDS = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(20)), *(f"<extra_id_{5 - i}>" for i in range(6))]


def tokenizer_of(*, closes):
    """Words by spaces, w0 is 3; `closes`: </s> after each text, as T5's."""
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##")
    if closes:
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.add_special_tokens(WORDS[:3])
    return Tokenizer(backend, frozenset({1}))


def write(path, pairs):
    path.write_text("".join(json.dumps({"input": given, "target": wanted, "id": 5}) + "\n" for given, wanted in pairs))


@pytest.fixture
def folder(tmp_path):
    """A T5 and a decoder with a tokenizer, and pairs whose target is the last word but one of the input, twice."""
    for name, model in (("t5", tiny_t5(scale=0.1)), ("decoder", tiny(scale=0.1))):
        backend = tokenizer_of(closes=name == "t5").backend
        settings = {"eos_token": "</s>"}
        model.files = {
            "tokenizer.json": backend.to_str().encode(),
            "tokenizer_config.json": json.dumps(settings).encode(),
            "training.json": json.dumps({"tokens": 77, "val_loss": 1.5}).encode(),
            "LICENSE": b"as it was",
        }
        modicum.save(model, tmp_path / name)
    pairs = [(f"w{i} w{i % 4} w9", f"w{i % 4} w{i % 4}") for i in range(19)]
    write(tmp_path / "train.jsonl", pairs)
    write(tmp_path / "dev.jsonl", pairs[:5])
    return tmp_path


def recipe(folder, kind="t5"):
    path = folder / f"{kind}.toml"
    path.write_text(RECIPE.format(folder=folder, kind=kind))
    return path


A, B = Example([5, 6, 7, 1], [8, 1]), Example([9, 1], [10, 11, 12, 1])


def test_batches_by_hand():
    given, targets = separate([A, B], start=0)
    assert given["source"].tolist() == [[5, 6, 7, 1], [9, 1, 0, 0]]
    assert given["lengths_B"].tolist() == [4, 2]
    assert given["ids_BL"].tolist() == [[0, 8, 0, 0], [0, 10, 11, 12]]
    assert targets.tolist() == [[8, 1, IGNORED, IGNORED], [10, 11, 12, 1]]
    given, targets = continued([Example([5, 6, 7], [8, 1]), Example([9], [10, 11, 1])])
    assert given["ids_BL"].tolist() == [[5, 6, 7, 8], [9, 10, 11, 0]]
    assert targets.tolist() == [[IGNORED, IGNORED, 8, 1], [10, 11, 1, IGNORED]]


@pytest.mark.parametrize(("make", "start"), [(tiny_t5, 0), (tiny, None)])
def test_padding_changes_nothing(make, start):
    """The loss of a padded batch is that of its examples one by one, however a step is split."""
    model, pairs = make(), [A, B, Example([13, 14, 15, 16, 17, 1], [18, 1])]
    whole = PairsTask(pairs, pairs, start=start, batch=3, accumulate=1, seed=4)
    split = PairsTask(pairs, pairs, start=start, batch=1, accumulate=3, seed=4)
    loss = whole.loss(model, 0).item()
    assert sum(split.loss(model, part).item() for part in range(3)) / 3 == pytest.approx(loss, rel=1e-5)
    assert whole.quality(model, bf16=False)[0] == pytest.approx(loss, rel=1e-5)
    assert split.quality(model, bf16=False)[0] == pytest.approx(loss, rel=1e-5)
    assert (whole.per_batch, split.per_batch) == (20, 7)
    # By hand, from the logits of each example alone.
    nats = 0.0
    for given, wanted in pairs:
        if start is None:
            logits = model(torch.tensor([given + wanted[:-1]]))[0, len(given) - 1 :]
        else:
            logits = model(torch.tensor([given]), torch.tensor([[start, *wanted[:-1]]]))[0]
        nats += F.cross_entropy(logits, torch.tensor(wanted), reduction="sum").item()
    assert loss == pytest.approx(nats / 8, rel=1e-5)
    # Positive control: an encoder that is not told of its padding sees it.
    if start == 0:
        given, _ = separate(pairs, 0)
        hidden = model(**given)
        assert not torch.allclose(hidden[1], model(**{**given, "lengths_B": None})[1], rtol=1e-3, atol=1e-3)


def test_what_a_decoder_is_given_is_not_learned():
    """No gradient comes from predicting the input: tokens that are only targets there leave the head's rows alone."""
    model = tiny(tie_embeddings=False)
    PairsTask([Example([3, 4, 5], [6, 7, 1])] * 2, [], start=None, batch=1, accumulate=1, seed=0).loss(
        model, 0
    ).backward()
    logits = model(torch.tensor([[3, 4, 5, 6, 7]]))[0].detach()
    states = model.hidden(torch.tensor([[3, 4, 5, 6, 7]]))[0].detach()
    error = logits.softmax(-1)[2:] - F.one_hot(torch.tensor([6, 7, 1]), 29)
    torch.testing.assert_close(model.head.weight.grad, error.T @ states[2:] / 3, rtol=1e-4, atol=1e-5)


def test_examples_of_a_file_by_hand(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write(path, [("w0 w1", "w2"), ("w0 w1 w2 w3 w4", "w5 w6 w7 w8"), ("w3", "")])
    read = encode_pairs(path, tokenizer_of(closes=True), 4, 3, continued=False)
    assert read.examples == [([3, 4, 1], [5, 1]), ([3, 4, 5, 1], [8, 9, 1]), ([6, 1], [1])]
    assert (read.cut_inputs, read.cut_targets) == (1, 1)
    # A decoder's input is open, whatever the template says.
    for closes in (True, False):
        read = encode_pairs(path, tokenizer_of(closes=closes), 4, 3, continued=True)
        assert read.examples == [([3, 4], [5, 1]), ([3, 4, 5, 6], [8, 9, 1]), ([6], [1])]
        assert (read.cut_inputs, read.cut_targets) == (1, 1)


def test_the_order_is_a_function_of_seed_and_number():
    pairs = [Example([number], [1]) for number in range(7)]
    first, second = (PairsTask(pairs, [], start=0, batch=3, accumulate=1, seed=2) for _ in range(2))
    seen = [example.input[0] for number in range(7) for example in first.examples(number)]
    assert [example.input[0] for example in second.examples(5)] == seen[15:18]
    passes = [seen[:7], seen[7:14], seen[14:]]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert passes[0] != passes[1] != passes[2]


@pytest.mark.parametrize("kind", ["t5", "decoder"])
def test_the_loss_falls_and_the_folder_is_complete(folder, kind, capsys):
    settings = ["model.dropout=0.1"] if kind == "t5" else ["optim.optimizer=adamw", "optim.lr=0.02"]
    made = train(recipe(folder, kind), [*settings, "optim.steps=30", "run.validate_every=10", "data.max_input=3"])
    assert made == folder / "run" / "model"
    record = json.loads((made / "training.json").read_text())
    entry = record["finetuned"][0]
    rows = [row.split(",") for row in (folder / "run" / "log.csv").read_text().splitlines()[1:]]
    judged = {int(row[0]): float(row[5]) for row in rows if row[5]}
    assert float(rows[0][2]) > 3
    assert entry["val_loss"] < 2
    assert judged[entry["kept_step"]] == min(judged.values()) == pytest.approx(entry["val_loss"], abs=1e-5)
    assert (record["tokens"], "val_loss" in record, entry["examples"]) == (77, False, 19)
    assert (made / "LICENSE").read_bytes() == b"as it was"
    assert ("19 inputs cut at 3 tokens" if kind == "t5" else "0 inputs cut at 3 tokens") in capsys.readouterr().err
    # What is judged is what was written, and it can be fine-tuned again.
    model = modicum.load(made)
    pairs = encode_pairs(folder / "dev.jsonl", model.tokenizer, 3, 4, continued=kind != "t5").examples
    task = PairsTask(pairs, pairs, start=0 if kind == "t5" else None, batch=5, accumulate=1, seed=0)
    assert task.quality(model, bf16=False)[0] == pytest.approx(entry["val_loss"], rel=1e-4)
    again = train(recipe(folder, kind), [f"model.source={made}", f"run.folder={folder}/again", "optim.steps=1"])
    assert len(json.loads((again / "training.json").read_text())["finetuned"]) == 2


def test_the_best_weights_are_kept_or_the_last(folder):
    """Far too high a rate: what comes later is worse."""
    losses = {}
    for keep in ("best", "last"):
        settings = ["optim.lr=3.0", "run.validate_every=1", f"run.keep={keep}", f"run.folder={folder}/{keep}"]
        entry = json.loads((train(recipe(folder), settings) / "training.json").read_text())["finetuned"][0]
        losses[keep] = entry["val_loss"]
        assert entry["steps"] == 6
        assert (entry["kept_step"] < 6) == (keep == "best")
    assert losses["best"] < losses["last"]


@pytest.mark.parametrize("stopped", [2, 3])
def test_resume_is_bit_exact(folder, monkeypatch, stopped):
    """Dropout included, and also where it stops at a step after which it is judged, the best of the run."""
    path, settings = recipe(folder), ["model.dropout=0.1", "optim.lr=3.0"]
    record = json.loads((train(path, settings) / "training.json").read_text())
    assert record["finetuned"][0]["kept_step"] == 3
    step = Training._step

    def interrupted(self, number):
        if number == stopped - 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, number)

    other = [*settings, f"run.folder={folder}/other"]
    monkeypatch.setattr(Training, "_step", interrupted)
    assert train(path, other) is None
    monkeypatch.undo()
    train(path, other, resume=True)
    for name in ("state.safetensors", "best.safetensors", "model/model.safetensors"):
        one, two = (load_file(folder / run / name) for run in ("run", "other"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), name
    logs = [
        [row.split(",")[:4] + row.split(",")[5:] for row in (folder / run / "log.csv").read_text().splitlines()]
        for run in ("run", "other")
    ]
    assert logs[0] == logs[1]
    with pytest.raises(UsageError, match="begun with other settings or data"):
        train(path, [*other, "run.keep=last"], resume=True)
    write(folder / "train.jsonl", [("w1", "w2")] * 19)
    with pytest.raises(UsageError, match="begun with other settings or data"):
        train(path, other, resume=True)


def test_dry_run_says_what_and_writes_nothing(folder, capsys):
    before = sorted(folder.rglob("*"))
    assert train(recipe(folder), ["data.max_target=2"], dry_run=True) is None
    said = capsys.readouterr().err
    assert "0 inputs cut at 7 tokens, 19 targets at 2" in said
    assert "6 of 6 examples: 1.9 passes" in said
    assert sorted(folder.rglob("*")) == sorted([*before, folder / "t5.toml"])


def test_the_shipped_recipe_is_the_papers():
    shipped = FinetuneRecipe.from_dict(read_values(resources.recipe_path("finetune"), []))
    optim = shipped.optim
    assert (optim.batch * optim.accumulate, optim.lr, optim.floor, optim.warmup) == (128, 1e-3, 1.0, 0)
    assert (optim.optimizer, shipped.model.dropout, shipped.run.keep) == ("adafactor", 0.1, "best")


@pytest.mark.parametrize(
    ("kind", "override", "sentence"),
    [
        ("t5", "data.window=3", "PairsSection has no key `window`"),
        ("t5", "model.dim=3", "SourceSection has no key `dim`"),
        ("t5", "data.max_target=0", "`max_target` is 0: it must be at least 1"),
        ("t5", "model.dropout=1.0", "`dropout` is 1.0: give the share that is dropped"),
        ("t5", "run.keep=first", "`keep` is 'first': choose best or last"),
        ("t5", "data.pairs=nowhere.jsonl", "nowhere.jsonl does not exist: give a file of lines"),
        ("decoder", "model.dropout=0.1", "is a decoder, which has none: set model.dropout=0"),
        ("decoder", "data.max_input=94", "94 tokens of input and 4 of target follow each other and the context of"),
    ],
)
def test_recipes_that_cannot_be_honoured(folder, kind, override, sentence):
    with pytest.raises(UsageError, match=re.escape(sentence)):
        train(recipe(folder, kind), [override])


@pytest.mark.parametrize(
    "line", [b"{", b"\xff", b'["input", "target"]', b'{"input": "w1"}', b'{"input": "w1", "target": 3}', b"3"]
)
def test_a_wrong_line_is_named(folder, line):
    (folder / "dev.jsonl").write_bytes(b'{"input": "w1", "target": "w2"}\n\n' + line + b"\n")
    with pytest.raises(UsageError, match=r'dev\.jsonl, line 3: write \{"input": text, "target": text\}, on one line'):
        train(recipe(folder))


def test_files_and_folders_that_lack_something(folder):
    (folder / "dev.jsonl").write_text("\n")
    with pytest.raises(UsageError, match=r"dev\.jsonl is empty: give a file of lines"):
        train(recipe(folder))
    write(folder / "dev.jsonl", [("w1", "w2"), ("", "w2")])
    with pytest.raises(UsageError, match=r"dev\.jsonl, line 2: the input has no tokens: give one that is not empty"):
        train(recipe(folder, "decoder"))
    text = recipe(folder).read_text()
    (folder / "t5.toml").write_text(text.replace("held_out", "# held_out"))
    with pytest.raises(UsageError, match="PairsSection needs `held_out`"):
        train(folder / "t5.toml")
    for name, sentence in (
        ("tokenizer_config.json", "names no end-of-text token"),
        ("tokenizer.json", "has no tokenizer"),
    ):
        (folder / "t5" / name).unlink()
        with pytest.raises(UsageError, match=sentence):
            train(recipe(folder))
