"""What drafters that are trained for one target have in common: a network, and the target whose tables it uses."""

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from modicum.config import Config, DecoderConfig
from modicum.core.cache import KVCache
from modicum.core.linear import Packable, dense_state, pack
from modicum.decode.batch import Batch
from modicum.errors import UsageError
from modicum.lm.decoder import Decoder, causality


@dataclass(frozen=True, kw_only=True)
class DrafterConfig(Config):
    """A drafter of up to `num_draft_tokens` at a time for one target, whose shape and fingerprint it keeps.

    `n_layers` is the depth of a parallel drafter; the others have one layer.
    """

    kind: Literal["heads", "features", "parallel"]
    num_draft_tokens: int
    n_layers: int = 1
    fingerprint: str
    target: DecoderConfig

    def __post_init__(self) -> None:
        self.check_choices()
        if self.num_draft_tokens < 1 or self.n_layers < 1:
            raise UsageError(
                f"`num_draft_tokens` is {self.num_draft_tokens} and `n_layers` {self.n_layers}: both must be at least 1"
            )
        if self.n_layers > 1 and self.kind != "parallel":
            raise UsageError(
                f"`n_layers` is {self.n_layers} and a drafter of kind {self.kind} has one layer: leave it out"
            )


class Network(Packable):
    """The weights of a trained drafter. Embeddings, positions and head are the target's, which every call names."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def begin(self, target: Decoder) -> None:
        """Set the weights that training begins with, from the target's own where that helps."""
        raise NotImplementedError

    def predictions(self, target: Decoder, ids_BL: Tensor, hidden_BLD: Tensor) -> Iterator[tuple[int, Tensor]]:
        """What it would draft after every token of a text: for each drafted place, `shift` and logits [B, L - shift, V].

        Row t of the logits is about the token that the target's logits at t + shift are about. `hidden_BLD` is what the
        target's head reads, from `Decoder.hidden`.
        """
        raise NotImplementedError

    def for_inference(self) -> Self:
        self.eval()
        pack(self)
        return self

    def dense_state(self) -> dict[str, Tensor]:
        return dense_state(self)


def run_blocks(
    blocks: Any, target: Decoder, x_BLD: Tensor, positions_BL: Tensor, cache: KVCache | None, mask: Tensor | None = None
) -> Tensor:
    """Blocks of a drafter on the target's positions; without a mask of their own every token sees all before it."""
    if target.positions is not None:
        x_BLD = x_BLD + target.positions(positions_BL.clamp(max=target.config.max_seq_len - 1))
    rotate = target.rope(positions_BL, x_BLD.dtype) if target.rope is not None else None
    L, causal = x_BLD.shape[1], False
    if mask is None:
        n_slots = L if cache is None else cache.n_slots(L)
        mask, causal = causality(positions_BL, n_slots, None, cache, x_BLD.dtype)
    for block in blocks:
        x_BLD = block(x_BLD, rotate=rotate, mask=mask, causal=causal, cache=cache, positions_BL=positions_BL)
    return x_BLD


class TrainedDrafter:
    """A network drafting for the target that it was trained for. Subclasses propose."""

    max_rows: int | None = None

    def __init__(self, network: Network, files: dict[str, bytes] | None = None) -> None:
        self.loaded = network
        self.network: Any = network  # as the target needs it
        self.files = files or {}
        self.place: tuple[torch.device, torch.dtype] | None = None

    @property
    def config(self) -> DrafterConfig:
        return self.loaded.config

    def check(self, target: Any) -> None:
        """Raise UsageError if `target` has another shape; warn if it has other weights: then few tokens are accepted."""
        decoder = decoder_of(target)
        wanted, held = (replace(config, dtype="float32") for config in (self.config.target, decoder.config))
        if wanted != held:
            raise UsageError(
                f"the draft was trained for {described(wanted)} and the target is {described(held)}: "
                "train one for this target, or choose another draft"
            )
        if target.fingerprint != self.config.fingerprint:
            warnings.warn(
                "the draft was trained for a target with other weights: the text is right all the same, but fewer tokens "
                "may be accepted",
                stacklevel=2,
            )
        self.target = decoder
        self._follow(decoder.embed.weight)

    def _follow(self, like: Tensor) -> None:
        """Be where the target is, in its dtype. What was loaded stays as it is, for other targets and to be saved."""
        place = (like.device, like.dtype)
        if self.place != place:
            self.network, self.place = copy.deepcopy(self.loaded).to(*place).for_inference(), place

    def offers(self, batch: Batch, allowed: list[int]) -> list[int]:
        """All that is allowed, up to what it was trained for."""
        return [min(n, self.config.num_draft_tokens) for n in allowed]

    def new_cache(self, batch: Batch, capacity: int) -> KVCache:
        t, like = self.config.target, self.target.embed.weight
        shape = (self.config.n_layers, len(batch.rows), t.n_kv_heads, capacity, t.head_dim)
        return KVCache(*shape, dtype=like.dtype, device=like.device)


def decoder_of(target: Any) -> Decoder:
    """What writes a target's text: itself, or of a captioner its decoder.

    Raises:
        UsageError: another kind of model.
    """
    decoder = getattr(target, "decoder", target)
    if not isinstance(decoder, Decoder):
        raise UsageError(
            f"a trained drafter works inside a native decoder-only target, and this one is {type(target).__name__}: "
            "choose another draft"
        )
    return decoder


def last_of(made_BLD: Tensor, counts_B: Tensor, before_BD: Tensor) -> Tensor:
    """Of each row the last of its first `counts_B[b]` states, [B, D]; what it had before where that is none."""
    last_B11 = (counts_B - 1).clamp(min=0)[:, None, None]
    last_BD = made_BLD.gather(1, last_B11.expand(-1, 1, made_BLD.shape[-1]))[:, 0]
    return torch.where(counts_B[:, None] > 0, last_BD, before_BD)


def described(config: DecoderConfig) -> str:
    return f"a {config.family} of {config.n_layers} layers, width {config.dim} and {config.vocab_size} tokens"


@torch.no_grad()
def copy_weights(module: nn.Module, source: nn.Module) -> None:
    """Give `module` the weights of another that has all of its parameters, and in a captioner's layer cross-attention."""
    theirs = dict(source.named_parameters())
    for name, ours in module.named_parameters():
        ours.copy_(theirs[name])
