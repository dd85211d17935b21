"""Video recipes: one update however it is shared out, exact resume, what is judged and written, what is refused."""

import json
import math
import random
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

import modicum
from modicum import resources
from modicum.errors import CheckpointError, MissingExtraError, UsageError
from modicum.parallel.data import Processes
from modicum.train.recipe import expectation, read_values
from modicum.train.run import train
from modicum.train.state import previous_path
from modicum.train.video.build import activation_bytes, fresh_model, hold_less
from modicum.train.video.recipe import ClipsSection, VideoOptimSection, VideoRecipe, VivitSection, rate
from modicum.video.datasets.epic import COLUMNS
from modicum.video.read import Video
from modicum.video.synthetic import LABELS, MOTION_LABELS, write_dataset
from tests.train.video_runs import begun_in, run_apart, same, table, weights, write_recipe
from tests.vivit.image_files import weights as image_weights
from tests.vivit.image_files import write_hugging_face


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the recipe's clips, which every run then finds."""
    folder = tmp_path_factory.mktemp("video")
    write_dataset(folder / "clips", {"train": 2, "held_out": 1}, num_frames=6, side=16)
    return folder


@pytest.fixture(scope="module")
def recipe(folder):
    return write_recipe(folder)


def distance(one, other):
    return max((one[key] - other[key]).abs().max().item() for key in one if key.startswith("model."))


ALL_DRAWS = ["model.stochastic_depth=0.4", "augment.mixup=0.3", "augment.label_smoothing=0.1", "optim.ema=0.7"]


def test_a_run_ends_in_a_folder_that_classifies(recipe, folder, capsys):
    goal = train(recipe, ALL_DRAWS)
    model = modicum.load(goal)
    assert model.labels == LABELS
    video = next((folder / "clips" / "held_out" / "moves up").iterdir())
    assert {p.label for p in modicum.classify(model, video, stride=1)} <= set(LABELS)
    record = json.loads((goal / "training.json").read_text())
    assert (record["steps"], record["clips"], record["views"]) == (6, 72, [2, 1])
    assert record["videos"] == {"train": 24, "held_out": 12}
    rows = table(folder / "run" / "classes.csv")
    assert [row["label"] for row in rows] == LABELS
    assert [row["group"] for row in rows] == ["motion"] * len(MOTION_LABELS) + ["frame"] * 4
    assert record["groups"].keys() == {"motion", "frame"}
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


def test_a_run_may_go_on_in_other_parts(recipe, folder, capsys):
    where = begun_in(folder, "moved")
    assert train(recipe, [where, "run.max_seconds=0"]) is None
    train(recipe, [where, "optim.accumulate=3", "optim.checkpointing=true", "data.prefetch=3"], resume=True)
    assert (
        "begun in 1 processes x 1 parts, goes on in 1 processes x 3 parts: the same batches" in capsys.readouterr().err
    )
    with pytest.raises(UsageError, match="begun with other settings or data"):
        train(recipe, [where, "augment.flip=0.5"], resume=True)


def test_dry_run_says_what_and_writes_nothing(recipe, folder, capsys):
    where = f"data.root={folder / 'nowhere'}"
    assert train(recipe, [where, begun_in(folder, "dry"), "optim.accumulate=3"], dry_run=True) is None
    said = capsys.readouterr().err
    for line in (
        "parameters, factorized_encoder, 12 classes",
        f"24 synthetic clips of 12 classes, in {folder / 'nowhere'}",
        "5 frames of 15x11, one in 1 of 25 per second",
        "12 = 1 process(es) x 4 clips x 3 part(s)",
        "6: 3 epochs of 2, the first 0.5 of warm-up",
        "expect      nothing of it, or little.\n",
        "with 2x1 views at the end",
    ):
        assert line in said
    # Without the data all else is said, and then what is amiss.
    with pytest.raises(UsageError, match="the format list needs `annotations`"):
        train(recipe, ["data.format=list", begun_in(folder, "dry")], dry_run=True)
    assert "parameters without its head, factorized_encoder" in (said := capsys.readouterr().err)
    assert "3 epochs, the first 0.5 of warm-up" in said
    # What would be refused is, here too.
    for refused in (["optim.batch=25"], ["optim.epochs=0.2", "optim.batch=24"]):
        with pytest.raises(UsageError, match="24 videos in batches of .. make less than one step"):
            train(recipe, [where, begun_in(folder, "dry"), *refused], dry_run=True)
    assert not (folder / "dry").exists()
    assert not (folder / "nowhere").exists()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["optim.accumulate=5"],
            r"12 cannot be split into 5 parts in each of 1 processes: set optim.accumulate to one of "
            "1, 2, 3, 4, 6, 12",
        ),
        (["model.name=vivit-b/16x2"], "`name` is 'vivit-b/16x2', which says what `tubelet_size` is"),
        (["model.tubelet_size=[2, 7]"], r"`tubelet_size` is \(2, 7\): give \[time, height, width\]"),
        (["views.views=[4, 2]"], r"`views` is \(4, 2\): give temporal views and crops"),
        (["optim.optimizer=sdg"], "`optimizer` is 'sdg': did you mean `sgd`"),
        (["augment.flipp=1"], "has no key `flipp`: did you mean `flip`"),
        (["augment.label_smoothing=1.0"], "`label_smoothing` is 1.0: give a share"),
        (["clips.size=[1, 2, 3]"], r"`size` is \(1, 2, 3\): give a side, or \[height, width\]"),
        (["optim.epochs=0.2", "optim.batch=24"], "0.2 epochs of 1 steps are less than one"),
        (["optim.batch=25"], "has 24 videos, fewer than a batch of 25"),
        (["run.seed=-1"], "`seed` is -1: it must not be negative"),
        (["views.short_side=10"], "`short_side` is 10: give at least the clips' 11"),
        (["augment.short_side=10"], "`short_side` is 10: give at least the clips' 11"),
        (
            ["augment.mixup=0.3", "optim.accumulate=12"],
            "a part of 1 clip in each of 1 processes has no other for mixup",
        ),
        (["data.format=kinetics"], "the format kinetics needs `annotations`"),
        (["model.start=nowhere/model"], "nowhere/model"),
    ],
)
def test_what_cannot_be_honoured_is_refused(recipe, folder, overrides, sentence):
    with pytest.raises((UsageError, CheckpointError), match=sentence):
        train(recipe, [*overrides, begun_in(folder, "refused")])


