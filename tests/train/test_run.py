"""Training: exact resume, data held out whole, schedules and losses by hand."""

import json
import math
import re
import signal
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import modicum
from modicum.errors import CheckpointError, UsageError
from modicum.lm.objective import CausalLM
from modicum.train.optim import learning_rate
from modicum.train.recipe import OptimSection, read_recipe
from modicum.train.run import train
from modicum.train.state import Progress, load_state, save_state, saved_progress
from modicum.train.text import Windows, find_corpus, held_out_texts, read_text, tokenize
from modicum.train.tokenizer import train_tokenizer

RECIPE = """
[model]
dim = 16
n_layers = 2
n_heads = 2
n_kv_heads = 2
head_dim = 8
ffn_dim = 24
max_seq_len = 64

[data]
source = "{source}"
held_out = 0.3
vocab_size = 300
window = 24

[optim]
steps = 6
batch = 3
lr = 1e-2
warmup = 2

[run]
folder = "{folder}"
log_every = 1
save_every = 2
validate_every = 3
"""


@pytest.fixture
def recipe(tmp_path):
    source = tmp_path / "text"
    source.mkdir()
    for number in range(13):
        lines = [f"def function_{number}_{line}(x):\n    return x * {line} + {number}\n" for line in range(20)]
        (source / f"file{number}.py").write_text("\n".join(lines))
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE.format(source=source, folder=tmp_path / "run"))
    return path


def test_resume_is_bit_exact(recipe, tmp_path, monkeypatch):
    train(recipe)
    whole = load_file(tmp_path / "run" / "state.safetensors")
    other = [f"run.folder={json.dumps(str(tmp_path / 'other'))}"]
    stop_after(3, monkeypatch)
    assert train(recipe, other) is None
    monkeypatch.undo()
    train(recipe, other, resume=True)
    resumed = load_file(tmp_path / "other" / "state.safetensors")
    assert whole.keys() == resumed.keys()
    assert any("exp_avg_sq" in name for name in whole)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    weights = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("run", "other")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def stop_after(steps, monkeypatch, kind=signal.SIGINT):
    """A signal, Ctrl-C by default, during the step with this number."""
    from modicum.train.loop import Training

    step = Training._step

    def interrupted(self, number):
        if number == steps - 1:
            signal.raise_signal(kind)
        return step(self, number)

    monkeypatch.setattr(Training, "_step", interrupted)


def test_a_run_ends_in_a_folder_that_generates(recipe, tmp_path):
    folder = train(recipe)
    model = modicum.load(folder)
    assert model.embed.weight.dtype == torch.bfloat16
    out = modicum.generate(model, "def function", max_new_tokens=5, temperature=0, ignore_eos=True)
    assert len(out.tokens[0]) == 5
    record = json.loads((folder / "training.json").read_text())
    assert record["tokens"] == 6 * 3 * 24
    assert 0 < record["val_loss"] < math.log(300) + 1
    assert set(record["held_out"]).isdisjoint(find_corpus(str(tmp_path / "text"), (".py",), (), 0.3).training)
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert len(rows) == 1 + 6 + 2


def test_distillation_through_a_recipe(recipe, tmp_path):
    teacher = train(recipe)
    extra = [f'{key}="{value}"' for key, value in (("teacher.model", teacher), ("data.tokenizer", teacher))]
    student = train(recipe, ["model.n_layers=1", f'run.folder="{tmp_path / "student"}"', *extra])
    assert modicum.load(student).tokenizer.difference(modicum.load(teacher).tokenizer) is None


def test_a_teacher_with_another_tokenizer_is_refused(recipe, tmp_path):
    teacher = train(recipe)
    for number, path in enumerate(sorted((tmp_path / "text").iterdir())):
        path.write_text(f"zebra = 'a zebra'\nquagga = zebra * {number}\n" * 50)
    student = [f'run.folder="{tmp_path / "student"}"', f'teacher.model="{teacher}"']
    with pytest.raises(UsageError, match=r"different tokenizers \(token \d+ is .*: take the teacher's"):
        train(recipe, student)
    with pytest.raises(UsageError, match=r"different tokenizers \(300 tokens against 290\)"):
        train(recipe, [*student, "data.vocab_size=290", f'run.folder="{tmp_path / "smaller"}"'])


