"""Loops that are replayed: the texts of the ordinary engines, nothing for the host to wait for, and nothing that moves."""

import pytest
import torch

import modicum
from modicum.decode import batch as batch_module
from modicum.decode import clock as clock_module
from modicum.decode import loop as loop_module
from modicum.decode import sampling
from modicum.decode.batch import Batch, Request
from modicum.decode.clock import Clock
from modicum.decode.sampling import SamplingParams
from modicum.errors import GenerationError
from modicum.speculative import captured, static_loop
from modicum.speculative.captured import CapturedEngine, bucket_of, can_capture
from modicum.speculative.drafters.model import ModelDrafter
from modicum.speculative.drafters.ngram import NgramDrafter
from tests.helpers import perturbed, prompts, tiny, tiny_t5
from tests.parity.families import CASES, make
from tests.speculative.replay import NotCapturable, OnDevice, Recording

MIXED = {
    "temperature": [0.9, 0, 1.3, 0.6, 1],
    "top_k": [None, 3, 9, None, 4],
    "top_p": [0.9, 1.0, None, 0.7, 0.8],
    "min_p": [None, 0.1, 0.03, None, 0.01],
    "repetition_penalty": [1.3, 1.1, 1.0, 1.0, 0.8],
}
SETTINGS = {
    "greedy": {"temperature": 0},
    "greedy, penalised": {"temperature": 0, "repetition_penalty": 1.4},
    "sampled": {"temperature": 0.9},
    "nucleus": {"top_p": 0.8},
    "mixed": MIXED,
}
GIVEN = prompts([5, 1, 17, 9, 2])


def first(settings, count):
    return {name: value[:count] if isinstance(value, list) else value for name, value in settings.items()}


@pytest.fixture
def both(monkeypatch):
    """Outputs of the ordinary engine and of replayed loops."""

    def run(*args, **kwargs):
        outputs, engines = [], []
        start = CapturedEngine.start
        monkeypatch.setattr(CapturedEngine, "start", lambda self, batch: (engines.append(self), start(self, batch))[1])
        for devices in ((), ("cpu",)):
            monkeypatch.setattr(captured, "DEVICES", devices)
            outputs.append(modicum.generate(*args, **kwargs))
            assert bool(engines) == bool(devices)
        monkeypatch.setattr(CapturedEngine, "start", start)
        return outputs

    return run


@pytest.fixture
def recorded(monkeypatch):
    """Loops as a GPU would have them: recorded as soon as may be, and nothing at hand for the host to look at."""
    monkeypatch.setattr(static_loop, "Replayed", Recording)
    monkeypatch.setattr(captured, "PAYS", 0)
    monkeypatch.setattr(sampling, "at_hand", lambda _: False)
    monkeypatch.setattr(Recording, "n_repeated", 0)


def assert_same(ordinary, replayed):
    assert replayed.tokens == ordinary.tokens
    assert replayed.texts == ordinary.texts
    assert replayed.finish_reasons == ordinary.finish_reasons
    for ours, theirs in zip(replayed.row_stats, ordinary.row_stats, strict=True):
        assert ours.target_calls == theirs.target_calls
        assert ours.accepted_by_position == theirs.accepted_by_position
        assert ours.judged_by_position == theirs.judged_by_position


@pytest.mark.parametrize("case", CASES)
def test_every_family(case, tmp_path, both):
    """Up to the context, which ends the longest row, windows included."""
    make(case, tmp_path)
    target = modicum.load(tmp_path, device="cpu")
    draft = perturbed(modicum.load(tmp_path, device="cpu"), 5, 0.05)
    given = prompts([5, 1, 48, 9, 2], vocab_size=61)
    for k, settings in ((4, MIXED), (0, MIXED)):
        drafting = {"draft": draft, "num_draft_tokens": k} if k else {}
        assert_same(*both(target, given, max_new_tokens=[17, 9, 40, 1, 3], seed=k, **drafting, **settings))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("verification", ["token", "block"])
def test_every_setting(settings, verification, both):
    target = tiny()
    draft = perturbed(target, 5, 0.1)
    for k in range(1, 6) if verification == "token" else (2, 5):
        own = first(SETTINGS[settings], k)
        drafting = {"draft": draft, "num_draft_tokens": k, "verification": verification}
        ordinary, replayed = both(target, GIVEN[:k], max_new_tokens=19, seed=k, **drafting, **own)
        assert_same(ordinary, replayed)
        assert 0 < replayed.stats.acceptance_rate < 1
        if verification == "token" and k == 3:
            assert_same(*both(target, GIVEN[:k], max_new_tokens=11, seed=k, **own))


