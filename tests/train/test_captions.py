"""Captioners' recipes: what they learn and write, exact resume, frozen and shared encoders, published formats, refusals."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import modicum
from modicum.checkpoint.tokenizer import Tokenizer
from modicum.classification.predict import Protocol
from modicum.cli.main import app
from modicum.errors import UsageError
from modicum.parallel.data import Processes
from modicum.train.captions.data import PADDING, CaptionRows, caption_tokenizer, read_captioned
from modicum.train.captions.evaluate import evaluate_captions
from modicum.train.captions.recipe import CaptionedSection
from modicum.train.captions.task import CaptionsTask
from modicum.train.run import train
from modicum.video.datasets import read_dataset
from modicum.video.loader import ClipLoader
from modicum.video.synthetic import write_captioned, write_dataset
from tests.captioning.watching import captioner
from tests.helpers import random_weights, tiny
from tests.train.caption_runs import ENCODER, write_four, write_recipe
from tests.train.video_runs import begun_in, run_apart, same, table, weights
from tests.train.video_runs import write_recipe as write_video_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the recipe's clips, which every run then finds."""
    folder = tmp_path_factory.mktemp("captions")
    write_captioned(folder / "clips", {"train": 13, "held_out": 4}, num_frames=6, side=16)
    return folder


@pytest.fixture(scope="module")
def recipe(folder):
    return write_recipe(folder)


@pytest.fixture(scope="module")
def model(recipe):
    return train(recipe)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    return folder, write_four(folder)


def record(folder):
    return json.loads((folder / "training.json").read_text())