def test_text_is_not_trained_in_several_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "text.toml").write_text("[model]\ndim = 8\n")
    with pytest.raises(UsageError, match="text is no video recipe, and others train in one process"):
        train(tmp_path / "text.toml")


def test_processes_that_differ_are_refused(monkeypatch):
    processes = Processes(rank=0, world=3)
    monkeypatch.setattr(Processes, "gathered", lambda self, facts: [facts, facts, {**facts, "weights": "other"}])
    with pytest.raises(UsageError, match="process 2 has weights other and process 0 same: give all processes the same"):
        processes.check_equal(step=4, weights="same")
    monkeypatch.setattr(Processes, "gathered", lambda self, facts: [facts] * 3)
    processes.check_equal(step=4, weights="same")


def test_shuffled_frames_are_a_data_set_of_their_own(recipe, folder):
    """The same pictures, in files of their own: not the ordered files' frames shuffled."""
    train(recipe, ["data.shuffle_frames=true", begun_in(folder, "shuffled"), "optim.epochs=1"])
    ordered, shuffled = (
        Video(folder / name / "train" / "moves up" / "00001.mp4").frames(range(6)).float()
        for name in ("clips", "clips-shuffled")
    )
    distances = (ordered[:, None] - shuffled[None]).abs().mean((2, 3, 4))
    assert sorted(distances.argmin(1).tolist()) == list(range(6))
    assert distances.argmin(1).tolist() != list(range(6))


@pytest.fixture
def listed(folder, tmp_path):
    """41 videos of two classes in a list, of which two are broken and one is missing; 6 held out."""
    rows = {"train": [], "held_out": []}
    for number in range(47):
        path = tmp_path / f"{number}.mp4"
        label = ("moves up", "moves down")[number % 2]
        source = folder / "clips" / "train" / label / f"{number % 4 // 2:05d}.mp4"
        if number not in (3,):
            path.write_bytes(source.read_bytes() if number not in (11, 20) else b"no video")
        rows["train" if number < 41 else "held_out"].append(f"{number}.mp4 {label}\n")
    for split, lines in rows.items():
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    return [
        "data.format=list",
        f"data.annotations={tmp_path / 'train.txt'}",
        f"data.held_out_annotations={tmp_path / 'held_out.txt'}",
        f"data.root={tmp_path}",
        f"run.folder={tmp_path / 'run'}",
    ]


def test_broken_and_missing_videos_are_listed_and_do_no_harm(recipe, listed, tmp_path, capsys):
    goal = train(recipe, listed)
    said = capsys.readouterr().err
    assert "1 of 41 are missing" in said
    assert "2 of 40 videos could not be read; others stood in" in said
    record = json.loads((goal / "training.json").read_text())
    assert record["broken"] == {"train": 2, "held_out": 0}
    assert modicum.load(goal).labels == ["moves down", "moves up"]


def test_videos_on_both_sides_are_refused(recipe, listed, tmp_path):
    (tmp_path / "held_out.txt").write_text((tmp_path / "train.txt").read_text())
    with pytest.raises(UsageError, match="40 videos are both trained on and held out, such as"):
        train(recipe, listed)


