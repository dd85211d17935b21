"""The paper's table and figure: written at toy size, from figures that are counted right."""

import pytest

from benchmarks import speculative_paper
from benchmarks.speculative_paper import Runs, parses, quantile
from modicum.decode.stats import GenerationStats


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\ny = [2,\n", True),  # an open bracket
        ("def f(a):\n", True),  # no body yet
        ('"""To be\ncontinued\n', True),
        ("x = 1\nreturn a +", True),  # the last line is not whole
        ("x = 1\nreturn a +\n", False),
        ("x = = 1\ny = 2\nz = 3\n", False),
    ],
)
def test_what_counts_as_parsed(text, expected):
    assert parses(text) is expected


def test_quantiles_are_nearest_ranks():
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [quantile(values, share) for share in (0.0, 0.5, 0.9, 0.99)] == [1.0, 3.0, 5.0, 5.0]


def test_times_are_per_token_and_per_loop():
    runs = Runs(seconds=[0.2, 0.6])
    for tokens, calls in ((10, 4), (20, 6)):
        runs.stats.append(GenerationStats(tokens=tokens, target_calls=calls))
    assert runs.ms_per_token == pytest.approx([20.0, 30.0])
    assert runs.tokens_per_loop == pytest.approx(3.0)
    assert runs.ms_per_loop == pytest.approx(80.0)


def test_writes_tables_and_figure(tmp_path):
    out = tmp_path / "paper.md"
    speculative_paper.main(["--prompts", "2", "--tokens", "5", "--max-k", "2", "-k", "2", "--out", str(out)])
    text = out.read_text()
    assert "2 held-out prompts, 5 tokens each" in text
    assert f"--out {out}" in text
    for name in speculative_paper.SETTINGS:
        assert f"| {name} | plain |" in text
        assert f"| {name} | speculative, K = 2 |" in text
    # Greedy text is the same with a draft: so is its log-probability, to the last digit that is shown.
    greedy = [line.split("|")[10] for line in text.splitlines() if line.startswith("| greedy |")]
    assert len(set(greedy)) == 1
    assert out.with_suffix(".png").stat().st_size > 10_000
