"""The captioner: a ViViT watches a clip once, and a text decoder with cross-attention writes about it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from modicum.config import CaptionerConfig
from modicum.core.attention import Context
from modicum.core.cache import KVCache
from modicum.core.linear import Linear, Packable, dense_state, pack
from modicum.core.positions import sinusoids
from modicum.errors import UsageError
from modicum.lm.decoder import Decoder
from modicum.lm.language_model import fingerprint_of
from modicum.lm.reader import Reader
from modicum.vivit.model import Vivit


class MemoryProjection(Packable):
    """From an encoder's vectors to what cross-attention reads: a linear layer, a norm, and where each stands in time.

    The positions are sinusoids (1706.03762) and as large as what they are added to: frame vectors of a factorized encoder
    know nothing of time, and small models do not learn it from positions that begin small.
    """

    def __init__(self, in_features: int, dim: int, slots_per_frame: int) -> None:
        super().__init__()
        self.slots_per_frame = slots_per_frame
        self.linear = Linear(in_features, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, memory_BMD: Tensor) -> Tensor:
        x_BMD = self.norm(self.linear(memory_BMD))
        times_M = torch.arange(x_BMD.shape[1], device=x_BMD.device) // self.slots_per_frame
        return x_BMD + sinusoids(times_M, x_BMD.shape[-1]).to(x_BMD.dtype)


class Captioner(Reader):
    """`model(video, ids)` scores captions of clips; `modicum.caption` writes them.

    The encoder's output is what a request reads (`encode`), so that a target and its draft can share it: each makes its own
    keys and values of it (`read`), with its own projection, once per clip. Cross-attention has the decoder's number of
    key-value heads. A captioner that was saved without its encoder borrows that of its target, or one given by `share`.
    """

    kind = "reads a video and writes about it"
    call = "model(video, ids)"
    sources = "memories"
    reads_video = True

    def __init__(self, config: CaptionerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = None if config.shares_encoder else Vivit(config.encoder).without_head()
        self.project = MemoryProjection(config.encoder.dim, config.dim, config.slots_per_frame)
        self.decoder = Decoder(config.decoder, context_dim=config.dim)
        self.encoder_frozen = False
        # Not a submodule: another model's weights are not to be trained, moved or saved with this one's.
        self._borrowed: tuple[Vivit, ...] = ()
        self._encoder_fingerprint = config.shares_encoder

    @property
    def embed(self) -> nn.Embedding:  # type: ignore[override]
        return self.decoder.embed

    @property
    def head(self) -> Linear:  # type: ignore[override]
        return self.decoder.head

    @property
    def blocks(self) -> nn.ModuleList:
        return self.decoder.blocks

    def encode(self, video: Tensor) -> Tensor:
        """What the decoder is to read of clips: [B, frames, height, width, 3] as for a `Vivit` -> memories [B, M, D'].

        Raises:
            UsageError: a clip of another shape, or no encoder to read it with.
        """
        vivit = self.watching
        if video.shape[1] < vivit.config.tubelet_size[0]:
            raise UsageError(
                f"a clip of {video.shape[1]} frames holds no tubelet of {vivit.config.tubelet_size[0]}: give more frames"
            )
        frames_BTD, patches_BTSD = vivit.tokens(video)
        return patches_BTSD.flatten(1, 2) if self.config.memory == "patches" else vivit.over_time(frames_BTD)

    def encode_frames(self, video: Tensor) -> Tensor:
        """The part of `encode` that a long video needs only once per tubelet, [B, T, D']; see `Vivit.encode_frames`."""
        return self.watching.encode_frames(video)

    def memory_of_frames(self, frames_BTD: Tensor) -> Tensor:
        """The rest of it, for one window of those vectors: -> memories [B, T, D'].

        Raises:
            UsageError: the captioner reads patches, which frame vectors do not have.
        """
        if self.config.memory == "patches":
            raise UsageError("this captioner reads patches, of which no frame vector is made: encode each window whole")
        return self.watching.over_time(frames_BTD)

    def forward(
        self,
        source: Tensor | None = None,
        ids_BL: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        lengths_B: Tensor | None = None,
        cache: KVCache | None = None,
        at_BN: Tensor | None = None,
    ) -> Tensor:
        """Score captions of clips: int64 [B, L] -> logits [B, L, V], each token's about the next (teacher forcing).

        Rows of different lengths are padded at the right: no token sees what follows it.

        Args:
            source: clips [B, frames, height, width, 3], or memories [B, M, D'] that `encode` made. With a cache, the ids.
            pixel_values: clips as [B, frames, 3, height, width], the order of `transformers`.
            lengths_B, cache, at_BN: as in `Reader.forward`; `lengths_B` counts slots of memories.
        """
        if pixel_values is not None:
            # The ids are then all that is left to be given by position.
            source, ids_BL = pixel_values.movedim(2, -1), source if ids_BL is None else ids_BL
        if source is None:
            raise UsageError(f"this model {self.kind}: call `{self.call}`")
        return super().forward(source, ids_BL, lengths_B=lengths_B, cache=cache, at_BN=at_BN)

    def context_of(self, source: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        if source.dim() not in (3, 5):
            raise UsageError(
                f"the video is {list(source.shape)}: give clips [B, frames, height, width, 3], or memories [B, M, "
                f"{self.config.encoder.dim}]"
            )
        memory_BMD = self.encode(source) if source.dim() == 5 else source
        return self.project(memory_BMD.to(self.dtype))

    def write(self, ids_BL: Tensor, contexts: list[Context], padding: Tensor | None, cache: KVCache | None) -> Tensor:
        return self.decoder.hidden(ids_BL, cache, n_layers=len(contexts), contexts=contexts, context_mask=padding)

    def score(self, x_BLD: Tensor) -> Tensor:
        return self.decoder.score(x_BLD)

    def gathered(self, sources: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(sources)).to(self.device)

    def sample_source(self) -> Tensor:
        return torch.zeros(self.config.memory_slots, self.config.encoder.dim, dtype=self.dtype, device=self.device)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def watching(self) -> Vivit:
        """The encoder: its own, or the one it was given to share.

        Raises:
            UsageError: there is none.
        """
        if self.encoder is not None:
            return self.encoder
        if not self._borrowed:
            raise UsageError(
                "this captioner was saved without its encoder: use it as the draft of the captioner it was trained beside, "
                "or call `model.share(that_captioner)`"
            )
        return self._borrowed[0]

    def share(self, other: "Captioner") -> Self:
        """Read with the encoder of another captioner, which stays that one's. Returns the model.

        Raises:
            UsageError: its own encoder is another one.
        """
        self.check_sources_of(other)
        if self.encoder is None:
            self._borrowed = (other.watching,)
        return self

    def without_encoder(self) -> Self:
        """Let go of the encoder, and remember which one it was: what `save` then writes is small. Returns the model."""
        if self.encoder is not None:
            self._encoder_fingerprint = self.encoder_fingerprint
            self.encoder, self._fingerprint = None, None
            self.config = replace(self.config, shares_encoder=self._encoder_fingerprint)
        return self

    def freeze_encoder(self, frozen: bool = True) -> Self:
        """Leave the encoder as it is while the rest is trained: no gradients, and its evaluation mode. Returns the model."""
        self.encoder_frozen = frozen
        if self.encoder is not None:
            self.encoder.requires_grad_(not frozen)
        return self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.encoder_frozen and self.encoder is not None:
            self.encoder.eval()
        return self

    @property
    def encoder_fingerprint(self) -> str:
        """A hash of the encoder, as `fingerprint` is of all: the same for all captioners that read alike."""
        if self._encoder_fingerprint is not None:
            return self._encoder_fingerprint
        assert self.encoder is not None
        return self._fingerprint_of_encoder(self.encoder.dense_state())

    def remember_encoder(self, stored: Mapping[str, Tensor]) -> None:
        """Go by the encoder as it was stored, before its weights were rounded: in float16 they have another fingerprint."""
        self._encoder_fingerprint = self._fingerprint_of_encoder(stored)

    def _fingerprint_of_encoder(self, state: Mapping[str, Tensor]) -> str:
        # What does not change what the encoder computes does not tell encoders apart either.
        ignored = ("num_classes", "heads", "pre_logits", "stochastic_depth")
        shape = {key: value for key, value in self.config.encoder.to_dict().items() if key not in ignored}
        return fingerprint_of(shape, state)

    def check_sources_of(self, target: Any) -> None:
        """Refuse to read what `target` has encoded, where this captioner was made for another encoder's output."""
        ours, theirs = self.config, target.config
        if ours.memory != theirs.memory:
            raise UsageError(
                f"the draft reads {ours.memory} and the target {theirs.memory}, and what the encoder makes of a clip is for "
                "both: choose a draft with the target's memory"
            )
        if self.encoder_fingerprint != target.encoder_fingerprint:
            raise UsageError(
                "the draft was trained on another encoder's output than the target's: choose a draft that shares the "
                "target's encoder, a text-only draft, or `ngram`"
            )

    def for_inference(self, weights: str | None = None) -> Self:
        """As `LanguageModel.for_inference`; `weights` are the decoder's, and the encoder keeps its own."""
        self._fingerprint, self._encoder_fingerprint = self.fingerprint, self.encoder_fingerprint
        if self.encoder is not None:
            self.encoder.for_inference()
        pack(self.project)
        self.decoder.for_inference(weights)
        return self.requires_grad_(False).eval()

    def dense_state(self) -> dict[str, Tensor]:
        state = dense_state(self)
        if self.config.tie_embeddings:
            state.pop("decoder.head.weight", None)
        return state
