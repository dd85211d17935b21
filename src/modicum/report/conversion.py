"""What sharing keys and values would lose, drawn: a heat map per quantity, layers by numbers of key-value heads."""

from pathlib import Path
from typing import Any

from modicum.report.figures import load_pyplot, write_png

QUANTITIES = ("keys", "values", "outputs")


def conversion_heat_map(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """From rows of `gqa.report`. Writes a PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    drawn = [name for name in QUANTITIES if rows[0][name] is not None]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    counts = sorted({row["kv_heads"] for row in rows}, reverse=True)
    size = (1.6 + (1.2 + 0.6 * len(counts)) * len(drawn), 1.8 + 0.3 * len(layers))
    figure, axes = pyplot.subplots(1, len(drawn), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axis, name in zip(axes[0], drawn, strict=True):
        share = {(row["layer"], row["kv_heads"]): row[name] for row in rows}
        table = [[share.get((layer, count), float("nan")) for count in counts] for layer in layers]
        image = axis.imshow(table, vmin=0, vmax=1, cmap="magma_r", aspect="auto")
        for y, line in enumerate(table):
            for x, value in enumerate(line):
                if value == value:
                    axis.text(x, y, f"{value:.0%}", ha="center", va="center", color="white" if value > 0.5 else "black")
        axis.set_xticks(range(len(counts)), [str(count) for count in counts])
        axis.set_xlabel("key-value heads")
        axis.set_title(f"{name} lost")
    axes[0][0].set_yticks(range(len(layers)), layers)
    figure.colorbar(image, ax=axes[0].tolist(), label="share of the energy", fraction=0.05)
    figure.suptitle(title)
    write_png(figure, path)
