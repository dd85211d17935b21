"""`modicum caption`: what a video shows in words, file by file or window by window."""

import json
import secrets
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli import common
from modicum.errors import UsageError

EXAMPLES = """Examples:

modicum caption ./captioner clip.mp4

modicum caption ./captioner *.mp4 --draft ./captioner-draft -k 6 --json > captions.json

modicum caption ./captioner clip.mp4 --prompt 'a red' --temperature 0.7 --seed 1 --sheet clip.png

modicum caption ./captioner long.mp4 --window 4 --every 2 --vtt long.vtt"""

MOST_IN_A_SHEET = 24


def caption(
    model: Annotated[
        str,
        typer.Argument(help="Name of a captioner that ships with modicum, a local folder, or a Hugging Face hub id."),
    ],
    videos: Annotated[list[str], typer.Argument(help="Video files, or folders of images.", metavar="VIDEO...")],
    draft: Annotated[
        str | None,
        typer.Option(
            help="What proposes tokens, for the same words sooner: a captioner that shares the model's encoder; a text "
            "model with its tokenizer, which sees no video; `ngram`; or `self:LAYERS`, the model's own first layers."
        ),
    ] = None,
    num_draft_tokens: common.NumDraftTokens = 4,
    prompt: Annotated[
        str | None, typer.Option(help="What every caption begins with; it is not printed again.", metavar="TEXT")
    ] = None,
    max_new_tokens: common.MaxNewTokens = 64,
    temperature: common.Temperature = 0.0,
    top_k: common.TopK = None,
    top_p: common.TopP = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same captions above temperature 0.")] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Frames of the clock from one frame of the clip to the next; as trained, or else 2.", min=1),
    ] = None,
    fps: common.Fps = None,
    short_side: common.ShortSide = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="A line per window of each video instead of one caption of its middle.")
    ] = False,
    window: Annotated[
        float | None,
        typer.Option(
            help="Seconds that a window shows, instead of a stride. Like --every and --vtt it implies --stream."
        ),
    ] = None,
    every: Annotated[
        float | None,
        typer.Option("--every", "--hop", help="Seconds from window to window; as long as a window if nothing is said."),
    ] = None,
    vtt: Annotated[
        Path | None, typer.Option(help="Write the lines as WebVTT subtitles as well, each as soon as it is known.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Draw the frames that were seen, with their captions, into a PNG.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the sheet or the subtitles if they exist.")] = False,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    weights: common.Weights = None,
    as_json: common.Json = False,
    no_color: common.NoColor = False,
) -> None:
    """Say what videos show. A file that cannot be read is reported and the others go on.

    A caption is about the middle of its video: as many frames as the model reads, a stride apart. With --stream a long video
    is watched from its beginning to its end in constant memory, a line per window; Ctrl-C keeps the lines that are finished.

    In a terminal, tokens that came from the draft are green and those that the model put in are yellow.
    """
    from modicum import api

    streaming = stream or window is not None or every is not None or vtt is not None
    if draft is not None and num_draft_tokens != "auto" and num_draft_tokens < 1:
        raise UsageError(f"-k {num_draft_tokens} drafts nothing: give at least 1, or leave --draft out")
    if window is not None and stride is not None:
        raise UsageError("--window and --stride both say how long a window is: give one of them")
    if vtt is not None:
        if len(videos) != 1:
            raise UsageError(f"--vtt holds the subtitles of one video and {len(videos)} were given: give one")
        common.check_writable(vtt, force=force)
    if sheet is not None:
        check_sheet(sheet, videos, streaming, force=force)
    target, drafter = common.load_pair(model, draft, device, dtype)
    api.check_captioner(target)
    if weights is not None:
        target.for_inference(weights=weights)
    settings = {
        "draft": drafter,
        "num_draft_tokens": num_draft_tokens,
        "prompt": prompt,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    base = secrets.randbits(63) if seed is None else seed
    printed = Printed(len(videos), settings, drafted=drafter is not None, as_json=as_json, color=not no_color)
    clock = {"stride": stride, "fps": "auto" if fps is None else fps, "short_side": short_side}
    if streaming:
        caption_streams(target, videos, printed, base, vtt, {"every": every, "window": window, **clock})
    else:
        caption_files(target, videos, printed, base, sheet, clock)


def check_sheet(sheet: Path, videos: list[str], streaming: bool, *, force: bool) -> None:
    """Refuse a sheet that cannot be drawn, before any work is done."""
    from modicum.report.figures import load_pyplot

    if streaming:
        raise UsageError("--sheet draws the frames of whole files: leave it out, or leave out --stream and its options")
    if len(videos) > MOST_IN_A_SHEET:
        raise UsageError(f"--sheet has room for {MOST_IN_A_SHEET} videos and {len(videos)} were given: give fewer")
    common.check_writable(sheet, force=force)
    load_pyplot()


class Printed:
    """Captions on stdout: as they are written in a terminal, as lines to anything else, or as JSON at the end.

    The JSON is printed when the block ends, even by Ctrl-C, so that what is finished is not lost. A refusal before that
    leaves stdout empty.
    """

    def __init__(self, n_videos: int, settings: dict[str, Any], *, drafted: bool, as_json: bool, color: bool) -> None:
        from rich.console import Console

        from modicum.decode.stats import GenerationStats

        plain = not color or None
        self.answer = Console(highlight=False, soft_wrap=True, no_color=plain)
        self.notes = Console(stderr=True, highlight=False, no_color=plain)
        self.settings, self.drafted, self.as_json, self.several = settings, drafted, as_json, n_videos > 1
        self.live = self.answer.is_terminal and not as_json
        self.results: list[dict[str, Any]] = []
        self.total = GenerationStats()

    def __enter__(self) -> "Printed":
        from modicum.cli.generate import LEGEND

        if self.live and self.drafted and not self.answer.no_color:
            self.notes.print(LEGEND)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        from modicum.cli.generate import closing_line

        refused = kind is not None and issubclass(kind, UsageError) and not self.total.tokens
        if self.as_json and not refused:
            print(json.dumps(self.results), flush=True)
        elif self.total.tokens:
            self.notes.print(closing_line(self.total), style="dim", soft_wrap=True)

    def name(self, path: str) -> None:
        """Say which video comes, if there are several."""
        if self.several and not self.as_json:
            self.answer.print(path, style="bold", markup=False)

    def begin(self, prefix: str = "") -> None:
        """The part of a line that comes before its text, in a terminal."""
        if self.live:
            print(prefix, end="", flush=True)

    def on_token(self) -> Any:
        """What writes tokens as they come, in a terminal."""
        from modicum.cli.generate import printer

        return printer(not self.answer.no_color) if self.live else None

    def end(self, text: str, stats: Any, prefix: str = "") -> None:
        """A caption is finished."""
        self.total.add(stats)
        self.total.seconds += stats.seconds
        if self.live:
            print(flush=True)
        elif not self.as_json:
            # A line is a line, whatever a model writes.
            print(prefix + " ".join(text.split()), flush=True)


def caption_files(
    target: Any, videos: list[str], printed: Printed, seed: int, sheet: Path | None, clock: dict[str, Any]
) -> None:
    """A caption of each file, with a bar over them; failures are named as they come and counted at the end."""
    from modicum import api
    from modicum.classification.predict import protocol_for, read_ahead, read_views
    from modicum.cli.files import FileBar
    from modicum.video.read import VideoError

    protocol = protocol_for(target, views=(1, 1), **clock)
    clips = read_ahead(videos, lambda path: read_views(path, target.config.encoder, protocol)[0])
    seen: list[tuple[Any, str]] = []
    with printed, FileBar(printed.notes, len(videos)) as files:
        for number, (path, clip) in enumerate(zip(videos, clips, strict=True)):
            if isinstance(clip, VideoError):
                files.failed(clip)
                printed.results.append({"video": path, "error": str(clip)})
                continue
            if printed.live:
                files.hide()
            printed.name(path)
            printed.begin()
            out = api.caption(target, [clip], seed=[(seed, number)], on_token=printed.on_token(), **printed.settings)
            text = text_of(out)
            printed.end(text, out.stats)
            files.advance()
            if printed.live:
                files.show()
            result = {"text": None if out.texts is None else out.texts[0], "tokens": out.tokens[0]}
            printed.results.append({"video": path, **result, "stats": out.stats.to_dict()})
            if sheet is not None:
                seen.append((clip, text))
    if sheet is not None and seen:
        draw(seen, sheet)
        printed.notes.print(f"frames in {sheet}", soft_wrap=True)
    files.check("captioned")


def caption_streams(
    target: Any, videos: list[str], printed: Printed, seed: int, vtt: Path | None, windows: dict[str, Any]
) -> None:
    """A line per window of each file as soon as it has been seen."""
    from modicum import api
    from modicum.captioning.vtt import VttWriter
    from modicum.cli.files import FileBar
    from modicum.video.read import VideoError

    with printed, ExitStack() as opened:
        # Lines come as a long video is read and show how far it is; a bar over files would only be in their way.
        files = FileBar(printed.notes, len(videos))
        for number, path in enumerate(videos):
            printed.name(path)
            result: dict[str, Any] = {"video": path, "windows": []}
            printed.results.append(result)
            subtitles = None
            try:
                for shown in api.caption_windows(
                    target,
                    path,
                    seed=(seed, number),
                    on_window=lambda start, end: printed.begin(times(start, end)),
                    on_token=printed.on_token(),
                    **windows,
                    **printed.settings,
                ):
                    text = shown.text if shown.text is not None else ids_of(shown.tokens)
                    printed.end(text, shown.stats, times(shown.start, shown.end))
                    result["windows"].append(shown.to_dict())
                    if vtt is not None:
                        subtitles = subtitles or opened.enter_context(VttWriter(vtt))
                        subtitles.add(shown.start, shown.end, text)
            except VideoError as error:
                result["error"] = str(error)
                files.failed(error)
    files.check("captioned")


def times(start: float, end: float) -> str:
    return f"{start:8.2f} - {end:8.2f} s  "


def text_of(out: Any) -> str:
    """The one text of an output, or without a tokenizer its ids."""
    return out.texts[0] if out.texts is not None else ids_of(out.tokens[0])


def ids_of(tokens: list[int]) -> str:
    return " ".join(map(str, tokens))


def draw(seen: list[tuple[Any, str]], path: Path) -> None:
    """A row of frames per video, under its caption."""
    import torch

    from modicum.report.figures import frames_sheet

    clips, texts = zip(*seen, strict=True)
    frames_sheet(torch.stack(clips), "", path, captions=[" ".join(text.split()) for text in texts])
