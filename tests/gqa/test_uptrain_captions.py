"""Uptraining of captioners: budgets in clips, a frozen encoder, the control, exact resume, what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import modicum
from modicum.cli.main import app
from modicum.errors import UsageError
from modicum.gqa.uptrain import Settings, Uptraining
from modicum.gqa.uptrain_captions import CaptionUptraining, uptraining
from modicum.train.loop import Training
from modicum.train.run import train
from modicum.video.synthetic import write_captioned
from tests.gqa.small import trained
from tests.train.caption_runs import write_four, write_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    write_captioned(folder / "clips", {"train": 13, "held_out": 4}, num_frames=6, side=16)
    return folder


@pytest.fixture(scope="module")
def source(folder):
    """Trained on 156 clips, 39 steps."""
    return train(write_recipe(folder), ["optim.epochs=13", "run.log_every=50", "run.validate_every=13"])


def planned(source, folder, goal, **changes):
    values = {"kv_heads": 1, "method": "mean", "data": (str(folder / "clips"),), "device": "cpu", **changes}
    return uptraining(str(source), goal, Settings(**values))


def record_of(folder):
    return json.loads((folder / "training.json").read_text())


def test_a_share_of_the_original_clips(source, folder, tmp_path, capsys):
    plan = planned(source, folder, tmp_path / "goal", fraction=0.1, method="merged")
    assert isinstance(plan, CaptionUptraining)
    # A tenth of 156 clips is 15.6, and steps have 4.
    assert (plan.facts["steps"], plan.facts["clips"], plan.facts["kv_heads"]) == (4, 16, [2, 1])
    assert plan.facts["tokens"] / plan.facts["original_tokens"] == pytest.approx(16 / 156, abs=1e-3)
    assert plan.optim.lr == pytest.approx(0.001), "a tenth of the original's"
    assert plan.optim.accumulate == 1
    plan.describe()
    said = capsys.readouterr().err
    assert "2 key-value heads -> 1 by merged, calibrated on training clips, in self- and cross-attention" in said
    assert planned(source, folder, tmp_path / "goal", tokens=round(plan.mean_length * 20)).facts["steps"] == 5
    with pytest.raises(UsageError, match="a budget of 3 tokens is less than a step of"):
        planned(source, folder, tmp_path / "goal", tokens=3)


def test_text_models_are_uptrained_as_before(tmp_path):
    model, text = trained(tmp_path)
    settings = Settings(kv_heads=2, method="mean", data=(text,), tokens=720, device="cpu")
    plan = uptraining(str(model), tmp_path / "goal", settings)
    assert type(plan) is Uptraining
    assert plan.facts["steps"] == 10


def test_converted_and_uptrained_it_keeps_its_encoder(source, folder, tmp_path):
    goal = tmp_path / "goal"
    facts = planned(source, folder, goal, fraction=0.5, lr=0.01, method="merged").go()
    before, after = load_file(source / "model.safetensors"), load_file(goal / "model.safetensors")
    encoder = [name for name in before if name.startswith("encoder.")]
    assert encoder
    assert all(torch.equal(before[name], after[name]) for name in encoder)
    for part in ("attention", "cross"):
        name = f"decoder.blocks.0.{part}.project.k.weight"
        assert after[name].shape == (10, before[name].shape[1]), "one head of 10 in the place of two"
    nats = facts["nats_per_token"]
    assert nats["original"] < nats["converted"]
    assert nats["uptrained"] < nats["converted"]
    assert facts["kv_bytes_per_token"][0] == 2 * facts["kv_bytes_per_token"][1]
    # Two layers, keys and values of 2 vectors of one head of 10, in float32.
    assert facts["context_bytes_per_clip"][1] == 2 * 2 * 2 * 10 * 4
    said = record_of(goal)
    assert said["val_loss"] == nats["uptrained"]
    assert (said["clips"], said["steps"]) == (156, 39), "of the original training"
    assert [entry["clips"] for entry in said["uptrained"]] == [facts["clips"]]
    assert not {"captions", "controls", "val_accuracy"} & set(said)
    model = modicum.load(goal)
    assert model.config.n_kv_heads == 1
    clip = next((folder / "clips" / "videos").iterdir())
    assert modicum.caption(model, clip).texts
    assert model.encoder_fingerprint == modicum.load(source).encoder_fingerprint, "drafts go on fitting"


def test_the_control_has_the_same_batches_and_heads(source, folder, tmp_path, monkeypatch):
    met = {}

    def noted(self, step):
        met.setdefault(self.folder.name, []).append([sample.id for sample in self.task.clips(step).samples])
        return whole(self, step)

    whole = Training._step
    monkeypatch.setattr(Training, "_step", noted)
    planned(source, folder, tmp_path / "goal", fraction=0.2).go()
    facts = planned(source, folder, tmp_path / "control", fraction=0.2, control=True).go()
    assert met["goal.run"] == met["control.run"]
    assert len(met["goal.run"]) == 8
    assert facts["kv_heads"] == [2, 2]
    assert facts["nats_per_token"]["converted"] is None
    assert modicum.load(tmp_path / "control").config.n_kv_heads == 2


def test_resumed_it_ends_with_the_same_bits(source, folder, tmp_path, monkeypatch):
    planned(source, folder, tmp_path / "never", fraction=0.2, teacher=str(source)).go()
    step = Training._step

    def interrupted(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Training, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        planned(source, folder, tmp_path / "once", fraction=0.2, teacher=str(source)).go()
    monkeypatch.setattr(Training, "_step", step)
    planned(source, folder, tmp_path / "once", fraction=0.2, teacher=str(source)).go(resume=True)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("never", "once"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    # The control: the teacher has a part in it.
    planned(source, folder, tmp_path / "alone", fraction=0.2).go()
    other = load_file(tmp_path / "alone" / "model.safetensors")
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_published_layouts(source, tmp_path):
    write_four(tmp_path)
    vatex = tuple(str(tmp_path / f"vatex_{split}.json") for split in ("train", "test"))
    plan = planned(source, tmp_path, tmp_path / "goal", data=vatex[:1], held_out=vatex[1], batch=3)
    assert (len(plan.training), len(plan.held_out), plan.optim.batch) == (3, 4, 3)
    plan = planned(source, tmp_path, tmp_path / "goal", data=(str(tmp_path / "captions.json"),))
    assert (len(plan.training), len(plan.held_out)) == (4, 4)
    with pytest.raises(UsageError, match="has no splits, as VATEX has a file for each"):
        planned(source, tmp_path, tmp_path / "goal", data=vatex[:1])
    with pytest.raises(UsageError, match="holds 3 files of captions"):
        planned(source, tmp_path, tmp_path / "goal", data=(str(tmp_path),))
    with pytest.raises(UsageError, match="4 videos are both trained on and held out"):
        planned(source, tmp_path, tmp_path / "goal", data=(str(tmp_path / "captions.json"),), held_out="train")


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"data": ("a", "b")}, "2 sources of clips were given"),
        ({"window": 7}, "`window` is about text"),
        ({"held_out": 0.1}, "of clips name the split"),
        ({"kv_heads": 3}, "3 key-value heads do not divide the checkpoint's 2"),
        ({"data": (".",)}, "holds no file of captions"),
    ],
)
def test_what_is_refused(source, folder, tmp_path, changes, refusal, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=refusal):
        planned(source, folder, tmp_path / "goal", **changes)


def test_on_the_command_line(source, folder, tmp_path):
    arguments = ["uptrain", str(source), str(tmp_path / "goal"), "--kv-heads", "1", "--data", str(folder / "clips")]
    result = CliRunner().invoke(app, [*arguments, "--fraction", "0.1", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "KV bytes/clip" in result.stdout
    assert modicum.load(tmp_path / "goal").config.n_kv_heads == 1
