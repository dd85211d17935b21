"""The benchmark of grouped decoding runs at toy size, counts bytes right, and notices an expanded copy."""

import argparse

import pytest
import torch

from benchmarks import gqa_decode
from modicum.core.attend import folded

B, H, G, K, M = 3, 6, 2, 16, 4096
OPTIONS = argparse.Namespace(heads=H, head_dim=K, context=M, tokens=1, dtype="float32", device="cpu")


@pytest.fixture
def pool():
    with torch.inference_mode():
        yield gqa_decode.new_pool(OPTIONS, B, "cpu")


def test_runs_and_writes_the_same_tables(tmp_path, capsys):
    out = tmp_path / "result.md"
    gqa_decode.main(["--toy", "--dtype", "float32", "--batch", "1", "3", "--tokens", "2", "--out", str(out)])
    text = out.read_text()
    assert capsys.readouterr().out == text
    assert "`python benchmarks/gqa_decode.py --toy --dtype float32 --batch 1 3 --tokens 2" in text
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| ") and "heads" not in line]
    # Keys and values of 6, 3 and 1 heads of 16 float32 behind 4096 tokens; then in 2 layers, then 3 rows.
    sizes = [["3.1", "1.6", "0.5"], ["6.3", "3.1", "1.0"], ["9.4", "4.7", "1.6"], ["18.9", "9.4", "3.1"]]
    assert [(int(heads), cache.strip()) for heads, cache in rows] == [
        (heads, size) for table in sizes for heads, size in zip((6, 3, 1), table, strict=True)
    ]
    assert list(tmp_path.iterdir()) == [out]


def test_a_missing_folder_is_refused_before_anything_is_measured(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        gqa_decode.main(["--toy", "--out", str(tmp_path / "absent" / "result.md")])
    assert "there is no folder" in capsys.readouterr().err


def test_bytes_of_a_step(pool):
    alone, model = (make(OPTIONS, B, G, pool) for make in (gqa_decode.attention_step, gqa_decode.model_step))
    assert alone.cached_bytes == 2 * B * G * M * K * 4
    assert alone.weight_bytes == 256 * (2 * H + 2 * G) * K * 4
    assert model.cached_bytes == 2 * alone.cached_bytes
    norms, ffn, head = 5 * 256, 2 * 3 * 256 * 512, 256 * 1000
    assert model.weight_bytes == 2 * alone.weight_bytes + 4 * (norms + ffn + head)
    assert model.expanded_bytes == B * H * M * K * 4
    assert model.n_bytes <= pool.nbytes


@pytest.mark.parametrize("make", [gqa_decode.attention_step, gqa_decode.model_step])
def test_an_expanded_copy_ends_the_run(make, pool, monkeypatch):
    steps = [make(OPTIONS, B, n_kv_heads, pool) for n_kv_heads in (H, G, 1)]
    for step in steps:
        assert gqa_decode.check_memory(step, "cpu") < step.expanded_bytes / 2

    def expanded(q_BHLK, k_BGMK, v_BGMK, *rest):
        R = H // k_BGMK.shape[1]
        return folded(q_BHLK, k_BGMK.repeat_interleave(R, 1), v_BGMK.repeat_interleave(R, 1), *rest)

    monkeypatch.setattr(gqa_decode, "sdpa", expanded)  # what `stock` puts in the place of every layer's attention
    for step in steps[1:]:
        step.run = step.stock
        with pytest.raises(SystemExit, match=f"{step.n_kv_heads} key-value heads: a step allocates"):
            gqa_decode.check_memory(step, "cpu")


def test_peak_memory_counts_what_is_held_at_once():
    def run():
        first = torch.empty(1024)
        second = torch.empty(2048)
        del first
        return second, torch.empty(512)

    assert gqa_decode.peak_memory(run, "cpu") == 4 * (1024 + 2048)


def test_groups():
    assert gqa_decode.groups(32) == [32, 16, 8, 4, 2, 1]
    assert gqa_decode.groups(12) == [12, 6, 3, 1]
