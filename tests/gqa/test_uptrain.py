"""Uptraining: budgets by hand, the control's batches, distillation, exact resumes, folders that load anywhere."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import models, pre_tokenizers, processors

import modicum
from modicum.checkpoint.record import Record
from modicum.errors import CheckpointError, UsageError
from modicum.gqa.uptrain import Settings, Uptraining, budget, calibration_pieces
from modicum.lm.objective import CausalLM
from modicum.train.loop import Training
from modicum.train.onward import schedule, sitting, train_on
from modicum.train.optim import learning_rate
from modicum.train.task import Task
from tests.gqa.small import TOKENS, trained
from tests.parity.t5 import make as make_t5
from tests.vivit.tiny import tiny_vivit


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a trained model, and that of its text."""
    return trained(tmp_path_factory.mktemp("small"))


def planned(small, goal, **changes):
    """Steps of 72 tokens, ten of them."""
    values = {"kv_heads": 2, "method": "mean", "data": (small[1],), "tokens": 720, "device": "cpu", **changes}
    return Uptraining(small[0], goal, Settings(**values))


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def record_of(folder):
    return json.loads((Path(folder) / "training.json").read_text())


def test_budgets_by_hand():
    known, unknown = Record({"tokens": 12_000}), Record({})
    text = {"data": ("x",), "kv_heads": 2}
    assert budget(Settings(**text), known, "it") == 600
    assert budget(Settings(**text, fraction=0.1), known, "it") == 1200
    assert budget(Settings(**text, tokens=77), unknown, "it") == 77
    assert budget(Settings(**text, original_tokens=4000), unknown, "it") == 200
    # Whoever says a number means it.
    assert budget(Settings(**text, original_tokens=4000), known, "it") == 200
    with pytest.raises(
        UsageError, match="it does not say how many tokens it was trained on: give --original-tokens N, or"
    ):
        budget(Settings(**text), unknown, "it")


def test_schedules_by_hand():
    given = {"lr": 2e-3, "accumulate": 2, "beta2": 0.9, "steps": 6000, "warmup": 100, "batch": 99}
    optim = schedule(10_000, batch=3, window=16, original=given)
    # 96 tokens a step; five per cent of the steps to warm up.
    assert (optim.steps, optim.warmup, optim.batch, optim.accumulate) == (104, 6, 3, 2)
    assert (optim.lr, optim.beta2) == (2e-4, 0.9)
    assert schedule(10_000, batch=3, window=16).lr == 1e-4
    assert schedule(10_000, batch=3, window=16, lr=7e-4, original=given).lr == 7e-4
    with pytest.raises(UsageError, match="a budget of 23 tokens is less than a step of 48"):
        schedule(23, batch=3, window=16)


