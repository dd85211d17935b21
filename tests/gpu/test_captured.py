"""Captured loops on a real GPU: the texts of the ordinary engines, graphs that are replayed, and no waiting in between."""

import pytest
import torch

import modicum
from modicum.speculative import captured, static_loop
from modicum.speculative.captured import CapturedEngine
from tests.helpers import perturbed, prompts, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GIVEN = prompts([5, 1, 17, 9, 2])
MIXED = {
    "temperature": [0.9, 0, 1.3, 0.6, 1],
    "top_k": [None, 3, 9, None, 4],
    "top_p": [0.9, 1.0, None, 0.7, 0.8],
    "min_p": [None, 0.1, 0.03, None, 0.01],
    "repetition_penalty": [1.3, 1.1, 1.0, 1.0, 0.8],
}


def pair():
    """In float64, where no kernel rounds enough to turn a draw."""
    target = tiny()
    return target.double().to("cuda"), perturbed(target, 5, 0.1).double().to("cuda")


@pytest.fixture
def engines(monkeypatch):
    """The captured engines that were started."""
    monkeypatch.setattr(captured, "DEVICES", {"cuda"})
    started, start = [], CapturedEngine.start
    monkeypatch.setattr(CapturedEngine, "start", lambda self, batch: (started.append(self), start(self, batch))[1])
    return started


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.8}, MIXED])
@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("k", [0, 1, 4])
def test_the_same_texts(k, verification, settings, engines, monkeypatch):
    target, draft = pair()
    drafting = {"draft": draft, "num_draft_tokens": k, "verification": verification} if k else {}
    options = {"max_new_tokens": [60, 9, 41, 1, 50], "seed": 3, **drafting, **settings}
    replayed = modicum.generate(target, GIVEN, **options)
    assert len(engines) == 1
    loops = [loop for room in engines[0].rooms.values() for loop in room.loops.values()]
    assert any(loop.graph is not None for loop in loops)
    monkeypatch.setattr(captured, "DEVICES", set())
    ordinary = modicum.generate(target, GIVEN, **options)
    assert len(engines) == 1
    assert replayed.tokens == ordinary.tokens
    assert [s.target_calls for s in replayed.row_stats] == [s.target_calls for s in ordinary.row_stats]


def strict(launch):
    """A launch during which whatever waits for the device raises, once its loop is captured."""

    def launched(self, batch):
        loops = self.room.loops.values()
        if not loops or any(loop.graph is None for loop in loops):
            return launch(self, batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(self, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return launched


@pytest.mark.parametrize("k", [0, 4])
def test_nothing_in_a_loop_waits(k, engines, monkeypatch):
    target, draft = pair()
    monkeypatch.setattr(CapturedEngine, "_launch", strict(CapturedEngine._launch))
    drafting = {"draft": draft, "num_draft_tokens": k} if k else {}
    modicum.generate(target, GIVEN, max_new_tokens=60, seed=1, **drafting, **MIXED)
    # Nor does what is captured, run as it is.
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            next(iter(engines[0].rooms[5].loops.values())).function()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_is_noticed(engines, monkeypatch):
    """Positive control."""
    target, draft = pair()
    modicum.generate(target, GIVEN, draft=draft, max_new_tokens=30, temperature=0)
    kept_tokens = static_loop.kept_tokens
    monkeypatch.setattr(static_loop, "kept_tokens", lambda *args: kept_tokens(*args) + int(args[0].sum().item() * 0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode(), pytest.raises(RuntimeError, match="synchroniz"):
            next(iter(engines[0].rooms[5].loops.values())).function()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_batch_uses_the_same_graphs(engines, monkeypatch):
    """Batches of one call, one after another: loops are captured once."""
    monkeypatch.setattr("modicum.decode.prompts.MAX_ROWS", 2)
    target, draft = pair()
    options = {"draft": draft, "max_new_tokens": 40, "temperature": 0.9, "seed": 2}
    replayed = modicum.generate(target, prompts([4] * 7), **options)
    assert len(engines) == 4
    assert len({id(engine) for engine in engines}) == 1
    monkeypatch.setattr(captured, "DEVICES", set())
    assert replayed.tokens == modicum.generate(target, prompts([4] * 7), **options).tokens


def test_time_by_part(engines):
    target, draft = pair()
    stats = modicum.generate(target, GIVEN[:1], draft=draft, max_new_tokens=80, temperature=0).row_stats[0]
    assert {"prefill", "loop", "capture", "idle", "rest"} == set(stats.seconds_by_part)
    assert sum(stats.seconds_by_part.values()) == pytest.approx(stats.seconds, rel=1e-6)
    assert stats.non_model_share is None
