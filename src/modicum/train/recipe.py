"""Recipes: TOML files that say everything about a run."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modicum.config import Config
from modicum.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ModelSection(Config):
    """The sizes of a Llama-like decoder."""

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


@dataclass(frozen=True, kw_only=True)
class DataSection(Config):
    """Where the text comes from. `tokenizer`: a model's folder to take it from; without one it is trained."""

    source: str
    suffixes: tuple[str, ...] = (".py",)
    exclude: tuple[str, ...] = ()
    held_out: float = 0.02
    tokenizer: str | None = None
    vocab_size: int = 2048
    window: int = 512


@dataclass(frozen=True, kw_only=True)
class OptimSection(Config):
    """AdamW, cosine after a linear warm-up. `lr` is the peak; it ends at `lr * floor`."""

    steps: int
    batch: int
    accumulate: int = 1
    lr: float
    floor: float = 0.05
    warmup: int = 100
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    bf16: bool = True


@dataclass(frozen=True, kw_only=True)
class TeacherSection(Config):
    """Distillation: `weight` of KL(teacher || student), the rest cross-entropy with the text."""

    model: str
    weight: float = 0.9


@dataclass(frozen=True, kw_only=True)
class RunSection(Config):
    """Where a run lives and how often it reports, validates and saves, in steps."""

    folder: str
    seed: int = 0
    log_every: int = 20
    validate_every: int = 500
    save_every: int = 250
    tensorboard: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """A whole run."""

    model: ModelSection
    data: DataSection
    optim: OptimSection
    run: RunSection
    teacher: TeacherSection | None = field(default=None)


def read_recipe(path: Path, overrides: list[str]) -> Recipe:
    """Read a recipe and apply `section.key=value` overrides, values as TOML writes them.

    Raises:
        UsageError: no such file, invalid TOML, an unknown or missing key.
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
    return Recipe.from_dict(values)


def toml_value(text: str) -> Any:
    """A TOML value, or the text itself where it is none (a bare string)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