def test_the_plan_follows_the_original_training(small, tmp_path):
    facts = planned(small, tmp_path / "gqa", tokens=None, fraction=0.5).facts
    assert (facts["original_tokens"], facts["tokens"], facts["steps"]) == (TOKENS, TOKENS // 2, 15)
    settings = facts["settings"]
    assert (settings["optim"]["batch"], settings["data"]["window"], settings["data"]["held_out"]) == (3, 24, 0.3)
    plan = planned(small, tmp_path / "gqa")
    assert list(plan.corpus.held_out) == record_of(small[0])["held_out"]
    # However the path is spelled; and another source is another rule.
    spelled = str(Path(small[1]) / ".." / "text")
    assert list(planned(small, tmp_path / "gqa", data=(spelled,)).corpus.held_out) == list(plan.corpus.held_out)
    other = planned(small, tmp_path / "gqa", data=(small[1] + "/*.py",), held_out=0.5).facts["settings"]["data"]
    assert other["held_out"] == 0.5
    assert list(tmp_path.iterdir()) == []


def test_from_folder_to_folder(small, tmp_path):
    facts = planned(small, tmp_path / "gqa", tokens=2880).go()
    nats = facts["nats_per_token"]
    assert nats["original"] == pytest.approx(record_of(small[0])["val_loss"], abs=1e-6)
    assert nats["converted"] > nats["uptrained"]
    assert facts["kv_bytes_per_token"] == [2 * 2 * 4 * 6 * 4, 2 * 2 * 2 * 6 * 4]
    record = record_of(tmp_path / "gqa")
    assert (record["tokens"], record["uptrained"][0]["tokens"]) == (TOKENS, 2880)
    assert (record["uptrained"][0]["method"], record["uptrained"][0]["kv_heads"]) == ("mean", [4, 2])
    assert record["settings"] == record_of(small[0])["settings"]
    assert sorted(path.name for path in (tmp_path / "gqa.run").iterdir()) == ["log.csv"]
    model = modicum.load(tmp_path / "gqa")
    assert model.config.n_kv_heads == 2
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gqa").eval()
    ids = torch.arange(31)[None] * 7 % 300
    with torch.no_grad():
        torch.testing.assert_close(model(ids), stock(ids).logits, atol=2e-5, rtol=1e-5)
    assert modicum.generate(model, "def function", max_new_tokens=3, temperature=0, ignore_eos=True).tokens[0]


def test_a_grouped_model_is_uptrained_again(small, tmp_path):
    planned(small, tmp_path / "two").go()
    again = planned((str(tmp_path / "two"), small[1]), tmp_path / "one", kv_heads=1, tokens=None, fraction=0.1)
    # A tenth of what the first of them was trained on, by the rate of its own training.
    assert (again.facts["tokens"], again.optim.lr) == (TOKENS // 10, 0.1 * 1e-2)
    facts = again.go()
    assert facts["kv_heads"] == [2, 1]
    entries = record_of(tmp_path / "one")["uptrained"]
    assert [entry["kv_heads"] for entry in entries] == [[4, 2], [2, 1]]
    assert record_of(tmp_path / "one")["tokens"] == TOKENS


def test_the_control_takes_the_same_steps_on_the_same_batches(small, tmp_path, monkeypatch):
    seen = []
    loss = Task.loss

    def watched(self, model, number):
        seen.append((model.config.n_kv_heads, number, self.windows.at(number).tolist()))
        return loss(self, model, number)

    monkeypatch.setattr(Task, "loss", watched)
    planned(small, tmp_path / "gqa").go()
    facts = planned(small, tmp_path / "mha", control=True).go()
    converted, control = seen[:10], seen[10:]
    assert {heads for heads, *_ in converted} == {2}
    assert {heads for heads, *_ in control} == {4}
    assert [batch for _, *batch in converted] == [batch for _, *batch in control]
    assert (facts["method"], facts["nats_per_token"]["converted"]) == (None, None)
    rates = [
        [row.split(",")[3] for row in (tmp_path / name / "log.csv").read_text().split()]
        for name in ("gqa.run", "mha.run")
    ]
    assert rates[0] == rates[1]
    # It needs no number of heads.
    assert planned(small, tmp_path / "mha", control=True, kv_heads=None).facts["kv_heads"] == [4, 4]


def test_distillation_from_the_source(small, tmp_path, monkeypatch):
    seen = []
    loss = Task.loss

    def watched(self, model, number):
        seen.append(loss(self, model, number))
        return seen[-1]

    monkeypatch.setattr(Task, "loss", watched)
    settings = {"control": True, "teacher": small[0], "tokens": 72}
    planned(small, tmp_path / "self", **settings, teacher_weight=1.0).go()
    planned(small, tmp_path / "half", **settings, teacher_weight=0.5).go()
    planned(small, tmp_path / "text", control=True, tokens=72).go()
    # A model that is its own teacher has nothing to learn from it.
    alone, half, text = (value.item() for value in seen)
    assert alone == pytest.approx(0, abs=1e-6)
    assert half == pytest.approx(text / 2)
    assert text > 1


def test_a_teacher_with_another_tokenizer_is_refused(small, tmp_path):
    with pytest.raises(UsageError, match=r"has another tokenizer than .* \(2048 tokens against 300\)"):
        planned(small, tmp_path / "gqa", teacher="modicum-code-draft").go()


def test_calibration_is_spread_over_the_text(small, tmp_path):
    pieces = calibration_pieces(np.arange(100_000), 24, 64)
    assert len(pieces) == 256
    assert (pieces[0][0], pieces[-1][-1]) == (0, 99_999)
    assert len(calibration_pieces(np.arange(100_000), 2000, 64)) == 313
    # A short text is not read twice.
    assert calibration_pieces(np.arange(65), 24, 64) == [list(range(64)), list(range(1, 65))]
    merged = planned(small, tmp_path / "merged", method="merged", tokens=72).go()["nats_per_token"]["converted"]
    assert merged < planned(small, tmp_path / "mean", tokens=72).go()["nats_per_token"]["converted"]


KILLED = """
import os, signal, sys
from modicum.cli.main import run
from modicum.train.loop import Training
from modicum.lm.objective import CausalLM

step = Training._step

def killed(self, number):
    if number == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number)

Training._step = killed
sys.argv = ["modicum", "uptrain", *{arguments!r}]
run()
"""


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """What a run gives that nothing interrupts: 40 steps, of which every second is saved."""
    goal = tmp_path_factory.mktemp("whole") / "gqa"
    planned(small, goal, method="random", tokens=2880, seed=5).go()
    return goal


@pytest.mark.parametrize("step", [0, 7])
def test_resume_after_a_kill_is_bit_exact(small, whole, tmp_path, monkeypatch, step):
    """Killed before the first step, and one after a state was saved."""
    arguments = [small[0], str(tmp_path / "killed"), "--kv-heads", "2", "--method", "random", "--data", small[1]]
    arguments += ["--tokens", "2880", "--seed", "5", "--device", "cpu"]
    code = KILLED.format(step=step, arguments=arguments)
    found = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True)
    assert found.returncode == -signal.SIGKILL
    # The converted model is not made again.
    monkeypatch.setattr("modicum.api.convert_to_gqa", None)
    resumed = planned(small, tmp_path / "killed", method="random", tokens=2880, seed=5).go(resume=True)
    assert resumed["steps"] == 40
    first, second = weights(whole), weights(tmp_path / "killed")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed["nats_per_token"] == record_of(whole)["uptrained"][0]["nats_per_token"]


def test_ctrl_c_saves_and_other_settings_do_not_resume(small, tmp_path, monkeypatch):
    step = Training._step

    def interrupted(self, number):
        if number == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, number)

    monkeypatch.setattr(Training, "_step", interrupted)
    assert planned(small, tmp_path / "gqa").go() is None
    assert not (tmp_path / "gqa").exists()
    with pytest.raises(UsageError, match="holds a run already: add --resume, or remove it"):
        planned(small, tmp_path / "gqa").go()
    for change in ({"lr": 1e-5}, {"seed": 1}, {"method": "first"}, {"kv_heads": 1}, {"control": True}):
        with pytest.raises(UsageError, match="was begun with other settings or data: resume it with the same ones"):
            planned(small, tmp_path / "gqa", **change).go(resume=True)
    assert planned(small, tmp_path / "gqa").go(resume=True)["steps"] == 10


