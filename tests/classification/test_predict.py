"""From files to labels: which clips reach the model, how logits become predictions, one window after another."""

import json

import numpy as np
import pytest
import torch

import modicum
from modicum.classification.predict import Protocol, best, classify_files, protocol_for, read_views
from modicum.classification.stream import classify_stream
from modicum.errors import ModicumError, UsageError
from modicum.video.datasets import VideoSample
from modicum.video.read import Video
from tests.classification.small import FRAMES, SIDE, small
from tests.helpers import tiny
from tests.video.clips import number_of, write_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", 40)


def test_the_views_are_those_frames(clip):
    views = read_views(clip, small().config, Protocol(views=(3, 1), stride=2, short_side=48))
    assert views.shape == (3, FRAMES, SIDE, SIDE, 3)
    # 40 frames leave room for 40 - 12 = 28. The crop cuts 8 columns off either side of the picture, which its widest
    # blocks survive at the edges; the full frames tell the numbers.
    with Video(clip) as video:
        for view, start in zip(views, (0, 14, 28), strict=True):
            frames = video.frames([start + 2 * i for i in range(FRAMES)])
            assert [number_of(frame) for frame in frames] == [start + 2 * i for i in range(FRAMES)]
            assert torch.equal(view, frames[:, :, 8:56])


def test_logits_are_averaged_over_views(clip):
    model = small()
    views = read_views(clip, model.config, Protocol(views=(4, 3)))
    assert len(views) == 12
    with torch.no_grad():
        expected = torch.stack([model(view[None])[0] for view in views]).mean(0).softmax(-1)
    predictions = modicum.classify(model, clip, views=(4, 3), top=5)
    assert [p.index for p in predictions] == expected.argsort(descending=True).tolist()
    for prediction in predictions:
        assert prediction.score == pytest.approx(expected[prediction.index].item(), abs=1e-5)
        assert prediction.label == str(prediction.index)
    assert sum(p.score for p in predictions) == pytest.approx(1)


def test_labels_name_the_classes(clip):
    model = small()
    model.labels = ["jump", "run", "sit", "swim", "wave"]
    (first, *_), again = modicum.classify(model, [clip, str(clip)], top=2)
    assert first.label == model.labels[first.index]
    assert again[0] == first
    assert len(again) == 2


def test_two_heads_give_actions():
    logits = {"noun": torch.tensor([0.0, 2.0, 1.0]), "verb": torch.tensor([1.0, 0.5])}
    labels = ["cup", "door", "egg", "close", "open"]
    found = best(logits, labels, 2)
    assert [p.label for p in found["noun"]] == ["door", "egg"]
    assert [p.label for p in found["verb"]] == ["close", "open"]
    joint = torch.outer(logits["noun"].softmax(0), logits["verb"].softmax(0))
    assert [p.index for p in found["action"]] == [(1, 0), (1, 1)]
    assert found["action"][0].label == "door close"
    assert found["action"][0].score == pytest.approx(joint[1, 0].item())


