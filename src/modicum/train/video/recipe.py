"""The tables of a video recipe: a recipe with `[clips]` is one."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from modicum.config import Section, Variant, VivitConfig, require
from modicum.errors import UsageError
from modicum.train.recipe import RunSection
from modicum.video.augment import Augment
from modicum.vivit.build import named_config
from modicum.vivit.initialization import Kernel, Temporal

# What a name such as vivit-b/16x2 already says.
SIZES = ("tubelet_size", "dim", "n_layers", "n_heads", "head_dim", "ffn_dim")


@dataclass(frozen=True, kw_only=True)
class ClipsSection(Section):
    """What a model sees at once: `num_frames`, `stride` ticks of an `fps` clock apart, `size` a side or [height, width].

    With `fps` 0 every frame of a file is a tick, however fast it is.
    """

    num_frames: int = 32
    stride: int = 2
    fps: float = 25.0
    size: int | tuple[int, ...] = 224

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_frames", "stride"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "it must be at least 1")
        require(self.fps >= 0, "fps", self.fps, "give ticks per second, or 0 for a file's own frames")
        sides = (self.size,) if isinstance(self.size, int) else self.size
        require(len(sides) in (1, 2) and min(sides) >= 1, "size", self.size, "give a side, or [height, width]")
        require(isinstance(self.size, int) or len(sides) == 2, "size", self.size, "give a side, or [height, width]")

    @property
    def shape(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else (self.size[0], self.size[1])

    @property
    def clock(self) -> float | None:
        return self.fps or None


@dataclass(frozen=True, kw_only=True)
class VivitSection(Section):
    """The model: a `name` such as vivit-b/16x2, or its sizes one by one; what it reads and names the other tables say.

    `start` is a folder, file or hub id of an image ViT, or of a ViViT, from which all but the head is copied; `kernel` and
    `temporal` are how an image's weights are spread over time (section 3.4). `positions`: the deviation of fresh position
    embeddings, 0.02 in the paper; models of little width learn where things are sooner from larger ones.
    """

    name: str | None = None
    variant: Variant = "factorized_encoder"
    tubelet_size: tuple[int, ...] | None = None
    dim: int | None = None
    n_layers: int | None = None
    n_heads: int | None = None
    head_dim: int | None = None
    ffn_dim: int | None = None
    n_kv_heads: int | None = None
    temporal_layers: int | None = None
    pooling: str | None = None
    attention_order: str = "space_time"
    sampled_frames: int | None = None
    stochastic_depth: float = 0.0
    stochastic_depth_rule: str = "from_zero"
    start: str | None = None
    kernel: Kernel = "central_frame"
    temporal: Temporal = "zero_output"
    positions: float = 0.02
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in SIZES if getattr(self, name) is not None]
        if self.name is not None and given:
            raise UsageError(f"`name` is {self.name!r}, which says what `{given[0]}` is: give one or the other")
        missing = [name for name in SIZES if name not in given and name != "head_dim"]
        if self.name is None and missing:
            raise UsageError(
                f"the model has no `name` and no `{missing[0]}`: give a name, as vivit-b/16x2, or all sizes"
            )
        require(self.positions > 0, "positions", self.positions, "give a deviation above 0")

    def config(self, clips: ClipsSection, heads: dict[str, int]) -> VivitConfig:
        """The model for these clips and classes; a single head's name is empty."""
        named = {} if list(heads) == [""] else heads
        shared: dict[str, Any] = {
            "variant": self.variant,
            "num_frames": clips.num_frames,
            "image_size": clips.shape,
            "sampled_frames": self.sampled_frames,
            "attention_order": self.attention_order,
            "stochastic_depth": self.stochastic_depth,
            "stochastic_depth_rule": self.stochastic_depth_rule,
        }
        if self.name is not None:
            named_only = {name: getattr(self, name) for name in ("temporal_layers", "pooling", "n_kv_heads")}
            return named_config(self.name, num_classes=sum(heads.values()), heads=named, **shared, **named_only)
        n_heads, dim, tubelet = self.n_heads or 0, self.dim or 0, self.tubelet_size or ()
        require(len(tubelet) == 3, "tubelet_size", tubelet, "give [time, height, width]")
        token = self.variant in ("spacetime", "factorized_encoder")
        return VivitConfig(
            **shared,
            tubelet_size=(tubelet[0], tubelet[1], tubelet[2]),
            dim=dim,
            n_layers=self.n_layers or 0,
            n_heads=n_heads,
            n_kv_heads=self.n_kv_heads or n_heads,
            head_dim=self.head_dim or dim // max(1, n_heads),
            ffn_dim=self.ffn_dim or 0,
            temporal_layers=self.temporal_layers or 0,
            pooling=self.pooling or ("token" if token else "gap"),  # type: ignore[arg-type]
            num_classes=sum(heads.values()),
            heads=tuple(named.items()),
        )