def test_an_end_of_text_and_stop_strings(both):
    """Rows leave one by one, in the middle of drafts, and the rest is moved together twice or more."""
    names = "modicum-code-target", "modicum-code-draft"
    target, draft = (modicum.load(name, device="cpu", dtype="float32") for name in names)
    given = ["def add(", "import ", "class Stack:\n    ", "x = ", "for i in"]
    options = {"max_new_tokens": [40, 7, 60, 21, 33], "seed": 3, "stop": ["self", ")", "\n\n"], "top_p": 0.95}
    ordinary, replayed = both(
        target, given * 2, **{**options, "max_new_tokens": options["max_new_tokens"] * 2}, draft=draft
    )
    assert_same(ordinary, replayed)
    assert {"stop", "length"} <= set(replayed.finish_reasons)
    target = tiny()
    target.eos_ids = frozenset({7, 11})
    ordinary, replayed = both(target, GIVEN, draft=perturbed(target, 5, 0.1), max_new_tokens=50, seed=2)
    assert_same(ordinary, replayed)
    assert "eos" in replayed.finish_reasons
    assert_same(*both(target, GIVEN, max_new_tokens=50, seed=2))


@pytest.mark.parametrize("changes", [{"max_seq_len": 24}, {"vocab_size": 23}, {"vocab_size": 37}])
def test_a_draft_of_another_size(changes, both):
    """One with a shorter context proposes up to it, ids that it lacks are never proposed."""
    draft = tiny(1, **changes)
    for settings in (SETTINGS["greedy"], MIXED):
        assert_same(*both(tiny(), GIVEN, draft=draft, num_draft_tokens=3, max_new_tokens=21, seed=1, **settings))


def test_a_draft_that_is_the_target(both):
    """Full acceptance: the draft has not read the last but one token of any loop."""
    ordinary, replayed = both(tiny(), GIVEN, draft=tiny(), num_draft_tokens=4, max_new_tokens=40, seed=1)
    assert_same(ordinary, replayed)
    assert replayed.stats.tokens_per_target_call == 5


@pytest.mark.parametrize("settings", ["greedy, penalised", "mixed"])
@pytest.mark.parametrize("k", [0, 3])
def test_loops_can_be_replayed(k, settings, monkeypatch, recorded, both):
    """Operations recorded in a bucket's second loop, and from then on only repeated, write the same text.

    Buckets are small: it is captured again and again, while rows end.
    """
    monkeypatch.setattr(captured, "BUCKET", 16)
    target = tiny()
    drafting = {"draft": perturbed(target, 5, 0.1), "num_draft_tokens": k} if k else {}
    lengths = [40, 9, 31, 1, 55]
    ordinary, replayed = both(target, GIVEN, max_new_tokens=lengths, seed=5, **drafting, **SETTINGS[settings])
    assert_same(ordinary, replayed)
    assert Recording.n_repeated > 8


def test_what_a_replay_cannot_know(monkeypatch, recorded, both):
    """Positive control: a length that is read from the host's side stays what it was when the loop was recorded."""
    place = static_loop.KVCache.place
    lengths = iter(range(4, 1000))
    monkeypatch.setattr(static_loop.KVCache, "place", lambda self, _: place(self, torch.full((1,), next(lengths))))
    ordinary, replayed = both(tiny(), [GIVEN[0]], max_new_tokens=20, temperature=0)
    assert ordinary.tokens[0][:3] == replayed.tokens[0][:3]
    assert ordinary.tokens != replayed.tokens


def engine_on(device, k, settings=MIXED, verification="token"):
    """An engine that has read its prompts, and its batch."""
    models = [tiny().to(device), tiny(1).to(device)]
    for model in models:
        model._fingerprint = "of no numbers"
        model.for_inference()
        model.rope.frequencies, model.rope.signs = model.rope.frequencies.to(device), model.rope.signs.to(device)
    requests = [
        Request(
            index=row,
            prompt=prompt,
            key=row,
            params=SamplingParams(**{name: value[row] for name, value in settings.items()}),
            max_total=len(prompt) + 40,
            eos_ids=frozenset(),
        )
        for row, prompt in enumerate(GIVEN)
    ]
    batch = Batch(requests, vocab_size=29, device=torch.device(device))
    engine = CapturedEngine(models[0], ModelDrafter(models[1]) if k else None, k, verification)
    engine.start(batch)
    return engine, batch, engine.room.loop(64, verification, None)


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("k", [0, 1, 4])
@torch.inference_mode()
def test_a_loop_never_looks_at_a_number(k, verification):
    """On the meta device there are no numbers: whoever asks for one, or mixes in a tensor of the host, fails.

    It is also a device that is no CPU, so what a GPU would do is done.
    """
    greedy = {**MIXED, "temperature": [0] * 5}
    for settings in (MIXED, greedy):
        _, _, loop = engine_on("meta", k, settings, verification)
        for _ in range(2):
            with OnDevice() as recorded:
                loop.function()
        assert len(recorded.calls) > 100


