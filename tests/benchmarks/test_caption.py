"""The benchmark of captions runs at toy size, compares like with like, and its savings are those of its times."""

import argparse

import pytest
import torch

import modicum
from benchmarks import caption
from modicum.decode.stats import GenerationStats
from tests.captioning.watching import captioner, draft_for

OPTIONS = argparse.Namespace(k=3, tokens=7, rounds=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model = captioner()
    modicum.save(model, folder / "model")
    modicum.save(draft_for(model), folder / "draft")
    return folder


@pytest.fixture
def clips():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 6, 48, 48, 3), generator=generator, dtype=torch.uint8)


def rows_of(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_runs_and_writes_the_tables(folder, tmp_path, capsys):
    out = tmp_path / "result.md"
    sizes = ["--clips", "3", "--rounds", "1", "--tokens", "6", "--batch", "2", "-k", "2", "--out", str(out)]
    caption.main([str(folder / "model"), "--draft", str(folder / "draft"), *sizes])
    text = out.read_text()
    assert capsys.readouterr().out == text
    assert "All write the same 3 of 3 captions" in text
    _, *ways, head, encoder, heads, decoding, every = rows_of(text)
    # Two layers, keys and values of 10 float32 each: of 27 patches or 3 frames, for 6 heads or 2.
    spacetime, own = ["spacetime, patches"], ["factorized_encoder, frames"]
    sizes = [(*spacetime, "6", "25.9"), (*spacetime, "2", "8.6"), (*own, "6", "2.9"), (*own, "2", "1.0")]
    assert [(way[0], way[1], way[8]) for way in ways] == [size for size in sizes for _ in range(2)]
    assert [way[2] for way in ways] == ["plain", "speculative"] * 4
    assert [row[0] for row in (head, encoder, heads, decoding, every)] == ["saving", *caption.SAVINGS, "all"]


@pytest.mark.parametrize("settings", [{}, {"memory": "patches"}])
@torch.inference_mode()
def test_all_combinations_write_the_same_words(clips, settings):
    target = captioner(**settings)
    ways = caption.combinations(target, draft_for(target))
    written = caption.measure(ways, clips, 2, OPTIONS)
    alone = modicum.caption(target, list(clips), max_new_tokens=7).tokens
    assert [[tokens for out in outs for tokens in out.tokens] for outs in written] == [alone] * 8
    assert len({way.target.config.n_kv_heads for way in ways}) == 2
    assert all(set(seconds) == set(caption.PARTS) and min(seconds.values()) > 0 for w in ways for seconds in w.seconds)


@torch.inference_mode()
def test_words_would_differ_if_heads_were_copied_in_another_order(clips, monkeypatch):
    target = captioner()
    monkeypatch.setattr(caption, "repeated", lambda x, place: None if x is None else x.repeat(3, 1, 1))
    written = caption.measure(caption.combinations(target, None), clips, 3, OPTIONS)
    texts = [[tokens for out in outs for tokens in out.tokens] for outs in written]
    assert texts[1] == texts[3] != texts[0]


def test_a_captioner_that_saves_nothing_is_compared_with_itself_alone():
    assert len(caption.combinations(captioner(variant="spacetime"), None)) == 2
    assert len(caption.combinations(captioner(variant="spacetime"), "ngram")) == 4


def test_savings_by_hand():
    times = {(False, False): 10.0, (False, True): 8.0, (True, False): 4.0, (True, True): 3.0}
    target = captioner()
    ways = [
        caption.Combination(
            (own, True, fast),
            target,
            "ngram" if fast else None,
            1,
            [{"encode": took, "prefill": 0.0, "decode": 0.0}] * 3,
        )
        for (own, fast), took in times.items()
    ]
    out = argparse.Namespace(tokens=[[1, 2]], stats=GenerationStats(tokens=2, target_calls=1))
    lines = list(caption.table(ways, [[out]] * 4))
    assert rows_of("\n".join(lines))[-4:] == [
        ["saving", "alone takes off", "beside the others takes off"],
        ["encoder", "60%", "62%"],
        ["decoding", "20%", "25%"],
        ["all", "70%", ""],
    ]
