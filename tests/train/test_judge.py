"""Judging a video classifier: hand-counted hits, pairs of two heads, shares of processes, broken videos."""

import csv

import pytest
import torch

from modicum.classification.predict import Protocol
from modicum.errors import UsageError
from modicum.parallel.data import Processes, buckets, shares
from modicum.train.video.judge import Judge, _Tally, hits, measures_of
from modicum.train.video.report import class_rows, group_means, write_report
from modicum.video.datasets import VideoDataset, VideoSample
from modicum.vivit.initialization import resize
from tests.classification.small import small
from tests.video.clips import write_video


def test_hits_are_among_the_best_one_and_five():
    scores_BV = torch.tensor([[7.0, 6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6, 7], [1, 9, 8, 7, 6, 5, 2]])
    assert hits(scores_BV, torch.tensor([0, 1, 0])).tolist() == [1, 1]
    assert hits(scores_BV, torch.tensor([4, 2, 5])).tolist() == [0, 3]
    # Of fewer classes than five every one is among them.
    assert hits(torch.tensor([[1.0, 2]]), torch.tensor([0])).tolist() == [0, 1]


def test_an_action_is_the_pair_with_the_best_product():
    """Noun right twice, verb right twice, both once; the second best pair takes the likelier of the two second choices."""
    tally = _Tally({"noun": 3, "verb": 2})
    noun_BV = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.5, 0.4, 0.1]], dtype=torch.float64).log()
    verb_BV = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]], dtype=torch.float64).log()
    tally.add({"noun": noun_BV, "verb": verb_BV}, torch.tensor([[0, 0], [1, 1], [2, 1]]))
    figures = tally.figures(Processes(), {})
    assert {head: found[1] for head, found in figures.hits.items()} == {"noun": 2, "verb": 2, "action": 1}
    # (2, 1) has 0.07, behind 0.35, 0.28, 0.15 and 0.12: the fifth of six.
    assert figures.hits["action"][5] == 3
    assert figures.counts["noun"].tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0]]
    expected = -sum(map(torch.log, torch.tensor([0.7, 0.9, 0.8, 0.4, 0.1, 0.7]))) / 6
    assert figures.loss == pytest.approx(expected.item(), abs=1e-6)
    assert measures_of(["noun", "verb"])[3:] == (
        "verb_top1",
        "verb_top5",
        "action_top1",
        "action_top5",
    )
    assert "action top-1 33.3%, top-5 100.0%" in figures.words()


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """11 videos of 23 frames, of which two are broken."""
    folder = tmp_path_factory.mktemp("held_out")
    paths = [write_video(folder / f"{i}.mp4", [(17 * i + j) % 256 for j in range(23)]) for i in range(11)]
    for broken in (2, 7):
        paths[broken].write_bytes(paths[broken].read_bytes()[:99])
    samples = [VideoSample(path, (i % 5,), str(i)) for i, path in enumerate(paths)]
    return VideoDataset("small", samples, {"": 5}, list("abcde"))


def judge_of(dataset, model, **settings):
    fixed = {"workers": 0, "batch": 3, "processes": Processes()}
    return Judge(dataset, model.config, Protocol(views=(2, 3), stride=2), **{**fixed, **settings})


def test_judging_is_what_classify_does(held_out):
    """Whatever the batch; broken videos count nowhere, and are named."""
    from modicum.classification.predict import logits_of, read_views

    model = small()
    expected = {}
    for index, sample in enumerate(held_out.samples):
        if index not in (2, 7):
            logits_V = logits_of(model, read_views(sample.path, model.config, Protocol(views=(2, 3), stride=2)), 4)[""]
            expected[index] = int(logits_V.argmax())
    for batch in (1, 7, 64):
        figures = judge_of(held_out, model, batch=batch)(model.train(), bf16=False)
        assert model.training
        assert figures.n == 9
        assert figures.hits[""][1] == sum(found == index % 5 for index, found in expected.items())
        counts = torch.zeros(5, 5, dtype=torch.int64)
        for index, found in expected.items():
            counts[index % 5, found] += 1
        assert torch.equal(figures.counts[""], counts)
        assert sorted(path.rsplit("/", 1)[1] for path in figures.broken) == ["2.mp4", "7.mp4"]


def test_parts_of_a_broken_file_are_counted_apart(held_out):
    whole, broken = held_out.samples[0].path, held_out.samples[2].path
    samples = [VideoSample(broken, (0,), id, start=start, end=start + 0.2) for id, start in (("a", 0.1), ("b", 0.5))]
    model = small()
    figures = judge_of(VideoDataset("parts", [VideoSample(whole, (1,)), *samples], {"": 5}), model)(model, bf16=False)
    assert figures.n == 1
    assert list(figures.broken) == [f"{broken} (a)", f"{broken} (b)"]


def test_shuffled_frames_are_judged_by_the_key_alone(held_out):
    model = small()
    losses = [judge_of(held_out, model, shuffle=key)(model, bf16=False).loss for key in (None, (3,), (3,), (4,))]
    assert losses[1] == losses[2]
    assert len(set(losses)) == 3


def test_videos_that_cannot_be_read_are_refused_when_there_are_no_others(held_out):
    broken = VideoDataset("bad", [held_out.samples[2]], {"": 5}, list("abcde"))
    with pytest.raises(UsageError, match="none of the 1 held-out videos can be read; the first: "):
        judge_of(broken, model := small())(model, bf16=False)


def test_a_larger_model_is_judged_at_its_size(held_out):
    model = resize(small(), image_size=64)
    assert judge_of(held_out, model)(model, bf16=False).n == 9


def test_the_report_names_mistakes_and_groups(held_out, tmp_path):
    tally = _Tally(held_out.heads)
    scores_BV = torch.eye(5, dtype=torch.float64)[[0, 0, 2, 3, 3]]
    tally.add({"": scores_BV}, torch.tensor([[0], [0], [2], [1], [3]]))
    figures, groups = tally.figures(Processes(), {}), {"first": ["a", "b"], "other": ["c", "e"]}
    assert class_rows(figures, "", held_out, groups)[1] == ("b", "first", 1, 0, "0.0000", "d")
    # Class e is shown by nothing and counts in no mean.
    assert group_means(figures, held_out, groups) == {"first": 0.5, "other": 1.0}
    write_report(tmp_path, figures, held_out, groups)
    with (tmp_path / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["top1"] for row in rows] == ["1.0000", "0.0000", "1.0000", "1.0000", ""]
    assert (tmp_path / "confusion.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_shares_and_buckets_leave_nothing_out(monkeypatch):
    parts = [shares(range(11), Processes(rank, 3)) for rank in range(3)]
    assert sorted(index for part in parts for index in part) == list(range(11))
    assert [len(part) for part in parts] == [4, 4, 3]
    monkeypatch.setattr("modicum.parallel.data.BUCKET", 10)
    tensors = [torch.zeros(n) for n in (7, 5, 3, 20, 1)] + [torch.zeros(2, dtype=torch.float64)]
    groups = list(buckets(tensors))
    assert [[t.numel() for t in group] for group in groups] == [[7, 5], [3, 20], [1], [2]]
