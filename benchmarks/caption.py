"""A caption's time, part by part, and what each of the three savings takes off it.

    python benchmarks/caption.py MODEL [--draft DRAFT] [-k 4] [--clips 12] [--rounds 5] [--batch 1 8] [--out FILE.md]

A request is a clip that is encoded, read into the decoder's caches (prefill) and written about (decode). The three savings:

    encoder     the captioner's own, against Model 1 (all pairs of tokens), as wide and as deep, whose patches are read
    heads       the captioner's key-value heads, against one for each query head, in cross-attention and self-attention
    decoding    speculative, against one token at a time

All eight combinations write the same words, so that nothing but time differs between them: heads are copied for multi-head
attention, which changes no output; and where Model 1 watches, which is untrained, its time is measured, and the decoder
then reads the captioner's own memory, each frame's vector repeated for all its patches, over which attention comes out the
same. Clips are synthetic scenes, or --videos. Combinations take turns, in an order that rotates; figures are medians over
rounds. Without --draft decoding is plain, and the other two savings are measured.
"""

import argparse
import math
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modicum import api
from modicum.captioning.model import Captioner
from modicum.classification.predict import protocol_for, read_views
from modicum.config import CaptionerConfig, with_kv_heads
from modicum.decode.stats import GenerationStats
from modicum.gqa.heads import places, put, take
from modicum.report.machine import machine
from modicum.speculative.drafters.make import is_named_drafter
from modicum.video.crops import crops_of
from modicum.video.synthetic import draw_scene, render

PARTS = ("encode", "prefill", "decode")
SAVINGS = ("encoder", "heads", "decoding")


@dataclass
class Combination:
    """A way to caption: which of the savings it has, and the models that do it."""

    saved: tuple[bool, ...]  # by `SAVINGS`
    target: Captioner
    draft: Any
    repeats: int  # how often it reads each vector of the captioner's own memory
    seconds: list[dict[str, float]]  # per round, by part


@torch.no_grad()
def rebuilt(model: Captioner, *, own_encoder: bool, grouped: bool, reads_like: Captioner | None = None) -> Captioner:
    """The captioner with Model 1 as its encoder, with a key-value head per query head, or both; the same words.

    `reads_like` is the target whose encoder a draft is to share.
    """
    config, state = model.config, dict(model.dense_state())
    if not own_encoder:
        config = replace(config, encoder=model_1(config), memory="patches")
        state = {name: tensor for name, tensor in state.items() if not name.startswith("encoder.")}
    if not grouped:
        wide = with_kv_heads(config, config.n_heads)
        for place in places(config):
            layer = take(state, place)
            copies = {name: repeated(getattr(layer, name), place) for name in ("k", "v", "k_bias", "v_bias")}
            state |= put(replace(layer, **copies), replace(place, n_kv_heads=place.n_heads))
        config = wide
    if reads_like is not None:
        config = replace(config, shares_encoder=reads_like.encoder_fingerprint)
        state = {name: tensor for name, tensor in state.items() if not name.startswith("encoder.")}
    torch.manual_seed(0)
    made = Captioner(config)
    missing, surplus = made.load_state_dict(state, strict=False)
    assert not surplus, surplus
    assert all(name.startswith("encoder.") or name == "decoder.head.weight" for name in missing), missing
    made.tokenizer, made.eos_ids = model.tokenizer, model.eos_ids
    return made.to(model.device, model.dtype).for_inference()


