"""Which frames a model sees: temporal views (2103.15691, section 4.1); `video.crops` has which part of them."""

import numpy as np


def temporal_views(n_frames: int, num_frames: int, stride: int, views: int) -> list[list[int]]:
    """Frame indices of each view: `num_frames` of them, `stride` apart, views spread evenly from the first frame to the
    last; a single view is the middle one. A video that is too short starts again from its beginning.

    Args:
        n_frames: frames of the video.
    """
    room = max(0, n_frames - num_frames * stride)
    offsets = [room // 2] if views == 1 else np.linspace(0, room, views).astype(int).tolist()
    return [[(offset + i * stride) % n_frames for i in range(num_frames)] for offset in offsets]
