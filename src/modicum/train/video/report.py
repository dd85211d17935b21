"""What is written and printed of a judged classifier: a table of its classes, and what it takes for what."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from modicum.errors import MissingExtraError
from modicum.report.figures import confusion_figure
from modicum.train.loop import console
from modicum.train.video.judge import VideoFigures
from modicum.video.datasets import VideoDataset

PRINTED = 30  # classes; of more, the worst


def write_report(
    folder: Path, figures: VideoFigures, dataset: VideoDataset, groups: Mapping[str, Sequence[str]]
) -> None:
    """`classes.csv`, every class with its accuracy, and `confusion.png`, one for each head."""
    with (folder / "classes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["head", "label", "group", "videos", "correct", "top1", "most_often_taken_for"])
        for head in figures.counts:
            writer.writerows([head, *row] for row in class_rows(figures, head, dataset, groups))
    for head, counts_VV in figures.counts.items():
        path = folder / f"confusion{f'-{head}' if head else ''}.png"
        try:
            confusion_figure(counts_VV.numpy(), dataset.labels_of(head), path, f"{head or 'classes'}, held out")
        except MissingExtraError as error:
            console.print(f"no {path.name}: {error}", soft_wrap=True)
            return


def class_rows(
    figures: VideoFigures, head: str, dataset: VideoDataset, groups: Mapping[str, Sequence[str]]
) -> list[tuple[str, str, int, int, str, str]]:
    """Per class its label, group, videos, how many are recognised, their share, and the commonest mistake."""
    labels, counts_VV = dataset.labels_of(head), figures.counts[head]
    rows = []
    for number, label in enumerate(labels):
        row_V = counts_VV[number].clone()
        n, correct = int(row_V.sum()), int(row_V[number])
        row_V[number] = 0
        mistake = labels[int(row_V.argmax())] if int(row_V.max()) else ""
        group = next((name for name, members in groups.items() if label in members), "")
        rows.append((label, group, n, correct, f"{correct / n:.4f}" if n else "", mistake))
    return rows


def group_means(figures: VideoFigures, dataset: VideoDataset, groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """The mean accuracy of the classes of each group, by its name."""
    shares = dict(zip(dataset.labels_of(), figures.per_class().tolist(), strict=True)) if groups else {}
    means = {}
    for name, members in groups.items():
        known = [shares[label] for label in members if label in shares and not math.isnan(shares[label])]
        if known:
            means[name] = sum(known) / len(known)
    return means


def print_classes(figures: VideoFigures, dataset: VideoDataset, groups: Mapping[str, Sequence[str]]) -> None:
    """A table of the classes, of many only the worst, and the means of groups."""
    for head in figures.counts:
        rows = [row for row in class_rows(figures, head, dataset, groups) if row[2]]
        if len(rows) > PRINTED:
            rows = sorted(rows, key=lambda row: float(row[4]))[:PRINTED]
            console.print(f"the {PRINTED} classes recognised least; all are in classes.csv:")
        table = Table("class", *(["group"] if groups else []), "videos", "top-1", "most often taken for")
        for label, group, n, _, share, mistake in rows:
            table.add_row(label, *([group] if groups else []), str(n), f"{float(share):.1%}", mistake)
        console.print(table)
    for name, mean in group_means(figures, dataset, groups).items():
        console.print(f"{name} classes: {mean:.1%}")
