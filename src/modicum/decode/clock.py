"""Where a loop's time goes, measured without waiting for the device."""

from time import perf_counter
from typing import Any

import torch

Stamp = Any  # a moment: seconds of the host's clock, or an event on the device's stream


class Clock:
    """Moments on the device that computes, and the time that models were at work.

    On a CPU an operation has run when its call returns, so the host's clock is right. On a GPU calls only launch, and
    the host would book a draft's work on whoever waits for the device first. There a moment is an event on the stream:
    it costs a launch, and is read after the transfer that every loop ends with, when it has long passed. What lies
    between two events includes the time in which the device had nothing to do, as it should: that is waiting for the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_device = device.type == "cuda"
        self.calls: list[tuple[str, Stamp, Stamp]] = []

    def stamp(self) -> Stamp:
        """This moment."""
        if not self.on_device:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Stamp, second: Stamp) -> float:
        """Seconds from one moment to another. On a GPU both must have passed."""
        return first.elapsed_time(second) / 1e3 if self.on_device else second - first

    def call(self, part: str, model: Any, *args: Any, **kwargs: Any) -> Any:
        """What `model(...)` returns; the time it takes counts as a model's, under the name of `part`."""
        began = self.stamp()
        result = model(*args, **kwargs)
        self.calls.append((part, began, self.stamp()))
        return result

    def collect(self, total: dict[str, float]) -> None:
        """Add the time of all calls since the last `collect` to `total`, by part. On a GPU they must have ended."""
        for part, began, ended in self.calls:
            total[part] = total.get(part, 0.0) + self.between(began, ended)
        self.calls.clear()
