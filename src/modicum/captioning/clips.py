"""What a caller gives to be captioned, as memories: files read and cropped, clips encoded a few at a time, once each."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modicum.captioning.model import Captioner
from modicum.classification.predict import Protocol, protocol_for, read_views
from modicum.decode.batch import Request
from modicum.decode.prompts import MAX_ROWS, encode_prompts
from modicum.decode.stats import add_seconds
from modicum.errors import UsageError
from modicum.video.crops import crops_of

# What memories of clips that wait to be written about may take together.
MAX_MEMORY_BYTES = 256 << 20


def as_clips(videos: Any, pixel_values: Tensor | None = None) -> list[Any]:
    """One entry per clip: a path, frames [T, H, W, 3], or a memory [M, D'] that was encoded before.

    Args:
        videos: one of these, several, or clips of one length as [B, T, H, W, 3]. Arrays are taken as tensors.
        pixel_values: clips as [B, T, 3, H, W] instead.
    """
    if (videos is None) == (pixel_values is None):
        raise UsageError("give either videos or pixel_values: paths, or clips [T, height, width, 3]")
    if pixel_values is not None:
        frames = _tensor(pixel_values)
        if frames.dim() not in (4, 5):
            raise UsageError(f"pixel_values are {list(frames.shape)}: give clips [B, T, 3, height, width]")
        videos = frames.movedim(-3, -1)
    if isinstance(videos, str | Path):
        return [videos]
    if isinstance(videos, Tensor) or hasattr(videos, "__array__"):
        given = _tensor(videos)
        return list(given) if given.dim() in (3, 5) else [_checked(given)]
    if not isinstance(videos, Iterable):
        raise UsageError(f"videos is {type(videos).__name__}: give paths, or clips [T, height, width, 3]")
    return [clip if isinstance(clip, str | Path) else _checked(_tensor(clip)) for clip in videos]


def _tensor(given: Any) -> Tensor:
    """An array, nested lists or a tensor, as a tensor."""
    if hasattr(given, "__array__") and not isinstance(given, Tensor):
        # Frames turned from BGR by [..., ::-1] have strides that tensors cannot have.
        given = np.ascontiguousarray(given)
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(
            f"a clip is {type(given).__name__}, which is no tensor: give frames [T, height, width, 3], or a path"
        ) from None


def _checked(clip: Tensor) -> Tensor:
    if clip.dim() not in (2, 4):
        raise UsageError(f"a clip is {list(clip.shape)}: give frames [T, height, width, 3], or a path")
    return clip


def beginnings(model: Captioner, prompt: Any, n_clips: int) -> list[list[int]]:
    """What each caption begins with: the start token, and behind it a prompt, as text or ids; one for all, or one each."""
    several = isinstance(prompt, list | tuple) and not all(isinstance(token, int) for token in prompt)
    prompts = list(prompt) if several else [prompt] * n_clips
    if len(prompts) != n_clips:
        raise UsageError(f"{len(prompts)} prompts were given for {n_clips} videos: give one, or one per video")
    start = model.config.decoder_start_id
    # Encoded in one call, so that a refusal names the prompt's place.
    given = encode_prompts(model, [[start] if text is None else text for text in prompts])
    return [ids if ids[0] == start else [start, *ids] for ids in given]


def encoded(model: Captioner, clips: Sequence[Any], protocol: Protocol) -> Iterator[Tensor]:
    """Memories [M, D'] of clips, in order. Files are decoded while the model looks at those before them.

    Raises:
        UsageError: a clip that the encoder does not read.
        VideoError: a file cannot be read.
    """

    def read(part: Sequence[Any]) -> list[Tensor]:
        return [_frames(model, clip, protocol) for clip in part]

    with ThreadPoolExecutor(max_workers=1) as decoder:
        ahead = None
        for part in by_some(clips, protocol.batch):
            coming = decoder.submit(read, part)
            if ahead is not None:
                yield from _memories(model, ahead.result())
            ahead = coming
        if ahead is not None:
            yield from _memories(model, ahead.result())


def by_some(items: Sequence[Any], most: int) -> Iterator[Sequence[Any]]:
    """`most` of them at a time."""
    return (items[start : start + most] for start in range(0, len(items), most))


def _frames(model: Captioner, clip: Any, protocol: Protocol) -> Tensor:
    """A clip as its encoder reads it; a memory as it is."""
    config = model.config.encoder
    if isinstance(clip, str | Path):
        return read_views(clip, config, protocol)[0]
    if clip.dim() == 2:
        if clip.shape[1] != config.dim or not len(clip):
            raise UsageError(
                f"a memory is {list(clip.shape)} and this model's encoder makes vectors of {config.dim}: give one of its own"
            )
        return clip
    if clip.dtype == torch.uint8 and clip.shape[1:3] != config.image_size:
        return next(crops_of(clip, config.image_size, protocol.short_side, 1))
    return clip


def _memories(model: Captioner, clips: list[Tensor]) -> Iterator[Tensor]:
    """Clips of equal length, which is usual, are encoded together."""
    made: dict[int, Tensor] = {at: clip for at, clip in enumerate(clips) if clip.dim() == 2}
    for shape, dtype in dict.fromkeys((clip.shape, clip.dtype) for clip in clips if clip.dim() == 4):
        places = [at for at, clip in enumerate(clips) if (clip.shape, clip.dtype) == (shape, dtype)]
        video = torch.stack([clips[at] for at in places]).to(model.device)
        made.update(zip(places, model.encode(video), strict=True))
    yield from (made[at].to(model.device) for at in range(len(clips)))


def parts(
    model: Captioner, requests: list[Request], clips: Sequence[Any], protocol: Protocol, by_part: dict[str, float]
) -> Iterator[list[Request]]:
    """Requests with the memories that they are about, as many at a time as may wait; the time goes to "encode"."""
    c, size = model.config, model.embed.weight.element_size()
    together = max(1, min(MAX_ROWS, MAX_MEMORY_BYTES // (c.memory_slots * c.encoder.dim * size)))
    for some in by_some(requests, together):
        began = perf_counter()
        model.for_inference()
        memories = encoded(model, [clips[request.index] for request in some], protocol)
        ready = [replace(request, source=memory) for request, memory in zip(some, memories, strict=True)]
        add_seconds(by_part, {"encode": perf_counter() - began})
        yield ready


@torch.no_grad()
def shown_and_said(model: Captioner, pairs: Any) -> list[tuple[Tensor, ...]]:
    """Pairs of a clip and its caption, text or ids, as the model is called with them: memories [1, M, D'] and ids [1, L].

    Raises:
        UsageError: something else than pairs.
    """
    several = [] if isinstance(pairs, str | Path) else list(pairs)
    paired = (isinstance(pair, list | tuple) and len(pair) == 2 and not isinstance(pair[0], int) for pair in several)
    if not several or not all(paired):
        raise UsageError(
            "a captioner is calibrated on what it sees and says: give pairs of a clip and its caption, as in "
            '[("clip.mp4", "a dog runs"), ...]'
        )
    shown, said = zip(*several, strict=True)
    ids = beginnings(model, list(said), len(shown))
    clips = [clip for given in shown for clip in as_clips(given)]
    memories = encoded(model, clips, protocol_for(model, views=(1, 1)))
    return [
        (memory[None], torch.tensor([text], device=model.device)) for memory, text in zip(memories, ids, strict=True)
    ]
