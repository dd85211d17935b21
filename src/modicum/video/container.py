"""Opening a file's container, and refusing what holds no pictures."""

from pathlib import Path
from typing import Any

from modicum.video.pixels import VideoError, check_size

_ATTACHED_PICTURE = 0x400  # a song's cover is stored as a video of one frame
_TEXT_ART = "tty"  # FFmpeg takes any .txt for a recording of a terminal


def open_container(av: Any, path: Path) -> Any:
    """An input container of PyAV's.

    Raises:
        VideoError: FFmpeg does not recognise the file.
    """
    try:
        # The prefix keeps a colon in a name from being taken for a protocol.
        return av.open(f"file:{path}", metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(
            f"{path} is not a video, or is damaged or incomplete ({reason}): give a video file such as mp4, webm, mkv "
            "or avi, or a folder of images"
        ) from error


def first_video_stream(container: Any, path: Path) -> Any:
    """The first stream of pictures that can be decoded.

    Raises:
        VideoError: there is none, or its pictures are too large.
    """
    if container.format.name == _TEXT_ART:
        raise VideoError(f"{path} is a text file: give a video file or a folder of images")
    streams = [s for s in container.streams.video if not int(getattr(s, "disposition", 0)) & _ATTACHED_PICTURE]
    if not streams:
        held = "only sound or other data" if len(container.streams) else "nor any other: it is empty or incomplete"
        raise VideoError(f"{path} has no video stream, {held}; give a file with pictures")
    stream = streams[0]
    if stream.codec_context is None or not stream.time_base:
        raise VideoError(
            f"{path} is coded in a way that the installed FFmpeg cannot decode: convert it to H.264 in mp4"
        )
    check_size(path, stream.codec_context.width, stream.codec_context.height)
    return stream
