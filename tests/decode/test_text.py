"""Stop strings and streamed text, over tokens that split characters and stop strings."""

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import modicum
from modicum.checkpoint.tokenizer import Tokenizer
from modicum.decode.stats import GenerationStats, percentiles
from modicum.decode.text import RowText
from tests.helpers import tiny


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte: every character beyond ASCII and every stop string is split."""
    vocab = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def feed(tokenizer, text, stops):
    row, pieces = RowText(tokenizer, stops), []
    for number, token in enumerate(tokenizer.encode(text), start=1):
        piece, stopped = row.feed(token)
        pieces.append(piece)
        if stopped:
            return row.released, number, pieces
    pieces.append(row.flush())
    return row.released, None, pieces


@pytest.mark.parametrize(
    ("text", "stops", "expected", "n_tokens"),
    [
        ("abcdef", ("cd",), "ab", 4),
        ("abcdef", ("de", "bcd"), "a", 4),
        ("abcabd", ("abd",), "abc", 6),
        ("aaab", ("aab",), "a", 4),
        ("日本語です", ("語",), "日本", 9),
        ("a🙂b", ("🙂b",), "a", 6),
        ("abc", ("x",), "abc", None),
        ("abca", ("ab!", "ca!"), "abca", None),
    ],
)
def test_stop_strings(tokenizer, text, stops, expected, n_tokens):
    released, at, pieces = feed(tokenizer, text, stops)
    assert (released, at) == (expected, n_tokens)
    # What was streamed is what stays: nothing had to be taken back.
    assert "".join(pieces) == expected


@pytest.mark.parametrize("draft", [None, "itself", "ngram"])
def test_a_stop_string_inside_a_draft_ends_the_text_there(tokenizer, draft):
    target = tiny(vocab_size=94)  # the readable characters come first, so it writes nothing else
    target.tokenizer = tokenizer
    drafter = target if draft == "itself" else draft
    settings = {"temperature": 0, "max_new_tokens": 30}
    plain = modicum.generate(target, "start", **settings)
    text = plain.texts[0]
    assert len(text) == 30
    # Two characters that first stand together inside the text become the stop string.
    end, stop = next((n + 2, text[n : n + 2]) for n in range(5, 20) if text.index(text[n : n + 2]) == n)
    events = []
    out = modicum.generate(target, "start", draft=drafter, stop=stop, on_token=events.append, **settings)
    assert out.finish_reasons == ["stop"]
    assert out.tokens[0] == plain.tokens[0][:end]
    assert out.texts[0] == text[: end - 2]
    assert "".join(event.text for event in events) == out.texts[0]
    assert out.stats.tokens == end


def test_stats_by_hand():
    stats = GenerationStats()
    stats.record_loop(n_tokens=3, judged=3, accepted=2, draft_calls=4, seconds=0.3)
    stats.record_loop(n_tokens=5, judged=4, accepted=4, draft_calls=4, seconds=0.5)
    stats.record_loop(n_tokens=1, judged=1, accepted=0, draft_calls=4, seconds=0.1)
    assert stats.acceptance_by_position == [2 / 3, 1.0, 0.5, 1.0]
    assert (stats.accepted, stats.rejected, stats.acceptance_rate) == (6, 2, 0.75)
    assert stats.tokens_per_target_call == 3.0
    total = GenerationStats()
    total.add(stats)
    total.add(stats)
    assert total.acceptance_by_position == stats.acceptance_by_position
    assert (total.tokens, total.target_calls, total.draft_calls) == (18, 6, 24)


def test_percentiles_by_hand():
    assert percentiles([]) == {}
    assert percentiles(range(1, 101)) == {"mean": 50.5, "p50": 51, "p90": 91, "p99": 100}
