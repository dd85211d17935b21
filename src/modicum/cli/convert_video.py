"""`modicum convert-video`: a checkpoint of the ViViT authors' code as a folder that `load` reads."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli import common
from modicum.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from modicum.vivit.model import Vivit

EXAMPLES = """Examples:

modicum convert-video vivit_base_k400/checkpoint vivit-b

modicum convert-video checkpoint_100699 vivit-epic --heads noun=300,verb=97 --labels classes.txt

modicum convert-video checkpoint_5000 wide --frames 64 --size 224x288 --variant factorized_dot_product"""


def convert_video(
    source: Annotated[
        str,
        typer.Argument(help="A Flax checkpoint or its folder; or the folder or hub id of a ViViT that loads already."),
    ],
    destination: Annotated[Path, typer.Argument(help="The folder to write.")],
    frames: Annotated[int | None, typer.Option(help="Frames the model reads; 32 if not given.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Side of its frames, or HEIGHTxWIDTH; 224 if not given.", metavar="224x224")
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(help="spacetime or factorized_dot_product, where a file without a class token may be either."),
    ] = None,
    attention_order: Annotated[
        str | None,
        typer.Option(
            help="Of factorised self-attention: space_time (the paper's, default) or time_space (its code's)."
        ),
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="gap (default), gmp or gsp, without a class token.")] = None,
    heads: Annotated[
        str | None, typer.Option(help="Names and sizes of several outputs, in order.", metavar="noun=300,verb=97")
    ] = None,
    sampled_frames: Annotated[int | None, typer.Option(help="How many frames uniform frame sampling keeps.")] = None,
    labels: Annotated[Path | None, typer.Option(help="A text file with one class name per line.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that holds something.")] = False,
) -> None:
    """Write a ViViT in PyTorch: depth and widths come from the file, frames and frame size from the options.

    A spacetime model with a class token is written as Hugging Face's `VivitForVideoClassification`, others in a folder of
    our own kind; `modicum.load` and the other commands read both.
    """
    from modicum import api

    given = {
        "num_frames": frames,
        "image_size": None if size is None else common.parse_size(size),
        "variant": variant,
        "attention_order": attention_order,
        "pooling": pooling,
        "heads": None if heads is None else parse_heads(heads),
        "sampled_frames": sampled_frames,
    }
    model = read_model(source, {name: value for name, value in given.items() if value is not None})
    if labels is not None:
        model.labels = read_labels(labels, model.config.num_classes)
    api.save(model, destination, overwrite=force)
    print(summary(model, destination))


def read_model(source: str, settings: dict[str, Any]) -> "Vivit":
    """The model at `source`: of the authors' code, read with `settings`, or a folder or hub id, which needs none."""
    from modicum import api
    from modicum.checkpoint.flax import holds_flax
    from modicum.vivit import from_scenic
    from modicum.vivit.model import Vivit

    path = Path(source).expanduser()
    # Folders of `transformers` may hold weights for Flax too, of another layout.
    if path.is_file() or (holds_flax(path) and not any(path.glob("*.safetensors"))):
        return from_scenic(path, **settings)
    if settings:
        raise UsageError(
            f"{source} is no Flax checkpoint and says by itself what it is: leave out {', '.join(map(option, settings))}"
        )
    model = api.load(source, device="cpu")
    if not isinstance(model, Vivit):
        raise UsageError(f"{source} is not a ViViT: give a video classifier")
    return model


def option(setting: str) -> str:
    """How the command line calls an argument of `from_scenic`."""
    return "--" + {"num_frames": "frames", "image_size": "size"}.get(setting, setting).replace("_", "-")


def parse_heads(text: str) -> dict[str, int]:
    """noun=300,verb=97 -> {"noun": 300, "verb": 97}"""
    pairs = [part.partition("=") for part in text.split(",")]
    heads = {name.strip(): int(size) for name, _, size in pairs if name.strip() and size.isdecimal() and int(size)}
    if len(heads) != len(pairs):
        raise UsageError(
            f"--heads {text} is no list of outputs: give different names with sizes, as in noun=300,verb=97"
        )
    return heads


def read_labels(path: Path, num_classes: int) -> list[str]:
    """The lines of a file, as many as there are classes."""
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as text ({error}): give a file with a class name per line"
        ) from error
    if len(names) != num_classes:
        raise UsageError(f"{path} has {len(names)} lines for {num_classes} classes: give one name per class, in order")
    return names


def summary(model: "Vivit", destination: Path) -> str:
    """What was written, on one line."""
    n_params = sum(parameter.numel() for parameter in model.parameters())
    T, height, width = model.config.grid
    variant = model.config.variant
    return f"{destination}: {variant}, {n_params:,} parameters, {T} x {height} x {width} tokens (time, height, width)"
