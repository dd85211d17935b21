"""What calls cost: measured once, kept whole or not at all, read between the lines."""

import json

import pytest
import torch

import modicum
from modicum.core.exact import exact_view
from modicum.speculative import costs
from modicum.speculative.costs import CallTimes, MeasuredCosts, between, cache_folder, key_of, time_calls
from modicum.speculative.drafters.model import ModelDrafter
from modicum.speculative.drafters.ngram import LOOKUP_SECONDS, NgramDrafter
from tests.helpers import tiny, tiny_t5


class Stopwatch:
    """A measurement by hand: one second per row and token, and a cliff of 100 from five tokens on."""

    def __init__(self):
        self.asked = []

    def __call__(self, model, rows, tokens):
        self.asked.append((rows, tuple(tokens)))
        return {n: rows * n + 100.0 * (rows * n >= 5) for n in tokens}


def test_between_measurements_by_hand():
    points = [(2, 10.0), (4, 20.0), (8, 16.0)]
    assert [between(points, at) for at in (1, 2, 3, 4, 6, 8, 16)] == [10, 10, 15, 20, 18, 16, 32]


def test_a_cliff_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "SLOW_SECONDS", 1e9)
    times = CallTimes(tiny(), tmp_path, Stopwatch())
    times.prepare(1, reading=False)
    assert [times(1, n) for n in (1, 4, 5, 9, 10)] == [1, 4, 105, 109, 110]


def test_what_is_measured_follows_what_it_costs(tmp_path):
    stopwatch = Stopwatch()
    CallTimes(tiny(), tmp_path, stopwatch).prepare(5, reading=False)
    # Five rows are measured as six; 6 x 17 tokens fit, 6 x 64 do not; slow models are measured at few places.
    assert stopwatch.asked == [(6, (1, 2)), (6, (3, 5, 9, 17))]
    CallTimes(tiny(n_layers=1), tmp_path, stopwatch).prepare(40, reading=False)
    assert stopwatch.asked[2:] == [(48, (1, 2))]
    CallTimes(tiny(n_layers=3), tmp_path, stopwatch).prepare(1, reading=True)
    assert stopwatch.asked[3:] == [(1, (1, 2, 64))]


def test_times_are_kept_for_the_next_process(tmp_path):
    first, second = Stopwatch(), Stopwatch()
    times = CallTimes(tiny(), tmp_path, first)
    times.prepare(1, reading=False)
    again = CallTimes(tiny(3), tmp_path, second)  # other weights, the same shape
    again.prepare(1, reading=False)
    assert (len(first.asked), second.asked) == (2, [])
    assert again(1, 4) == times(1, 4)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    again.prepare(2, reading=True)  # what is missing is added
    assert second.asked == [(2, (1, 2, 64))]
    third = Stopwatch()
    CallTimes(tiny(), tmp_path, third).prepare(2, reading=True)
    assert third.asked == []


@pytest.mark.parametrize("change", ["shape", "packing", "int8", "exact", "dtype", "threads", "torch", "device"])
def test_another_machine_or_model_is_another_file(change, tmp_path, monkeypatch):
    CallTimes(tiny(), tmp_path, Stopwatch()).prepare(1, reading=True)
    model = tiny()
    if change == "shape":
        model = tiny(ffn_dim=32)
    elif change == "packing":
        model.for_inference()
    elif change == "int8":
        model.for_inference(weights="int8")
    elif change == "exact":
        model = exact_view(model.for_inference())
    elif change == "dtype":
        model = model.bfloat16()
    elif change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    else:
        monkeypatch.setattr(costs, "processor", lambda: "abacus")
    stopwatch = Stopwatch()
    CallTimes(model, tmp_path, stopwatch).prepare(1, reading=True)
    assert stopwatch.asked == [(1, (1, 2, 64))]
    assert len(list(tmp_path.iterdir())) == 2


def damaged(content):
    key = content["key"]
    return {
        "cut": json.dumps(content)[:-9],
        "empty": "",
        "a list": "[1, 2]",
        "no times": json.dumps({"key": key}),
        "of another model": json.dumps({**content, "key": {**key, "threads": 0}}),
        "negative": json.dumps({"key": key, "seconds": [[1, 1, -1.0]]}),
        "not a number": json.dumps({"key": key, "seconds": [[1, 1, float("nan")]]}),
        "text": json.dumps({"key": key, "seconds": [[1, 1, "fast"]]}),
        "short": json.dumps({"key": key, "seconds": [[1, 1]]}),
        "not utf-8": b"\xff\xfe\x00",
    }