def test_models_and_tokens_in_memory(small, tmp_path):
    """As a benchmark uses it: no folder but the run's."""
    tokens = np.random.default_rng(0).integers(0, 300, 2000).astype(np.uint16)
    optim = schedule(480, batch=2, window=24, lr=1e-3)
    model = modicum.load(small[0], device="cpu")
    task = Task(CausalLM(24), tokens, tokens[:200], None, batch=2, seed=0)
    before = task.quality(model, bf16=True)[0]
    outcome = train_on(model, task, optim, sitting(tmp_path / "run", optim), notes={"of": 3.0})
    assert (outcome.steps, outcome.tokens, outcome.before) == (10, 480, before)
    assert outcome.after < before
    assert (outcome.bits_per_byte, outcome.notes["of"]) == (None, 3.0)


def test_what_cannot_be_uptrained(small, tmp_path):
    goal = tmp_path / "gqa"
    with pytest.raises(UsageError, match="3 key-value heads do not divide the checkpoint's 4: choose one of 1, 2, 4"):
        planned(small, goal, kv_heads=3)
    with pytest.raises(UsageError, match="`window` is 65: the model's context is 64 tokens"):
        planned(small, goal, window=65)
    with pytest.raises(CheckpointError, match="nothing to resume: run without --resume first"):
        planned(small, goal).go(resume=True)
    modicum.save(tiny_vivit(variant="spacetime"), tmp_path / "vivit")
    with pytest.raises(UsageError, match="is a ViViT, and uptraining reads text"):
        planned((str(tmp_path / "vivit"), small[1]), goal)
    bare = modicum.load(small[0])
    bare.files = {}
    modicum.save(bare, tmp_path / "bare")
    with pytest.raises(UsageError, match="bare has no tokenizer files, and the text must be read with its own"):
        planned((str(tmp_path / "bare"), small[1]), goal)
    goal.mkdir()
    (goal / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match="already holds files"):
        planned(small, goal).go()
    planned(small, goal).go(force=True)
    assert not (goal / "mine.txt").exists()


def test_a_t5_fills_in_spans_by_adafactor(small, tmp_path):
    make_t5("v1.1", tmp_path / "t5", eos_token_id=1)
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(38)), *(f"<extra_id_{19 - i}>" for i in range(20))]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.save(str(tmp_path / "t5" / "tokenizer.json"))
    (tmp_path / "text").mkdir()
    for number in range(9):
        (tmp_path / "text" / f"{number}.txt").write_text(" ".join(f"w{i % 7}" for i in range(number, number + 99)))
    source = str(tmp_path / "t5"), str(tmp_path / "text")
    settings = {"window": 20, "batch": 3, "held_out": 0.3, "tokens": 720}
    plan = planned(source, tmp_path / "usual", **settings)
    assert [learning_rate(plan.optim, step) for step in (0, 1)] == [1e-3, 1 / math.sqrt(1_000_001)]
    assert planned(source, tmp_path / "usual", **{**settings, "window": None, "tokens": 9999}).data.window == 568
    plan = planned(source, tmp_path / "gqa", **settings, lr=0.03)
    assert [learning_rate(plan.optim, step) for step in (0, 11)] == [0.03, 0.03]
    nats = plan.go()["nats_per_token"]
    assert nats["uptrained"] < nats["converted"] - 0.1
    model = modicum.load(tmp_path / "gqa")
    assert (model.config.n_kv_heads, model.encoder.blocks[0].attention.project.k.out_features) == (2, 4 * 14)