def test_verbs_and_nouns_are_trained_and_judged_together(recipe, folder, tmp_path):
    rows = {"train": "", "held_out": ""}
    for number in range(14):
        video = tmp_path / f"P01_{number:02d}.MP4"
        video.write_bytes((folder / "clips" / "train" / "moves up" / f"{number % 2:05d}.mp4").read_bytes())
        rows["train" if number < 12 else "held_out"] += (
            f"{number},P01,P01_{number:02d},00:00:00.0,00:00:00.00,00:00:00.20,1,6,do,do,{7 * number},it,{number},[],[]\n"
        )
    for split, text in rows.items():
        (tmp_path / f"{split}.csv").write_text(",".join(COLUMNS) + "\n" + text)
    goal = train(
        recipe,
        [
            "data.format=epic",
            f"data.annotations={tmp_path / 'train.csv'}",
            f"data.held_out_annotations={tmp_path / 'held_out.csv'}",
            f"data.root={tmp_path}",
            f"run.folder={tmp_path / 'run'}",
            "augment.mixup=0.3",
            "optim.epochs=1",
        ],
    )
    model = modicum.load(goal)
    assert model.config.heads == (("noun", 300), ("verb", 97))
    assert (tmp_path / "run" / "confusion-noun.png").exists()
    record = json.loads((goal / "training.json").read_text())
    assert {"noun_top1", "verb_top5", "action_top1"} <= record.keys()
    # The head is zero at the start: ln 300 and ln 97, and their mean.
    loss = float(table(tmp_path / "run" / "log.csv")[0]["loss"])
    assert loss == pytest.approx((math.log(300) + math.log(97)) / 2, abs=1e-4)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_run_begins_with_the_weights_that_it_is_given(recipe, folder, tmp_path, kind):
    """At a rate of nothing what comes out is what went in; a resumed run needs the start no more."""
    settings = [
        "model.dim=24",
        "model.n_heads=4",
        "model.head_dim=6",
        "model.tubelet_size=[2, 5, 7]",
        "clips.size=[15, 21]",
    ]
    if kind == "image":
        start = write_hugging_face(tmp_path / "start", given := image_weights())
        expected = given["encoder.blocks.1.ffn.down.weight"]
    else:
        start = train(recipe, [*settings, f"run.folder={tmp_path / 'first'}", "optim.epochs=1"])
        expected = modicum.load(start).encoder.blocks[1].ffn.down.weight
    run = [*settings, f"model.start={start}", f"run.folder={tmp_path / 'run'}", "optim.lr=1e-12", "run.max_seconds=0"]
    assert train(recipe, run) is None
    shutil.rmtree(start)
    goal = train(recipe, run[:-1], resume=True)
    assert torch.allclose(modicum.load(goal).encoder.blocks[1].ffn.down.weight, expected, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_about_what_is_said(checkpointing):
    """Against what autograd really keeps, each storage counted once."""
    section = VivitSection(tubelet_size=(2, 8, 8), dim=96, n_layers=5, n_heads=3, ffn_dim=384, temporal_layers=2)
    config = section.config(ClipsSection(num_frames=12, size=40), {"": 7})
    model = fresh_model(config, section, seed=0).train()
    if checkpointing:
        hold_less(model)
    storages = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and tensor.untyped_storage().data_ptr() not in weights_at:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights_at = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(torch.rand(3, 12, 40, 40, 3)).sum()
    said = activation_bytes(config, 3, bf16=False, checkpointing=checkpointing)
    found = sum(storages.values())
    if checkpointing:
        # Inputs of blocks alone are kept; what one block needs besides comes with the backward pass.
        assert said > found > 0.2 * said
    else:
        assert said == pytest.approx(found, rel=0.3)
    loss.backward()


def test_without_pyav_one_sentence_says_so(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        MissingExtraError, match=r"needs `av`, which is not installed: run `pip install 'modicum\[video\]'`"
    ):
        train(recipe, dry_run=True)


def test_the_recipes_that_ship_have_table_7s_values():
    """Rate, epochs, colour jitter, RandAugment, stochastic depth, label smoothing, mixup."""
    table_7 = {
        "vivit-k400": (0.1, 30, 0.8, (0, None), 0.0, 0.0, 0.0),
        "vivit-k600": (0.1, 30, 0.8, (0, None), 0.0, 0.0, 0.0),
        "vivit-mit": (0.25, 10, 0.8, (0, None), 0.0, 0.0, 0.0),
        "vivit-epic": (0.5, 50, 0.0, (2, 15), 0.2, 0.2, 0.1),
        "vivit-ssv2": (0.5, 35, 0.0, (2, 20), 0.3, 0.3, 0.3),
    }
    for name, expected in table_7.items():
        path = resources.recipe_path(name)
        recipe = VideoRecipe.from_dict(read_values(path, []))
        o, a = recipe.optim, recipe.augment
        layers = (a.randaugment_layers, a.randaugment_magnitude if a.randaugment_layers else None)
        found = (o.lr, o.epochs, a.colour_jitter, layers, recipe.model.stochastic_depth, a.label_smoothing, a.mixup)
        assert found == expected, name
        assert (o.optimizer, o.momentum, o.weight_decay, o.batch, o.warmup_epochs) == ("sgd", 0.9, 0.0, 64, 2.5)
        assert (a.flip, a.scale_jitter, recipe.clips.num_frames) == (0.5, (0.9, 1.33), 32)
        assert "top-1" in (expectation(path) or ""), name
        assert recipe.model.config(recipe.clips, {"": 3}).tubelet_size == (2, 16, 16)
