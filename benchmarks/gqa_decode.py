"""A step of decoding behind a long text, against the number of key-value heads: attention alone, and a whole model.

    python benchmarks/gqa_decode.py [--device cpu|cuda] [--dtype bfloat16] [--context 16384] [--batch 1 8] [--rounds 7]
    python benchmarks/gqa_decode.py --tokens 5         five tokens at once, as when a draft of four is verified
    python benchmarks/gqa_decode.py --out FILE.md      the tables with hardware, date and command in FILE.md as well

The bound of a step is the time that one read of its bytes takes: cached keys and values, and weights. It is measured by
summing a buffer of that many bytes on the same threads. Steps and reads take turns, each after a sweep over other memory,
so that none finds its bytes in a processor's cache; figures are medians. "PyTorch" is the same step with grouped heads
left to `scaled_dot_product_attention(enable_gqa=True)`. Weights are random. No step may hold an expanded copy of the
keys or values: the peak of what it allocates is measured, and the run ends with an error if it would have room for one.
"""

import argparse
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from modicum.config import DecoderConfig, RopeConfig
from modicum.core.attend import sdpa, visibility
from modicum.core.attention import Attention, AttentionConfig
from modicum.core.cache import KVCache
from modicum.lm.decoder import Decoder
from modicum.report.machine import machine

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines on stderr

# More than a processor keeps for itself.
SWEEP_BYTES = 1 << 28
# So narrow beside its heads that a model's weights are a small share of what a step reads.
LAYERS, DIM, FFN_DIM, VOCAB = 2, 256, 512, 1000


@dataclass
class Step:
    """One measured call: what it reads, and its time in every round beside that of a plain read of as many bytes."""

    n_kv_heads: int
    cached_bytes: int
    weight_bytes: int
    expanded_bytes: int  # what one copy of a layer's keys for every query head would take
    run: Callable[[], object]
    stock: Callable[[], object]

    @property
    def n_bytes(self) -> int:
        return self.cached_bytes + self.weight_bytes


