"""Batches of clips: what they hold, in what order, whoever decodes them, and what happens to broken files."""

import os
import re
import signal
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from modicum.errors import UsageError
from modicum.video.crops import resize
from modicum.video.datasets import VideoDataset, VideoSample
from modicum.video.loader import ClipLoader
from modicum.video.read import VideoError
from modicum.video.sampling import epoch_order, training_ticks
from tests.video.clips import number_of, numbers_of, write_video

SIZE = (36, 48)  # a quarter less than the pictures, which keep their proportions


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """13 videos; video i shows the numbers 19 i ... 19 i + 18 (mod 256)."""
    folder = tmp_path_factory.mktemp("videos")
    return [write_video(folder / f"{i}.mp4", [(19 * i + j) % 256 for j in range(19)]) for i in range(13)]


def dataset_of(paths, name="test"):
    samples = [VideoSample(path, (i, 2 * i), str(i), (f"{i} a", f"{i} b", f"{i} c")) for i, path in enumerate(paths)]
    return VideoDataset(name, samples, {"noun": len(paths), "verb": 2 * len(paths)})


def loader_of(paths, **settings):
    fixed = {
        "num_frames": 3,
        "stride": 2,
        "fps": 25,
        "size": SIZE,
        "short_side": 36,
        "batch": 4,
        "seed": 5,
        "workers": 0,
    }
    return ClipLoader(dataset_of(paths), **{**fixed, **settings})


def taken(loader, start, n):
    batches = loader.iterate(start)
    try:
        return list(islice(batches, n))
    finally:
        batches.close()


def same(one, other):
    return (
        one.number == other.number
        and torch.equal(one.video, other.video)
        and torch.equal(one.targets, other.targets)
        and one.samples == other.samples
        and one.captions == other.captions
        and one.broken == other.broken
    )


def marked(clip, key):
    """An augmentation that shows its key and its draw."""
    clip = resize(clip, *SIZE).clone()
    clip[0, 0, :3, 0] = torch.tensor(key)
    clip[:, 1, 0] = int(np.random.default_rng(list(key)).integers(256))
    return clip


def test_a_batch_holds_what_the_order_says(videos):
    loader = loader_of(videos)
    assert loader.batches_per_epoch == 3
    order = epoch_order(13, 5, 1)
    clips = taken(loader, 3 + 2, 1)[0]
    assert clips.number == 5
    assert clips.indices == order[8:12].tolist()
    assert [int(sample.id) for sample in clips.samples] == clips.indices
    assert clips.targets.tolist() == [[i, 2 * i] for i in clips.indices]
    assert clips.targets.dtype == torch.int64
    assert clips.video.shape == (4, 3, *SIZE, 3)
    assert clips.video.dtype == torch.uint8
    for clip, index in zip(clips.video, clips.indices, strict=True):
        first, *rest = [(number - 19 * index) % 256 for number in numbers_of(clip)]
        assert rest == [first + 2, first + 4]
        assert [first, *rest] == training_ticks(19, 3, 2, (5, 1, index))


def test_every_epoch_sees_each_video_at_most_once_and_drops_others(videos):
    loader = loader_of(videos)
    epochs = [[i for clips in taken(loader, 3 * e, 3) for i in clips.indices] for e in range(4)]
    assert all(len(set(epoch)) == 12 for epoch in epochs)
    left_out = {*range(13)} - {*epochs[0]}
    assert any({*range(13)} - {*epoch} != left_out for epoch in epochs), "the same video would never be seen"
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_starts_are_drawn_evenly_and_what_is_short_starts_again():
    starts = [training_ticks(11, 4, 2, (0, epoch, 3))[0] for epoch in range(1500)]
    counts = np.bincount(starts)
    assert len(counts) == 5, "11 - 3 * 2"
    assert counts.min() > 300 - 6 * 16, "six standard deviations"
    assert training_ticks(7, 4, 2, (0, 0, 0)) == [0, 2, 4, 6]
    assert training_ticks(5, 4, 2, (0, 0, 0)) == [0, 2, 4, 1]
    assert training_ticks(1, 3, 2, (0, 0, 0)) == [0, 0, 0]


