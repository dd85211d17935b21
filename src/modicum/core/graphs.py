"""A function that does the same to the same tensors every time: on a GPU it is captured, and then only replayed."""

from collections.abc import Callable
from typing import Any

import torch


class Replayed:
    """`function`, called with nothing and returning nothing, for a device.

    It works in place on tensors that stay where they are, its shapes never change, and it never looks at a number on the
    host. Calls run it as it is, until on a GPU `prepare` has recorded it as a CUDA graph; then a call is one launch.

    Whatever the function caches must be held by someone as long as this object: a graph knows addresses, not tensors.
    Functions that never run at the same time, and leave nothing in memory of their own, may share a `pool` of it.
    """

    def __init__(self, function: Callable[[], None], device: torch.device, pool: Any = None) -> None:
        self.function, self.device, self.pool = function, device, pool
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False

    def prepare(self) -> bool:
        """Capture the function, if it has been called: that loads kernels and lets libraries set themselves up.

        Returns whether it was captured now, which takes as long as some calls.
        """
        if self.stream is None or not self.warm or self.graph is not None:
            return False
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            self.function()
        self.graph = graph
        return True

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        elif self.stream is None:
            self.function()
        else:
            # On the stream of the capture: libraries keep their workspaces by stream.
            current = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                self.function()
            current.wait_stream(self.stream)
        self.warm = True


def shared_pool(device: torch.device) -> Any:
    """Memory for several `Replayed`."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None