@pytest.mark.parametrize("damage", sorted(damaged({"key": {}})))
def test_a_damaged_file_is_measured_again_and_replaced(damage, tmp_path):
    CallTimes(tiny(), tmp_path, Stopwatch()).prepare(1, reading=True)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    broken = damaged(json.loads(whole))[damage]
    path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    stopwatch = Stopwatch()
    CallTimes(tiny(), tmp_path, stopwatch).prepare(1, reading=True)
    assert stopwatch.asked == [(1, (1, 2, 64))]
    assert path.read_bytes() == whole


def test_where_nothing_can_be_kept_it_works_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    times = CallTimes(tiny(), tmp_path / "file", Stopwatch())
    times.prepare(1, reading=True)
    assert times(1, 2) == 2
    monkeypatch.setattr(costs, "cache_folder", lambda: None)
    times = CallTimes(tiny(), None, Stopwatch())
    times.prepare(1, reading=True)
    assert times(1, 2) == 2


def test_a_write_that_fails_leaves_nothing_half_done(tmp_path, monkeypatch):
    CallTimes(tiny(), tmp_path, Stopwatch()).prepare(1, reading=True)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no room")

    monkeypatch.setattr(costs.os, "replace", fail)
    CallTimes(tiny(), tmp_path, Stopwatch()).prepare(4, reading=True)
    assert path.read_bytes() == before


def test_the_users_cache_by_the_xdg_rules(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "modicum" / "costs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "modicum" / "costs"


def test_costs_of_a_pair_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "SLOW_SECONDS", 1e9)
    target, draft = tiny(), tiny(1, n_layers=1)
    measured = MeasuredCosts(target, ModelDrafter(draft), lambda model: CallTimes(model, tmp_path, Stopwatch()))
    assert measured.prepare(2) > 0
    assert measured.prepare(1) == 0
    assert measured.verify(1, 5) == 105
    assert measured.verify(2, 2) == 4
    # Two tokens first, then one at a time; reading five more beside the one there always is.
    assert measured.draft(2, 3) == 4 + 2 + 2
    assert measured.read(1, 63) == (64 + 100) - 1
    lookup = MeasuredCosts(target, NgramDrafter(), lambda model: CallTimes(model, tmp_path, Stopwatch()))
    lookup.prepare(2)
    assert (lookup.draft(2, 9), lookup.read(2, 9)) == (2 * LOOKUP_SECONDS, 0.0)

    class Other:
        """Knows nothing of costs."""

    unknown = MeasuredCosts(target, Other(), lambda model: CallTimes(model, tmp_path, Stopwatch()))
    unknown.prepare(1)
    assert (unknown.draft(1, 3), unknown.read(1, 3)) == (None, 0.0)


@pytest.mark.parametrize("model", [tiny(), tiny(max_seq_len=5, rope=None), tiny_t5()], ids=["rope", "short", "t5"])
def test_calls_are_timed(model):
    with torch.inference_mode():
        times = time_calls(model, 3, [1, 4])
    assert times.keys() == {1, 4}
    assert all(0 < seconds < 1 for seconds in times.values())


def test_the_key_is_the_same_for_the_same_model():
    assert key_of(tiny()) == key_of(tiny(3))
    assert json.loads(json.dumps(key_of(tiny()))) == key_of(tiny())


def test_generate_calibrates_once(tmp_path, monkeypatch):
    """For real: the public call measures, says so, and does not measure again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target, draft = tiny(), tiny(1, n_layers=1)
    settings = {"draft": draft, "num_draft_tokens": "auto", "max_new_tokens": 20, "temperature": 0}
    first = modicum.generate(target, [[1, 2]], **settings)
    assert len(list((tmp_path / "modicum" / "costs").iterdir())) == 2
    # Once for the call, and no row's: what it is worth per token would say nothing.
    assert first.stats.seconds > first.stats.seconds_by_part["calibrate"] > first.row_stats[0].seconds / 10
    measured = []
    monkeypatch.setattr(costs, "time_calls", lambda *_: measured.append(True))
    second = modicum.generate(target, [[1, 2]], **settings)
    assert not measured
    assert first.tokens == second.tokens == modicum.generate(target, [[1, 2]], max_new_tokens=20, temperature=0).tokens


def test_integer_weights_in_an_exact_view_have_times_of_their_own():
    model = tiny().for_inference(weights="int8")
    assert key_of(model) != key_of(exact_view(model))
