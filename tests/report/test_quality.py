"""The panels of `modicum evaluate`: which are drawn, and that they hold the numbers they were given."""

import pytest

pyplot = pytest.importorskip("matplotlib.pyplot")

from modicum.report import quality  # noqa: E402
from modicum.report.quality import evaluation_figure  # noqa: E402


def row(kv_heads, nats, method=None, fraction=None, *, control=False, ms=(2.0, 3.0), query_heads=8):
    return {
        "model": f"{method}-{kv_heads}",
        "query_heads": query_heads,
        "kv_heads": kv_heads,
        "nats_per_token": nats,
        "ms_per_token": dict(zip((16, 400), ms, strict=True)),
        "method": method,
        "fraction": fraction,
        "control": control,
    }


ORIGINAL = row(8, 2.0, fraction=0.0, control=True, ms=(4.0, 9.0))
CONTROL = row(8, 1.75, fraction=0.05, control=True)
MEAN = [row(2, nats, "mean", fraction) for nats, fraction in ((4.0, 0.0), (2.5, 0.05), (2.25, 0.1))]
MERGED = row(2, 3.0, "merged", 0.0)
MQA = [row(1, nats, "mean", fraction) for nats, fraction in ((5.0, 0.0), (3.0, 0.05), (2.0, 0.05))]


@pytest.fixture
def axis():
    figure, axis = pyplot.subplots()
    yield axis
    pyplot.close(figure)


def lines(axis):
    """What is drawn: by label, the points."""
    return {line.get_label(): [tuple(map(float, xy)) for xy in line.get_xydata()] for line in axis.get_lines()}


def test_quality_against_time_at_the_longest_context(axis):
    quality.quality_panel(axis, [ORIGINAL, *MEAN])
    points = [tuple(map(float, points.get_offsets()[0])) for points in axis.collections]
    assert points == [(9.0, 2.0), (3.0, 4.0), (3.0, 2.5), (3.0, 2.25)]
    assert axis.get_xlabel() == "milliseconds per token after 400 tokens"
    assert [text.get_text() for text in axis.texts][1] == "mean-2 (8:2)"


def test_conversions_side_by_side(axis):
    first = row(2, 3.5, "first", 0.0)
    quality.conversion_panel(axis, [ORIGINAL, *MEAN, MERGED, CONTROL, first])
    drawn = lines(axis)
    assert [label.get_text() for label in axis.get_xticklabels()] == ["first", "mean", "merged"]
    assert drawn.pop("GQA-2, 0 % trained") == [(0, 3.5), (1, 4.0), (2, 3.0)]
    assert {y for _, y in drawn.pop("original")} == {2.0}
    # What was converted in one way alone is no comparison.
    assert drawn == {}


def test_training_afterwards(axis):
    quality.fraction_panel(axis, [*MEAN[::-1], ORIGINAL, *MQA, CONTROL])
    assert lines(axis) == {
        "GQA-2": [(0, 4.0), (5, 2.5), (10, 2.25)],
        # Two seeds are their mean.
        "MQA": [(0, 5.0), (5, 2.5)],
        "control": [(0, 2.0), (5, 1.75)],
    }
    # The control stands apart.
    assert [line.get_linestyle() for line in axis.get_lines()].count("--") == 1


def test_ways_to_convert_have_lines_of_their_own(axis):
    quality.fraction_panel(axis, [*MEAN, MERGED])
    assert lines(axis) == {"GQA-2, mean": [(0, 4.0), (5, 2.5), (10, 2.25)], "GQA-2, merged": [(0, 3.0)]}


def test_time_against_groups(axis):
    other = row(1, 9.0, ms=(1000.0, 1000.0), query_heads=4)
    quality.groups_panel(axis, [ORIGINAL, row(1, 3.0, ms=(1.0, 2.0)), row(1, 3.0, ms=(3.0, 4.0)), other])
    assert lines(axis) == {"after 16 tokens": [(1, 2.0), (8, 4.0)], "after 400 tokens": [(1, 3.0), (8, 9.0)]}


PLAIN = [row(8, 2.0), row(2, 3.0), row(1, 4.0)]


@pytest.mark.parametrize(
    ("rows", "panels"),
    [
        ([ORIGINAL], []),
        (PLAIN, ["groups"]),  # nothing is known of how they were made
        ([ORIGINAL, MEAN[0]], ["groups"]),
        ([MEAN[0], MERGED], ["conversion"]),
        ([MEAN[0], MEAN[1]], ["fraction"]),
        ([ORIGINAL, CONTROL], ["fraction"]),
        ([MEAN[1], MERGED], []),  # of different training: no comparison of conversions
        ([ORIGINAL, *MEAN, MERGED, *MQA], ["conversion", "fraction", "groups"]),
    ],
)
def test_only_panels_that_compare_are_drawn(rows, panels, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(quality, "write_png", lambda figure, path: drawn.extend(figure.axes))
    evaluation_figure(rows, tmp_path / "figure.png")
    labels = {
        "conversion": "",
        "fraction": "training after conversion, % of the original's",
        "groups": "key-value heads",
    }
    assert [axis.get_xlabel() for axis in drawn[1:]] == [labels[panel] for panel in panels]
    pyplot.close("all")


def test_a_png_is_written_whole(tmp_path):
    path = tmp_path / "figure.png"
    evaluation_figure([ORIGINAL, *MEAN, MERGED, *MQA], path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert list(tmp_path.iterdir()) == [path]
    assert not pyplot.get_fignums()
