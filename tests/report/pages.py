"""A report with every kind of block, and with text that would break a page that does not escape it."""

import numpy as np

from modicum.report.html import Report, Token, strip

HOSTILE = "</style><script>alert('&amp;')</script><img src=x onerror=y> \"quoted\" `code <b>`"


def clip(frames: int = 7, height: int = 5, width: int = 9) -> np.ndarray:
    """A frame's first number is its place in time."""
    pixels = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3)).astype(np.uint8)
    pixels[:, 0, 0, 0] = np.arange(frames)
    return pixels


def full_report() -> Report:
    report = Report(f"A title {HOSTILE}", f"A lead {HOSTILE}")
    first = report.section("Watch & read")
    first.figure("2.5×", f"as fast {HOSTILE}")
    first.text(f"A paragraph. {HOSTILE}")
    first.text("What is missing.", quiet=True)
    first.table(
        ("model", "words", "numbers"), [("a", HOSTILE, 3), ("b", "c", 1234)], f"A table {HOSTILE}", words=(0, 1)
    )
    first.bars([("plain", 5.0, "5.0 ms"), (HOSTILE, 2.0, "2.0 ms")], f"Bars {HOSTILE}")
    first.plot(lambda axis: axis.plot([1, 2, 3], [1, 4, 9], label="squares"), f"A curve {HOSTILE}", "A plot")
    tokens = [Token("two ", "draft"), Token("red ", "target"), Token(HOSTILE, "plain")]
    first.strips([strip(clip(), f"Frames {HOSTILE}", [("shown", HOSTILE), ("written", tokens)])])
    second = report.section(f"Write {HOSTILE}")
    code = [Token("def f():\n    ", "prompt"), Token("return", "draft"), Token("\n\n  " + "x" * 300, "target")]
    second.tokens(code, "Code", code=True)
    second.tokens([Token("words ", "plain"), Token("", "draft")], "Words")
    second.strips([strip(clip(3), "Frames", [("shown", "nothing")]), strip(clip(19), "Frames", [], most=16)], wide=True)
    report.command(f"modicum {'x' * 200} {HOSTILE}", f"A command {HOSTILE}")
    report.fact("Machine", HOSTILE)
    return report
