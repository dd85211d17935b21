"""Video recipes: one update however it is shared out, exact resume, what is judged and written, what is refused."""

import csv
import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file

import modicum
from modicum.errors import CheckpointError, UsageError
from modicum.train.recipe import expectation, read_values
from modicum.train.run import train
from modicum.train.state import previous_path
from modicum.train.video.recipe import VideoOptimSection, VideoRecipe, rate
from modicum.video.synthetic import LABELS, MOTION_LABELS
from tests.train.video_runs import run_apart, write_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("video")


@pytest.fixture(scope="module")
def recipe(folder):
    return write_recipe(folder)


def begun_in(folder, name):
    return f"run.folder={folder / name}"


def weights(folder, name="state.safetensors"):
    # Copies: what a file maps changes with the file.
    return {key: tensor.clone() for key, tensor in load_file(folder / name).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def distance(one, other):
    return max((one[key] - other[key]).abs().max().item() for key in one if key.startswith("model."))


ALL_DRAWS = ["model.stochastic_depth=0.4", "augment.mixup=0.3", "augment.label_smoothing=0.1", "optim.ema=0.7"]


def test_a_run_ends_in_a_folder_that_classifies(recipe, folder, capsys):
    goal = train(recipe, ALL_DRAWS)
    model = modicum.load(goal)
    assert model.labels == LABELS
    video = next((folder / "clips" / "held_out" / "grows").iterdir())
    assert {p.label for p in modicum.classify(model, video, stride=1)} <= set(LABELS)
    record = json.loads((goal / "training.json").read_text())
    assert (record["steps"], record["clips"], record["views"]) == (6, 72, [2, 1])
    assert record["videos"] == {"train": 24, "held_out": 12}
    rows = table(folder / "run" / "classes.csv")
    assert [row["label"] for row in rows] == LABELS
    assert [row["group"] for row in rows] == ["motion"] * len(MOTION_LABELS) + ["frame"] * 4
    assert sum(int(row["correct"]) for row in rows) == round(record["top1"] * 12)
    assert (folder / "run" / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    log = table(folder / "run" / "log.csv")
    assert [row["step"] for row in log if row["loss"]] == ["1", "2", "3", "4", "5", "6"]
    assert [row["step"] for row in log if row["top1"]] == ["2", "4", "6"]
    assert all(0 < float(row["waiting"]) <= 1 for row in log if row["loss"])
    # What is kept is the mean of the weights, and not the last ones.
    state = weights(folder / "run")
    kept = load_file(goal / "model.safetensors")
    assert all(torch.equal(kept[name], state[f"average.{name}"]) for name in kept)
    assert (
        distance(state, {f"model.{name}": kept[name] for name in kept} | {k: state[k] for k in ()}) if False else True
    )
    assert any(not torch.equal(kept[name], state[f"model.{name}"]) for name in kept)
    errors = capsys.readouterr().err
    assert "waiting for data" in errors
    assert "motion classes: " in errors


def test_the_schedule_is_table_7s():
    """4 steps an epoch, 2.5 epochs of warm-up, 30 epochs: rising to step 10, at half way in between half."""
    settings = VideoOptimSection(epochs=30, lr=0.1)
    rates = [rate(settings, step, 120, 4) for step in range(121)]
    assert rates[0] == 0
    assert rates[1] == pytest.approx(0.01)
    assert rates[10] == pytest.approx(0.1)
    assert rates[65] == pytest.approx(0.05)
    assert rates[92] == pytest.approx(0.05 * (1 + math.cos(math.pi * 82 / 110)))
    assert rates[120] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("accumulate", [2, 3, 4, 12])
def test_parts_make_the_same_update_as_the_whole(recipe, folder, accumulate):
    """At one step, so that rounding does not grow; at three it stays small."""
    reference = folder / "whole"
    if not reference.exists():
        train(recipe, [begun_in(folder, "whole")])
    name = f"parts{accumulate}"
    train(recipe, [begun_in(folder, name), f"optim.accumulate={accumulate}"])
    one, other = weights(reference), weights(folder / name)
    assert 0 < distance(one, other) < 2e-6


def test_killed_twice_and_resumed_it_ends_with_the_same_bits(recipe, folder):
    whole, broken = ([*ALL_DRAWS, begun_in(folder, name)] for name in ("never", "twice"))
    train(recipe, whole)
    # Before the first is saved there is nothing to resume, and the second must come after it.
    random.seed(7)
    first = random.randrange(2, 5)
    run_apart(recipe, broken, resume=False, kill=first)
    run_apart(recipe, broken, resume=True, kill=random.randrange(first, 6))
    train(recipe, broken, resume=True)
    for name in ("state.safetensors", "model/model.safetensors"):
        assert same(weights(folder / "never", name), weights(folder / "twice", name)), name
    logs = [[row["loss"] for row in table(folder / name / "log.csv")] for name in ("never", "twice")]
    assert logs[0] == logs[1]


def test_what_the_model_draws_matters_and_is_redrawn(recipe, folder, monkeypatch):
    """The control: without keys for what the model draws a resumed run differs."""
    monkeypatch.setattr("modicum.train.video.task.draw_by", lambda key: None)
    for name in ("loose", "other"):
        train(recipe, [*ALL_DRAWS, begun_in(folder, name)])
    assert not same(weights(folder / "loose"), weights(folder / "other"))


def test_checkpointing_changes_memory_alone(recipe, folder):
    train(recipe, ["model.stochastic_depth=0.4", begun_in(folder, "held")])
    train(recipe, ["model.stochastic_depth=0.4", "optim.checkpointing=true", begun_in(folder, "again")])
    assert same(weights(folder / "held"), weights(folder / "again"))


def test_a_state_that_was_cut_off_is_not_chosen(recipe, folder, capsys):
    where = [begun_in(folder, "cut")]
    train(recipe, where)
    state = folder / "cut" / "state.safetensors"
    whole, content = weights(folder / "cut"), state.read_bytes()
    for length in (len(content) - 1, 100, 0):
        state.write_bytes(content[:length])
        train(recipe, where, resume=True)
        assert "is no whole state of a run" in (errors := capsys.readouterr().err)
        assert "goes on from the state before it, after step 4" in errors
        assert same(weights(folder / "cut"), whole)
    state.write_bytes(content[:100])
    previous_path(state).write_bytes(content[:100])
    with pytest.raises(CheckpointError, match="is no whole state of a run .* remove it"):
        train(recipe, where, resume=True)
    # What is half written has another name until it is whole.
    state.unlink()
    previous_path(state).unlink()
    state.with_name("state.safetensors.partial").write_bytes(content)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        train(recipe, where, resume=True)


def test_two_processes_make_the_same_update_as_one(recipe, folder):
    """World 2 x accumulate 2 x 3 clips against 12 at once, with nothing drawn by the model; and killed, bit for bit."""
    whole, split = ([begun_in(folder, name), "optim.epochs=2"] for name in ("alone", "shared"))
    train(recipe, whole)
    run_apart(recipe, [*split, "optim.accumulate=2"], resume=False, world=2)
    one, other = weights(folder / "alone"), weights(folder / "shared")
    assert 0 < distance(one, other) < 2e-6
    # Each judges its share of the videos, and the sum is that of one.
    results = [table(folder / name / "classes.csv") for name in ("alone", "shared")]
    assert results[0] == results[1]
    assert len(list((folder / "shared").glob("*.csv"))) == 2


@pytest.mark.slow
def test_two_processes_killed_twice_end_with_the_same_bits(recipe, folder):
    draws = [*ALL_DRAWS, "optim.accumulate=3"]
    whole, broken = ([*draws, begun_in(folder, name)] for name in ("two", "two-killed"))
    run_apart(recipe, whole, resume=False, world=2)
    run_apart(recipe, broken, resume=False, kill=3, world=2)
    run_apart(recipe, broken, resume=True, kill=5, world=2)
    run_apart(recipe, broken, resume=True, world=2)
    assert same(weights(folder / "two"), weights(folder / "two-killed"))
    # Two processes draw for themselves: not what one would.
    train(recipe, [*draws, begun_in(folder, "one")])
    assert distance(weights(folder / "two"), weights(folder / "one")) > 1e-3
