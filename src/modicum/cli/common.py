"""What the verbs share: options with their help, consoles, and the way a draft is named."""

import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.errors import UsageError

INTERRUPTED = 130  # the exit code after Ctrl-C

Target = Annotated[
    str, typer.Argument(help="Name of a model that ships with modicum, a local folder, or a Hugging Face hub id.")
]
Draft = Annotated[
    str | None,
    typer.Option(
        help="A smaller model with the same tokenizer; a drafter that `modicum train` made for this target; `ngram`: what "
        "followed the last tokens before; or `self:LAYERS`: the target's own first layers."
    ),
]


def parse_k(text: str) -> int | str:
    """ "auto", or a whole number."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            f"-k {text} is not a number of draft tokens: give a whole number of at least 1, or auto"
        ) from None


NumDraftTokens = Annotated[
    Any,
    typer.Option(
        "-k",
        "--num-draft-tokens",
        parser=parse_k,
        metavar="N|auto",
        help="Tokens drafted per call of the target; auto chooses their number anew for every call.",
    ),
]
Verification = Annotated[
    str,
    typer.Option(
        help="How drafts are judged: token, one by one (2302.01318), or block, together (2403.10444). Both are exact; "
        "block keeps as many tokens or more."
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Exact, unless the text, a stop string or the context ends before.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy: always the most probable token.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the K most probable tokens only.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the most probable tokens that hold this share, 0 to 1.")]
MinP = Annotated[float | None, typer.Option(help="Drop tokens less probable than this share of the most probable one.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: tokens seen before become less likely.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text, whatever else is in the batch.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Weights = Annotated[
    str | None,
    typer.Option(
        help="int8: the target's weights as bytes, on a CPU; int8-dynamic: activations, too; faster, less exact."
    ),
]
Fps = Annotated[
    float | None,
    typer.Option(help="Frames per second of the clock that strides count; as trained, or else Kinetics' 25."),
]
ShortSide = Annotated[
    int | None,
    typer.Option(help="Size of the shorter side before cropping; as trained, or else 256 for crops of 224."),
]
NoColor = Annotated[bool, typer.Option("--no-color", help="Plain text, also in a terminal.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def load_pair(target: str, draft: str | None, device: str, dtype: str) -> tuple[Any, Any]:
    """The target, and the draft as `modicum.generate` takes it."""
    from modicum import api
    from modicum.speculative.drafters.make import is_named_drafter

    loaded = api.load(target, device=device, dtype=dtype)
    if draft is None or is_named_drafter(draft):
        return loaded, draft
    return loaded, api.load(draft, device=device, dtype=dtype)


def check_writable(path: Path, *, force: bool) -> None:
    """Refuse an output that exists or cannot be written, before any work is done."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists: choose another place, or replace it with --force")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder, so {path.name} cannot be written: create it first")
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{path} cannot be written: choose another place")


def parse_views(text: str) -> tuple[int, int]:
    """ "4x3", temporal views x spatial crops, -> (4, 3); "4" alone is (4, 1)."""
    first, second = _pair("--views", text, "temporal views x crops: write 4x1, or 4x3")
    return first, second or 1


def parse_size(text: str) -> tuple[int, int]:
    """ "224" -> (224, 224), "224x288" -> (224, 288): height first."""
    first, second = _pair("--size", text, "a size: give a side, or HEIGHTxWIDTH as in 224x288")
    return first, second or first


def _pair(option: str, text: str, required: str) -> tuple[int, int | None]:
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text.strip().lower())
    if not match:
        raise UsageError(f"{option} {text} is not {required}")
    return int(match[1]), int(match[2]) if match[2] else None


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