LOOKS = {
    "item": lambda x: x + int(x.sum().item()),
    "truth": lambda x: x if bool((x > 3).any()) else x + 1,
    "list": lambda x: x + x.tolist()[0][0],
    "host": lambda x: x + x.cpu(),
    "mask": lambda x: x + x[x > 3].sum(),
    "data": lambda x: x + torch.tensor([1], device=x.device),
    "scalar of the host": lambda x: x + torch.tensor(1),
}


@pytest.mark.parametrize("look", LOOKS)
@torch.inference_mode()
def test_whoever_looks_is_caught(look, monkeypatch):
    """Positive control of the test above."""
    kept_tokens = static_loop.kept_tokens
    monkeypatch.setattr(static_loop, "kept_tokens", lambda *args: LOOKS[look](kept_tokens(*args)))
    _, _, loop = engine_on("meta", 2)
    with pytest.raises((NotCapturable, RuntimeError)), OnDevice():
        loop.function()


@pytest.mark.parametrize("k", [0, 3])
@torch.inference_mode()
def test_nothing_moves(k):
    engine, _, loop = engine_on("cpu", k)
    caches = next(cell.cell_contents for cell in loop.function.__closure__ if isinstance(cell.cell_contents, list))

    def places():
        held = [engine.room.__dict__, *(cache.__dict__ for cache in caches)]
        named = {(at, name): value for at, values in enumerate(held) for name, value in values.items()}
        return {key: value.data_ptr() for key, value in named.items() if isinstance(value, torch.Tensor)}

    assert len(caches) == 1 + (k > 0)
    before, lengths = places(), engine.room.lengths_B.clone()
    assert {name for at, name in before if at == 0} == {*static_loop.OF_ROWS, "seen_BV", "addresses_NP", "table_BX"}
    for _ in range(12):
        loop()
    assert places() == before
    assert (engine.room.lengths_B >= lengths + 12).all()


@torch.inference_mode()
def test_an_idle_row_stays_as_it_is():
    engine, batch, loop = engine_on("cpu", 3)
    engine.keep([0, 2, 3, 4], [batch.lengths[row] for row in (0, 2, 3, 4)])
    before = engine.room.lengths_B.clone()
    for _ in range(5):
        loop()
    grown = engine.room.lengths_B - before
    assert grown[1] == 0
    assert (grown[[0, 2, 3, 4]] >= 5).all()
    assert engine.slots == [0, 2, 3, 4]
    # Half of them are left: what stays moves together.
    engine.keep([1, 3], [0, 0])
    assert engine.slots == [0, 1]
    assert engine.room.lengths_B.tolist() == (before + grown)[[2, 4]].tolist()


def test_rooms_serve_the_next_batch(monkeypatch, recorded, both):
    """Seven prompts, two at a time: what was recorded for two rows, and for the one that is left of them, is used again."""
    monkeypatch.setattr("modicum.decode.prompts.MAX_ROWS", 2)
    made, init = [], static_loop.Room.__init__
    monkeypatch.setattr(static_loop.Room, "__init__", lambda self, *args: made.append(self) or init(self, *args))
    target = tiny()
    lengths = [12, 3, 19, 7, 11, 2, 9]
    settings = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 6}
    drafting = {"draft": perturbed(target, 5, 0.1), "num_draft_tokens": 2}
    given = prompts([4, 9, 1, 13, 6, 3, 8])
    assert_same(*both(target, given, max_new_tokens=lengths, **settings, **drafting))
    assert [len(room.lengths_B) for room in made] == [2, 1]
    calls = [loop.n_calls for room in made for loop in room.loops.values()]
    assert len(calls) == 2
    # As many as four batches need: one launched too many, at most, at the end of each.
    assert min(calls) > 5


def test_a_short_text_is_not_recorded(monkeypatch, recorded, both):
    monkeypatch.setattr(captured, "PAYS", 4)
    ordinary, replayed = both(tiny(), [GIVEN[0]], draft=tiny(), num_draft_tokens=3, max_new_tokens=15, temperature=0)
    assert_same(ordinary, replayed)
    assert Recording.n_repeated == 0
    both(tiny(), [GIVEN[0]], draft=tiny(), num_draft_tokens=3, max_new_tokens=20, temperature=0)
    assert Recording.n_repeated == 4


def test_time_by_part(monkeypatch):
    monkeypatch.setattr(captured, "DEVICES", ("cpu",))
    out = modicum.generate(tiny(), GIVEN, draft=tiny(1), max_new_tokens=[3, 9, 17, 5, 12], temperature=0)
    for stats in out.row_stats:
        assert {"prefill", "loop", "rest"} <= set(stats.seconds_by_part) <= {"prefill", "loop", "idle", "rest"}
        assert sum(stats.seconds_by_part.values()) == pytest.approx(stats.seconds, rel=1e-9)
        assert stats.draft_calls == 4 * stats.target_calls
        assert (stats.model_seconds, stats.non_model_share) == ({}, None)


