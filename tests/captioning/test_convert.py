"""Fewer key-value heads in a captioner: by hand, nothing lost where heads are equal, and calibrated on what it sees."""

import json

import pytest
import torch
from typer.testing import CliRunner

import modicum
from modicum.captioning import clips as room
from modicum.cli.main import app
from modicum.config import with_kv_heads
from modicum.errors import UsageError
from modicum.gqa.heads import places, take
from tests.helpers import clips, tiny_captioner
from tests.speculative.readers import FRAMES, LEARNED, PATCHES, name_of

IDS = torch.tensor([[0, 3, 17, 5, 9, 2, 20], [0, 1, 1, 28, 7, 23, 11]])
VIDEO = torch.stack(clips([9, 9]))
# Nine pieces, of which one judges the refits.
SAID = (torch.arange(9 * 8).view(9, 8) % 29).tolist()
PAIRS = list(zip(clips([9] * 9, seed=6), SAID, strict=True))


def converted(model, folder, *args, **settings):
    modicum.save(model, folder / "source")
    ckpt = modicum.convert_to_gqa(modicum.read_checkpoint(folder / "source"), *args, **settings)
    modicum.write_checkpoint(ckpt, folder / "converted")
    return ckpt, modicum.load(folder / "converted")


@pytest.mark.parametrize("kind", [FRAMES, PATCHES, LEARNED], ids=name_of)
@pytest.mark.parametrize("method", ["mean", "first", "random"])
def test_what_a_head_becomes(kind, method, tmp_path):
    model = kind.make(n_kv_heads=6)
    ckpt, loaded = converted(model, tmp_path, 2, method)
    assert loaded.config == with_kv_heads(model.config, 2)
    assert ckpt.config["decoder"]["n_kv_heads"] == 2
    assert ckpt.config["encoder"]["n_kv_heads"] == 2  # its own, as before
    state, source = loaded.dense_state(), model.dense_state()
    changed = {name for name in source if state[name].shape != source[name].shape}
    kinds = ("weight", "bias") if kind is LEARNED else ("weight",)
    assert changed == {
        f"decoder.blocks.{i}.{layer}.project.{part}.{kind}"
        for i in range(2)
        for layer in ("attention", "cross")
        for part in "kv"
        for kind in kinds
    }
    assert all(torch.equal(state[name], source[name]) for name in state if name not in changed)
    if method != "random":
        for name in changed:
            groups = source[name].reshape(2, 3, 10, *source[name].shape[1:])
            pooled = groups.mean(1) if method == "mean" else groups[:, 0]
            torch.testing.assert_close(state[name], pooled.flatten(0, 1))
    with torch.no_grad():
        assert 1e-3 < (loaded(VIDEO, IDS) - model(VIDEO, IDS)).abs().max() < torch.inf
    cache = loaded.new_cache(2, 9)
    loaded.read(list(loaded.encode(VIDEO)), cache)
    assert cache.k_NBGMK.shape == (2, 2, 2, 9, 10)
    assert cache.context.k_NBGMK.shape == (2, 2, 2, model.config.memory_slots, 10)


def test_as_many_heads_change_nothing(tmp_path):
    model = tiny_captioner(n_kv_heads=6)
    modicum.save(model, tmp_path / "source")
    source = modicum.read_checkpoint(tmp_path / "source")
    same = modicum.convert_to_gqa(source, 6)
    assert same.config == source.config
    assert all(torch.equal(same.state_dict[name], source.state_dict[name]) for name in source.state_dict)


@pytest.mark.parametrize("method", ["mean", "first", "aligned", "merged"])
def test_heads_that_are_equal_already_lose_nothing(method, tmp_path):
    model = tiny_captioner(n_kv_heads=6)
    state = model.state_dict()
    for place in places(model.config):
        for part in "kv":
            heads = state[f"{place.prefix}.project.{part}.weight"].unflatten(0, (2, 3, 10))
            heads.copy_(heads[:, :1].expand(-1, 3, -1, -1).clone())
    _, loaded = converted(model, tmp_path, 2, method)
    with torch.no_grad():
        assert (loaded(VIDEO, IDS) - model(VIDEO, IDS)).abs().max() < 1e-4
        # The same heads shared otherwise are another function.
        state[f"{place.prefix}.project.v.weight"].copy_(state[f"{place.prefix}.project.v.weight"].roll(10, 0))
        assert (loaded(VIDEO, IDS) - model(VIDEO, IDS)).abs().max() > 1e-3


