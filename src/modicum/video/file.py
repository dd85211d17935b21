"""A video file: its frames by time stamp, with seeks that land on the right frame."""

import math
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from modicum.video.container import first_video_stream, open_container
from modicum.video.pixels import VideoError, check_size, import_av, to_rgb

_WORTH_A_SEEK = 8  # frames; a seek throws away what the decoder holds, so nearer ones are decoded through
_HIDING_CODECS = ("vp8", "mpeg4")  # their packets may hold nothing to show: a mere reference, or a placeholder
_BEFORE, _AFTER = -(2**63), 2**63


class HiddenFrameError(VideoError):
    """The frame of a packet never shows, as with the references that VP8 hides: `index(by_decoding=True)` finds out."""


class VideoFile:
    """The frames of the first video stream, each known by its stamp: a count of `time_base` seconds.

    A frame's stamp is its packet's presentation time, so that an index needs no decoding. Some containers store none,
    or only the order of decoding (AVI): there frames are decoded to be counted, and always from the start.
    """

    def __init__(self, path: Path, threads: str = "SLICE") -> None:
        self.path = path
        self.stamps: Sequence[int] = ()
        self.end = 0
        self._threads = threads
        self._keys: Sequence[int] = ()
        self._counted: bool | None = None  # known from the first packet
        self._stored_size: tuple[int, int] | None = None
        self._av = import_av()
        self._converter = self._av.video.reformatter.VideoReformatter()
        self._open()

    def _open(self) -> None:
        self._container = open_container(self._av, self.path)
        try:
            self._stream = first_video_stream(self._container, self.path)
        except VideoError:
            self._container.close()
            raise
        self.time_base: Fraction = self._stream.time_base
        self.may_hide_frames = self._stream.codec_context.name in _HIDING_CODECS
        self._read_from(self._packets())

    def close(self) -> None:
        """Let go of the file; closing twice is harmless."""
        self._frames.close()
        self._container.close()

    def index(self, by_decoding: bool = False) -> Any:
        """Find `stamps`, increasing, and `end`, where the last frame ends; return the first frame.

        Raises:
            VideoError: no frame can be decoded.
        """
        if self._counted is not None:
            self._start_over()
        seen: list[tuple[int | None, bool, bool]] = []
        packets = self._packets(seen)
        frames = self.passing(packets)
        first, frame = next(frames, (0, None))
        if frame is None:
            raise VideoError(
                f"{self.path} has no frame that can be decoded: copy it again, or convert it to H.264 in mp4"
            )
        if by_decoding or self._counted:
            self.stamps = [first, *(stamp for stamp, _ in frames)]
        else:
            # The rest is read without decoding. The first frame had to be, for what leads up to it may never show.
            for _ in packets:
                pass
            self.stamps = sorted({pts for pts, _, hidden in seen if pts is not None and pts >= first and not hidden})
            self._counted = any(pts is None for pts, _, _ in seen)
            if self._counted or self.stamps[:1] != [first]:
                return self.index(by_decoding=True)
            self.end = self._end_of(self.stamps[-2:])
        self._keys = () if self._counted else sorted(pts for pts, is_key, _ in seen if is_key and pts is not None)
        self._at = _AFTER
        return frame

    def index_part(self, start: Fraction, end: Fraction | None) -> Any:
        """As `index`, as far as it takes to know the frames nearest to each moment from `start` to `end` seconds after
        the first frame: of an hour's recording a few packets are read. `stamps` are the first one and those around the
        part; `end`, unless it was reached, lies short of the video's. Where seeks are not to be relied on, all is indexed.
        """
        first, frame = next(self.passing(), (0, None))
        if frame is None or self._counted or self.may_hide_frames or not self._seeks_well():
            return self.index(by_decoding=self.may_hide_frames)
        begin = first + math.floor(start / self.time_base)
        stop = _AFTER if end is None else first + math.ceil(end / self.time_base)
        margin = math.ceil(1 / self.time_base)
        limit = stop + margin
        stamps: list[int] = []
        keys: list[int] = []
        through = True
        try:
            self._container.seek(begin, stream=self._stream)
        except self._av.FFmpegError:
            return self.index()
        for packet in self._packets():
            pts, dts = packet.pts, packet.dts
            if pts is None or dts is None or (not keys and packet.is_keyframe and pts > begin):
                return self.index()
            if packet.is_keyframe:
                keys.append(pts)
            if not packet.is_discard:
                stamps.append(pts)
            if dts > limit:
                # Whatever follows is shown later still, so that all up to the limit are known.
                if any(stop <= stamp <= limit for stamp in stamps):
                    through = False
                    break
                limit += margin
        if not keys:
            return self.index()
        self.stamps = sorted({first, *(stamp for stamp in stamps if stamp >= first)})
        self.end = self._end_of(self.stamps[-2:]) if through else self.stamps[-1]
        self._keys, self._at = sorted(keys), _AFTER
        return frame

    def _seeks_well(self) -> bool:
        """Whether the container stores where key frames are and when each frame is shown."""
        return bool({"mp4", "matroska"} & set(self._container.format.name.split(",")))

    def at(self, stamp: int) -> Any:
        """The frame with a stamp out of `stamps`.

        Raises:
            VideoError: it cannot be decoded.
            HiddenFrameError: it never shows.
        """
        ahead = bisect_right(self._keys, stamp)
        far = bisect_right(self.stamps, stamp) - bisect_right(self.stamps, self._at) > _WORTH_A_SEEK
        if self._at >= stamp or (far and ahead and self._keys[ahead - 1] > self._at):
            self._go_to(stamp, self._keys[max(0, ahead - 3) : ahead])
        for reached, frame in self._frames:
            self._at = reached
            if reached == stamp:
                return frame
            if reached > stamp:
                break
        else:
            self._at = _AFTER
        seconds = float((stamp - self.stamps[0]) * self.time_base)
        if self._broken:
            raise VideoError(
                f"{self.path} is damaged: the frame at {seconds:.2f} s cannot be decoded; copy the file again, or read "
                "other parts of it"
            )
        if self._keys:
            # Seeks may be at fault.
            self._keys = ()
            self._start_over()
            return self.at(stamp)
        raise HiddenFrameError(
            f"{self.path} lists a frame at {seconds:.2f} s that it never shows: convert it to H.264 in mp4"
        )

    def passing(self, packets: Iterable[Any] | None = None) -> Iterator[tuple[int, Any]]:
        """(stamp, frame) of every frame, once and in order; `end` is known when they are through."""
        tail: list[int] = []
        for stamp, frame in self._frames if packets is None else self._decoded(packets):
            tail = [*tail[-1:], stamp]
            yield stamp, frame
        self.end = self._end_of(tail)

    def rgb(self, frame: Any) -> np.ndarray:
        """uint8 [H, W, 3], upright. A frame whose size differs from the first one's is scaled to it."""
        check_size(self.path, frame.width, frame.height)
        if self._stored_size is None:
            self._stored_size = frame.width, frame.height
        return to_rgb(self._converter, frame, *self._stored_size)

    def _go_to(self, stamp: int, keys: Sequence[int]) -> None:
        """Read on from a key frame at or before `stamp`, out of `keys`, or from the start."""
        for key in reversed(keys):
            try:
                self._container.seek(key, stream=self._stream)
            except self._av.FFmpegError:
                break
            packets = self._packets()
            landed = next((packet for packet in packets if packet.is_keyframe), None)
            # Without an index in the file a seek may land behind, and in MPEG-PS times are off after it. Frames between
            # the key frame and `stamp` are passed over: one shown before the key frame may build on what was skipped.
            if landed is not None and landed.pts is not None and landed.pts <= stamp and self._is_key(landed.pts):
                self._read_from(chain([landed], packets))
                return
        self._start_over()

    def _is_key(self, stamp: int) -> bool:
        after = bisect_right(self._keys, stamp)
        return after > 0 and self._keys[after - 1] == stamp

    def _start_over(self) -> None:
        self.close()
        self._open()

    def _read_from(self, packets: Iterable[Any]) -> None:
        self._at, self._broken = _BEFORE, False
        self._frames = self._decoded(packets)

    def _packets(self, seen: list[tuple[int | None, bool, bool]] | None = None) -> Iterator[Any]:
        """Packets to the end of the file, noted in `seen` as (pts, is a key frame, is to be hidden)."""
        self._latest = (_BEFORE, 0)
        for packet in self._whole_packets():
            if self._counted is None:
                # AVI knows one time per packet. If presentation times differ from it, they were made up.
                made_up = self._container.format.name == "avi" and packet.pts != packet.dts
                self._counted = packet.pts is None or made_up
            if not self._stream.codec_context.is_open:
                # Decoding frames side by side disturbs the times that counting relies on.
                self._stream.thread_type = "SLICE" if self._counted else self._threads
            self._latest = max(self._latest, (_BEFORE if packet.pts is None else packet.pts, packet.duration or 0))
            if seen is not None:
                seen.append((packet.pts, packet.is_keyframe, packet.is_discard))
            yield packet

    def _whole_packets(self) -> Iterator[Any]:
        """Without the last one if it was cut short, which would decode to half a picture, and without empty ones."""
        packets = self._container.demux(self._stream)
        suspect = None
        while True:
            try:
                packet = next(packets, None)
            except self._av.FFmpegError:
                packet, self._broken = None, True
            if packet is None:
                return
            if not packet.size:
                continue  # it would tell the decoder that this is the end
            if suspect is not None:
                yield suspect
            suspect = packet if packet.is_corrupt else None
            if suspect is None:
                yield packet

    def _decoded(self, packets: Iterable[Any]) -> Generator[tuple[int, Any], None, None]:
        """(stamp, frame) with increasing stamps."""
        last = None
        for packet in chain(packets, [None]):
            try:
                frames = self._stream.decode(packet)
            except self._av.FFmpegError:
                self._broken = True
                continue
            for frame in frames:
                stamp = frame.dts if self._counted else frame.pts
                if stamp is None or (self._counted and last is not None and stamp <= last):
                    stamp = 0 if last is None else last + self._usual_gap()
                if last is None or stamp > last:
                    last = stamp
                    yield stamp, frame

    def _end_of(self, tail: Sequence[int]) -> int:
        """Where the frame with the last of these stamps ends: by its packet, else as long as the frame before."""
        if not tail:
            return 0
        pts, duration = self._latest
        if duration > 0 and pts == tail[-1]:
            return tail[-1] + duration
        return tail[-1] + (tail[-1] - tail[-2] if len(tail) > 1 else self._usual_gap())

    def _usual_gap(self) -> int:
        rate = self._stream.average_rate
        return self._latest[1] or (max(1, round(1 / (rate * self.time_base))) if rate else 1)
