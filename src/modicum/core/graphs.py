"""A function that does the same to the same tensors every time: on a GPU it is captured, and then only replayed."""

from collections.abc import Callable

import torch


class Side:
    """Where functions are captured: a stream beside the current one, and memory that all their graphs share.

    They may share it because they never run at the same time and leave nothing in it. Libraries keep workspaces by stream,
    which is why there is one for all.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        # The memory is given up with the last graph in it, and cannot be had again.
        self.latest: torch.cuda.CUDAGraph | None = None

    @classmethod
    def of(cls, device: torch.device) -> "Side | None":
        """None where there is nothing to capture for."""
        return cls(device) if device.type == "cuda" else None

    def run(self, function: Callable[[], None]) -> None:
        """Run `function` on the stream, in order with what comes before and after on the current one."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            function()
        current.wait_stream(self.stream)

    def capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """What `function` launches, as a graph; nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            function()
        self.latest = graph
        return graph


class Replayed:
    """`function`, called with nothing and returning nothing.

    It works in place on tensors that stay where they are, its shapes never change, and it never looks at a number on the
    host. Calls run it as it is, until `prepare` has recorded it as a CUDA graph; then a call is one launch.

    Whatever the function caches must be held by someone as long as this object: a graph knows addresses, not tensors.
    """

    def __init__(self, function: Callable[[], None], side: Side | None) -> None:
        self.function, self.side = function, side
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False

    def prepare(self) -> bool:
        """Capture the function, if it has been called: that loads kernels and lets libraries set themselves up.

        Returns whether it was captured now, which takes as long as some calls.
        """
        if self.side is None or not self.warm or self.graph is not None:
            return False
        self.graph = self.side.capture(self.function)
        return True

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        elif self.side is not None:
            self.side.run(self.function)
        else:
            self.function()
        self.warm = True
