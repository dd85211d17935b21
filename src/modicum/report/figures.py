"""Plots of measured results."""

import os
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

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    figure, (time, share, loop) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
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
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=120, format="png")
    os.replace(partial, path)
    pyplot.close(figure)