def unchanged(clip, key):
    return clip


def test_augmentation_gets_its_key_and_the_clip(videos):
    seen = []
    loader = loader_of(videos, augment=lambda clip, key: (seen.append((tuple(clip.shape), key)), clip[:, :36, :48])[1])
    order = epoch_order(13, 5, 0)
    taken(loader, 1, 1)
    assert seen == [((3, 48, 64, 3), (5, 0, int(i))) for i in order[4:8]]
    for workers in (0, 1):
        with pytest.raises(
            UsageError, match=r"^`augment` gave torch.uint8 \[3, 48, 64, 3\]: it has to give uint8 \[3, 36, 48, 3\]$"
        ):
            taken(loader_of(videos, augment=unchanged, workers=workers), 0, 1)


def test_large_videos_are_scaled_down_before_they_are_augmented(videos):
    shapes = []
    loader = loader_of(
        videos,
        size=(18, 24),
        short_side=21,
        augment=lambda clip, key: (shapes.append(clip.shape), clip[:, :18, :24])[1],
    )
    plain = taken(loader_of(videos, size=(18, 24), short_side=21), 0, 1)[0]
    assert plain.video.shape == (4, 3, 18, 24, 3)
    taken(loader, 0, 1)
    assert shapes == [(3, 21, 28, 3)] * 4, "48 rows are more than twice 21"


def test_one_caption_is_drawn_for_an_epoch(videos):
    loader = loader_of(videos)
    drawn = {i: set() for i in range(13)}
    for clips in taken(loader, 0, 3 * 12):
        for index, caption in zip(clips.indices, clips.captions, strict=True):
            drawn[index].add(caption)
    assert all(drawn[i] <= {f"{i} a", f"{i} b", f"{i} c"} for i in drawn)
    assert sum(map(len, drawn.values())) > 30


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_and_resuming_change_nothing(videos, workers):
    settings = {"augment": marked, "batch": 3}
    whole = taken(loader_of(videos, **settings), 0, 11)
    beside = loader_of(videos, workers=workers, **settings)
    before = torch.random.get_rng_state()
    assert all(map(same, taken(beside, 6, 5), whole[6:]))
    assert torch.equal(torch.random.get_rng_state(), before), "the model's random numbers are its own"
    assert beside.waited_seconds > 0
    assert not all(map(same, taken(loader_of(videos, **settings | {"seed": 6}), 6, 5), whole[6:]))


def test_processes_share_the_batch_that_one_would_see(videos):
    whole = taken(loader_of(videos, batch=6), 1, 3)
    shares = [taken(loader_of(videos, batch=6, rank=rank, world=3), 1, 3) for rank in range(3)]
    for one, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(one.video, torch.cat([part.video for part in parts]))
        assert torch.equal(one.targets, torch.cat([part.targets for part in parts]))
        assert one.indices == [i for part in parts for i in part.indices]
    parts = [taken(loader_of(videos, batch=6, rank=rank, world=3, parts=2), 2, 6) for rank in range(3)]
    assert [clips.number for clips in parts[0]] == [2, 3, 4, 5, 6, 7]
    for i, one in enumerate(whole):
        shared = [rank[2 * i + part] for part in range(2) for rank in parts]
        assert torch.equal(one.video, torch.cat([clips.video for clips in shared]))
    with pytest.raises(UsageError, match="of 4 cannot be shared by 3 processes in 2 parts: give a multiple of 6"):
        loader_of(videos, world=3, parts=2)
    with pytest.raises(UsageError, match="rank=2: of 2 processes the ranks are 0 to 1"):
        loader_of(videos, rank=2, world=2)


def with_broken(videos, tmp_path, broken):
    paths = list(videos)
    for i in broken:
        paths[i] = tmp_path / f"broken {i}.mp4"
        paths[i].write_bytes(videos[i].read_bytes()[: 300 + i])
    return paths


