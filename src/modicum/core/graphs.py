"""A function that does the same to the same tensors every time: on a GPU it is captured, and then only replayed."""

from collections.abc import Callable

import torch


class Replayed:
    """`function`, called with nothing and returning nothing, for a device.

    It works in place on tensors that stay where they are, its shapes never change, and it never looks at a number on the
    host. On a GPU its first call runs as it is, which loads kernels and lets libraries set themselves up; the second is
    recorded as a CUDA graph; from then on a call is one launch. Elsewhere every call runs as it is.

    Whatever the function caches must be held by someone as long as this object: a graph knows addresses, not tensors.
    """

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self.function, self.device = function, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False

    def __call__(self) -> None:
        if self.stream is None:
            self.function()
        elif self.warm:
            self._replay(self.stream)
        else:
            # On the stream of the capture: libraries keep their workspaces by stream.
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                self.function()
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            self.warm = True

    def _replay(self, stream: torch.cuda.Stream) -> None:
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.function()
            self.graph = graph
        self.graph.replay()
