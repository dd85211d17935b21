"""Model configurations: frozen dataclasses that know their own consistency, with an exact JSON round trip."""

import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass
from typing import Any, Literal, Self

from modicum.errors import UsageError


class Config:
    """Mixin for frozen dataclasses: `to_dict`, and `from_dict` that refuses unknown keys with the nearest valid name."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a plain dictionary, as read from JSON or TOML.

        Raises:
            UsageError: a key that the class does not have, or a required key that is missing.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in values:
            if key not in fields:
                raise UsageError(f"{cls.__name__} has no key `{key}`{nearest(key, fields)}")
        missing = [
            name
            for name, field in fields.items()
            if name not in values
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise UsageError(f"{cls.__name__} needs {', '.join(f'`{name}`' for name in missing)}: add what is missing")
        hints = typing.get_type_hints(cls)
        return cls(**{key: _decode(hints[key], value) for key, value in values.items()})

    def check_choices(self) -> None:
        """Refuse a value that is none of those its field's `Literal` names."""
        for name, hint in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
                raise UsageError(f"`{name}` is {value!r}{nearest(str(value), typing.get_args(hint))}")


def nearest(name: str, choices: typing.Iterable[str]) -> str:
    """The end of a refusal: `: did you mean ...?`, or the list of what is valid."""
    names = list(choices)
    close = difflib.get_close_matches(name, names, n=1)
    return f": did you mean `{close[0]}`?" if close else f": choose one of {', '.join(sorted(names))}"


class Section(Config):
    """A table of a recipe: every value is of its field's type, checked before hours are spent on it."""

    def __post_init__(self) -> None:
        self.check_choices()
        for name, hint in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, hint):
                kind = getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
                raise UsageError(f"`{name}` is {value!r}: give a value of type {kind}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a TOML value may stand where `hint` is declared; an integer may stand for a float, a bool for neither."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return value in options
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(item, options[0]) for item in value)
    if options:
        return any(_fits(value, option) for option in options)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def require(valid: bool, name: str, value: object, remedy: str) -> None:
    """Refuse `name = value` unless `valid`."""
    if not valid:
        raise UsageError(f"`{name}` is {value!r}: {remedy}")


def _decode(hint: Any, value: Any) -> Any:
    """Turn JSON's lists and dictionaries back into the tuples and dataclasses that `hint` names."""
    for option in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return option.from_dict(value)  # type: ignore[union-attr]
    return tuple(_decode(Any, item) for item in value) if isinstance(value, list) else value


def check_groups(n_heads: int, n_kv_heads: int) -> None:
    """Refuse key-value heads that cannot be shared out evenly."""
    if n_heads % n_kv_heads:
        valid = [g for g in range(1, n_heads + 1) if n_heads % g == 0]
        raise UsageError(
            f"{n_kv_heads} key-value heads do not divide {n_heads} query heads: "
            f"choose one of {', '.join(map(str, valid))}"
        )


@dataclass(frozen=True, kw_only=True)
class RopeConfig(Config):
    """Rotary positions (2104.09864) and how their frequencies are stretched to longer contexts.

    `rotary_dim` of each head's dimensions are rotated, the rest pass through. `original_max_seq_len` is the context
    before stretching; `dynamic` depends on the length seen so far and is therefore used only up to it.
    """

    theta: float = 10000.0
    rotary_dim: int
    scaling: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_seq_len: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(Config):
    """A decoder-only language model. Multi-head, grouped-query and multi-query attention differ in `n_kv_heads` alone.

    `windows` holds one entry per layer: how many of the latest tokens a query sees, itself included, or None for all.
    `rope=None` means learned absolute positions, a table of `max_seq_len` rows.
    """

    family: str
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    max_seq_len: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    parallel: bool = False  # attention and feed-forward read the same input, side by side (GPT-NeoX)
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    rope: RopeConfig | None = None
    windows: tuple[int | None, ...] = ()
    tie_embeddings: bool = False
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "max_seq_len"):
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` is {getattr(self, name)}: it must be at least 1")
        check_groups(self.n_heads, self.n_kv_heads)
        if self.windows and len(self.windows) != self.n_layers:
            raise UsageError(
                f"`windows` has {len(self.windows)} entries for {self.n_layers} layers: give one per layer, or none"
            )


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(Config):
    """A T5 (1910.10683): an encoder reads one text, a decoder writes another with attention to what was read.

    `n_kv_heads` are those of the decoder, in self-attention and cross-attention; the encoder keeps `n_heads` of each.
    Where a token stands relative to another falls into one of `relative_buckets`, the last of which begins at
    `relative_max_distance`. `scale_head` divides what the head reads by sqrt(dim), as T5 1.0 does and 1.1 does not.
    """

    family: str
    vocab_size: int
    dim: int
    n_encoder_layers: int
    n_layers: int  # of the decoder
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float = 1e-6
    activation: Literal["relu", "gelu_tanh", "gelu", "silu"] = "relu"
    gated: bool = False
    relative_buckets: int = 32
    relative_max_distance: int = 128
    tie_embeddings: bool = True
    scale_head: bool = True
    decoder_start_id: int = 0
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "dim", "n_encoder_layers", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim")
        for name in sizes:
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` is {getattr(self, name)}: it must be at least 1")
        check_groups(self.n_heads, self.n_kv_heads)
        if self.relative_buckets < 4 or self.relative_max_distance <= self.relative_buckets // 2:
            raise UsageError(
                f"{self.relative_buckets} relative buckets up to a distance of {self.relative_max_distance}: at least 4 are "
                "needed, and the distance must be above half of them"
            )
        if not 0 <= self.decoder_start_id < self.vocab_size:
            raise UsageError(
                f"`decoder_start_id` is {self.decoder_start_id}: it must be one of the {self.vocab_size} token ids"
            )

    @property
    def max_seq_len(self) -> int:
        """Relative positions end nowhere, so that memory is the only limit: a number that no text reaches."""
        return 1 << 31


