"""The benchmark for GPUs runs on the CPU at toy size, says that it does, and its acceptance is the one asked for."""

import pytest
import torch

from benchmarks import text_gpu


def test_toy(capsys):
    options = ["--rows", "1", "2", "--prompt", "9", "--tokens", "14", "--rounds", "2", "-k", "3"]
    text_gpu.main(["--toy", "--models", "1B", "8B", *options])
    out = capsys.readouterr().out
    assert "Nothing below is a measurement" in out
    lines = out.splitlines()
    assert sum(line.startswith("transformers assisted K=3") for line in lines) == 2
    assert sum(line.startswith("transformers static, compiled") for line in lines) == 4
    # Captured or not, the same loops.
    calls = [line.split(": ")[1].split(" ms")[0].rsplit(", ", 1)[0] for line in lines if "tokens per call" in line]
    assert len(calls) == 16
    for plain, drafted, plain_again, drafted_again in zip(*[iter(calls)] * 4, strict=True):
        assert plain == plain_again == "1.00 tokens per call"
        assert drafted == drafted_again != plain
    assert sum("host gap" in line for line in lines) == 8


def test_the_reference_pair(capsys):
    text_gpu.main(["--toy", "--models", "reference", "--rows", "1", "--tokens", "6", "--rounds", "1", "-k", "2"])
    assert "modicum K=2" in capsys.readouterr().out


def test_scripts_err_as_often_as_asked():
    text, with_errors = text_gpu.scripts(5000, 53, 0.8)
    equal = sum(a == b for a, b in zip(text, with_errors, strict=True)) / 5000
    assert equal == pytest.approx(0.8, abs=0.03)
    assert text_gpu.scripts(50, 53, 1.0)[0] == text_gpu.scripts(50, 53, 1.0)[1]


def test_what_a_call_reads():
    """By hand, for the toy target: its embeddings are its head, so they count."""
    device = torch.device("cpu")
    model = text_gpu.scripted(text_gpu.TOY["1B"][0], [1, 2, 3], device, torch.float32)
    layer = 24 * 24 + 2 * 8 * 24 + 24 * 24 + 3 * 36 * 24 + 2 * 24
    assert text_gpu.weight_bytes(model) == 4 * (53 * 24 + 2 * layer + 24)
    keys_values = 4 * 2 * 2 * 2 * 4
    assert model.cache_bytes_per_token == keys_values
    seconds = text_gpu.limit([model], 0, loops=7, n_rows=3, n_tokens=11, speed=1e6)
    assert seconds == pytest.approx(7 * (text_gpu.weight_bytes(model) + 33 * keys_values) / 1e6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="no GPU here"):
        text_gpu.main([])
