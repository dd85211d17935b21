"""Pictures inside a page: PNG from pixels, SVG from matplotlib, and both as data URIs."""

import base64
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

from modicum.report.figures import load_pyplot

# Inches, of 96 pixels: a page's column on a desk, and on a telephone, so that letters are as large as the text's on both.
WIDE, NARROW = (7.4, 3.7), (3.7, 3.1)
# Two papers, and lines that differ by more than their colour on either.
INK = {
    False: {"ink": "#22252b", "quiet": "#5c626d", "grid": "#dcd8cf"},
    True: {"ink": "#e9e6df", "quiet": "#a3a8b2", "grid": "#383c44"},
}
LINES = {
    False: ["#0b6e62", "#9a5b00", "#5a4fcf", "#b3346b"],
    True: ["#5cc8b6", "#e3a94a", "#a79ff5", "#f08bb4"],
}
MARKS, STROKES = ["o", "s", "^", "D"], ["-", "--", "-.", ":"]


def png(pixels: Any) -> bytes:
    """A PNG of uint8 [height, width, 3], RGB."""
    height, width, channels = pixels.shape
    if channels != 3 or str(pixels.dtype).removeprefix("torch.") != "uint8":
        raise ValueError(f"a picture is uint8 [height, width, 3]: {pixels.dtype} {tuple(pixels.shape)} was given")
    # Every row begins with its filter, here 0, none.
    rows = b"".join(b"\0" + bytes(row) for row in pixels.reshape(height, width * 3).tolist())
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def svg(draw: Callable[[Any], None], *, dark: bool, narrow: bool) -> bytes:
    """What `draw` puts on an axis, as an SVG without a background, for light paper or dark, a desk or a telephone.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    file = io.BytesIO()
    with pyplot.rc_context(theme(pyplot, dark)):
        figure, axis = pyplot.subplots(figsize=NARROW if narrow else WIDE, layout="constrained")
        draw(axis)
        # No date, so that the same figures make the same file.
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return file.getvalue()


def theme(pyplot: Any, dark: bool) -> dict[str, Any]:
    ink = INK[dark]
    ways = {"color": LINES[dark], "marker": MARKS, "linestyle": STROKES}
    return {
        "axes.prop_cycle": pyplot.cycler(**ways),
        "axes.edgecolor": ink["quiet"],
        "axes.labelcolor": ink["ink"],
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": ink["grid"],
        "grid.linewidth": 0.7,
        "text.color": ink["ink"],
        "xtick.color": ink["quiet"],
        "ytick.color": ink["quiet"],
        "xtick.labelcolor": ink["ink"],
        "ytick.labelcolor": ink["ink"],
        "font.size": 11,
        "lines.linewidth": 2,
        "lines.markersize": 6,
        "legend.frameon": False,
        "legend.fontsize": 10,
        "svg.hashsalt": "modicum",
    }


def data_uri(content: bytes, kind: str) -> str:
    """`kind`: png | svg+xml."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