def test_a_broken_file_does_not_stop_the_others(clip, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    results = list(classify_files(small(), [clip, broken, clip], Protocol(views=(1, 1))))
    assert [isinstance(result, ModicumError) for result in results] == [False, True, False]
    assert results[0][0] == results[2][0]
    with pytest.raises(ModicumError, match=r"broken\.mp4"):
        modicum.classify(small(), [clip, broken])


def test_refusals(clip):
    for views, sentence in (((0, 1), "`views` is"), ((1, 2), "2 spatial crops .* choose 1 or 3")):
        with pytest.raises(UsageError, match=sentence):
            modicum.classify(small(), clip, views=views)
    with pytest.raises(UsageError, match="Decoder is not a video classifier: give a ViViT"):
        modicum.classify(tiny(), clip)


VARIANTS = [
    {},
    {"temporal_layers": 0},
    {"pooling": "gap"},
    {"heads": {"noun": 3, "verb": 2}},
    {"variant": "spacetime"},
    {"variant": "factorized_dot_product"},
]


@pytest.mark.parametrize("settings", VARIANTS)
def test_a_stream_equals_each_window_afresh(clip, settings):
    model = small(**settings)
    protocol = Protocol(stride=1, short_side=48)
    windows = list(classify_stream(model, clip, every=0.2, protocol=protocol))
    # A tubelet is 2 frames of a 25 fps clock, so 0.2 s round to 2 tubelets, 4 frames.
    starts = list(range(0, 40 - FRAMES + 1, 4))
    assert len(windows) == len(starts)
    with Video(clip) as video:
        for window, start in zip(windows, starts, strict=True):
            frames = video.frames(list(range(start, start + FRAMES)))[None, :, :, 8:56]
            with torch.no_grad():
                out = model(frames)
            out = {name: value[0] for name, value in (out if isinstance(out, dict) else {"": out}).items()}
            expected = best(out, None, 5)
            assert window.start == pytest.approx(start / 25)
            assert window.end == pytest.approx((start + FRAMES - 1) / 25)
            pairs = [(window.predictions, expected)]
            if isinstance(expected, dict):
                pairs = [(window.predictions[name], expected[name]) for name in expected]
            for found, wanted in pairs:
                assert [p.index for p in found] == [p.index for p in wanted]
                assert [p.score for p in found] == pytest.approx([p.score for p in wanted], abs=1e-5)


def test_a_stream_encodes_each_tubelet_once(clip, monkeypatch):
    model = small()
    encoded = []
    encode = type(model).encode_frames
    monkeypatch.setattr(
        type(model), "encode_frames", lambda self, video: encoded.append(video.shape[1]) or encode(self, video)
    )
    windows = list(classify_stream(model, clip, every=0.01, protocol=Protocol(stride=1)))
    assert len(windows) == 20 - 3 + 1
    assert encoded == [2] * 20


def test_a_video_shorter_than_a_window_gives_one(tmp_path):
    path = write_video(tmp_path / "short.mp4", 4)
    model = small()
    (window,) = classify_stream(model, path, every=1.0, protocol=Protocol(stride=1))
    assert window.predictions == modicum.classify(model, path, views=(1, 1), stride=1)
    assert (window.start, window.end) == (0.0, pytest.approx(3 / 25))


def test_stream_refusals(clip):
    with pytest.raises(UsageError, match="`every` is 0: give a positive number of seconds"):
        next(classify_stream(small(), clip, every=0, protocol=Protocol()))
    with pytest.raises(UsageError, match="samples frames from its whole window"):
        next(classify_stream(small(sampled_frames=4), clip, every=1, protocol=Protocol()))


def test_predictions_become_json():
    found = best({"": torch.tensor([0.0, 1.0])}, ["no", "yes"], 1)[0].to_dict()
    assert json.loads(json.dumps(found)) == {"label": "yes", "index": 1, "score": pytest.approx(1 / (1 + np.exp(-1)))}


def test_views_of_a_part_are_those_of_the_part_alone(tmp_path):
    """Frames 10 to 27 of 40, read as part of the whole and from a file of their own, show the same numbers."""
    whole, alone = write_video(tmp_path / "whole.mp4", 40), write_video(tmp_path / "alone.mp4", range(10, 28))
    part, protocol = VideoSample(whole, start=0.4, end=1.12), Protocol(views=(3, 1), stride=2, short_side=48)
    seen, expected, others = (read_views(video, small().config, protocol) > 128 for video in (part, alone, whole))
    assert torch.equal(seen, expected)
    assert not torch.equal(seen, others)


def test_a_model_looks_as_it_was_trained_unless_told_otherwise():
    """What training.json says of strides and sizes holds for what the caller leaves open; without it 2, in proportion."""
    model = small()
    record = {"settings": {"clips": {"stride": 3, "size": 32}, "augment": {"short_side": 61}}}
    assert protocol_for(model, views=(1, 1)) == Protocol(views=(1, 1), stride=2, short_side=None)
    model.files = {"training.json": json.dumps(record).encode()}
    assert protocol_for(model, views=(1, 1)) == Protocol(views=(1, 1), stride=3, short_side=61)
    # SSv2's clock, a file's own, and a number that the caller gives.
    for trained, given, expected in ((12.5, "auto", 12.5), (0.0, "auto", None), (12.5, 30, 30), (12.5, None, None)):
        clips = record["settings"]["clips"] | {"fps": trained}
        model.files = {"training.json": json.dumps({"settings": {"clips": clips}}).encode()}
        assert protocol_for(model, fps=given).fps == expected
    judged = record["settings"] | {"views": {"views": [4, 1], "short_side": 67}}
    model.files = {"training.json": json.dumps({"settings": judged}).encode()}
    assert protocol_for(model).short_side == 67
    model.files = {"training.json": json.dumps(record).encode()}
    assert protocol_for(model, stride=5, short_side=70, top=2) == Protocol(stride=5, short_side=70, top=2)
    record["settings"]["augment"]["short_side"] = min(model.config.image_size) - 1
    model.files = {"training.json": json.dumps(record).encode()}
    assert protocol_for(model).short_side is None