def test_calibrated_on_clips_and_captions(tmp_path):
    model, layers = tiny_captioner(n_kv_heads=6), []
    settings = {"calibration": PAIRS, "on_layer": lambda: layers.append(1)}
    _, calibrated = converted(model, tmp_path, 2, "merged", **settings)
    assert len(layers) == 4
    _, blind = converted(model, tmp_path / "blind", 2, "merged")
    (tmp_path / "mean").mkdir()
    _, mean = converted(model, tmp_path / "mean", 2, "mean")
    video, ids = torch.stack([video for video, _ in PAIRS]), torch.tensor([[0, *said[1:]] for _, said in PAIRS])

    def distance(other):
        with torch.no_grad():
            wanted = model(video, ids).log_softmax(-1)
            return (wanted.exp() * (wanted - other(video, ids).log_softmax(-1))).sum(-1).mean().item()

    assert distance(calibrated) < distance(blind) < distance(mean)
    record = json.loads(modicum.read_checkpoint(tmp_path / "converted").files["training.json"])
    assert record["conversion"] == {"method": "merged", "kv_heads": 2, "calibrated": True}


def test_on_the_command_line(tmp_path):
    modicum.save(tiny_captioner(n_kv_heads=6), tmp_path / "source")
    run = CliRunner().invoke
    arguments = ["convert", str(tmp_path / "source"), str(tmp_path / "out"), "--kv-heads", "3", "--json"]
    facts = json.loads(run(app, arguments).stdout)
    assert facts["kv_heads"] == [6, 3]
    # Keys and values of a token, two layers, heads of 10; of a clip it is as many per slot.
    assert facts["kv_numbers_per_token"] == [2 * 2 * 6 * 10, 2 * 2 * 3 * 10]
    assert not facts["loads_in_transformers"]
    shorter = ["convert", str(tmp_path / "source"), str(tmp_path / "one"), "--keep-layers", "1"]
    assert run(app, shorter).exit_code == 0
    kept, whole = modicum.load(tmp_path / "one"), modicum.load(tmp_path / "source")
    assert torch.equal(kept.blocks[0].cross.out.weight, whole.blocks[1].cross.out.weight)
    # What is left drafts for the whole.
    assert modicum.caption(whole, clips([9]), draft=kept, max_new_tokens=5).tokens[0]
    report = run(app, ["convert", str(tmp_path / "source"), "--report", "--json"])
    assert {row["layer"].rpartition(".")[2] for row in json.loads(report.stdout)} == {"attention", "cross"}
    (tmp_path / "text.txt").write_text("a text")
    text = [*arguments[:2], str(tmp_path / "x"), "--kv-heads", "3", "--method", "merged", "--calibration"]
    refused = run(app, [*text, str(tmp_path / "text.txt")])
    assert "give pairs of a clip and its caption" in str(refused.exception)


def test_calibration_looks_at_files_as_the_model_was_trained(monkeypatch):
    model, seen = tiny_captioner(), []

    def read(path, config, protocol):
        seen.append((protocol.stride, protocol.short_side))
        return torch.zeros(1, 9, 11, 16, 3, dtype=torch.uint8)

    monkeypatch.setattr(room, "read_views", read)
    model.files = {"training.json": json.dumps({"settings": {"clips": {"stride": 3}, "augment": {"short_side": 17}}})}
    room.shown_and_said(model, [("clip.mp4", [1, 2])])
    assert seen == [(3, 17)]


@pytest.mark.parametrize("calibration", ["text.txt", [[1, 2, 3]], [[1, 2]], [], [None], [PAIRS[0], 5]])
def test_calibration_on_anything_else_is_refused(calibration, tmp_path):
    with pytest.raises(UsageError, match="give pairs of a clip and its caption"):
        converted(tiny_captioner(n_kv_heads=6), tmp_path, 2, "merged", calibration=calibration)


def test_cross_attention_has_no_rotation():
    model = tiny_captioner()
    found = {place.prefix: take(model.dense_state(), place).rotary_dim for place in places(model.config)}
    assert found == {
        "decoder.blocks.0.attention": 10,
        "decoder.blocks.0.cross": 0,
        "decoder.blocks.1.attention": 10,
        "decoder.blocks.1.cross": 0,
    }