@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_in_order_stands_in_for_a_broken_video(videos, tmp_path, workers):
    order = epoch_order(13, 5, 0).tolist()
    broken = [order[1], order[2], order[3]]  # the last of a batch, so that others' places are looked at too
    loader = loader_of(with_broken(videos, tmp_path, broken), workers=workers, augment=marked)
    first, second, third = taken(loader, 0, 3)
    assert first.indices == [order[0], order[4], order[4], order[4]]
    assert [set(clips.broken) for clips in (first, second, third)] == [set(broken), set(), set()]
    keys = first.video[:, 0, 0, :3, 0].tolist()
    assert keys == [[5, 0, order[i]] for i in range(4)], "a stand-in's draws are those of the place"
    assert {int(re.search(r"broken (\d+)", path)[1]) for path in loader.broken} == set(broken)
    report = loader.report().splitlines()
    assert report[0] == "3 of 12 videos could not be read; others stood in:", "one sits the epoch out"
    assert len(report) == 4
    assert "is not a video, or is damaged or incomplete" in report[1]
    # A rank whose share ends before the stand-in looks beyond its own part.
    halves = [
        taken(loader_of(with_broken(videos, tmp_path, broken), rank=r, world=2, augment=marked), 0, 3) for r in (0, 1)
    ]
    for number, one in enumerate([first, second, third]):
        assert torch.equal(one.video, torch.cat([half[number].video for half in halves]))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_with_one_broken_file_in_twenty_goes_through_and_says_so(videos, tmp_path, workers):
    paths = [tmp_path / f"{i}.mp4" for i in range(40)]
    for i, path in enumerate(paths):
        content = videos[i % 13].read_bytes()
        path.write_bytes(content[:200] if i in (7, 31) else content)
    loader = loader_of(paths, workers=workers)
    batches = taken(loader, 0, loader.batches_per_epoch)
    shown = [i for clips in batches for i in clips.indices]
    assert len(shown) == 40
    assert {*range(40)} - {*shown} == {7, 31}
    assert set(loader.broken) == {str(paths[7]), str(paths[31])}
    assert loader.report().splitlines()[0] == "2 of 40 videos could not be read; others stood in:"


def test_a_file_that_is_gone_is_broken_and_most_broken_is_worth_a_warning(videos, tmp_path):
    paths = [path if i % 3 == 0 else tmp_path / f"gone {i}.mp4" for i, path in enumerate(videos)]
    loader = loader_of(paths)
    with pytest.warns(
        UserWarning, match=r"test: \d of the first \d+ videos cannot be read; the latest: .* does not exist"
    ) as caught:
        batches = taken(loader, 0, 6)
    assert len(caught) == 1
    assert all(i % 3 == 0 for clips in batches for i in clips.indices)
    assert len(loader.broken) == 8
    assert loader.report(2).splitlines()[-1] == "  and 6 more"
    assert loader_of(videos).report() is None


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_videos_is_an_error(tmp_path, workers):
    paths = [tmp_path / f"{i}.mp4" for i in range(70)]
    loader = loader_of(paths, workers=workers)
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(VideoError, match="^test: 65 videos in a row cannot be read; the first: .* does not exist"),
    ):
        taken(loader, 0, 1)


def test_errors_of_an_augmentation_are_not_taken_for_broken_files(videos):
    def wrong(clip, key):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        taken(loader_of(videos, augment=wrong), 0, 1)


def killed(clip, key):
    os.kill(os.getpid(), 9)


def test_a_killed_worker_is_a_sentence(videos):
    with pytest.raises(Exception, match="a worker that decodes videos died, mostly for want of memory") as caught:
        taken(loader_of(videos, workers=1, augment=killed), 0, 1)
    assert type(caught.value).__name__ == "ModicumError"


def interrupted(clip, key):
    os.kill(os.getpid(), signal.SIGINT)
    return resize(clip, *SIZE)


def test_ctrl_c_stops_no_worker(videos):
    """A terminal sends it to all processes, and the training still needs batches to finish its step."""
    assert len(taken(loader_of(videos, workers=1, augment=interrupted), 0, 2)) == 2