def test_a_state_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    path = tmp_path / "state.safetensors"
    save_state(path, model, optimizer, Progress(step=5))
    before = path.read_bytes()

    def full_disk(tensors, goal, metadata):
        goal.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("modicum.train.state.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_state(path, model, optimizer, Progress(step=6))
    assert path.read_bytes() == before
    load_state(path, model, optimizer)
    assert saved_progress(path).step == 5


def test_a_second_run_and_a_missing_state_are_refused(recipe, tmp_path):
    with pytest.raises(CheckpointError, match="nothing to resume: run without --resume first"):
        train(recipe, resume=True)
    train(recipe)
    with pytest.raises(UsageError, match="holds a run already: add --resume"):
        train(recipe)
    with pytest.raises(UsageError, match="begun with other settings or data"):
        train(recipe, ["optim.lr=0.5"], resume=True)


def test_max_seconds_saves_and_stops_and_resumes_exactly(recipe, tmp_path):
    train(recipe)
    other = [f'run.folder="{tmp_path / "other"}"']
    assert train(recipe, [*other, "run.max_seconds=0"]) is None
    with safe_open(tmp_path / "other" / "state.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["progress"])["step"] == 1
    train(recipe, other, resume=True)
    states = [load_file(tmp_path / run / "state.safetensors") for run in ("run", "other")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_sigterm_saves_as_ctrl_c_does(recipe, tmp_path, monkeypatch):
    stop_after(3, monkeypatch, signal.SIGTERM)
    assert train(recipe) is None
    with safe_open(tmp_path / "run" / "state.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["progress"])["step"] == 3


@pytest.mark.parametrize("change", ["text", "seed"])
def test_a_run_is_not_resumed_on_other_data_or_in_another_order(recipe, tmp_path, monkeypatch, change):
    stop_after(3, monkeypatch)
    train(recipe)
    monkeypatch.undo()
    if change == "text":
        for path in (tmp_path / "text").iterdir():
            path.write_text(path.read_text().replace("return", "yield"))
    with pytest.raises(UsageError, match="begun with other settings or data"):
        train(recipe, ["run.seed=1"] if change == "seed" else [], resume=True)


def test_a_left_over_tokenizer_is_not_taken(recipe, tmp_path):
    own = tmp_path / "run" / "tokenizer.json"
    own.parent.mkdir()
    train_tokenizer(["quagga zebra"], 258).save(str(own))
    train(recipe)
    assert Tokenizer.from_file(str(own)).token_to_id("Ġx") is not None


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(recipe, tmp_path):
    train_tokenizer(TEXTS, 290).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match="tokens and data.vocab_size is 257: set data.vocab_size="):
        train(recipe, [f'data.tokenizer="{tmp_path}"', "data.vocab_size=257"])
    with pytest.raises(UsageError, match="does not exist: give the folder of a model"):
        train(recipe, [f'data.tokenizer="{tmp_path / "none"}"'])


def test_dry_run_writes_nothing(recipe, tmp_path, capsys):
    assert train(recipe, dry_run=True) is None
    assert not (tmp_path / "run").exists()
    assert "432 tokens" not in capsys.readouterr().err


def test_files_are_held_out_whole_and_by_name_alone(recipe, tmp_path):
    corpus = find_corpus(str(tmp_path / "text"), (".py",), (), 0.3)
    assert len(corpus.training) + len(corpus.held_out) == 13
    (tmp_path / "text" / "another.py").write_text("x = 1\n")
    again = find_corpus(str(tmp_path / "text"), (".py",), (), 0.3)
    assert set(corpus.held_out) <= set(again.held_out)
    assert set(corpus.training) <= set(again.training)


def test_line_ends_are_read_as_they_are(tmp_path):
    for name in ("a.py", "b.py", "c.py", "d.py", "e.py"):
        (tmp_path / name).write_bytes(b"x = 1\r\ny = 2\n")
    corpus = find_corpus(str(tmp_path), (".py",), (), 0.5)
    assert read_text(next(iter(corpus.training.values()))) == "x = 1\r\ny = 2\n"


def test_the_cache_follows_its_sources(recipe, tmp_path):
    corpus = find_corpus(str(tmp_path / "text"), (".py",), (), 0.3)
    tokenizer = train_tokenizer(map(read_text, corpus.training.values()), 300)
    cache = tmp_path / "cache.npy"
    before = np.array(tokenize(corpus.training, tokenizer, 0, cache))
    stamp = cache.stat().st_mtime_ns
    tokenize(corpus.training, tokenizer, 0, cache)
    assert cache.stat().st_mtime_ns == stamp
    next(iter(corpus.training.values())).write_text("changed = True\n")
    after = tokenize(corpus.training, tokenizer, 0, cache)
    assert len(after) < len(before)
    assert (np.array(before) == 0).sum() == (np.array(after) == 0).sum() == len(corpus.training)


def test_windows_are_a_function_of_the_step():
    tokens = np.arange(1000, dtype=np.uint16)
    first, second = (Windows(tokens, 10, 4, seed=3) for _ in range(2))
    later = second.at(57)
    assert torch.equal([first.at(step) for step in range(58)][57], later)
    assert (later[:, 1:] == later[:, :-1] + 1).all()
    # One pass meets every window once.
    starts = [int(row[0]) for step in range(24) for row in first.at(step)]
    assert len(set(starts)) == 96


def test_schedule_by_hand():
    settings = OptimSection(steps=10, batch=1, lr=2.0, floor=0.1, warmup=4)
    rates = [learning_rate(settings, step) for step in range(11)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[7] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rates[10] == pytest.approx(0.2)


def test_losses_by_hand():
    """Two tokens of probabilities 1/4 and 3/4, a teacher that gives 1/2 each."""

    def constant(logits):
        return lambda ids: torch.tensor(logits).expand(*ids.shape, 2)

    model, teacher = constant([0.0, math.log(3.0)]), constant([0.0, 0.0])
    tokens = torch.tensor([[0, 0, 1]])
    entropy = (math.log(4) + math.log(4 / 3)) / 2
    assert CausalLM(2).loss(model, tokens, 0).item() == pytest.approx(entropy)
    distance = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    loss = CausalLM(2).loss(model, tokens, 0, teacher, weight=0.75).item()
    assert loss == pytest.approx(0.75 * distance + 0.25 * entropy)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.stepz=3", "no key `stepz`: did you mean `steps`?"),
        ("optimizer.steps=3", "no key `optimizer`: did you mean `optim`?"),
        ("steps=3", "write section.key=value"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(recipe, override, sentence):
    with pytest.raises(UsageError, match=sentence.replace("?", r"\?")):
        read_recipe(recipe, [override])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ('model.save_dtype="bf16"', "`save_dtype` is 'bf16': choose one of float32, bfloat16, float16"),
        ("optim.steps=abc", "`steps` is 'abc': give a value of type int"),
        ("optim.lr=true", "`lr` is True: give a value of type float"),
        ('optim.bf16="no"', "`bf16` is 'no': give a value of type bool"),
        ("data.suffixes=[1]", "`suffixes` is (1,): give a value of type tuple[str, ...]"),
        ("data.window=65", "`window` is 65: the model's context is 64 tokens"),
        ("data.held_out=0.0", "`held_out` is 0.0: give the share of files"),
        ("data.vocab_size=256", "`vocab_size` is 256: it must be at least 257"),
        ("optim.batch=0", "`batch` is 0: it must be at least 1"),
        ("optim.accumulate=0", "`accumulate` is 0: it must be at least 1"),
        ("run.log_every=0", "`log_every` is 0: it must be at least 1"),
    ],
)
def test_values_that_would_fail_later_are_refused_at_once(recipe, override, sentence):
    with pytest.raises(UsageError, match=re.escape(sentence)):
        read_recipe(recipe, [override])


def test_overrides_are_typed(recipe):
    changed = read_recipe(recipe, ["optim.bf16=false", "optim.lr=1e-4", "data.source=other", "data.suffixes=['.txt']"])
    assert (changed.optim.bf16, changed.optim.lr) == (False, 1e-4)
    assert (changed.data.source, changed.data.suffixes) == ("other", (".txt",))


TEXTS = [
    "def f(x):\n    return x\n",
    "\tif a:\r\n\t\tb = 'ü' # 日本語 🙂\n\n\n",
    "  trailing   \n",
    "x" * 999,
    "\x00\x7f",
]


def test_the_tokenizer_is_lossless():
    tokenizer = train_tokenizer(TEXTS, 400)
    for text in [*TEXTS, "".join(map(chr, range(1, 1500)))]:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.token_to_id("<|endoftext|>") == 0


def test_sources_may_be_files_patterns_and_several_at_once(recipe, tmp_path):
    folder = str(tmp_path / "text")
    (tmp_path / "notes").mkdir()
    for name in ("one.txt", "two.txt", "three.md"):
        (tmp_path / "notes" / name).write_text(f"about {name}\n")
    pattern, single = str(tmp_path / "notes" / "*.txt"), str(tmp_path / "notes" / "three.md")
    corpus = find_corpus((folder, pattern, single), (".py",), (), 0.3)
    names = {Path(name).name for name in (*corpus.training, *corpus.held_out)}
    assert len(names) == 13 + 3
    assert {"one.txt", "two.txt", "three.md"} <= names
    # A source to hold out takes its files away from the others.
    corpus = find_corpus((folder, pattern), (".py",), (), str(tmp_path / "text" / "file3.py"))
    assert [path.name for path in corpus.held_out.values()] == ["file3.py"]
    assert len(corpus.training) == 12 + 2
    with pytest.raises(UsageError, match=r"data source .*\.rst does not exist: give a folder, a file, a pattern"):
        find_corpus((folder, str(tmp_path / "*.rst")), (".py",), (), 0.3)
    with pytest.raises(UsageError, match=r"gives 1 files to train on and 0 to hold out, both are needed: .*`held_out`"):
        find_corpus(single, (".py",), (), 1e-9)


def test_a_recipe_takes_a_list_of_sources(recipe, tmp_path):
    one, two = (json.dumps(str(tmp_path / "text" / f"file{n}.py")) for n in (1, 2))
    settings = read_recipe(recipe, [f"data.source=[{one}, {two}]", f"data.held_out={two}"]).data
    assert settings.source == (str(tmp_path / "text" / "file1.py"), str(tmp_path / "text" / "file2.py"))
    folder = train(recipe, [f"data.source=[{one}, {two}]", f"data.held_out={two}", "data.window=12"])
    assert json.loads((folder / "training.json").read_text())["held_out"] == [json.loads(two)]


def test_another_teacher_is_another_run(recipe, tmp_path, monkeypatch):
    teacher = train(recipe)
    student = [f'{key}="{value}"' for key, value in (("teacher.model", teacher), ("data.tokenizer", teacher))]
    student += [f'run.folder="{tmp_path / "student"}"']
    stop_after(3, monkeypatch)
    assert train(recipe, student) is None
    monkeypatch.undo()
    weights = load_file(teacher / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="begun with other settings or data"):
        train(recipe, student, resume=True)


def test_a_resumed_log_has_every_step_once(recipe, tmp_path, monkeypatch):
    stop_after(3, monkeypatch)
    assert train(recipe) is None
    monkeypatch.undo()
    log = tmp_path / "run" / "log.csv"
    # What a machine that went down leaves: steps after the last state, the last of them cut short.
    log.write_text(log.read_text() + "4,288,5.0,1e-3,100,,\n5,36")
    train(recipe, resume=True)
    steps = [row.split(",")[0] for row in log.read_text().splitlines()[1:] if row.split(",")[2]]
    assert steps == ["1", "2", "3", "4", "5", "6"]


def test_a_run_may_begin_with_another_models_weights(recipe, tmp_path, monkeypatch):
    first = train(recipe)
    deeper = [
        "model.n_layers=3",
        f'model.start="{first}"',
        f'data.tokenizer="{first}"',
        "optim.steps=1",
        "optim.lr=1e-9",
    ]
    folder = train(recipe, [*deeper, f'run.folder="{tmp_path / "deeper"}"'])
    before, after = (load_file(path / "model.safetensors") for path in (first, folder))
    assert all(torch.allclose(after[name].float(), before[name].float(), atol=1e-6) for name in before)
    assert len(after) > len(before)
    with pytest.raises(UsageError, match=r"has no weight of this model's names and shapes: give one of equal width"):
        train(recipe, [*deeper, "model.dim=20", f'run.folder="{tmp_path / "wider"}"'])


def test_held_out_texts_are_those_that_the_record_names(tmp_path):
    (tmp_path / "training.json").write_text(json.dumps({"held_out": ["abc.py", "not/in/this/python.py"]}))
    own = Path(sysconfig.get_paths()["stdlib"]) / "abc.py"
    assert held_out_texts(tmp_path) == [read_text(own)]
    (tmp_path / "training.json").write_text("{}")
    with pytest.raises(UsageError, match="names held-out files"):
        held_out_texts(tmp_path)
