"""From a video to tokens (2103.15691, section 3.2): uniform frame sampling and tubelet embedding."""

import torch
from torch import Tensor, nn

from modicum.core.linear import Linear


def sampled_indices(num_frames: int, sampled_frames: int) -> list[int]:
    """Which frames uniform frame sampling keeps: round(k * num_frames / (sampled_frames + 1)) for k = 1, 2, ...

    Halves round to even. Asked for as many frames as there are, or more, it keeps all. 32 and 8 give
    4, 7, 11, 14, 18, 21, 25, 28.
    """
    if sampled_frames >= num_frames:
        return list(range(num_frames))
    return [round(k * num_frames / (sampled_frames + 1)) for k in range(1, sampled_frames + 1)]


class TubeletEmbedding(nn.Module):
    """A linear map of non-overlapping tubelets: a 3-D convolution whose stride is its kernel, without padding.

    [B, T_frames, height, width, C] -> [B, T, S, D]; rows of tokens run along the width, then down the height. Frames,
    rows and columns that fill no whole tubelet are dropped. A weight row is ordered (time, height, width, C).
    """

    def __init__(self, size: tuple[int, int, int], channels: int, dim: int) -> None:
        super().__init__()
        self.size = size
        self.project = Linear(size[0] * size[1] * size[2] * channels, dim)

    def forward(self, video: Tensor) -> Tensor:
        t, h, w = self.size
        n_t, n_h, n_w = video.shape[1] // t, video.shape[2] // h, video.shape[3] // w
        whole = video[:, : n_t * t, : n_h * h, : n_w * w]
        cells = whole.unflatten(3, (n_w, w)).unflatten(2, (n_h, h)).unflatten(1, (n_t, t))
        # [B, n_t, t, n_h, h, n_w, w, C] -> [B, n_t, n_h, n_w, t, h, w, C]
        tubelets = cells.permute(0, 1, 3, 5, 2, 4, 6, 7)
        return self.project(tubelets.flatten(4).flatten(2, 3))


def to_unit_range(video: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels as the models were trained on them: uint8 0 ... 255 -> [-1, 1]; a float video passes as it is."""
    if video.dtype == torch.uint8:
        # Scaled in float32: bfloat16 cannot tell neighbouring bright pixels apart.
        return (video.float() * (2 / 255) - 1).to(dtype)
    return video.to(dtype)