def probe(clip, key):
    clip = resize(clip, *SIZE).clone()
    threads = len(os.listdir("/proc/self/task"))
    clip[0, 0, :3, 0] = torch.tensor([torch.get_num_threads(), threads, int(torch.cuda.is_initialized())])
    return clip


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_a_worker_computes_in_one_thread_beside_a_process_of_many(videos):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.ones(512, 512) @ torch.ones(512, 512)  # starts the pool that a forked process could not use
        clips = taken(loader_of(videos, workers=1, augment=probe), 0, 2)
    finally:
        torch.set_num_threads(threads)
    counts = clips[1].video[:, 0, 0, :3, 0]
    assert counts[:, 0].tolist() == [1] * 4
    assert counts[:, 2].tolist() == [0] * 4


def memory(pid):
    """Anonymous resident memory in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def who(clip, key):
    """Tells the reader's process."""
    clip = resize(clip, 144, 192)
    clip[0, 0, :4, 0] = torch.tensor(list(os.getpid().to_bytes(4, "little")), dtype=torch.uint8)
    return clip


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("workers", [0, 1])
def test_no_memory_and_no_files_are_leaked(videos, tmp_path, workers):
    """A clip takes 405 KiB, so that one in four that were kept would show."""
    loader = loader_of(
        with_broken(videos, tmp_path, [3]),
        workers=workers,
        batch=2,
        num_frames=5,
        short_side=144,
        size=(144, 192),
        augment=who,
    )
    batches = loader.iterate(0)
    pid = int.from_bytes(bytes(next(batches).video[0, 0, 0, :4, 0].tolist()), "little")
    assert (pid == os.getpid()) == (workers == 0)
    for _ in range(100):
        next(batches)  # until the allocator holds what it will
    kib, files = memory(pid), descriptors(pid)
    for _ in range(120):
        next(batches)
    assert memory(pid) - kib < 20 * 1024, "240 clips are 95 MiB"
    assert descriptors(pid) <= files + 4
    batches.close()
    if workers:
        for _ in range(100):
            if not Path(f"/proc/{pid}").exists():
                break
            time.sleep(0.05)
        assert not Path(f"/proc/{pid}").exists(), "the worker goes with its iterator"


def test_what_does_not_fit_is_refused(videos):
    with pytest.raises(UsageError, match="test has 13 videos, fewer than a batch of 14: lower `batch` or add videos"):
        loader_of(videos, batch=14)
    with pytest.raises(UsageError, match="num_frames=0: give at least 1"):
        loader_of(videos, num_frames=0)
    with pytest.raises(UsageError, match="workers=-1: give at least 0"):
        loader_of(videos, workers=-1)
    with pytest.raises(UsageError, match="fps=0: give a positive number"):
        loader_of(videos, fps=0)
    with pytest.raises(UsageError, match="short_side=35 is less than the clips' 36"):
        loader_of(videos, short_side=35)


def test_part_of_a_video_is_all_that_is_seen(videos):
    sample = VideoSample(videos[1], (0, 0), "part", start=0.16, end=0.4)
    dataset = VideoDataset("parts", [sample], {"noun": 1, "verb": 1})
    loader = ClipLoader(dataset, num_frames=4, stride=1, fps=25, size=SIZE, short_side=36, batch=1, seed=0, workers=0)
    starts = {tuple(numbers_of(clips.video[0])) for clips in taken(loader, 0, 30)}
    assert starts == {tuple(19 + 4 + start + i for i in range(4)) for start in range(3)}
    assert number_of(next(loader.iterate(0)).video[0, 0]) >= 23


def test_pinning_moves_tensors_and_nothing_else(videos, monkeypatch):
    (clips,) = taken(loader_of(videos), 0, 1)
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: (pinned.append(self), self.clone())[1])
    moved = clips.pin_memory()
    assert [tensor is own for tensor, own in zip(pinned, (clips.video, clips.targets), strict=True)] == [True, True]
    assert moved.video is not clips.video
    assert same(moved, clips)
