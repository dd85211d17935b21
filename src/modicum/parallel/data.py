"""Data parallelism: equal weights in every process, gradients averaged over all of them, one update.

    torchrun --nproc-per-node 8 -m modicum train recipes/vivit-k400.toml

Not `DistributedDataParallel`: it lays its buckets out anew after the first backward pass, so that with more than two
processes a resumed run adds in another order than one that was never stopped, and their weights part. Here the layout is
a function of the model. A step exchanges its gradients once, after its last part, however many parts it has.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modicum.assembly import pick_device
from modicum.errors import UsageError

# Numbers in one exchange: large enough to use a network's width, small enough to begin early.
BUCKET = 8_000_000


@dataclass(frozen=True)
class Processes:
    """The processes that train together, as this one sees them; without torchrun it is alone."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this one reports and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes of a tensor on any device; on that device, in its type."""
        if self.world == 1:
            return values
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    def mean(self, value: float) -> float:
        return self.sum(torch.tensor(value, dtype=torch.float64)).item() / self.world

    def any(self, flag: bool) -> bool:
        """Whether it is so in any of them: all go on, or all stop."""
        return bool(self.sum(torch.tensor(int(flag))).item())

    def gathered(self, value: Any) -> list[Any]:
        """A value of every process, in the order of their ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all have come here."""
        self.gathered(None)

    def check_equal(self, **facts: str | int) -> None:
        """Refuse to go on, in every process alike, unless each has the same facts.

        Raises:
            UsageError: some differ.
        """
        every = self.gathered(facts)
        for name in facts:
            values = [given[name] for given in every]
            other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
            if other is not None:
                raise UsageError(
                    f"process {other} has {name} {values[other]} and process 0 {values[0]}: give all processes the same "
                    "recipe, files and run folder"
                )

    def average_gradients(self, model: nn.Module) -> None:
        """Put the mean over processes into every gradient, in place."""
        if self.world == 1:
            return
        pending = []
        for bucket in buckets([p.grad for p in model.parameters() if p.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            pending.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, exchange in pending:
            exchange.wait()
            parts = (flat / self.world).split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))


def buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The same tensors in groups of `BUCKET` numbers and little more, each of one type."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and (sum(g.numel() for g in bucket) >= BUCKET or bucket[0].dtype != gradient.dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def shares(items: Sequence[Any], processes: Processes) -> Sequence[Any]:
    """Those of this process: every `world`-th, so that all have as many, give or take one."""
    return items[processes.rank :: processes.world]


@contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """The processes that torchrun started, joined for as long as the context lasts; a process alone where it did not.

    They meet over NCCL on GPUs, one for each, and over Gloo on CPUs.

    Raises:
        UsageError: a device that is not there, or more processes on a machine than it has GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = pick_device(device)
    if world == 1 and not dist.is_initialized():
        yield Processes(device=chosen)
        return
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    if chosen.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"process {local} of this machine has no GPU of its own, as there are {torch.cuda.device_count()}: start "
                "as many with --nproc-per-node"
            )
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    ours = not dist.is_initialized()
    if ours:
        gpu = chosen if chosen.type == "cuda" else None
        dist.init_process_group("gloo" if gpu is None else "nccl", device_id=gpu)
    try:
        yield Processes(rank, world, chosen)
    finally:
        if ours:
            dist.destroy_process_group()
