"""Plots of measured results."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modicum.errors import MissingExtraError


def load_pyplot() -> Any:
    """matplotlib's pyplot, drawing into files.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingExtraError("matplotlib", "plot", "the figure") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def speculation_figure(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Figure 1 of 2302.01318 from measured rows, one per K: time, efficiency and acceptance, time per loop. Writes a PNG.

    A row whose K is "auto" was measured with K chosen anew for every loop, and is a line across.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    figure, (time, share, loop) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    chosen, rows = [r for r in rows if r["k"] == "auto"], [r for r in rows if r["k"] != "auto"]
    for row in chosen:
        time.axhline(row["seconds_mean"], linestyle="--", color="C1", label=f"auto, {row['mean_k']:.1f} on average")
        time.legend()
    ks = [row["k"] for row in rows]
    drafted = [row for row in rows if row["k"]]
    time.errorbar(ks, [r["seconds_mean"] for r in rows], [r["seconds_sd"] for r in rows], marker="o", capsize=3)
    time.set_ylabel(f"seconds for {rows[0]['tokens']} tokens, with standard deviation")
    for key, label in (("efficiency", "tokens per loop / (K + 1)"), ("acceptance_rate", "accepted / judged")):
        share.plot([r["k"] for r in drafted], [r[key] for r in drafted], marker="o", label=label)
    share.set_ylim(0, 1.02)
    share.legend()
    loop.plot(ks, [r["ms_per_loop"] for r in rows], marker="o")
    loop.set_ylabel("milliseconds per loop")
    loop.set_ylim(bottom=0)
    for axis in (time, share, loop):
        axis.set_xlabel("drafted tokens K")
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    write_png(figure, path)


def frames_sheet(
    views: Any, title: str, path: Path, *, crops: int = 1, most: int = 8, captions: Sequence[str] | None = None
) -> None:
    """The frames that each view of a video saw, a row per view. Writes a PNG.

    Args:
        views: uint8 [views, frames, height, width, 3]; the crops of one moment follow each other.
        most: frames drawn of each view, evenly spread.
        captions: a line over each row instead of the numbers of views and frames.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    n_views, n_frames, height, width = views.shape[:4]
    columns = min(most, n_frames)
    heading = 0.25 if captions else 0
    size = (1.5 * columns + 0.6, (1.5 * height / width + heading) * n_views + (0 if captions else 0.8))
    figure, axes = pyplot.subplots(n_views, columns, figsize=size, layout="constrained", squeeze=False)
    for row in range(n_views):
        for column in range(columns):
            at = round(column * (n_frames - 1) / max(1, columns - 1))
            axis = axes[row][column]
            axis.imshow(views[row, at].numpy())
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0 and captions is None:
                axis.set_title(f"frame {at + 1}", fontsize=8)
        name = f"view {row // crops + 1}" + (f", crop {row % crops + 1}" if crops > 1 else "")
        if captions is None:
            axes[row][0].set_ylabel(name, fontsize=8)
        else:
            # A blank title keeps the height free. The line itself runs over all columns, of which the layout knows nothing,
            # and dollar signs are dollar signs.
            axes[row][0].set_title(" ", fontsize=9)
            line = axes[row][0].text(
                0, 1.04, fitted(captions[row], columns), transform=axes[row][0].transAxes, fontsize=9, parse_math=False
            )
            line.set_in_layout(False)
    if title:
        figure.suptitle(title)
    write_png(figure, path)


def confusion_figure(counts: Any, labels: list[str], path: Path, title: str) -> None:
    """What is taken for what: a row per true class, a column per named one, shares of each row. Writes a PNG.

    Args:
        counts: integers [V, V], of a row's class named as a column's. Up to 40 classes are written out, with the shares
            of up to 20; of more only the colours can be told apart.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    V = len(labels)
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    side = min(16.0, 3.5 + 0.35 * V)
    figure, axis = pyplot.subplots(figsize=(side + 1, side), layout="constrained")
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if V <= 40:
        axis.set_xticks(range(V), labels, rotation=60, ha="right", fontsize=8)
        axis.set_yticks(range(V), labels, fontsize=8)
    if V <= 20:
        for row, column in zip(*shares.nonzero(), strict=True):
            share = shares[row, column]
            colour = "white" if share > 0.6 else "black"
            axis.text(column, row, f"{share:.0%}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xlabel("named")
    axis.set_ylabel("true")
    figure.colorbar(image, label="share of a class's videos", shrink=0.8)
    figure.suptitle(title)
    write_png(figure, path)


def fitted(text: str, columns: int) -> str:
    """A text that fits over so many pictures, without characters that no font draws."""
    drawable = "".join(character if character.isprintable() else " " for character in text)
    return textwrap.shorten(drawable, width=21 * columns, placeholder=" …")


def write_png(figure: Any, path: Path) -> None:
    """Write and close a figure; the file appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=120, format="png")
    os.replace(partial, path)
    load_pyplot().close(figure)
