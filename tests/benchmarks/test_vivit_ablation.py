"""The ablations run at toy size, are gone on with, and call an order reproduced only where it shows."""

import json

import pytest
import torch

from benchmarks import vivit_ablation as bench
from modicum.vivit.initialization import init_from_image


def test_runs_and_goes_on(tmp_path, capsys):
    options = ["--scale", "toy", "--seeds", "2", "--workers", "1", "--cache", str(tmp_path / "cache")]
    results = tmp_path / "deep" / "results.jsonl"
    options += ["--results", str(results)]
    bench.main(["regularisers", *options])
    cells = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(cells) == 2 * 6
    assert {cell["spec"]["start"] for cell in cells} == {"image", "video"}
    assert all(0 <= share <= 1 for cell in cells for share in cell["accuracy"]["1"].values())
    capsys.readouterr()
    # One training of two seeds is taken away, as if the run had been stopped: it alone is measured again, to the digit.
    results.write_text("".join(json.dumps(cell) + "\n" for cell in cells[1:]))
    bench.main(["regularisers", *options])
    assert "1 of 12 to measure" in capsys.readouterr().err
    again = json.loads(results.read_text().splitlines()[-1])
    assert again | {"seconds": 0} == cells[0] | {"seconds": 0}
    bench.main(["table", "--scale", "toy", "--results", str(results)])
    lines = capsys.readouterr().out.splitlines()
    assert "| + mixup 0.1 | " in "\n".join(lines)
    assert sum(line.startswith("- + ") for line in lines) == 6
    assert not any("Table 1:" in line for line in lines)


def test_every_claim_is_about_rows_that_exist():
    for part in bench.PARTS.values():
        names = [row.name for row in part.rows]
        assert len(set(names)) == len(names)
        assert {name for claim in part.claims for name in (claim.better, claim.worse)} <= set(names)


def test_encodings_have_equal_tokens():
    scale = bench.SCALES["small"]
    rows = bench.PARTS["encodings"].rows
    assert {bench.build(row.spec, bench.CLIP_HEADS, scale, 0).config.grid for row in rows} == {(4, 4, 4)}


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        # Deviations 1 and 1: that of a difference is 1.41.
        ([50, 51, 52], [48, 49, 50], "+2.0 ± 1.4, reproduced"),
        ([50, 51, 52], [49, 50, 51], "+1.0 ± 1.4, flat"),
        ([48, 49, 50], [50, 51, 52], "-2.0 ± 1.4, reversed"),
        ([50, 50, 50], [50, 50, 50], "+0.0 ± 0.0, flat"),
        ([60], [50], "+10.0, one seed is no evidence"),
    ],
)
def test_verdicts(better, worse, expected):
    assert bench.verdict(better, worse) == expected


def test_figures():
    assert bench.figure([50.0, 51.0, 52.0]) == "51.0 ± 1.0"
    assert bench.figure([50.0]) == "50.0"
    assert bench.figure([]) == "-"


def test_the_image_model_is_what_others_begin_with(tmp_path):
    """Written as an image ViT and read again: the same function of a frame."""
    scale = bench.SCALES["toy"]
    model, other = (bench.build(bench.IMAGE, bench.IMAGE_HEADS, scale, seed).eval() for seed in (0, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    bench.write_image_vit(model, tmp_path / "image")
    init_from_image(other, tmp_path / "image")
    frame = torch.rand(2, 1, scale.crop, scale.crop, 3) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(other(frame, features=True).clip, model(frame, features=True).clip)


def test_accuracy_counts_what_is_right_in_both():
    """A model that always says noun 2 and verb 5."""
    scale = bench.SCALES["toy"]
    spec = bench.BASE
    model = bench.build(spec, bench.CLIP_HEADS, scale, 0).eval()
    with torch.no_grad():
        model.head.bias[[2, 6 + 5]] = 1
    videos = torch.zeros(5, 32, scale.side, scale.side, 3, dtype=torch.uint8).numpy()
    targets = torch.tensor([[2, 5], [2, 0], [1, 5], [2, 5], [0, 0]])
    for views in (1, 3):
        shares = bench.accuracy(model, spec, videos, targets, scale, views)
        assert shares == pytest.approx({"action": 0.4, "noun": 0.6, "verb": 0.6})
