"""`modicum classify`: what a video shows, file by file or second by second."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli import common
from modicum.cli.files import FileBar
from modicum.errors import UsageError

EXAMPLES = """Examples:

modicum classify ./vivit clip.mp4

modicum classify ./vivit *.mp4 --views 4x3 --top 3 --json > predictions.json

modicum classify ./vivit clip.mp4 --frames-sheet sheet.png

modicum classify ./vivit --stream long.mp4 --every 1.0"""


def classify(
    model: common.Target,
    videos: Annotated[list[str], typer.Argument(help="Video files, or folders of images.", metavar="VIDEO...")],
    views: Annotated[
        str, typer.Option(help="Temporal views x spatial crops, whose logits are averaged: 4x1, or 4x3 as in papers.")
    ] = "4x1",
    top: Annotated[int, typer.Option(help="How many classes to name.")] = 5,
    stride: Annotated[
        int | None,
        typer.Option(help="Frames of the clock from one frame of a view to the next; as trained, or else 2."),
    ] = None,
    fps: common.Fps = None,
    short_side: common.ShortSide = None,
    stream: Annotated[bool, typer.Option("--stream", help="A line per step of one long video, as it is read.")] = False,
    every: Annotated[float, typer.Option(help="With --stream: seconds from line to line.")] = 1.0,
    frames_sheet: Annotated[
        Path | None, typer.Option(help="Draw the frames that each view saw, with the prediction, into a PNG.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the sheet if it exists.")] = False,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    as_json: common.Json = False,
) -> None:
    """Name what videos show. A file that cannot be read is reported and the others go on."""
    from modicum import api
    from modicum.classification.predict import Protocol, protocol_for

    clock: Any = "auto" if fps is None else fps
    looking: Any = {"views": common.parse_views(views), "short_side": short_side, "top": top}
    # What cannot be honoured is refused before a model is loaded.
    Protocol(**looking, stride=1 if stride is None else stride)
    if stream and (len(videos) != 1 or frames_sheet is not None):
        raise UsageError(f"--stream reads one video and draws no sheet: give one instead of {len(videos)}, no sheet")
    if frames_sheet is not None:
        from modicum.report.figures import load_pyplot

        if len(videos) != 1:
            raise UsageError(f"--frames-sheet draws one video and {len(videos)} were given: give one")
        common.check_writable(frames_sheet, force=force)
        load_pyplot()
    loaded = api.check_video_model(api.load(model, device=device, dtype=dtype))
    protocol = protocol_for(loaded, stride=stride, fps=clock, **looking)
    if stream:
        show_stream(loaded, videos[0], every, protocol, as_json=as_json)
        return
    show_files(loaded, videos, protocol, frames_sheet, as_json=as_json)


def show_files(model: Any, videos: list[str], protocol: Any, sheet: Path | None, *, as_json: bool) -> None:
    """Classify files with a bar over them; failures are named as they come and counted at the end."""
    from rich.console import Console

    from modicum.classification.predict import classify_files
    from modicum.video.read import VideoError

    answer, notes = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False)
    results: list[Any] = []
    with FileBar(notes, len(videos)) as files:
        for path, result in zip(videos, classify_files(model, videos, protocol), strict=True):
            if isinstance(result, VideoError):
                files.failed(result)
                results.append(None)
                continue
            predictions, seen = result
            results.append(to_json(predictions))
            if sheet is not None:
                from modicum.report.figures import frames_sheet

                frames_sheet(seen, title_of(predictions), sheet, crops=protocol.views[1])
                notes.print(f"frames in {sheet}", soft_wrap=True)
            if not as_json:
                print_predictions(answer, path, predictions)
            files.advance()
    if as_json:
        print(json.dumps(results))
    files.check("classified")


def show_stream(model: Any, path: str, every: float, protocol: Any, *, as_json: bool) -> None:
    """A line per window as soon as it has been seen."""
    from modicum.classification.stream import classify_stream

    for window in classify_stream(model, path, every, protocol):
        if as_json:
            line = {"start": window.start, "end": window.end, "predictions": to_json(window.predictions)}
            print(json.dumps(line), flush=True)
        else:
            print(f"{window.start:8.2f} - {window.end:8.2f} s  {title_of(window.predictions)}", flush=True)


def print_predictions(console: Any, path: str, predictions: Any) -> None:
    """The classes of one video under its name."""
    console.print(path, style="bold", markup=False)
    for head, named in predictions.items() if isinstance(predictions, dict) else [("", predictions)]:
        for prediction in named:
            label = f"{head}: {prediction.label}" if head else prediction.label
            console.print(f"  {prediction.score:6.1%}  {label}", markup=False)


def title_of(predictions: Any) -> str:
    """The best class, of every head, in a line."""
    heads = predictions.items() if isinstance(predictions, dict) else [("", predictions)]
    return ", ".join(f"{f'{head}: ' if head else ''}{named[0].label} {named[0].score:.1%}" for head, named in heads)


def to_json(predictions: Any) -> Any:
    """A list of {label, index, score}; of several heads, by head."""
    if isinstance(predictions, dict):
        return {head: to_json(named) for head, named in predictions.items()}
    return [prediction.to_dict() for prediction in predictions]