LanguageConfig = DecoderConfig | EncoderDecoderConfig

Variant = Literal["spacetime", "factorized_encoder", "factorized_self_attention", "factorized_dot_product"]


@dataclass(frozen=True, kw_only=True)
class VivitConfig(Config):
    """A ViViT (2103.15691): Models 1 to 4 are its four `variant`s.

    `num_frames` frames of `image_size` (height, width) are handed in; `sampled_frames` of them are kept by uniform
    frame sampling, None for all; `tubelet_size` is (time, height, width). `n_layers` is the depth of the encoder, of
    the spatial one in a factorized encoder, whose temporal one has `temporal_layers`: 0 averages the frame vectors.
    `stochastic_depth` is the last layer's rate: layer l of L drops with rate * l / L (equation 10, l from 1), or, as in
    the authors' code, with rate * (l - 1) / (L - 1), which never drops the first.
    `heads` names parts of one projection of `num_classes`, as {"noun": 300, "verb": 97}: in order, in pairs.
    """

    variant: Variant
    image_size: tuple[int, int] = (224, 224)
    num_frames: int = 32
    sampled_frames: int | None = None
    tubelet_size: tuple[int, int, int] = (2, 16, 16)
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    temporal_layers: int = 0
    temporal_heads: int | None = None  # None: as the spatial encoder; likewise the next
    temporal_ffn_dim: int | None = None
    attention_order: Literal["space_time", "time_space"] = "space_time"
    pooling: Literal["token", "gap", "gmp", "gsp"] = "token"
    num_classes: int = 400
    heads: tuple[tuple[str, int], ...] = ()
    pre_logits: int | None = None
    stochastic_depth: float = 0.0
    stochastic_depth_rule: Literal["from_zero", "equation_10"] = "from_zero"
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    activation: Literal["gelu_tanh", "gelu", "relu", "silu"] = "gelu_tanh"
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"

    def __post_init__(self) -> None:
        self.check_choices()
        sizes = ("num_frames", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "num_classes")
        for name in sizes:
            if getattr(self, name) < 1:
                raise UsageError(f"`{name}` is {getattr(self, name)}: it must be at least 1")
        if min(self.tubelet_size) < 1 or min(self.image_size) < 1:
            raise UsageError(f"tubelets of {self.tubelet_size} in frames of {self.image_size}: sizes start at 1")
        check_groups(self.n_heads, self.n_kv_heads)
        temporal = self.temporal_heads or self.n_heads
        if self.n_heads * self.head_dim % temporal or temporal * self.n_kv_heads % self.n_heads:
            raise UsageError(
                f"`temporal_heads` is {temporal}: the width of {self.n_heads * self.head_dim} must split into that many "
                f"heads, in groups of {self.n_heads // self.n_kv_heads}; leave it out for {self.n_heads}"
            )
        factorized = self.variant == "factorized_encoder"
        if self.temporal_layers < 0 or (self.temporal_layers and not factorized):
            raise UsageError(
                f"`temporal_layers` is {self.temporal_layers}: only a factorized_encoder has a temporal encoder, "
                "of 0 layers (an average) or more; leave it out"
            )
        if self.pooling == "token" and self.variant not in ("spacetime", "factorized_encoder"):
            raise UsageError(f"{self.variant} has no class token: choose pooling gap, gmp or gsp")
        if self.variant == "factorized_dot_product" and (self.n_heads % 2 or self.n_kv_heads % 2):
            raise UsageError(
                f"factorized_dot_product gives half of its heads to time and half to space and cannot halve "
                f"{self.n_heads} query and {self.n_kv_heads} key-value heads: choose even numbers"
            )
        if self.heads and sum(size for _, size in self.heads) != self.num_classes:
            raise UsageError(f"`heads` {dict(self.heads)} do not add up to {self.num_classes} classes: make them")
        if not 0 <= self.stochastic_depth < 1:
            raise UsageError(f"`stochastic_depth` is {self.stochastic_depth}: give a rate of at least 0, below 1")
        if min(self.grid) < 1:
            raise UsageError(
                f"{self.kept_frames} frames of {self.image_size[0]}x{self.image_size[1]} hold no tubelet of "
                f"{'x'.join(map(str, self.tubelet_size))} (time x height x width): choose smaller tubelets"
            )

    @property
    def kept_frames(self) -> int:
        """How many frames the tubelets are cut from."""
        return self.num_frames if self.sampled_frames is None else min(self.sampled_frames, self.num_frames)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tubelets along time, height and width; remainders are dropped."""
        t, h, w = self.tubelet_size
        return self.kept_frames // t, self.image_size[0] // h, self.image_size[1] // w


@dataclass(frozen=True, kw_only=True)
class CaptionerConfig(Config):
    """A ViViT watches a clip, and a decoder with cross-attention writes about it. `n_kv_heads` are those of the decoder, in
    self-attention and cross-attention.

    `memory` is what the decoder reads: "frames", a vector per tubelet in time, which a factorized encoder's temporal layers
    have seen if it has some; or "patches", every token of the (spatial) encoder. `decoder_start_id` begins every caption.
    `shares_encoder` is the fingerprint of the encoder that this captioner reads with and does not hold: one of a pair.
    """

    encoder: VivitConfig
    decoder: DecoderConfig
    memory: Literal["frames", "patches"] = "frames"
    decoder_start_id: int
    shares_encoder: str | None = None

    def __post_init__(self) -> None:
        self.check_choices()
        if not 0 <= self.decoder_start_id < self.vocab_size:
            raise UsageError(
                f"`decoder_start_id` is {self.decoder_start_id}: it must be one of the {self.vocab_size} token ids"
            )
        if self.memory == "patches" and self.encoder.temporal_layers:
            raise UsageError(
                f"`memory` is 'patches', which the encoder's {self.encoder.temporal_layers} temporal layers never see: "
                "set its temporal_layers to 0, or choose 'frames'"
            )

    @property
    def memory_slots(self) -> int:
        """How many vectors the decoder reads of a clip of `num_frames`."""
        return self.encoder.grid[0] * self.slots_per_frame

    @property
    def slots_per_frame(self) -> int:
        return math.prod(self.encoder.grid[1:]) if self.memory == "patches" else 1

    # What every language model's configuration has: the decoder's own.
    family = "captioner"

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def dim(self) -> int:
        return self.decoder.dim

    @property
    def n_layers(self) -> int:
        return self.decoder.n_layers

    @property
    def n_heads(self) -> int:
        return self.decoder.n_heads

    @property
    def n_kv_heads(self) -> int:
        return self.decoder.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.decoder.head_dim

    @property
    def max_seq_len(self) -> int:
        return self.decoder.max_seq_len

    @property
    def windows(self) -> tuple[int | None, ...]:
        return self.decoder.windows

    @property
    def tie_embeddings(self) -> bool:
        return self.decoder.tie_embeddings

    @property
    def dtype(self) -> str:
        return self.decoder.dtype


AnyConfig = LanguageConfig | VivitConfig | CaptionerConfig


def with_kv_heads(config: Any, n_kv_heads: int) -> Any:
    """The same model with another number of key-value heads."""
    if isinstance(config, CaptionerConfig):
        return dataclasses.replace(config, decoder=with_kv_heads(config.decoder, n_kv_heads))
    return dataclasses.replace(config, n_kv_heads=n_kv_heads)


def with_dtype(config: Any, dtype: str) -> Any:
    """The same model, its weights stored in `dtype`."""
    if isinstance(config, CaptionerConfig):
        parts = {"encoder": with_dtype(config.encoder, dtype), "decoder": with_dtype(config.decoder, dtype)}
        return dataclasses.replace(config, **parts)
    return type(config).from_dict({**config.to_dict(), "dtype": dtype})
