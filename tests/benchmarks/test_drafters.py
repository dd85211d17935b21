"""The benchmark of drafters runs at toy size, and says of each what it loses to."""

import pytest

from benchmarks import drafters
from modicum.decode.stats import GenerationStats


def figures(seconds, accepted=(3, 1), judged=(4, 3)):
    stats = GenerationStats(tokens=10, target_calls=5, seconds=seconds)
    stats.accepted_by_position, stats.judged_by_position = list(accepted), list(judged)
    return [stats]


def test_who_loses_is_told():
    rounds = {"plain": figures(1.0, (), ()), "self:1": figures(1.25), "ngram": figures(0.5), "self:2": figures(0.25)}
    drafts = {name: None if name == "plain" else name for name in rounds}
    rows = [line.strip("| ").split(" | ") for line in drafters.table(rounds, drafts)[2:]]
    assert [row[0] for row in rows] == ["self:2", "ngram", "plain", "self:1"]
    assert rows[0] == ["self:2", "early exit", "0.57", "0.75 0.33", "2.00", "40", "4.00", "wins"]
    assert rows[1][-1] == "wins"
    assert rows[3][-2:] == ["0.80", "loses to plain, n-gram"]


def test_runs_on_the_shipped_pair(capsys):
    options = ["--prompts", "2", "--tokens", "5", "--rounds", "1", "-k", "2", "--temperature", "0"]
    drafters.main(["modicum-code-target", "--draft", "modicum-code-draft", "ngram", "self:1", *options])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert any("| small model |" in line for line in lines)


def test_short_texts_are_refused(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("import os\n")
    with pytest.raises(SystemExit, match="no text has 200 tokens"):
        drafters.main(["modicum-code-target", "--draft", "ngram", "--data", str(path)])
    with pytest.raises(SystemExit, match="choose from 1 to 8"):
        drafters.main(["modicum-code-target", "--draft", "self:9", "--prompts", "1", "--tokens", "2", "--rounds", "1"])
