"""Rotary positions, the four ways in use of stretching them, and T5's relative positions."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modicum.config import RopeConfig


class Rotate(NamedTuple):
    """The rotation of queries and keys at L positions: [B, L, heads, K] -> same."""

    cos_BL1R: Tensor
    sin_BL1R: Tensor  # the sign of the first half inside

    def __call__(self, x_BLHK: Tensor) -> Tensor:
        rotary_dim = self.cos_BL1R.shape[-1]
        if x_BLHK.shape[-1] == rotary_dim:
            return rotated(x_BLHK, self.cos_BL1R, self.sin_BL1R)
        turned, untouched = x_BLHK.split([rotary_dim, x_BLHK.shape[-1] - rotary_dim], dim=-1)
        return torch.cat([rotated(turned, self.cos_BL1R, self.sin_BL1R), untouched], dim=-1)

    def at(self, rows: slice) -> "Rotate":
        """The rotation of these positions alone."""
        return Rotate(self.cos_BL1R[:, rows], self.sin_BL1R[:, rows])


class Rope(nn.Module):
    """Rotary position embedding (2104.09864), rotating dimension i with i + rotary_dim/2 ("half-split", as in stock
    checkpoints).

    Angles are computed in float32, or float64 for float64 inputs, whatever the dtype of the model.
    """

    def __init__(self, config: RopeConfig) -> None:
        super().__init__()
        half_R, self.magnitude = frequencies(config)
        # Laid out so that a rotation is x * cos + swapped(x) * sin, the sign of the first half inside sin.
        self.frequencies = torch.cat([half_R, half_R])
        self.signs = torch.cat([-torch.ones_like(half_R), torch.ones_like(half_R)])
        self.rotary_dim = len(self.frequencies)  # an odd number is rounded up to whole pairs

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rope":
        # The tables follow the model to its device but never to its dtype.
        device = fn(torch.empty(0)).device
        if device.type != "meta":
            self.frequencies, self.signs = self.frequencies.to(device), self.signs.to(device)
        return super()._apply(fn, recurse)

    def forward(self, positions_BL: Tensor, dtype: torch.dtype) -> Rotate:
        """The rotation of queries and keys at `positions_BL`."""
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        angles_BL1R = positions_BL[..., None, None].to(precise) * self.frequencies.to(precise)
        cos_BL1R, sin_BL1R = angles_BL1R.cos(), angles_BL1R.sin() * self.signs.to(precise)
        if self.magnitude != 1:
            cos_BL1R, sin_BL1R = cos_BL1R * self.magnitude, sin_BL1R * self.magnitude
        return Rotate(cos_BL1R.to(dtype), sin_BL1R.to(dtype))


def rotated(x_BLHR: Tensor, cos_BL1R: Tensor, sin_BL1R: Tensor) -> Tensor:
    first, second = x_BLHR.chunk(2, dim=-1)
    return torch.addcmul(x_BLHR * cos_BL1R, torch.cat([second, first], dim=-1), sin_BL1R)


def frequencies(config: RopeConfig) -> tuple[Tensor, float]:
    """Radians per position of each rotated pair, float32 [rotary_dim / 2], and the factor on cos and sin.

    linear: positions divided by `factor` (2306.15595). llama3: only wavelengths long against the original context are
    divided, with a ramp between. yarn: interpolated, or not, per frequency, with a factor on the scores (2309.00071).
    dynamic: within the original context the same as default; beyond it the result would depend on the order in which
    the text was read, so the context ends there.
    """
    exponents = torch.arange(0, config.rotary_dim, 2, device="cpu").float() / config.rotary_dim
    plain = 1.0 / config.theta**exponents
    if config.scaling == "linear":
        return plain / config.factor, 1.0
    if config.scaling == "llama3":
        return _llama3(plain, config), 1.0
    if config.scaling == "yarn":
        return _yarn(plain, config)
    return plain, 1.0


def _llama3(plain: Tensor, config: RopeConfig) -> Tensor:
    assert config.original_max_seq_len is not None
    low, high = config.low_freq_factor, config.high_freq_factor
    wavelengths = 2 * math.pi / plain
    # 0 where a wavelength is longer than the original context / low, 1 where shorter than the context / high.
    ramp = (config.original_max_seq_len / wavelengths - low) / (high - low)
    smooth = (1 - ramp) * plain / config.factor + ramp * plain
    stretched = torch.where(wavelengths > config.original_max_seq_len / low, plain / config.factor, smooth)
    return torch.where(wavelengths < config.original_max_seq_len / high, plain, stretched)


def _yarn(plain: Tensor, config: RopeConfig) -> tuple[Tensor, float]:
    assert config.original_max_seq_len is not None
    dim, original = config.rotary_dim, config.original_max_seq_len

    def pair_turning(turns: float) -> float:
        """The (fractional) pair that makes `turns` full turns over the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_turning(config.beta_fast), pair_turning(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    ramp = ((torch.arange(dim // 2, device="cpu").float() - low) / width).clamp(0, 1)
    return plain / config.factor * ramp + plain * (1 - ramp), _yarn_magnitude(config)


def _yarn_magnitude(config: RopeConfig) -> float:
    def magnitude(mscale: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * mscale * math.log(config.factor) + 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return magnitude(config.mscale) / magnitude(config.mscale_all_dim)
    return magnitude(1.0)


def sinusoids(positions_L: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of wavelengths from 2 pi to 10000 * 2 pi (1706.03762, section 3.5): float32 [L, dim]."""
    half = (dim + 1) // 2
    rates = 10000.0 ** -(torch.arange(half, device=positions_L.device).float() / max(1, half - 1))
    angles_LR = positions_L[:, None].float() * rates
    return torch.cat([angles_LR.sin(), angles_LR.cos()], dim=-1)[:, :dim]


class RelativeBias(nn.Module):
    """T5's relative positions (1910.10683, section 2.1): a learned number per head and distance, added to the scores.

    Distances share numbers by buckets (`distance_buckets`). One table, [buckets, H], serves all layers of a stack.
    """

    buckets: Tensor

    def __init__(self, n_heads: int, n_buckets: int, max_distance: int, *, bidirectional: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_buckets, n_heads))
        self.ahead = max_distance if bidirectional else 0
        self.behind = max_distance
        # On the CPU, where a rounded logarithm is the same for every model, and out of what a checkpoint holds.
        buckets = distance_buckets(n_buckets, max_distance, bidirectional=bidirectional)
        self.register_buffer("buckets", buckets, persistent=False)

    def forward(self, positions_BL: Tensor, n_slots: int) -> Tensor:
        """What is added to the scores of queries at `positions_BL` and keys at 0 ... n_slots - 1: [B, H, L, M]."""
        slots_M = torch.arange(n_slots, device=positions_BL.device)
        distance_BLM = (slots_M - positions_BL[..., None]).clamp(-self.behind, self.ahead)
        by_distance = self.weight[self.buckets].T  # [H, distances], nearest last or in the middle
        return by_distance[:, distance_BLM + self.behind].transpose(0, 1)


def distance_buckets(n_buckets: int, max_distance: int, *, bidirectional: bool) -> Tensor:
    """The bucket of a key that stands -max_distance ... max_distance tokens after its query (... 0 if not bidirectional).

    The nearer half of the distances have a bucket each; beyond them buckets widen logarithmically, and the last one holds
    `max_distance` and everything farther. Looking both ways, keys behind a query have the first half of the buckets and
    keys ahead of it the second.
    """
    per_side = n_buckets // 2 if bidirectional else n_buckets
    exact = per_side // 2
    distance = torch.arange(max_distance + 1, device="cpu")
    share = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (share * (per_side - exact)).long()).clamp(max=per_side - 1)
    bucket = torch.where(distance < exact, distance, far)
    return torch.cat([bucket.flip(0), bucket[1:] + per_side]) if bidirectional else bucket.flip(0)