@dataclass(frozen=True, kw_only=True)
class VideosSection(Section):
    """Where the videos are: see `video.datasets.read_dataset` for the formats; "synthetic" writes its own into `root`.

    `held_out` is the split that is judged by, from `held_out_annotations` and `held_out_root` where these are others.
    `labels`: a file of class names in their order. `workers` decode. `shuffle_frames` puts the frames of every clip in a
    random order, in training and judging: a control that shows what a model owes to motion.

    Of "synthetic": how many clips of each class, and how long and large they are.
    """

    format: str
    annotations: str | None = None
    root: str | None = None
    split: str = "train"
    held_out: str = "held_out"
    held_out_annotations: str | None = None
    held_out_root: str | None = None
    labels: str | None = None
    workers: int = 4
    prefetch: int = 2
    shuffle_frames: bool = False
    per_class: int = 200
    held_out_per_class: int = 50
    clip_frames: int = 24
    clip_side: int = 48
    clip_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.workers >= 0, "workers", self.workers, "it must not be negative")
        for name in ("prefetch", "per_class", "held_out_per_class", "clip_frames", "clip_side"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "it must be at least 1")
        if self.format == "synthetic":
            require(self.root is not None, "root", self.root, "name the folder that the clips are written to")


@dataclass(frozen=True, kw_only=True)
class VideoAugmentSection(Augment):
    """What training changes: a clip (`Augment`), and a batch.

    `label_smoothing` is the share that goes to all classes alike (equation 11); `mixup` the parameter of the distribution
    from which a batch's weight is drawn (equation 12); 0 is none.
    """

    label_smoothing: float = 0.0
    mixup: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        smoothing = self.label_smoothing
        require(0 <= smoothing < 1, "label_smoothing", smoothing, "give a share, from 0 to below 1")
        require(self.mixup >= 0, "mixup", self.mixup, "it must not be negative")


@dataclass(frozen=True, kw_only=True)
class VideoOptimSection(Section):
    """SGD with momentum, or AdamW; a linear warm-up and half a cosine down to 0, in epochs.

    `batch` counts the clips of a step over all processes; each takes its share in `accumulate` parts, one after another.
    `ema`: decay of a running mean of the weights, which is then judged and kept; 0 is none. `checkpointing` computes
    activations a second time instead of holding them.
    """

    epochs: float
    lr: float
    optimizer: Literal["sgd", "adamw"] = "sgd"
    warmup_epochs: float = 2.5
    batch: int = 64
    accumulate: int = 1
    momentum: float = 0.9
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0
    ema: float = 0.0
    bf16: bool = True
    checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch", "accumulate"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "it must be at least 1")
        for name in ("lr", "clip", "epochs"):
            require(getattr(self, name) > 0, name, getattr(self, name), "it must be above 0")
        for name in ("warmup_epochs", "weight_decay"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "it must not be negative")
        for name in ("momentum", "ema", "beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "give at least 0, below 1")

    def micro_batch(self, world: int) -> int:
        """Clips that one process has in memory at once.

        Raises:
            UsageError: the batch cannot be shared out evenly.
        """
        if self.batch % (world * self.accumulate):
            fitting = [n for n in range(1, self.batch + 1) if self.batch % (world * n) == 0]
            remedy = f"set optim.accumulate to one of {', '.join(map(str, fitting))}" if fitting else "set optim.batch"
            raise UsageError(
                f"a batch of {self.batch} cannot be split into {self.accumulate} parts in each of {world} processes: "
                f"{remedy}"
            )
        return self.batch // (world * self.accumulate)


@dataclass(frozen=True, kw_only=True)
class ViewsSection(Section):
    """How the trained model is judged: [temporal views, crops], the mean of their logits (section 4.1).

    `short_side` None is training's, see `Augment`.
    """

    views: tuple[int, ...] = (4, 1)
    short_side: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        fitting = len(self.views) == 2 and self.views[0] >= 1 and self.views[1] in (1, 3)
        require(fitting, "views", self.views, "give temporal views and crops, as [4, 1] or [4, 3]")


@dataclass(frozen=True, kw_only=True)
class VideoRunSection(RunSection):
    """As `RunSection`, but it validates every so many epochs, with one view of each video."""

    validate_every: int = 1


@dataclass(frozen=True, kw_only=True)
class VideoRecipe(Section):
    """A whole run."""

    model: VivitSection
    data: VideosSection
    clips: ClipsSection
    augment: VideoAugmentSection = field(default_factory=VideoAugmentSection)
    optim: VideoOptimSection
    views: ViewsSection = field(default_factory=ViewsSection)
    run: VideoRunSection


def is_video(values: dict[str, Any]) -> bool:
    """Whether the tables of a recipe are about videos."""
    return "clips" in values


def rate(settings: VideoOptimSection, step: int, steps: int, per_epoch: int) -> float:
    """The learning rate of `step`, counted from 0, as the authors' code has it (table 7): its first step has rate 0.

    base * min(1, s / w) * (1 + cos(pi * max(0, s - w) / (S - w))) / 2, where w are the steps of the warm-up's epochs.
    """
    warmup = settings.warmup_epochs * per_epoch
    rising = min(1.0, step / warmup) if warmup else 1.0
    falling = max(0.0, step - warmup) / max(1.0, steps - warmup)
    return settings.lr * rising * (1 + math.cos(math.pi * min(1.0, falling))) / 2