def test_the_device_is_ahead_of_the_host(monkeypatch):
    """While the host takes a loop's tokens the next one is on its way, but none that would have nothing to do."""
    monkeypatch.setattr(captured, "DEVICES", ("cpu",))
    launch, step, seen = CapturedEngine._launch, CapturedEngine.step, []
    counts = {"launched": 0}

    def counted(self, batch):
        counts["launched"] += 1
        launch(self, batch)

    def watched(self, batch):
        loop = step(self, batch)
        seen.append(len(self.flights))
        return loop

    monkeypatch.setattr(CapturedEngine, "_launch", counted)
    monkeypatch.setattr(CapturedEngine, "step", watched)
    modicum.generate(tiny(), GIVEN, max_new_tokens=12, temperature=0)
    assert seen == [1] * 11 + [0]
    assert counts["launched"] == 12


LOOP, HOST = 0.010, 0.002  # seconds of the device for a loop, and of the host for its tokens


@pytest.mark.parametrize(("ahead", "waits"), [(2, 0.0), (1, HOST)])
def test_the_device_need_not_wait(ahead, waits, monkeypatch):
    """On a simulated GPU, whose loops a host launches in no time. With one on its way at a time, it waits for every one."""
    host = device = 0.0

    class Event:
        def __init__(self, enable_timing):
            self.at = 0.0

        def record(self):
            self.at = max(host, device)

        def synchronize(self):
            nonlocal host
            host = max(host, self.at)

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    class Launched(static_loop.Replayed):
        def __call__(self):
            nonlocal device
            super().__call__()
            device = max(host, device) + LOOP

    def take(*args):
        nonlocal host
        host += HOST
        return plain_take(*args)

    plain_take = Batch.take
    for module in (batch_module, clock_module, loop_module):
        monkeypatch.setattr(module, "perf_counter", lambda: host)
    monkeypatch.setattr(batch_module, "Clock", lambda _: Clock(torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(static_loop, "Replayed", Launched)
    monkeypatch.setattr(Batch, "take", take)
    monkeypatch.setattr(captured, "DEVICES", ("cpu",))
    monkeypatch.setattr(captured, "AHEAD", ahead)
    stats = modicum.generate(tiny(), [[1, 2, 3]], temperature=0, max_new_tokens=11).row_stats[0]
    assert stats.seconds_by_part["loop"] == pytest.approx(11 * LOOP)
    assert stats.seconds_by_part["idle"] == pytest.approx(10 * waits, abs=1e-9)
    assert stats.seconds == pytest.approx(11 * LOOP + 10 * waits + HOST)


def test_numbers_that_are_none_are_refused(monkeypatch):
    monkeypatch.setattr(captured, "DEVICES", ("cpu",))
    target = tiny()
    with torch.no_grad():
        target.norm.weight[3] = torch.nan
    for settings in ({"temperature": 0}, {"temperature": 1}):
        with pytest.raises(GenerationError, match="not numbers"):
            modicum.generate(target, GIVEN, draft=tiny(1), max_new_tokens=5, **settings)


def test_what_is_captured(monkeypatch):
    target, draft = tiny(), ModelDrafter(tiny(1))
    assert not can_capture(target, draft, 4)  # a CPU has nothing to gain
    monkeypatch.setattr(captured, "DEVICES", ("cpu",))
    assert can_capture(target, draft, 4)
    assert can_capture(target, None, 4)
    assert not can_capture(target, draft, "auto")
    assert not can_capture(target, NgramDrafter(), 4)
    assert not can_capture(tiny_t5(), None, 4)
    assert not can_capture(target, ModelDrafter(tiny(1).to("meta")), 4)

    def refuse(*_):
        raise AssertionError("captured")

    monkeypatch.setattr(CapturedEngine, "start", refuse)
    for option in (
        {"logprobs": 1},
        {"k_invariant": True},
        {"bit_exact": True},
        {"logits_processors": lambda ids, scores: scores},
        {"num_draft_tokens": "auto"},
        {"draft": "ngram"},
    ):
        modicum.generate(target, GIVEN[:1], **{"draft": draft.model, "max_new_tokens": 3, **option})
    with pytest.raises(AssertionError, match="captured"):
        modicum.generate(target, GIVEN[:1], draft=draft.model, max_new_tokens=3)


def test_buckets():
    assert [bucket_of(n) for n in (1, 256, 257, 1024, 1025, 2047, 2049, 5000)] == [
        256, 256, 512, 1024, 1280, 2048, 2560, 5120,
    ]  # fmt: skip
    sizes = [bucket_of(n) for n in range(1, 9000)]
    assert sizes == sorted(sizes)
    assert all(size >= n for n, size in enumerate(sizes, 1))
