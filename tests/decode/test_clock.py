"""Where the time of a loop goes: on a simulated GPU, where calls only launch, and on the CPU as it is."""

import time
from types import SimpleNamespace

import pytest
import torch

import modicum
from modicum.decode import batch as batch_module
from modicum.decode import clock as clock_module
from modicum.decode import loop as plain_loop
from modicum.decode.clock import Clock
from modicum.decode.stats import GenerationStats
from modicum.lm.decoder import Decoder
from modicum.speculative import loop as speculative_loop
from modicum.speculative.drafters.ngram import NgramDrafter
from tests.helpers import perturbed, tiny

LAUNCH = 1e-4  # seconds of the host per call
TARGET, DRAFT, TRANSFER = 0.010, 0.002, 0.001


class Device:
    """A host that launches and a device that works off what was launched, on clocks of their own."""

    def __init__(self):
        self.host = self.busy_until = 0.0

    def launch(self, seconds):
        self.host += LAUNCH
        self.busy_until = max(self.busy_until, self.host) + seconds

    def wait(self):
        self.host = max(self.host, self.busy_until) + TRANSFER

    def event(self, enable_timing=False):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", max(self.busy_until, self.host))
        event.elapsed_time = lambda other: (other.at - event.at) * 1e3
        return event


@pytest.fixture
def device(monkeypatch):
    """Models, transfers and clocks of a generation, as if on that device."""
    device, forward = Device(), Decoder.forward

    def launching(self, *args, **kwargs):
        device.launch(TARGET if self.config.max_seq_len == 97 else DRAFT)
        return forward(self, *args, **kwargs)

    def fetching(*args):
        device.wait()
        return plain_fetch(*args)

    plain_fetch = plain_loop.fetch
    monkeypatch.setattr(Decoder, "forward", launching)
    monkeypatch.setattr(plain_loop, "fetch", fetching)
    monkeypatch.setattr(speculative_loop, "fetch", fetching)
    for module in (plain_loop, batch_module, clock_module):
        monkeypatch.setattr(module, "perf_counter", lambda: device.host)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(batch_module, "Clock", lambda _: Clock(torch.device("cuda")))
    return device


def test_a_gpus_work_is_booked_where_it_was_asked_for(device):
    target = tiny()
    draft = tiny(max_seq_len=83)
    out = modicum.generate(target, [[1, 2, 3]], draft=draft, num_draft_tokens=3, temperature=0, max_new_tokens=20)
    stats = out.row_stats[0]
    assert (stats.target_calls, stats.draft_calls) == (5, 15)
    parts = stats.seconds_by_part
    assert list(parts) == ["prefill", "draft", "verify", "rest"]
    # The device never waits for the host here but at the beginning of a loop, for one launch.
    assert parts["draft"] == pytest.approx(15 * DRAFT + 4 * LAUNCH)
    assert parts["verify"] == pytest.approx(5 * TARGET)
    assert parts["prefill"] == pytest.approx(TARGET + DRAFT + LAUNCH)
    assert parts["rest"] == pytest.approx(5 * TRANSFER)
    assert sum(parts.values()) == pytest.approx(stats.seconds) == pytest.approx(device.host)
    assert stats.model_seconds == pytest.approx({"draft": parts["draft"], "target": 5 * TARGET})
    assert stats.non_model_share == pytest.approx(5 * TRANSFER / (stats.seconds - parts["prefill"]))
    # Without events, the host would have seen the draft launch, and all the rest as verification.
    naive = 15 * LAUNCH
    assert naive < 0.06 * parts["draft"]


def test_plain_decoding_on_a_gpu(device):
    out = modicum.generate(tiny(), [[1, 2, 3], [4]], temperature=0, max_new_tokens=[4, 9])
    first, second = out.row_stats
    assert first.seconds_by_part == pytest.approx(
        {"prefill": TARGET + LAUNCH, "verify": 4 * TARGET + 3 * LAUNCH, "rest": 4 * TRANSFER}
    )
    assert second.seconds_by_part["verify"] == pytest.approx(9 * TARGET + 8 * LAUNCH)
    assert out.stats.model_seconds == pytest.approx(second.model_seconds)
    # The first token had no part in reading the prompt.
    assert second.seconds_per_token == pytest.approx([TARGET + TRANSFER] + [TARGET + TRANSFER + LAUNCH] * 8)


@pytest.mark.parametrize("drafter", [None, "model", "ngram"])
def test_parts_add_up_to_the_whole(drafter):
    target = tiny()
    draft = perturbed(target, 5, 0.1) if drafter == "model" else drafter
    out = modicum.generate(target, [[1, 2], [3] * 9], draft=draft, max_new_tokens=[7, 30], temperature=0.8, seed=1)
    for stats in out.row_stats:
        assert sum(stats.seconds_by_part.values()) == pytest.approx(stats.seconds, rel=1e-9)
        assert 0 < stats.non_model_share < 1
        assert set(stats.model_seconds) == ({"target", "draft"} if drafter == "model" else {"target"})
    assert out.row_stats[0].seconds < out.row_stats[1].seconds < out.stats.seconds
    written = out.stats.to_dict()
    assert (written["model_seconds"], written["non_model_share"]) == (
        out.stats.model_seconds,
        out.stats.non_model_share,
    )
    assert set(written["seconds_per_token"]) == {"mean", "p50", "p90", "p99"}


def test_time_outside_the_models_counts_as_such(monkeypatch):
    propose = NgramDrafter.propose
    monkeypatch.setattr(NgramDrafter, "propose", lambda *given: (time.sleep(0.02), propose(*given))[1])
    stats = modicum.generate(tiny(), [[1, 2]], draft="ngram", max_new_tokens=9, temperature=0).row_stats[0]
    assert stats.seconds_by_part["draft"] >= 0.02 * stats.target_calls
    assert "draft" not in stats.model_seconds
    loops = stats.seconds - stats.seconds_by_part["prefill"]
    assert stats.non_model_share == pytest.approx(1 - stats.model_seconds["target"] / loops)
    assert stats.non_model_share >= stats.seconds_by_part["draft"] / loops


def test_nothing_measured_is_no_share():
    assert GenerationStats().non_model_share is None
