"""What `modicum evaluate` measured, drawn as figures 3 to 6 of 2305.13245: each a panel, from a list of plain rows.

A row is one model:

    model            its name
    query_heads, kv_heads
    nats_per_token   on held-out text
    ms_per_token     {tokens of context: milliseconds of one step}
    method           how its key-value heads were made of more; None if they were not
    fraction         of the original's training that it was trained on for; None if unknown
    control          whether it is the original, or the original trained on for that fraction
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, median
from typing import Any

from modicum.report.figures import load_pyplot, write_png

Rows = list[dict[str, Any]]


def evaluation_figure(rows: Rows, path: Path) -> None:
    """Every panel that has something to compare, in one PNG; quality against time always.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    drawn = [quality_panel, *(panel for panel, drawable in CHOICES if drawable(rows))]
    columns = min(2, len(drawn))
    lines = -(-len(drawn) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(0.5 + 5.5 * columns, 4.5 * lines), layout="constrained", squeeze=False
    )
    for axis, panel in zip(axes.flat, drawn, strict=False):
        panel(axis, rows)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(drawn) :]:
        axis.remove()
    write_png(figure, path)


def quality_panel(axis: Any, rows: Rows) -> None:
    """Figure 3: loss against the time of a step at the longest context, a point per model."""
    context = max(rows[0]["ms_per_token"])
    for row in rows:
        x, y = row["ms_per_token"][context], row["nats_per_token"]
        axis.scatter([x], [y])
        label = f"{row['model']} ({row['query_heads']}:{row['kv_heads']})"
        axis.annotate(label, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axis.set_xlabel(f"milliseconds per token after {context:,} tokens")
    axis.set_ylabel("nats per token")
    axis.margins(0.2)


def conversion_panel(axis: Any, rows: Rows) -> None:
    """Figure 4: ways to convert side by side, a line per number of groups and amount of training afterwards."""
    lines = by_groups_and_training(rows)
    methods = sorted({row["method"] for line in lines.values() for row in line})
    for (kv_heads, fraction), line in lines.items():
        places, losses = means((methods.index(row["method"]), row["nats_per_token"]) for row in line)
        trained = "" if fraction is None else f", {100 * fraction:g} % trained"
        axis.plot(places, losses, marker="o", linestyle=":", label=f"{groups(kv_heads)}{trained}")
    for row in rows:
        if row["control"] and row["fraction"] == 0:
            axis.axhline(row["nats_per_token"], color="black", linestyle="--", label="original")
    axis.set_xticks(range(len(methods)), methods)
    axis.margins(0.2)
    axis.set_ylabel("nats per token")
    axis.legend(fontsize=8)


def fraction_panel(axis: Any, rows: Rows) -> None:
    """Figure 5: loss against the share of the original's training spent afterwards, a line per number of groups (and way
    to convert, where there are several), and the control."""
    several = len({row["method"] for row in rows if row["method"] is not None}) > 1
    for start, line in by_start(rows).items():
        shares, losses = means((100 * row["fraction"], row["nats_per_token"]) for row in line)
        if start is None:
            axis.plot(shares, losses, marker="o", color="black", linestyle="--", label="control")
        else:
            kv_heads, method = start
            axis.plot(shares, losses, marker="o", label=groups(kv_heads) + (f", {method}" if several else ""))
    axis.set_xlabel("training after conversion, % of the original's")
    axis.set_ylabel("nats per token")
    axis.legend(fontsize=8)


def groups_panel(axis: Any, rows: Rows) -> None:
    """Figure 6: time of a step against the number of key-value heads, a line per context; of models with as many query
    heads as the first."""
    alike = [row for row in rows if row["query_heads"] == rows[0]["query_heads"]]
    counts = sorted({row["kv_heads"] for row in alike})
    for context in sorted(rows[0]["ms_per_token"]):
        times = [median(row["ms_per_token"][context] for row in alike if row["kv_heads"] == count) for count in counts]
        axis.plot(counts, times, marker="o", label=f"after {context:,} tokens")
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_xlabel("key-value heads")
    axis.set_ylabel("milliseconds per token")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)


def by_groups_and_training(rows: Rows) -> dict[tuple[int, float | None], Rows]:
    """Models converted in two or more ways, by what they share otherwise."""
    result: dict[tuple[int, float | None], Rows] = {}
    for row in rows:
        if row["method"] is not None:
            result.setdefault((row["kv_heads"], row["fraction"]), []).append(row)
    return {key: line for key, line in result.items() if len({row["method"] for row in line}) > 1}


def by_start(rows: Rows) -> dict[tuple[int, str] | None, Rows]:
    """Models by what their training began with; None is the control."""
    result: dict[tuple[int, str] | None, Rows] = {}
    for row in rows:
        if row["fraction"] is not None and (row["control"] or row["method"] is not None):
            result.setdefault(None if row["control"] else (row["kv_heads"], row["method"]), []).append(row)
    return result


def compares_fractions(rows: Rows) -> bool:
    return any(len({row["fraction"] for row in line}) > 1 for line in by_start(rows).values())


def compares_groups(rows: Rows) -> bool:
    return len({row["kv_heads"] for row in rows if row["query_heads"] == rows[0]["query_heads"]}) > 1


CHOICES: list[tuple[Callable[[Any, Rows], None], Callable[[Rows], bool]]] = [
    (conversion_panel, lambda rows: bool(by_groups_and_training(rows))),
    (fraction_panel, compares_fractions),
    (groups_panel, compares_groups),
]


def means(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Points in the order of x, those of equal x, such as several seeds, as their mean."""
    found: dict[float, list[float]] = {}
    for x, y in points:
        found.setdefault(x, []).append(y)
    places = sorted(found)
    return places, [fmean(found[place]) for place in places]


def groups(kv_heads: int) -> str:
    return "MQA" if kv_heads == 1 else f"GQA-{kv_heads}"
