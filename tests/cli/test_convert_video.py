"""`modicum convert-video`: from the authors' files to folders that load."""

import json
import sys

import pytest
import torch

import modicum
from modicum.cli import common, main
from modicum.errors import UsageError
from tests.helpers import tiny
from tests.vivit.scenic_files import equal_weights, nested, scenic_parameters, write_flax
from tests.vivit.tiny import M1, M2, M3, M4, clip, tiny_vivit

SIZES = ("--frames", "11", "--size", "36x22")


@pytest.fixture
def convert(monkeypatch, capsys):
    """Run the command in this process: exit code, stdout, stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["modicum", "convert-video", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main.run()
        return stopped.value.code, *capsys.readouterr()

    return call


def flax_file(folder, name="checkpoint_7", **kind):
    """A model of ours, and the file that the authors' code would have left of it."""
    model = tiny_vivit(**kind)
    folder.mkdir(exist_ok=True)
    parameters = nested(scenic_parameters(model))
    return model, write_flax(folder / name, {"optimizer": {"target": {"params": parameters}}, "global_step": 7})


def test_what_is_written(tmp_path, convert):
    model, file = flax_file(tmp_path / "source", variant=M2, temporal_layers=3)
    code, out, err = convert(file, tmp_path / "new", *SIZES)
    count = sum(parameter.numel() for parameter in model.parameters())
    line = f"{tmp_path / 'new'}: factorized_encoder, {count:,} parameters, 3 x 7 x 3 tokens (time, height, width)\n"
    assert (code, out, err) == (0, line, "")
    again = modicum.load(tmp_path / "new")
    assert again.config == model.config
    assert torch.equal(again(clip()), model(clip()))


def test_every_option(tmp_path, convert):
    kind = {"variant": M3, "pooling": "gmp", "attention_order": "time_space", "heads": (("noun", 9), ("verb", 4))}
    model, _ = flax_file(tmp_path / "source", **kind, tubelet_size=(1, 5, 7), sampled_frames=3)
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"thing {i}\n" for i in range(13)), encoding="utf-8")
    options = ["--pooling", "gmp", "--attention-order", "time_space", "--heads", "noun=9, verb=4"]
    options += ["--sampled-frames", 3, "--variant", M3, "--labels", labels]
    assert convert(tmp_path / "source", tmp_path / "new", *SIZES, *options)[0] == 0
    again = modicum.load(tmp_path / "new")
    assert again.config == model.config
    assert again.labels == [f"thing {i}" for i in range(13)]
    assert equal_weights(again, model)


def test_the_stock_layout_and_back(tmp_path, convert):
    """A folder is written again as it is, its labels replaced when others are given."""
    flax_file(tmp_path / "source", variant=M1)
    assert convert(tmp_path / "source", tmp_path / "one", *SIZES)[0] == 0
    assert json.loads((tmp_path / "one/config.json").read_text())["architectures"] == ["VivitForVideoClassification"]
    (tmp_path / "labels").write_text("\n".join("abcdefghijklm"))
    assert convert(tmp_path / "one", tmp_path / "two", "--labels", tmp_path / "labels")[0] == 0
    assert modicum.load(tmp_path / "two").labels == list("abcdefghijklm")
    one, two = (modicum.load(tmp_path / name) for name in ("one", "two"))
    assert one.labels is None
    assert equal_weights(one, two)


def test_force(tmp_path, convert):
    flax_file(tmp_path / "source", variant=M1)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/mine").write_text("keep me")
    code, out, err = convert(tmp_path / "source", tmp_path / "new", *SIZES)
    assert (code, out) == (2, "")
    assert "already holds files" in err
    assert (tmp_path / "new/mine").exists()
    assert convert(tmp_path / "source", tmp_path / "new", *SIZES, "--force")[0] == 0
    assert not (tmp_path / "new/mine").exists()


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        ((), 2, "63 tokens and 32 frames of 224x224 in tubelets of 3x5x7 make 14080: give its num_frames"),
        ((*SIZES, "--size", "36x"), 2, "--size 36x is not a size: give a side, or HEIGHTxWIDTH as in 224x288"),
        ((*SIZES, "--size", "1x2x3"), 2, "--size 1x2x3 is not a size"),
        ((*SIZES, "--heads", "noun,verb=4"), 2, "--heads noun,verb=4 is no list of outputs"),
        ((*SIZES, "--heads", "a=9,a=4"), 2, "give different names with sizes, as in noun=300,verb=97"),
        ((*SIZES, "--heads", "noun=0,verb=13"), 2, "is no list of outputs"),
        ((*SIZES, "--heads", "noun=9,verb=5"), 2, "do not add up to 13 classes"),
        ((*SIZES, "--variant", M4), 2, "`variant` is factorized_dot_product and the checkpoint holds a spacetime"),
        ((*SIZES, "--labels", "{folder}/none"), 1, "none cannot be read as text"),
        ((*SIZES, "--labels", "{folder}/two.txt"), 2, "two.txt has 2 lines for 13 classes: give one name per class"),
    ],
)
def test_refusals(tmp_path, convert, options, code, sentence):
    flax_file(tmp_path / "source", variant=M1)
    (tmp_path / "two.txt").write_text("a\nb\n")
    given = [option.format(folder=tmp_path) for option in options]
    result, out, err = convert(tmp_path / "source", tmp_path / "new", *given)
    assert (result, out) == (code, "")
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_sources_that_are_something_else(tmp_path, convert):
    modicum.save(tiny_vivit(variant=M2), tmp_path / "ours")
    code, _, err = convert(tmp_path / "ours", tmp_path / "new", *SIZES, "--sampled-frames", 2)
    assert code == 2
    assert "is no Flax checkpoint and says by itself what it is: leave out --frames, --size, --sampled-frames" in err
    modicum.save(tiny(), tmp_path / "text")
    code, _, err = convert(tmp_path / "text", tmp_path / "new")
    assert code == 2
    assert "is not a ViViT: give a video classifier" in err
    (tmp_path / "empty").mkdir()
    code, _, err = convert(tmp_path / "empty", tmp_path / "new")
    assert code == 1
    assert "has no config.json" in err
    (tmp_path / "not.msgpack").write_text("hello")
    code, _, err = convert(tmp_path / "not.msgpack", tmp_path / "new")
    assert code == 1
    assert "is not a complete Flax checkpoint (it does not begin with a map)" in err


def test_weights_for_flax_beside_safetensors(tmp_path, convert):
    """Folders on the hub may hold a flax_model.msgpack of another layout: the safetensors are read."""
    modicum.save(tiny_vivit(variant=M1), tmp_path / "stock")
    (tmp_path / "stock/flax_model.msgpack").write_bytes(b"\x80")
    assert convert(tmp_path / "stock", tmp_path / "new")[0] == 0


def test_sizes():
    assert common.parse_size("224") == (224, 224)
    assert common.parse_size("36X22") == (36, 22)
    with pytest.raises(UsageError, match="is not a size"):
        common.parse_size("-3")
