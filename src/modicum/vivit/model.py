"""ViViT (2103.15691): the four models as one module, told apart by `VivitConfig.variant`."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from modicum.config import VivitConfig
from modicum.core.attend import blocked
from modicum.core.attention import Attention, AttentionConfig
from modicum.core.block import Block, norm
from modicum.core.linear import Linear, Packable, dense_state, pack
from modicum.errors import UsageError
from modicum.vivit.factorizations import FactorizedDotProduct, SelfAttentionBlock, SpatialAttention
from modicum.vivit.tubelets import TubeletEmbedding, sampled_indices, to_unit_range

CHANNELS = 3
POOLS: dict[str, Callable[..., Tensor]] = {"gap": torch.mean, "gmp": torch.amax, "gsp": torch.sum}


class Features(NamedTuple):
    """What a model makes of a video before its head.

    clip: [B, D], what the head reads (D is `pre_logits` where the model has that layer).
    frames: [B, T, D], one vector per tubelet in time: in a factorized encoder what its temporal encoder reads, in other
        models the mean of the frame's patches.
    patches: [B, T, S, D], the tokens of the (spatial) encoder after its norm, without class tokens.
    """

    clip: Tensor
    frames: Tensor
    patches: Tensor


class Encoder(nn.Module):
    """An optional class token, learned positions, blocks and a norm. Tokens are [B, L, D] or [B, T, S, D]; a class token
    stands first on the last token axis, and `positions` has one entry for it."""

    def __init__(
        self, blocks: list[nn.Module], positions: tuple[int, ...], dim: int, eps: float, *, token: bool
    ) -> None:
        super().__init__()
        if token:
            positions = (*positions[:-1], positions[-1] + 1)
        self.class_token = nn.Parameter(torch.zeros(dim)) if token else None
        self.positions = nn.Parameter(torch.zeros(*positions, dim))
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm("layer", dim, eps)

    def forward(self, x: Tensor) -> Tensor:
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(*x.shape[:-2], 1, -1), x], dim=-2)
        # Of fewer frames than there are positions, the first ones; whoever calls has checked that there are not more.
        x = x + self.positions[..., : x.shape[-2], :]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Vivit(Packable):
    """A video classifier: float [B, frames, height, width, 3] in [-1, 1], or uint8, -> logits [B, classes].

    With several heads, as for EPIC-Kitchens' verbs and nouns, the logits are a dictionary of [B, size] by head.
    """

    stock_config: dict[str, Any] | None = None  # config.json as it was read, carried through to `save`
    files: dict[str, bytes] | None = None
    labels: list[str] | None = None  # one name per class, in the order of the logits
    tokenizer = None

    def __init__(self, config: VivitConfig) -> None:
        super().__init__()
        self.config = c = config
        token, (T, height, width) = c.pooling == "token", c.grid
        S = height * width
        self.temporal: Encoder | None = None
        self.embed = TubeletEmbedding(c.tubelet_size, CHANNELS, c.dim)
        if c.variant == "factorized_encoder":
            # Positions of the frames' own tokens are one table for all frames; the temporal encoder has its own.
            blocks = self._blocks(c.n_layers, c.n_heads, c.n_kv_heads, c.ffn_dim, SpatialAttention)
            self.encoder = Encoder(blocks, (S,), c.dim, c.norm_eps, token=token)
            if c.temporal_layers:
                self.temporal = self._temporal_encoder(T, token=token)
        elif c.variant == "factorized_self_attention":
            self.encoder = Encoder(self._self_attention_blocks(), (T, S), c.dim, c.norm_eps, token=False)
        else:
            blocks = self._blocks(c.n_layers, c.n_heads, c.n_kv_heads, c.ffn_dim, Attention)
            self.encoder = Encoder(blocks, (T * S,), c.dim, c.norm_eps, token=token)
        if c.variant == "factorized_dot_product":
            for block in self.encoder.blocks:
                assert isinstance(block, Block)
                block.attention.attend = FactorizedDotProduct(T, block.attention.attend)
        self.pre_logits = Linear(c.dim, c.pre_logits) if c.pre_logits else None
        self.head = Linear(c.pre_logits or c.dim, c.num_classes)

    def forward(
        self, video: Tensor | None = None, *, features: bool = False, pixel_values: Tensor | None = None
    ) -> Any:
        """Classify clips.

        Args:
            video: [B, frames, height, width, 3], of the configuration's sizes.
            features: return `Features` instead of logits.
            pixel_values: the same as [B, frames, 3, height, width], the order of `transformers`.

        Raises:
            UsageError: a video of another shape, or of integers other than uint8.
        """
        if pixel_values is not None:
            video = pixel_values.movedim(2, -1)
        if video is None:
            raise UsageError("no video was given: call model(video), or model(pixel_values=...)")
        self._check(video)
        if self.config.sampled_frames is not None:
            video = video[:, sampled_indices(self.config.num_frames, self.config.sampled_frames)]
        frames_BTD, patches_BTSD, clip_BD = self._encode(video)
        return Features(clip_BD, frames_BTD, patches_BTSD) if features else self._logits(clip_BD)

    def _encode(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frame vectors, patches and the clip's vector, as in `Features`."""
        if self.factorized_encoder:
            frames_BTD, patches_BTSD = self._encode_frames(video)
            return frames_BTD, patches_BTSD, self._encode_clip(frames_BTD)
        x_BTSD = self.embed(to_unit_range(video, self.dtype))
        x = self.encoder(x_BTSD if self.config.variant == "factorized_self_attention" else x_BTSD.flatten(1, 2))
        clip_BD, patches = self._pool(x.flatten(1, -2))
        patches_BTSD = patches.unflatten(1, x_BTSD.shape[1:3])
        return patches_BTSD.mean(2), patches_BTSD, self._before_head(clip_BD)

    def _encode_frames(self, video: Tensor) -> tuple[Tensor, Tensor]:
        return self._pool(self.encoder(self.embed(to_unit_range(video, self.dtype))))

    def _encode_clip(self, frames_BTD: Tensor) -> Tensor:
        if self.temporal is None:
            return self._before_head(frames_BTD.mean(1))
        return self._before_head(self._pool(self.temporal(frames_BTD))[0])

    def _pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One vector for the tokens on the last token axis, and the tokens themselves: [..., L, D] -> [..., D]."""
        if self.config.pooling == "token":
            return x[..., 0, :], x[..., 1:, :]
        return POOLS[self.config.pooling](x, dim=-2), x

    def _before_head(self, clip_BD: Tensor) -> Tensor:
        return clip_BD if self.pre_logits is None else torch.tanh(self.pre_logits(clip_BD))

    def _logits(self, clip_BD: Tensor) -> Any:
        logits_BV = self.head(clip_BD)
        if not self.config.heads:
            return logits_BV
        names, sizes = zip(*self.config.heads, strict=True)
        return dict(zip(names, logits_BV.split(sizes, dim=-1), strict=True))

    def encode_frames(self, video: Tensor) -> Tensor:
        """The spatial half of a factorized encoder: one vector per tubelet in time, [B, frames, h, w, 3] -> [B, T, D].

        A vector depends on its own frames alone, so a long video needs each only once, and any number of frames will do.

        Raises:
            UsageError: another variant, whose tokens depend on each other over time, or frames of another size.
        """
        self._require_factorized_encoder()
        self._check(video, any_length=True)
        return self._encode_frames(video)[0]

    def classify_frames(self, frames_BTD: Tensor) -> Any:
        """The temporal half: the vectors that `encode_frames` gave for one clip, [B, T, D] -> logits.

        Raises:
            UsageError: another variant, or vectors of another number than the temporal encoder has positions for.
        """
        self._require_factorized_encoder()
        T, D = self.config.grid[0], self.config.dim
        # Without a class token, a single vector would be taken for all of them.
        if self.temporal is not None and frames_BTD.shape[1:] != (T, D):
            raise UsageError(
                f"the frame vectors are {list(frames_BTD.shape)} and this model reads [B, {T}, {D}]: give those of "
                f"{self.config.kept_frames} frames"
            )
        return self._logits(self._encode_clip(frames_BTD))

    def tokens(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Frame vectors [B, T, D] and patches [B, T, S, D], as in `Features`.

        A factorized encoder takes any number of frames.

        Raises:
            UsageError: a video of another shape.
        """
        sampled = self.config.sampled_frames
        self._check(video, any_length=self.factorized_encoder and sampled is None)
        if sampled is not None:
            video = video[:, sampled_indices(self.config.num_frames, sampled)]
        if self.factorized_encoder:
            return self._encode_frames(video)
        frames_BTD, patches_BTSD, _ = self._encode(video)
        return frames_BTD, patches_BTSD

    def over_time(self, frames_BTD: Tensor) -> Tensor:
        """Frame vectors that have seen each other, through a factorized encoder's temporal layers if it has some, else the
        same: [B, T, D].

        Raises:
            UsageError: more vectors than the temporal encoder has positions for.
        """
        if self.temporal is None:
            return frames_BTD
        if frames_BTD.shape[1] > self.config.grid[0]:
            raise UsageError(
                f"{frames_BTD.shape[1]} frame vectors are more than the temporal encoder's {self.config.grid[0]} positions: "
                f"give at most {self.config.kept_frames} frames"
            )
        return self._pool(self.temporal(frames_BTD))[1]

    def without_head(self) -> Self:
        """Leave out what names classes, for those who read `tokens`. Returns the model."""
        self.head = self.pre_logits = None  # type: ignore[assignment]
        return self

    def _require_factorized_encoder(self) -> None:
        if not self.factorized_encoder:
            raise UsageError(
                f"the frames of a {self.config.variant} model cannot be encoded apart: use a factorized_encoder"
            )

    def _check(self, video: Tensor, *, any_length: bool = False) -> None:
        c = self.config
        expected = ("any" if any_length else c.num_frames, *c.image_size, CHANNELS)
        if video.dim() != 5 or any(
            size != wanted for size, wanted in zip(video.shape[1:], expected, strict=True) if wanted != "any"
        ):
            raise UsageError(
                f"the video is {list(video.shape)} and this model reads [B, {', '.join(map(str, expected))}]: sample and "
                "crop it so, or fit the model's positions to it with `modicum.vivit.resize`"
            )
        if not video.is_floating_point() and video.dtype != torch.uint8:
            raise UsageError(
                f"the video is {video.dtype} and this model reads uint8, or floats in [-1, 1]: convert it to one of them"
            )

    def _blocks(
        self, depth: int, n_heads: int, n_kv_heads: int, ffn_dim: int, along: type[Attention]
    ) -> list[nn.Module]:
        return [
            Block(
                self._attention_config(n_heads, n_kv_heads),
                norm_kind="layer",
                norm_eps=self.config.norm_eps,
                ffn_dim=ffn_dim,
                activation=self.config.activation,
                gated=False,
                ffn_bias=True,
                stochastic_depth=rate,
                along=along,
            )
            for rate in self._drop_rates(depth)
        ]

    def _self_attention_blocks(self) -> list[nn.Module]:
        c = self.config
        return [
            SelfAttentionBlock(
                self._attention_config(c.n_heads, c.n_kv_heads),
                norm_eps=c.norm_eps,
                ffn_dim=c.ffn_dim,
                activation=c.activation,
                stochastic_depth=rate,
                order=c.attention_order,
            )
            for rate in self._drop_rates(c.n_layers)
        ]

    def _temporal_encoder(self, n_frames: int, *, token: bool) -> Encoder:
        c = self.config
        n_heads = c.temporal_heads or c.n_heads
        # As many query heads per key-value head as in space.
        n_kv_heads = max(1, n_heads * c.n_kv_heads // c.n_heads)
        blocks = self._blocks(c.temporal_layers, n_heads, n_kv_heads, c.temporal_ffn_dim or c.ffn_dim, Attention)
        return Encoder(blocks, (n_frames,), c.dim, c.norm_eps, token=token)

    def _attention_config(self, n_heads: int, n_kv_heads: int) -> AttentionConfig:
        c = self.config
        head_dim = c.head_dim * c.n_heads // n_heads
        return AttentionConfig(
            dim=c.dim, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, qkv_bias=c.qkv_bias, out_bias=True
        )

    def _drop_rates(self, depth: int) -> list[float]:
        """Stochastic depth grows linearly to the full rate in the last layer, from 0 in the first or from one step above."""
        if self.config.stochastic_depth_rule == "equation_10":
            return [self.config.stochastic_depth * layer / depth for layer in range(1, depth + 1)]
        return [self.config.stochastic_depth * layer / max(1, depth - 1) for layer in range(depth)]

    @property
    def factorized_encoder(self) -> bool:
        return self.config.variant == "factorized_encoder"

    @property
    def device(self) -> torch.device:
        return self.encoder.positions.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.positions.dtype

    def for_inference(self) -> "Vivit":
        """Pack the weights in place for the device they are on; evaluation mode from here on. Returns the model."""
        pack(self)
        for module in self.modules():
            if isinstance(module, Attention) and not isinstance(module.attend, FactorizedDotProduct):
                module.attend = blocked
        return self.eval()

    def dense_state(self) -> dict[str, Tensor]:
        """The state dict as if never packed."""
        return dense_state(self)