def groups(n_heads: int) -> list[int]:
    """n_heads, half of it, and so on down to 1, or to what is no longer even and then 1."""
    counts = [n_heads]
    while counts[-1] % 2 == 0:
        counts.append(counts[-1] // 2)
    return counts if counts[-1] == 1 else [*counts, 1]


def filled_cache(pool: Tensor, shape: tuple[int, int, int, int, int], context: int) -> KVCache:
    """A cache whose rows hold `context` tokens, its memory the first part of `pool`, which all steps share."""
    layers, batch, n_kv_heads, capacity, head_dim = shape
    cache = KVCache(layers, batch, n_kv_heads, 1, head_dim, dtype=pool.dtype, device=pool.device)
    n = math.prod(shape)
    cache.capacity, cache.k_NBGMK, cache.v_NBGMK = capacity, pool[:n].view(shape), pool[n : 2 * n].view(shape)
    cache.commit(context, known=[context] * batch)
    return cache


def with_stock_attention(module: torch.nn.Module, run: Callable[[], object]) -> object:
    """`run` while every attention layer of `module` leaves its grouped heads to PyTorch."""
    layers = [layer for layer in module.modules() if isinstance(layer, Attention)]
    usual = [layer.attend for layer in layers]
    for layer in layers:
        layer.attend = sdpa
    try:
        return run()
    finally:
        for layer, attend in zip(layers, usual, strict=True):
            layer.attend = attend


def attention_step(options: argparse.Namespace, batch: int, n_kv_heads: int, pool: Tensor) -> Step:
    """New tokens through one attention layer of a narrow model."""
    capacity = options.context + options.tokens
    shape = (1, batch, n_kv_heads, capacity, options.head_dim)
    cache = filled_cache(pool, shape, options.context)
    settings = AttentionConfig(dim=DIM, n_heads=options.heads, n_kv_heads=n_kv_heads, head_dim=options.head_dim)
    layer = Attention(settings).to(pool.device, pool.dtype).eval()
    x_BLD = torch.randn(batch, options.tokens, DIM, device=pool.device, dtype=pool.dtype)
    positions_BL = cache.positions(options.tokens)
    mask = None if options.tokens == 1 else visibility(positions_BL, capacity, None, pool.dtype)
    run = partial(layer, x_BLD, mask=mask, cache=cache, positions_BL=positions_BL)
    return step_of(options, layer, cache, run)


def model_step(options: argparse.Namespace, batch: int, n_kv_heads: int, pool: Tensor) -> Step:
    """New tokens through a whole language model, packed for inference, logits included."""
    capacity = options.context + options.tokens
    config = DecoderConfig(
        family="llama",
        vocab_size=VOCAB,
        dim=DIM,
        n_layers=LAYERS,
        n_heads=options.heads,
        n_kv_heads=n_kv_heads,
        head_dim=options.head_dim,
        ffn_dim=FFN_DIM,
        max_seq_len=capacity,
        rope=RopeConfig(rotary_dim=options.head_dim),
    )
    model = Decoder(config).to(pool.device, pool.dtype)
    shape = (LAYERS, batch, n_kv_heads, capacity, options.head_dim)
    cache = filled_cache(pool, shape, options.context)
    ids_BL = torch.randint(0, VOCAB, (batch, options.tokens), device=pool.device)
    step = step_of(options, model, cache, partial(model, ids_BL, cache))
    model.for_inference()
    return step


def step_of(options: argparse.Namespace, module: torch.nn.Module, cache: KVCache, run: Callable[[], object]) -> Step:
    """What `run`, tokens through `module`, reads: the cache without their own slots, and all weights but the embedding."""
    batch, n_kv_heads = cache.k_NBGMK.shape[1:3]
    layer_bytes = batch * options.context * options.head_dim * cache.k_NBGMK.element_size()
    weights = [p.numel() * p.element_size() for name, p in module.named_parameters() if name != "embed.weight"]
    return Step(
        n_kv_heads=n_kv_heads,
        cached_bytes=2 * len(cache.k_NBGMK) * n_kv_heads * layer_bytes,
        weight_bytes=sum(weights),
        expanded_bytes=options.heads * layer_bytes,
        run=run,
        stock=partial(with_stock_attention, module, run),
    )


def peak_memory(run: Callable[[], object], device: str) -> int:
    """Bytes that `run` holds at most beyond what was there before."""
    run()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    # The sum over the allocator's own events, in their order, those within a kernel included.
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def check_memory(step: Step, device: str) -> int:
    """The peak of what a step allocates, in bytes; ends the run if half an expanded copy of a layer's keys would fit."""
    peak = peak_memory(step.run, device)
    if peak >= step.expanded_bytes / 2:
        raise SystemExit(
            f"{step.n_kv_heads} key-value heads: a step allocates {peak:,} bytes, and an expanded copy of a layer's keys is "
            f"{step.expanded_bytes:,}: keys or values are copied; read each where it lies in the cache"
        )
    return peak


def seconds(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        # Events, so that it is the device's time; a captured graph has no Python in it.
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def captured(run: Callable[[], object], device: str) -> Callable[[], object]:
    """On a GPU, `run` as one CUDA graph: at a microsecond per megabyte, launching it from Python would hide its time."""
    if device != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measure(steps: list[Step], pool: Tensor, rounds: int, device: str) -> list[dict[str, float]]:
    """Median seconds of every step, of the same step with PyTorch's grouping, and of a read of as many bytes."""
    data = pool.view(torch.float32)
    sweep = torch.ones(SWEEP_BYTES // 4, device=device)
    works: list[tuple[int, str, Callable[[], object]]] = []
    for i, step in enumerate(steps):
        works.append((i, "ours", captured(step.run, device)))
        works.append((i, "stock", captured(step.stock, device)))
        works.append((i, "bound", captured(data[: step.n_bytes // 4].sum, device)))
    times: dict[tuple[int, str], list[float]] = {(i, name): [] for i, name, _ in works}
    for turn in track(range(rounds + 1), "rounds", console=Console(stderr=True)):
        for i, name, run in works:
            sweep.sum()
            took = seconds(run, device)
            if turn:  # the first round warms up
                times[i, name].append(took)
    return [{name: statistics.median(times[i, name]) for name in ("ours", "stock", "bound")} for i in range(len(steps))]


def table(steps: list[Step], medians: list[dict[str, float]], peaks: list[int]) -> Iterator[str]:
    """Markdown lines."""
    yield "| key-value heads | cache MB | weights MB | ms | to MHA | bound ms | of the bound | PyTorch ms | peak MB |"
    yield "|" + "---:|" * 9
    for step, took, peak in zip(steps, medians, peaks, strict=True):
        cells = [
            str(step.n_kv_heads),
            f"{step.cached_bytes / 1e6:.1f}",
            f"{step.weight_bytes / 1e6:.1f}",
            f"{took['ours'] * 1e3:.2f}",
            f"{took['ours'] / medians[0]['ours']:.2f}",
            f"{took['bound'] * 1e3:.2f}",
            f"{took['bound'] / took['ours']:.0%}",
            f"{took['stock'] * 1e3:.2f}",
            f"{peak / 1e6:.1f}",
        ]
        yield f"| {' | '.join(cells)} |"


def new_pool(options: argparse.Namespace, batch: int, device: str) -> Tensor:
    """Room for the largest cache and all weights, filled with normal numbers of which a million repeat."""
    cached = 2 * LAYERS * batch * options.heads * (options.context + options.tokens) * options.head_dim
    weights = LAYERS * (4 * DIM * options.heads * options.head_dim + 3 * DIM * FFN_DIM) + DIM * (VOCAB + 16)
    block = torch.randn(1 << 20, device=device).to(getattr(torch, options.dtype))
    return block.repeat(-(-(cached + weights) // len(block)))


@torch.inference_mode()
def report(options: argparse.Namespace) -> Iterator[str]:
    """The markdown of a whole run, line by line."""
    yield f"# Grouped queries in decoding, {options.device.upper()}, {date.today()}"
    yield ""
    yield machine(options.device) + "."
    yield f"{options.heads} query heads of {options.head_dim}, {options.dtype}."
    yield f"New tokens per row: {options.tokens}, behind {options.context:,}."
    yield ""
    yield f"`python benchmarks/gqa_decode.py {shlex.join(options.command)}`"
    for batch in options.batch:
        torch.manual_seed(0)
        pool = new_pool(options, batch, options.device)
        for title, make in (("Attention alone", attention_step), (f"A model of {LAYERS} layers", model_step)):
            steps = [make(options, batch, n_kv_heads, pool) for n_kv_heads in groups(options.heads)]
            peaks = [check_memory(step, options.device) for step in steps]
            yield ""
            yield f"## {title}, batch {batch}"
            yield ""
            yield from table(steps, measure(steps, pool, options.rounds, options.device), peaks)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--context", type=int, default=16384, help="tokens that the cache holds")
    parser.add_argument("--tokens", type=int, default=1, help="new tokens per row and step")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--toy", action="store_true", help="6 heads of 16 and 4096 tokens, to see that it runs")
    parser.add_argument("--out", type=Path, help="a markdown file to write as well")
    options = parser.parse_args(arguments, argparse.Namespace(command=arguments))
    if options.toy:
        options.heads, options.head_dim, options.context, options.rounds = 6, 16, 4096, 1
    if options.out and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.parent}; make it first")
    lines = []
    for line in report(options):
        print(line, flush=True)
        lines.append(line)
    if options.out:
        partly = options.out.with_name(f"{options.out.name}.partial")
        partly.write_text("\n".join(lines) + "\n")
        partly.replace(options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
