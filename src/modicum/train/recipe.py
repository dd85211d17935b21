"""Recipes: TOML files that say everything about a run."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modicum.config import Section, require
from modicum.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ModelSection(Section):
    """The sizes of a Llama-like decoder. `start`: a model whose weights, of equal name and shape, it begins with."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    max_seq_len: int
    rope_theta: float = 10000.0
    tie_embeddings: bool = True
    save_dtype: str = "bfloat16"
    start: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = ("float32", "bfloat16", "float16")
        require(self.save_dtype in kinds, "save_dtype", self.save_dtype, f"choose one of {', '.join(kinds)}")


@dataclass(frozen=True, kw_only=True)
class DataSection(Section):
    """Where the text comes from: see `find_corpus`. `tokenizer`: a model's folder to take it from, else it is trained."""

    source: str | tuple[str, ...]
    suffixes: tuple[str, ...] = (".py",)
    exclude: tuple[str, ...] = ()
    held_out: float | str = 0.02
    tokenizer: str | None = None
    vocab_size: int = 2048
    window: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        share = isinstance(self.held_out, str) or 0 < self.held_out < 1
        require(share, "held_out", self.held_out, "give the share of files, between 0 and 1, or where they are")
        require(self.window >= 1, "window", self.window, "it must be at least 1")
        # 256 bytes and the end of text: with fewer tokens some text could not be written.
        require(self.vocab_size >= 257, "vocab_size", self.vocab_size, "it must be at least 257")


@dataclass(frozen=True, kw_only=True)
class OptimSection(Section):
    """AdamW (or Adafactor, which has no use for decay, betas and clipping), cosine after a linear warm-up.

    `lr` is the peak; it ends at `lr * floor`. A floor of 1 and no warm-up make it constant. `t5_step`: the rate is T5's
    schedule from that step of its pre-training on, times `lr`.
    """

    steps: int
    batch: int
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float
    t5_step: int | None = None
    floor: float = 0.05
    warmup: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    bf16: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch", "accumulate"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "it must be at least 1")
        for name in ("lr", "clip"):
            require(getattr(self, name) > 0, name, getattr(self, name), "it must be above 0")
        require(self.warmup >= 0, "warmup", self.warmup, "it must not be negative")
        require(self.optimizer in ("adamw", "adafactor"), "optimizer", self.optimizer, "choose adamw or adafactor")


@dataclass(frozen=True, kw_only=True)
class TeacherSection(Section):
    """Distillation: `weight` of KL(teacher || student), the rest cross-entropy with the text."""

    model: str
    weight: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.weight <= 1, "weight", self.weight, "give the teacher's share of the loss, from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class RunSection(Section):
    """Where a run lives and how often it reports, validates and saves, in steps.

    After `max_seconds` of one sitting it saves and stops, to be resumed; the schedule stays one of steps.
    """

    folder: str
    device: str = "auto"
    seed: int = 0
    log_every: int = 20
    validate_every: int = 500
    save_every: int = 250
    tensorboard: bool = False
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("log_every", "validate_every", "save_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "it must be at least 1")
        require(self.seed >= 0, "seed", self.seed, "it must not be negative")


@dataclass(frozen=True, kw_only=True)
class Recipe(Section):
    """A whole run."""

    model: ModelSection
    data: DataSection
    optim: OptimSection
    run: RunSection
    teacher: TeacherSection | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        context = self.model.max_seq_len
        require(self.data.window <= context, "window", self.data.window, f"the model's context is {context} tokens")


def read_recipe(path: Path, overrides: list[str]) -> Recipe:
    """A recipe with its overrides.

    Raises:
        UsageError: as `read_values`; an unknown or missing key.
    """
    return Recipe.from_dict(read_values(path, overrides))


def read_values(path: Path, overrides: list[str]) -> dict[str, Any]:
    """The tables of a recipe of any kind with `section.key=value` overrides applied, values as TOML writes them.

    Raises:
        UsageError: no such file, invalid TOML, something that is no override.
    """
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: give the path of a recipe, a .toml file") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML ({error}): repair it") from error
    for override in overrides:
        key, sign, text = override.partition("=")
        section, _, name = key.partition(".")
        if not sign or not name:
            raise UsageError(f"`{override}` is not an override: write section.key=value, such as optim.steps=100")
        values.setdefault(section, {})[name] = toml_value(text)
    return values


def expectation(path: Path) -> str | None:
    """What a recipe's header says one may expect: from its line that begins with "Expect" to the end of the paragraph."""
    lines: list[str] = []
    for line in path.read_text().splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or (lines and not text):
            break
        if lines or text.startswith("Expect"):
            lines.append(text)
    return " ".join(lines) or None


def toml_value(text: str) -> Any:
    """A TOML value, or the text itself where it is none (a bare string)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