def test_a_run_ends_in_a_folder_that_writes_captions(model, folder):
    loaded = modicum.load(model)
    rows = [json.loads(line) for line in (folder / "run" / "captions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["video13", "video14", "video15", "video16"]
    paths = [folder / "clips" / "videos" / f"{row['id']}.mp4" for row in rows]
    again = modicum.caption(loaded, paths, stride=1)
    assert again.texts == [row["caption"] for row in rows]
    said = record(model)
    assert (said["steps"], said["clips"], said["videos"]) == (9, 36, {"train": 13, "held_out": 4})
    assert set(said["captions"]["facts"]) == {"count", "colour", "shape", "motion", "order", "all"}
    assert set(said["controls"]) == {"shuffled", "blank"}
    log = table(folder / "run" / "log.csv")
    assert [row["step"] for row in log if row["loss"]] == list("123456789")
    assert [row["step"] for row in log if row["val_accuracy"]] == ["3", "6", "9"]
    assert float(log[-1]["val_loss"]) == pytest.approx(said["val_loss"], abs=1e-5)


def test_four_captions_are_learnt(four, tmp_path):
    folder, captions = four
    overrides = [
        "data.format=msrvtt",
        f"data.annotations={folder / 'captions.json'}",
        f"data.root={folder}",
        "data.held_out=test",
        "clips.num_frames=6",
        "clips.size=[28, 30]",
        "encoder.temporal_layers=0",
        "optim.epochs=160",
        "run.log_every=40",
        "optim.batch=4",
        "optim.label_smoothing=0.0",
        "run.validate_every=160",
        begun_in(tmp_path, "run"),
    ]
    goal = train(write_recipe(tmp_path), overrides)
    loaded = modicum.load(goal)
    shown = modicum.caption(loaded, [folder / f"test{number}.mp4" for number in range(4)], stride=1)
    assert shown.texts == captions
    # The control: a model that does not look says the same of all.
    dataset = read_dataset("msrvtt", folder / "captions.json", split="test")
    blind = evaluate_captions(loaded, dataset, Protocol(views=(1, 1), stride=1), control="blank", training=captions)
    assert len(set(blind.captions)) == 1
    assert blind.scores.exact <= 0.25


def test_killed_and_resumed_it_ends_with_the_same_bits(recipe, folder):
    draws = ["encoder.stochastic_depth=0.4", "optim.ema=0.7"]
    whole, broken = ([*draws, begun_in(folder, name)] for name in ("never", "once"))
    train(recipe, whole)
    run_apart(recipe, broken, resume=False, kill=5)
    train(recipe, broken, resume=True)
    for name in ("state.safetensors", "model/model.safetensors", "captions.jsonl"):
        if name.endswith("jsonl"):
            assert (folder / "never" / name).read_text() == (folder / "once" / name).read_text()
        else:
            assert same(weights(folder / "never", name), weights(folder / "once", name)), name


@pytest.fixture(scope="module")
def whole(recipe, folder):
    train(recipe, [begun_in(folder, "sgd"), "optim.optimizer=sgd"])
    return folder / "sgd"


def test_parts_make_the_same_update_as_the_whole(recipe, folder, whole):
    """Though captions of different lengths fall into them."""
    train(recipe, [begun_in(folder, "parts"), "optim.accumulate=4", "optim.optimizer=sgd"])
    one, other = weights(whole), weights(folder / "parts")
    furthest = max((one[key] - other[key]).abs().max().item() for key in one if key.startswith("model."))
    assert 0 < furthest < 2e-6


def test_two_processes_make_the_same_update(recipe, folder, whole):
    run_apart(recipe, [begun_in(folder, "two"), "optim.optimizer=sgd"], resume=False, world=2)
    one, other = weights(whole), weights(folder / "two")
    assert max((one[key] - other[key]).abs().max().item() for key in one if key.startswith("model.")) < 2e-6
    lines = [(folder / name / "captions.jsonl").read_text() for name in ("sgd", "two")]
    assert [json.loads(line)["id"] for line in lines[1].splitlines()] == ["video13", "video14", "video15", "video16"]
    assert lines[0] == lines[1]


def rows_of(model, max_tokens=40):
    return CaptionRows(model.tokenizer, model.config.decoder_start_id, max_tokens)


def test_rows_are_what_is_given_and_what_is_to_be_said():
    model = captioner()
    rows = rows_of(model)
    short, long = (model.tokenizer.encode(text) for text in ("a red", "a red square moves"))
    given_BL, targets_BL = rows(["a red", "a red square moves"])
    rest = len(long) - len(short)
    assert targets_BL.tolist() == [[*short, 0, *[PADDING] * rest], [*long, 0]]
    assert given_BL.tolist() == [[0, *short, *[0] * rest], [0, *long]]
    assert rows_of(model, 2)(["a red square moves"])[1].tolist() == [long[:3]], "cut off, without an end"


def loss_of(model, folder, captions, mean_length=None, smoothing=0.1, teacher=None):
    """The task's loss on the first clips, with these captions."""
    dataset = read_dataset("msrvtt", folder / "clips" / "captions.json", split="train")
    loader = ClipLoader(
        dataset, num_frames=6, stride=1, fps=25.0, size=(48, 48), batch=len(captions), seed=0, workers=0
    )
    task = CaptionsTask(
        loader, None, rows_of(model), Processes(), seed=0, smoothing=smoothing, teacher=teacher, weight=0.25
    )
    clips = loader.iterate(0)
    batch = next(clips)
    batch.captions = list(captions)
    task.clips = lambda number: batch
    task.mean_length = mean_length or task.mean_length
    return task.loss(model, 0), batch.video


def test_padding_never_changes_the_loss(folder):
    """A clip's loss beside a long caption is the one that it has alone."""
    model = captioner().train()
    both, video = loss_of(model, folder, ["a red", "a red square moves left " * 3], 1.0)
    with torch.no_grad():
        memory_BMD = model.encode(video)
        alone = []
        for number, text in enumerate(["a red", "a red square moves left " * 3]):
            given_BL, targets_BL = rows_of(model)([text])
            logits_BLV = model(memory_BMD[number : number + 1], given_BL)
            scores_LV = logits_BLV[0].log_softmax(-1)
            picked = -scores_LV.gather(1, targets_BL[0][:, None])[:, 0]
            alone.append((0.9 * picked - 0.1 * scores_LV.mean(-1)).sum())
    assert both.item() == pytest.approx(((alone[0] + alone[1]) / 2).item(), rel=1e-5)


def test_a_teacher_counts_by_its_weight(folder):
    model, teacher = captioner(seed=1).train(), captioner(seed=2)
    captions = ["a red", "a square moves left"]
    plain, video = loss_of(model, folder, captions, 1.0, smoothing=0.0)
    taught, _ = loss_of(model, folder, captions, 1.0, smoothing=0.0, teacher=teacher)
    with torch.no_grad():
        memory_BMD, distance = model.encode(video), 0.0
        for number, text in enumerate(captions):
            given_BL, _ = rows_of(model)([text])
            ours, theirs = (
                one(memory_BMD[number : number + 1], given_BL)[0].log_softmax(-1) for one in (model, teacher)
            )
            distance += (theirs.exp() * (theirs - ours)).sum().item()
    assert taught.item() == pytest.approx(0.25 * distance / 2 + 0.75 * plain.item(), rel=1e-4)


def test_a_frozen_encoder_stays_as_it_is(recipe, folder, tmp_path):
    video = write_video_recipe(tmp_path)
    write_dataset(tmp_path / "clips", {"train": 2, "held_out": 1}, num_frames=6, side=16)
    start = train(video, ["optim.epochs=1", "model.stochastic_depth=0.5"])
    sizes = write_recipe(folder, "frozen.toml", f'[encoder]\nstart = "{start}"\nfrozen = true\n')
    # The ViViT is for clips of 15 x 11, and its positions are interpolated.
    goal = train(sizes, [begun_in(folder, "frozen"), "clips.size=[21, 11]"])
    before, after = load_file(start / "model.safetensors"), load_file(goal / "model.safetensors")
    kept = {name: x for name, x in before.items() if not name.startswith("head.") and "positions" not in name}
    assert kept
    assert all(torch.equal(after[f"encoder.{name}"], x) for name, x in kept.items())
    # The control: it is trained unless it is frozen.
    goal = train(sizes, [begun_in(folder, "thawed"), "clips.size=[21, 11]", "encoder.frozen=false"])
    after = load_file(goal / "model.safetensors")
    assert not all(torch.equal(after[f"encoder.{name}"], x) for name, x in kept.items())


def test_a_draft_shares_its_targets_encoder(model, folder):
    sizes = write_recipe(folder, "draft.toml", f'[draft]\ntarget = "{model}"\nweight = 0.5\n')
    goal = train(sizes, [begun_in(folder, "draft"), "decoder.dim=12", "decoder.n_layers=1"])
    assert not any(name.startswith("encoder.") for name in load_file(goal / "model.safetensors"))
    target, draft = modicum.load(model), modicum.load(goal)
    paths = sorted((folder / "clips" / "videos").iterdir())[:3]
    plain = modicum.caption(target, paths, stride=1, max_new_tokens=9)
    drafted = modicum.caption(target, paths, draft=draft, stride=1, max_new_tokens=9)
    assert drafted.tokens == plain.tokens
    assert record(goal)["tokens_per_target_call"] >= 1
    with pytest.raises(UsageError, match="the target reads 5 frames of 14x10 and the recipe has 4 of 14x10"):
        train(sizes, [begun_in(folder, "other"), "clips.num_frames=4"])


def test_a_draft_learns_what_its_target_says(model, folder):
    """From the target alone, without the captions: closer to it than it began."""
    sizes = write_recipe(folder, "taught.toml", f'[draft]\ntarget = "{model}"\nweight = 1.0\n')
    train(sizes, [begun_in(folder, "taught"), "optim.epochs=10", "optim.label_smoothing=0.0"])
    losses = [float(row["loss"]) for row in table(folder / "taught" / "log.csv") if row["loss"]]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_a_decoder_begins_as_a_text_model_with_its_tokenizer(folder, tmp_path):
    writer = tiny(vocab_size=270)
    files = caption_tokenizer(read_dataset("msrvtt", folder / "clips" / "captions.json"), 270, 97)
    writer.files, writer.tokenizer = files, Tokenizer.from_files(files, {})
    writer.eos_ids = frozenset({0})
    modicum.save(random_weights(writer, 0.1), tmp_path / "writer")
    text = write_recipe(folder, "started.toml", ENCODER).read_text()
    begin, rest = text.index("[decoder]"), text.index("[data]")
    path = tmp_path / "started.toml"
    path.write_text(f'{text[:begin]}[decoder]\nstart = "{tmp_path / "writer"}"\nmemory = "patches"\n{text[rest:]}')
    goal = train(path, [begun_in(tmp_path, "run"), "optim.epochs=1", "optim.lr=1e-9", "optim.weight_decay=0"])
    begun, kept = load_file(tmp_path / "writer" / "model.safetensors"), load_file(goal / "model.safetensors")
    assert torch.allclose(kept["decoder.embed.weight"], begun["model.embed_tokens.weight"], atol=1e-7)
    assert (goal / "tokenizer.json").read_bytes() == files["tokenizer.json"]
    assert modicum.load(goal).config.memory == "patches"


@pytest.mark.parametrize("format", ["msrvtt", "vatex"])
def test_published_formats(four, format, tmp_path, capsys):
    folder, captions = four
    overrides = [f"data.format={format}", f"data.root={folder}", "optim.epochs=1", "optim.batch=3"]
    if format == "msrvtt":
        overrides += [f"data.annotations={folder / 'captions.json'}", "data.held_out=test"]
    else:
        annotations = [folder / f"vatex_{split}.json" for split in ("train", "test")]
        overrides += [f"data.annotations={annotations[0]}", f"data.held_out_annotations={annotations[1]}"]
    goal = train(write_recipe(tmp_path), [*overrides, "clips.size=[14, 15]"])
    said = record(goal)
    assert said["videos"] == {"train": 4 if format == "msrvtt" else 3, "held_out": 4}
    # Of other people's captions no facts are known.
    assert (said["captions"]["facts"] is None) == (format == "vatex")
    lines = [json.loads(line) for line in (tmp_path / "run" / "captions.jsonl").read_text().splitlines()]
    assert lines[0]["references"] == [captions[0]] + ["red it is"] * (format == "vatex")
    assert ("1 of 4 are missing" in capsys.readouterr().err) == (format == "vatex")


def test_videos_in_both_splits_are_refused(four):
    folder, _ = four
    section = CaptionedSection(
        format="msrvtt", annotations=str(folder / "captions.json"), root=str(folder), held_out="train"
    )
    with pytest.raises(UsageError, match="4 videos are both trained on and held out"):
        read_captioned(section)


def test_a_dry_run_writes_nothing(recipe, folder, model, tmp_path, capsys):
    before = sorted(path.name for path in folder.iterdir())
    assert train(recipe, [begun_in(folder, "dry")], dry_run=True) is None
    said = capsys.readouterr().err
    assert "11,721 parameters, factorized_encoder, trained" in said
    assert "2 vectors of 24 per clip: frames" in said
    assert "9: 3 epochs of 3" in said
    assert "nothing of it." in said
    sizes = write_recipe(tmp_path, "draft.toml", f'[draft]\ntarget = "{model}"\n')
    assert train(sizes, [], dry_run=True) is None
    assert f"shared with {model}" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("overrides", "refusal"),
    [
        (["draft.target=x"], "needs an \\[encoder\\] table, or a \\[draft\\] table"),
        (["decoder.memory=clip"], "`memory` is 'clip'"),
        (["decoder.start=x"], "`start` is 'x', which says what `dim` is"),
        (["data.format=kinetics"], "`format` is 'kinetics': choose one of synthetic, msrvtt, vatex, vatex-zh"),
        (["data.n_held_out=1"], "CIDEr-D compares at least 2 clips"),
        (["encoder.frozen=true"], "name what it is as `start`"),
        (["optim.batch=5", "optim.accumulate=2"], "a batch of 5 cannot be split into 2 parts"),
        (["decoder.vocab_size=200"], "it must be at least 257"),
    ],
)
def test_what_is_refused(recipe, folder, overrides, refusal):
    with pytest.raises(UsageError, match=refusal):
        train(recipe, [begun_in(folder, "refused"), *overrides])


def test_the_loss_begins_at_even_odds(folder, model):
    """Fresh weights know nothing: about the logarithm of the number of tokens."""
    losses = [float(row["loss"]) for row in table(folder / "run" / "log.csv") if row["loss"]]
    assert losses[0] == pytest.approx(math.log(len(modicum.load(model).tokenizer)), rel=0.25)


def test_evaluate_on_the_command_line(model, folder):
    data = str(folder / "clips")
    run = CliRunner().invoke(app, ["evaluate", str(model), "--data", data, "--json"])
    assert run.exit_code == 0, run.output
    (row,) = json.loads(run.stdout)
    said = record(model)["captions"]
    assert {name: row[name] for name in said} == said, "as at the end of its training"
    assert (row["captions"], row["control"], row["broken"]) == (4, None, {})
    run = CliRunner().invoke(app, ["evaluate", str(model), "--data", data, "--control", "blank", "--split", "train"])
    assert run.exit_code == 0, run.output
    assert "13 videos, blank frames" in run.stdout
    assert "majority caption" in run.stdout
    for arguments, refusal in (
        (["--control", "gone"], "`control` is 'gone'"),
        (["--window", "3"], "--original, --plot and --window are about text models"),
        (["--split", "other"], "other"),
    ):
        run = CliRunner().invoke(app, ["evaluate", str(model), "--data", data, *arguments])
        assert isinstance(run.exception, UsageError)
        assert refusal in str(run.exception)
