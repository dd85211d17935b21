"""Which frames and pixels a model sees, against numbers worked out by hand."""

import pytest
import torch

from modicum.classification.views import temporal_views
from modicum.errors import UsageError
from modicum.video.crops import crop_corners, crops_of, resize, resized_shape


def test_views_spread_from_the_first_frame_to_the_last():
    # 300 frames leave room for 300 - 32 * 2 = 236 before the last view.
    starts = [view[0] for view in temporal_views(300, 32, 2, 4)]
    assert starts == [0, 78, 157, 236]
    assert temporal_views(300, 32, 2, 4)[1][:3] == [78, 80, 82]
    assert all(len(view) == 32 and max(view) < 300 for view in temporal_views(300, 32, 2, 4))


def test_one_view_is_the_middle_one():
    assert temporal_views(300, 32, 2, 1)[0][0] == 118
    assert temporal_views(31, 3, 5, 1) == [[8, 13, 18]]


def test_a_short_video_starts_again_from_its_beginning():
    assert temporal_views(5, 7, 2, 1) == [[0, 2, 4, 1, 3, 0, 2]]
    assert temporal_views(5, 7, 2, 3) == [[0, 2, 4, 1, 3, 0, 2]] * 3
    assert temporal_views(1, 3, 2, 2) == [[0, 0, 0]] * 2


def test_the_shorter_side_is_resized_and_the_other_rounded_down():
    assert resized_shape(720, 1280, (224, 224), 256) == (256, 455)
    assert resized_shape(1280, 720, (224, 224), 256) == (455, 256)
    assert resized_shape(240, 320, (224, 224), 256) == (256, 341)
    assert resized_shape(333, 333, (224, 224), 288) == (288, 288)
    # A crop that is not square: the side that leaves it less room decides.
    assert resized_shape(100, 100, (32, 48), 40) == (60, 60)
    assert resized_shape(100, 300, (48, 32), 40) == (60, 180)


def test_crops_lie_along_the_longer_side():
    assert crop_corners(256, 340, (224, 224), 3) == [(16, 0), (16, 58), (16, 116)]
    assert crop_corners(340, 256, (224, 224), 3) == [(0, 16), (58, 16), (116, 16)]
    assert crop_corners(256, 341, (224, 224), 1) == [(16, 59)]  # half of 117, rounded up
    with pytest.raises(UsageError, match="5 spatial crops were asked for: choose 1, the centre, or 3"):
        crop_corners(256, 340, (224, 224), 5)


def test_resizing_is_bilinear_between_pixel_centres_and_cuts_off():
    frame = torch.tensor([[0, 10], [100, 255]], dtype=torch.uint8)[None, ..., None].expand(1, 2, 2, 3)
    # Doubled, the new centres lie a quarter and three quarters between the old ones: 0.25 * 10 = 2.5 becomes 2.
    rows = resize(frame, 2, 4)[0, :, :, 0].tolist()
    assert rows == [[0, 2, 7, 10], [100, 138, 216, 255]]
    assert resize(frame, 2, 2) is frame


def test_crops_are_cut_from_what_was_resized():
    frames = torch.arange(2 * 8 * 12, dtype=torch.uint8).view(2, 8, 12, 1).expand(-1, -1, -1, 3)
    left, centre, right = crops_of(frames, (7, 7), 8, 3)
    assert left.shape == (2, 7, 7, 3)
    assert torch.equal(left, frames[:, 1:8, 0:7])
    assert torch.equal(centre, frames[:, 1:8, 3:10])
    assert torch.equal(right, frames[:, 1:8, 5:12])
    # Without a size it is 256 / 224 of the crop: 8 for 7.
    assert torch.equal(next(crops_of(frames, (7, 7), None, 1)), centre)
    with pytest.raises(UsageError, match="a shorter side of 6 is less than the model's 7"):
        list(crops_of(frames, (7, 7), 6, 1))