def repeated(heads: Tensor | None, place: Any) -> Tensor | None:
    """A key-value head for each query head that shares it."""
    return None if heads is None else heads.repeat_interleave(place.n_heads // place.n_kv_heads, 0)


def model_1(config: CaptionerConfig) -> Any:
    """Attention over all pairs of tokens, as wide and as deep as the captioner's encoder."""
    own = config.encoder
    return replace(own, variant="spacetime", temporal_layers=0, temporal_heads=None, temporal_ffn_dim=None)


def combinations(target: Captioner, draft: Any) -> list[Combination]:
    """Every one that there is, what saves nothing first."""
    c = target.config
    # Where the encoder is no factorized one, or heads are not shared, there is nothing to take away.
    own = (False, True) if c.encoder.variant == "factorized_encoder" else (True,)
    grouped = (False, True) if c.n_kv_heads < c.n_heads else (True,)
    found = []
    for own_encoder, shared in product(own, grouped):
        kind = {"own_encoder": own_encoder, "grouped": shared}
        model = rebuilt(target, **kind)
        alongside = rebuilt(draft, **kind, reads_like=model) if isinstance(draft, Captioner) else draft
        repeats = model.config.memory_slots // c.memory_slots
        for drafter in (None, alongside) if draft is not None else (None,):
            saved = (own_encoder, shared, drafter is not None)
            found.append(Combination(saved, model, drafter, repeats, []))
    return found


def clips_of(options: argparse.Namespace, target: Captioner) -> Tensor:
    """uint8 [clips, frames, height, width, 3], as the encoder reads them."""
    config = target.config.encoder
    if options.videos:
        protocol = protocol_for(target, views=(1, 1))
        return torch.stack([read_views(path, config, protocol)[0] for path in options.videos])
    generator, side = np.random.default_rng(options.seed), max(config.image_size)
    made = []
    for _ in range(options.clips):
        scene = render(draw_scene(generator, held_out=True), generator, config.num_frames, side)
        made.append(next(crops_of(torch.from_numpy(np.stack(list(scene))), config.image_size, side, 1)))
    return torch.stack(made)


def request(how: Combination, clips: Tensor, memories: Tensor, options: argparse.Namespace) -> tuple[dict, Any]:
    """Seconds by part of captioning a batch of clips, and what came of it. `memories` are the captioner's own."""
    sync(how.target)
    began = time.perf_counter()
    how.target.encode(clips.to(how.target.device))
    sync(how.target)
    seconds = {"encode": time.perf_counter() - began}
    speculative = {} if how.draft is None else {"draft": how.draft, "num_draft_tokens": options.k}
    read = list(memories.repeat_interleave(how.repeats, 1))
    out = api.caption(how.target, read, max_new_tokens=options.tokens, **speculative)
    by_part = out.stats.seconds_by_part
    seconds["prefill"] = by_part.get("prefill", 0.0)
    seconds["decode"] = sum(took for part, took in by_part.items() if part not in ("prefill", "encode", "calibrate"))
    return seconds, out


def sync(model: Captioner) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def measure(ways: list[Combination], clips: Tensor, batch: int, options: argparse.Namespace) -> list[Any]:
    """Time all combinations on all clips, `batch` at a time. Returns what each wrote, and how."""
    memories = ways[-1].target.encode(clips.to(ways[-1].target.device))
    written: list[Any] = [None] * len(ways)
    for turn in range(-1, options.rounds):  # the first warms up, and is not counted
        order = [(turn + place) % len(ways) for place in range(len(ways))]
        for place in order:
            total, outs = dict.fromkeys(PARTS, 0.0), []
            for start in range(0, len(clips) if turn >= 0 else batch, batch):
                seconds, out = request(ways[place], clips[start:][:batch], memories[start:][:batch], options)
                total = {part: total[part] + seconds[part] for part in PARTS}
                outs.append(out)
            if turn >= 0:
                ways[place].seconds.append({part: took / len(clips) for part, took in total.items()})
                written[place] = outs
    return written


def median(way: Combination, part: str | None = None) -> float:
    """Seconds per clip of one part, or of the whole request."""
    return statistics.median(sum(s.values()) if part is None else s[part] for s in way.seconds)


def cache_bytes(model: Captioner) -> int:
    """Keys and values of cross-attention for one clip."""
    c = model.config
    return 2 * c.n_layers * c.n_kv_heads * c.head_dim * c.memory_slots * model.embed.weight.element_size()


def table(ways: list[Combination], written: list[Any]) -> Iterator[str]:
    """Markdown lines: a row per combination, then what each saving takes off."""
    heads = (
        "encoder",
        "key-value heads",
        "decoding",
        "encode ms",
        "prefill ms",
        "decode ms",
        "request ms",
        "to the first",
    )
    yield f"| {' | '.join(heads)} | cross cache kB |"
    yield "|---|---:|---|" + "---:|" * 6
    for way in ways:
        c, decoding = way.target.config, "plain" if way.draft is None else "speculative"
        times = [f"{median(way, part) * 1e3:.2f}" for part in (*PARTS, None)]
        cells = [f"{c.encoder.variant}, {c.memory}", str(c.n_kv_heads), decoding, *times]
        cells += [f"{median(way) / median(ways[0]):.2f}", f"{cache_bytes(way.target) / 1e3:.1f}"]
        yield f"| {' | '.join(cells)} |"
    yield ""
    texts = [[tokens for out in outs for tokens in out.tokens] for outs in written]
    same = sum(all(text[place] == texts[0][place] for text in texts) for place in range(len(texts[0])))
    n_tokens = sum(map(len, texts[0]))
    yield f"All write the same {same} of {len(texts[0])} captions, {n_tokens / len(texts[0]):.1f} tokens each."
    if ways[-1].draft is not None:
        stats = GenerationStats()
        for out in written[-1]:
            stats.add(out.stats)
        rate, per_call = stats.acceptance_rate or 0.0, stats.tokens_per_target_call
        yield f"Of the drafted tokens {rate:.0%} were accepted, {per_call:.2f} tokens per call of the target."
    yield ""
    yield "| saving | alone takes off | beside the others takes off |"
    yield "|---|---:|---:|"
    by_saved = {way.saved: median(way) for way in ways}
    most, least = ways[-1].saved, ways[0].saved
    for place, name in enumerate(SAVINGS):
        if most[place] == least[place]:
            continue
        alone = tuple(most[at] if at == place else least[at] for at in range(len(SAVINGS)))
        without = tuple(least[at] if at == place else most[at] for at in range(len(SAVINGS)))
        yield f"| {name} | {off(by_saved[least], by_saved[alone])} | {off(by_saved[without], by_saved[most])} |"
    yield f"| all | {off(by_saved[least], by_saved[most])} | |"


def off(before: float, after: float) -> str:
    """The share of a time that is saved."""
    return f"{1 - after / before:.0%}" if math.isfinite(before) and before else "-"


@torch.inference_mode()
def report(options: argparse.Namespace) -> Iterator[str]:
    """The markdown of a whole run, line by line."""
    target = api.check_captioner(api.load(options.model, device=options.device))
    draft = options.draft
    if draft is not None and not is_named_drafter(draft):
        draft = api.load(draft, device=options.device)
    clips = clips_of(options, target)
    config = target.config.encoder
    yield f"# Captions, {target.device.type.upper()}, {date.today()}"
    yield ""
    yield machine(target.device.type) + "."
    yield (
        f"{config.num_frames} frames of {config.image_size[0]} x {config.image_size[1]}, tubelets of "
        f"{' x '.join(map(str, config.tubelet_size))}; {len(clips)} clips, {options.rounds} rounds."
    )
    yield ""
    yield f"`python benchmarks/caption.py {shlex.join(options.command)}`"
    for batch in options.batch:
        ways = combinations(target, draft)
        written = measure(ways, clips, batch, options)
        yield ""
        yield f"## Batch {batch}: time per clip"
        yield ""
        yield from table(ways, written)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a captioner")
    parser.add_argument("--draft", help="a captioner that shares its encoder, a text model, ngram, or self:LAYERS")
    parser.add_argument("-k", type=int, default=4, help="tokens drafted per call")
    parser.add_argument("--tokens", type=int, default=64, help="at most, per caption")
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--videos", type=Path, nargs="*", help="clips of these files instead of synthetic scenes")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="a markdown file to write as well")
    options = parser.parse_args(arguments, argparse.Namespace(command=arguments))
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
