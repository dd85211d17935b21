"""The tables of a captioner's recipe: a video recipe with `[decoder]` is one."""

from dataclasses import dataclass, field
from typing import Any, Literal

from modicum.config import DecoderConfig, RopeConfig, Section, require
from modicum.errors import UsageError
from modicum.train.video.recipe import SIZES as ENCODER_SIZES
from modicum.train.video.recipe import ClipsSection, VideoOptimSection, VideoRunSection, VivitSection
from modicum.video.augment import Augment

FORMATS = ("synthetic", "msrvtt", "vatex", "vatex-zh")
SIZES = ("dim", "n_layers", "n_heads", "ffn_dim")


@dataclass(frozen=True, kw_only=True)
class EncoderSection(VivitSection):
    """What watches: the fields of a ViViT's recipe, or `start` alone, which is then a ViViT that keeps its shape.

    `frozen`: it stays as it begins, and only what writes is trained.
    """

    frozen: bool = False

    def __post_init__(self) -> None:
        if self.whole:
            Section.__post_init__(self)
        else:
            super().__post_init__()
        require(not self.frozen or self.start is not None, "frozen", self.frozen, "name what it is as `start`")

    @property
    def whole(self) -> bool:
        """Whether `start` is all that is said of the model."""
        sized = self.name is not None or any(getattr(self, name) is not None for name in ENCODER_SIZES)
        return self.start is not None and not sized


@dataclass(frozen=True, kw_only=True)
class WriterSection(Section):
    """What writes: the sizes of a Llama-like decoder, or `start`, any text model of a native family, with its tokenizer.

    `memory` is what it reads of a clip: "frames", a vector per tubelet in time, or "patches", every token. A draft reads
    what its target reads. `max_tokens`: longer captions are cut off in training.
    """

    start: str | None = None
    memory: Literal["frames", "patches"] = "frames"
    dim: int | None = None
    n_layers: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    head_dim: int | None = None
    ffn_dim: int | None = None
    max_seq_len: int = 64
    rope_theta: float = 10000.0
    tie_embeddings: bool = False
    vocab_size: int = 512
    max_tokens: int = 48
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in SIZES if getattr(self, name) is not None]
        if self.start is not None and given:
            raise UsageError(f"`start` is {self.start!r}, which says what `{given[0]}` is: give one or the other")
        missing = [name for name in SIZES if name not in given]
        if self.start is None and missing:
            raise UsageError(f"the decoder has no `start` and no `{missing[0]}`: give a text model, or all sizes")
        # 256 bytes and the end of text: with fewer tokens some text could not be written.
        require(self.vocab_size >= 257, "vocab_size", self.vocab_size, "it must be at least 257")
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "it must be at least 1")

    def config(self, vocab_size: int) -> DecoderConfig:
        """The decoder that the sizes describe."""
        dim, n_heads = self.dim or 0, self.n_heads or 0
        head_dim = self.head_dim or dim // max(1, n_heads)
        return DecoderConfig(
            family="llama",
            vocab_size=vocab_size,
            dim=dim,
            n_layers=self.n_layers or 0,
            n_heads=n_heads,
            n_kv_heads=self.n_kv_heads or n_heads,
            head_dim=head_dim,
            ffn_dim=self.ffn_dim or 0,
            max_seq_len=self.max_seq_len,
            rope=RopeConfig(theta=self.rope_theta, rotary_dim=head_dim),
            tie_embeddings=self.tie_embeddings,
        )


@dataclass(frozen=True, kw_only=True)
class DraftSection(Section):
    """The captioner is a draft of `target`, a captioner's folder or preset: it reads with the target's encoder, which is
    neither trained nor saved with it.

    `weight`: the target's share of the loss, KL(target || draft), the rest being the captions' own.
    """

    target: str
    weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.weight <= 1, "weight", self.weight, "give the target's share of the loss, from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class CaptionedSection(Section):
    """Where videos and captions are: "msrvtt" and "vatex" as published; "synthetic" writes its own into `root`.

    `held_out` is the split that is judged by, from `held_out_annotations` and `held_out_root` where these are others.
    `workers` decode.

    Of "synthetic": how many clips there are to train on and to judge by, and how long and large they are.
    """

    format: str
    annotations: str | None = None
    root: str | None = None
    split: str | None = "train"
    held_out: str | None = "held_out"
    held_out_annotations: str | None = None
    held_out_root: str | None = None
    workers: int = 4
    prefetch: int = 2
    n_clips: int = 10_000
    n_held_out: int = 500
    clip_frames: int = 16
    clip_side: int = 48
    clip_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.format in FORMATS, "format", self.format, f"choose one of {', '.join(FORMATS)}")
        require(self.workers >= 0, "workers", self.workers, "it must not be negative")
        for name in ("prefetch", "n_clips", "clip_frames", "clip_side"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "it must be at least 1")
        require(self.n_held_out >= 2, "n_held_out", self.n_held_out, "CIDEr-D compares at least 2 clips")
        if self.format == "synthetic":
            require(self.root is not None, "root", self.root, "name the folder that the clips are written to")
        else:
            require(self.annotations is not None, "annotations", None, "name the file that lists the videos")


@dataclass(frozen=True, kw_only=True)
class CaptionAugment(Augment):
    """What training changes about a clip; as captions tell left from right and name colours, nothing unless asked for."""

    flip: float = 0.0
    scale_jitter: tuple[float, ...] = (1.0, 1.0)
    colour_jitter: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CaptionOptimSection(VideoOptimSection):
    """As for a classifier. `label_smoothing`: the share of every target that goes to all tokens alike."""

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, "label_smoothing", smoothing, "give a share, from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class CaptionRecipe(Section):
    """A whole run: a captioner with its `encoder`, or a `draft` that shares its target's.

    Without an `augment` table every clip is the central crop, of a random moment.
    """

    encoder: EncoderSection | None = None
    draft: DraftSection | None = None
    decoder: WriterSection
    data: CaptionedSection
    clips: ClipsSection = field(default_factory=ClipsSection)
    augment: CaptionAugment | None = None
    optim: CaptionOptimSection
    run: VideoRunSection

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.encoder is None) == (self.draft is None):
            raise UsageError(
                "a captioner needs an [encoder] table, or a [draft] table with the target whose encoder it shares: give one"
            )
        if self.draft is not None and self.decoder.memory != "frames":
            raise UsageError("`memory` of a draft is its target's: leave it out")


def is_captioning(values: dict[str, Any]) -> bool:
    """Whether the tables of a recipe are about a model that writes about videos."""
    return "clips" in values and "decoder" in values
